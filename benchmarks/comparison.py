"""The comparison of methods: a small declared search on validation data, then three seeds on test data.

    python -m benchmarks.comparison --out outputs/comparison --tasks sst2_500 arc_e_500 --jobs 2 paths.data_dir=/data
    python -m utils.report outputs/comparison/final --out benchmarks/results/comparison

For every task and every method that trains, each learning rate in ``RATES`` is trained once with ``TUNING_SEED``,
further ones follow while the best is at the end of those tried (``EXTENSIONS``), and the one with the lowest
validation NLL of the method's own prediction is kept; test data is not read there. It is then trained with the seeds
0, 1, 2 and evaluated on test. Methods that only add to a trained LoRA adapter (``POST_HOC``) start from those of
``mle``. Finished runs are skipped, so the command can be repeated after a kill.

Many runs share one GPU: they are bound by launches, not by arithmetic (start NVIDIA's multi-process service first).
"""

import argparse
import json
import logging
import multiprocessing
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import train_script
from bnn.metrics import nll
from pipeline.evaluation import fit, logits_of
from pipeline.run import CONFIGS, prepare
from pipeline.training import train
from utils.run import write_json_atomic
from utils.settings import compose, one_line

TUNING_SEED = 100
SEEDS = (0, 1, 2)
TASKS = {
    "sst2_100": ("dset=sst2", "dset.train_subset=100", "train.epochs=15"),
    "sst2_500": ("dset=sst2", "dset.train_subset=500", "train.epochs=5"),
    "sst2_2000": ("dset=sst2", "dset.train_subset=2000", "train.epochs=3"),
    "cola_500": ("dset=cola", "dset.train_subset=500", "train.epochs=5"),
    "arc_e_500": ("dset=arc_e", "dset.train_subset=500", "train.epochs=5"),
    "obqa_500": ("dset=obqa", "dset.train_subset=500", "train.epochs=5"),
    "wg_s": ("dset=wg_s", "train.epochs=5"),
    "wg_m_500": ("dset=wg_m", "dset.train_subset=500", "train.epochs=5"),
}
RATES: dict[str, tuple[float, float, float]] = {
    "mle": (5e-4, 1e-3, 2e-3),
    "map": (5e-4, 1e-3, 2e-3),
    "mc_dropout": (5e-4, 1e-3, 2e-3),
    "lora_plus": (1e-4, 2.5e-4, 5e-4),
    "adalora": (5e-4, 1e-3, 2e-3),
    "blob": (5e-4, 1e-3, 2e-3),
    "scalabl": (1e-3, 3e-3, 1e-2),
    "sgp": (5e-4, 1e-3, 2e-3),
}
"""Learning rates that are tried first; those beyond follow by the factor between the first two."""
EXTENSIONS = 2
"""While the best rate is the lowest or the highest tried, one more beyond it is tried, so many times at most."""
AS_MLE = ("ensemble",)
"""Methods trained at the learning rate chosen for ``mle``, whose members they are."""
POST_HOC = ("temperature", "laplace", "laplace_last", "tfb")
COMMON = ("eval.every=none", "eval.n_mc=10", "eval.batch_size=64")
TUNED = "tuned.json"


class Job(NamedTuple):
    """One run."""

    folder: Path
    overrides: tuple[str, ...]
    test: bool
    """Whether to go on to the evaluation on test data."""


def tuning_job(task: str, method: str, rate: float, out: Path) -> Job:
    """One setting of the search."""
    return Job(out / "tune" / task / method / f"{rate:g}", settings_of(task, method, rate, TUNING_SEED), False)


def rates_beyond(method: str, found: dict[float, float]) -> list[float]:
    """What to train next, given the validation NLL of those of ``RATES`` and beyond that finished, if anything."""
    first = RATES[method]
    if not found:
        return []
    factor, best = first[1] / first[0], min(found, key=found.__getitem__)
    beyond = {min(found): best / factor, max(found): best * factor}.get(best)
    return [float(f"{beyond:.3g}")] if beyond is not None and len(found) < len(first) + EXTENSIONS else []


def tune(pool: Any, tasks: Sequence[str], out: Path, common: Sequence[str]) -> dict[str, dict[str, float]]:
    """The chosen learning rate of every method on every task; methods none of whose runs finished are left out."""
    found: dict[tuple[str, str], dict[float, float]] = {(task, method): {} for task in tasks for method in RATES}
    for extension in range(1 + EXTENSIONS):
        jobs = {}
        for (task, method), known in found.items():
            for rate in rates_beyond(method, known) if extension else RATES[method]:
                jobs[task, method, rate] = tuning_job(task, method, rate, out)
        run_all(pool, jobs.values(), common)
        for (task, method, rate), job in jobs.items():
            if is_finished(job):
                found[task, method][rate] = json.loads((job.folder / TUNED).read_text())["nll"]
    chosen: dict[str, dict[str, float]] = {task: {} for task in tasks}
    for (task, method), known in found.items():
        if known:
            chosen[task][method] = min(known, key=known.__getitem__)
    for best in chosen.values():
        best |= {method: best["mle"] for method in AS_MLE if "mle" in best}
    return chosen


def final_jobs(task: str, out: Path, chosen: dict[str, float]) -> list[Job]:
    """Every method that trains, at its chosen setting, with all seeds."""
    return [
        Job(final_folder(out, task, method, seed), settings_of(task, method, rate, seed), True)
        for method, rate in chosen.items()
        for seed in SEEDS
    ]


def post_hoc_jobs(task: str, out: Path, chosen: dict[str, float]) -> list[Job]:
    """Methods that start from the adapters of ``mle``."""
    jobs: list[Job] = []
    for method in POST_HOC if "mle" in chosen else ():
        for seed in SEEDS:
            start = (f"train.init_adapter={final_folder(out, task, 'mle', seed) / 'adapter'}", "train.epochs=0")
            overrides = (*settings_of(task, method, chosen["mle"], seed), *start)
            jobs.append(Job(final_folder(out, task, method, seed), overrides, True))
    return jobs


def settings_of(task: str, method: str, rate: float, seed: int) -> tuple[str, ...]:
    """What tells a run from others."""
    return (*TASKS[task], f"method={method}", f"opt.lr={rate:g}", f"seed={seed}")


def final_folder(out: Path, task: str, method: str, seed: int) -> Path:
    """Where the run of a method with a seed is kept."""
    return out / "final" / task / method / f"seed{seed}"


def is_finished(job: Job) -> bool:
    """Whether the run's last record is there."""
    return (job.folder / ("reliability.json" if job.test else TUNED)).exists()


def execute(job: Job, common: Sequence[str]) -> str | None:
    """Run one job in this process; returns what went wrong, if anything."""
    arguments = [*COMMON, *job.overrides, *common, f"paths.output_dir={job.folder}", "overwrite=true"]
    try:
        cfg = compose(CONFIGS, arguments)
        if job.test:
            train_script.execute(cfg)
        else:
            run = prepare(cfg)
            step = train(run)
            fit(run)
            mode = run.method.modes(cfg.eval.n_mc)[0]
            logits, answer = logits_of(run, run.data.validation, mode, "tuning")
            write_json_atomic(job.folder / TUNED, {"step": step, "nll": nll(logits, answer)})
    except train_script.USER_ERRORS as error:
        return f"{job.folder}: {one_line(error, CONFIGS)}"
    return None


def _work(arguments: tuple[Job, Sequence[str]]) -> tuple[Job, str | None]:
    logging.disable(logging.INFO)
    sys.stdout = open("/dev/null", "w")  # noqa: SIM115  # a worker's lines are in its run folder
    try:
        return arguments[0], execute(*arguments)
    except Exception as error:  # one failing run must not end the others; it is reported
        return arguments[0], f"{arguments[0].folder}: {type(error).__name__}: {error}"


def run_all(pool: Any, jobs: Iterable[Job], common: Sequence[str]) -> None:
    """Run what is not finished, many at once; failures are reported and left for the next call."""
    waiting = [(job, common) for job in jobs if not is_finished(job)]
    for i, (job, error) in enumerate(pool.imap_unordered(_work, waiting), 1):
        print(f"[{i}/{len(waiting)}] {job.folder} {error or 'done'}", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/comparison"))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["sst2_500", "arc_e_500"])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE for every run")
    arguments = parser.parse_args(argv)
    out, common, tasks = arguments.out.resolve(), arguments.overrides, arguments.tasks
    with multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool:
        chosen = tune(pool, tasks, out, common)
        out.mkdir(parents=True, exist_ok=True)
        (out / "chosen.json").write_text(json.dumps(chosen, indent=1))
        run_all(pool, [job for task in tasks for job in final_jobs(task, out, chosen[task])], common)
        run_all(pool, [job for task in tasks for job in post_hoc_jobs(task, out, chosen[task])], common)


if __name__ == "__main__":
    main()
