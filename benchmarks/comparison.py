"""The comparison of methods: a small declared search on validation data, then three seeds on test data.

    python -m benchmarks.comparison --out outputs/comparison --tasks sst2_500 arc_e_500 --jobs 2 paths.data_dir=/data
    python -m utils.report $(cat outputs/comparison/by_nll.txt) --out benchmarks/results/comparison/by_nll

For every task and every method that trains, each learning rate in ``RATES`` is trained once with ``TUNING_SEED``, and
further ones follow while the best is at the end of those tried (``EXTENSIONS``); each is judged by the method's own
prediction on validation data, test data is not read. Two selections are made (``RULES``): the rate with the lowest
NLL, each method at its best; and that with the highest accuracy, as rates are chosen where nobody looks at
probabilities. The chosen are then trained with the seeds 0, 1, 2 and evaluated on test. Methods that only add to a
trained LoRA adapter (``POST_HOC``) start from those of ``mle``. Finished runs are skipped, so the command can be
repeated after a kill; ``by_<rule>.txt`` lists the runs of a selection for the report.

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
from bnn.metrics import evaluate_predictions
from pipeline.evaluation import fit, logits_of
from pipeline.run import CONFIGS, prepare
from pipeline.training import train
from utils.run import write_json_atomic
from utils.settings import compose, one_line

TUNING_SEED = 100
SEEDS = (0, 1, 2)
TASKS = {
    "sst2_100": ("dset=sst2", "dset.train_subset=100", "train.epochs=15"),
    "sst2_500": ("dset=sst2", "dset.train_subset=500", "train.epochs=5", "eval.ood=[cola]"),
    "sst2_2000": ("dset=sst2", "dset.train_subset=2000", "train.epochs=3"),
    "cola_500": ("dset=cola", "dset.train_subset=500", "train.epochs=5"),
    "cola": ("dset=cola", "train.epochs=1"),
    "arc_e_500": ("dset=arc_e", "dset.train_subset=500", "train.epochs=5"),
    "obqa_500": (
        "dset=obqa",
        "dset.train_subset=500",
        "train.epochs=5",
        "eval.ood=[arc_e,arc_c,mmlu:college_chemistry]",
    ),
    "wg_s": ("dset=wg_s", "train.epochs=5"),
    "wg_m_500": ("dset=wg_m", "dset.train_subset=500", "train.epochs=5"),
}
RATES: dict[str, tuple[float, float, float]] = {
    "mle": (2e-4, 6e-4, 1.8e-3),
    "map": (2e-4, 6e-4, 1.8e-3),
    "mc_dropout": (2e-4, 6e-4, 1.8e-3),
    "lora_plus": (5e-5, 1.5e-4, 4.5e-4),
    "adalora": (6e-4, 1.8e-3, 5.4e-3),
    "blob": (6e-4, 1.8e-3, 5.4e-3),
    "scalabl": (6e-4, 1.8e-3, 5.4e-3),
    "sgp": (2e-4, 6e-4, 1.8e-3),
}
"""Learning rates that are tried first; those beyond follow by the factor between the first two."""
EXTENSIONS = 2
"""While the best rate is the lowest or the highest tried, one more beyond it is tried, so many times at most."""
RULES = {
    "nll": lambda tuned: (tuned["nll"], -tuned["acc"]),
    "acc": lambda tuned: (-tuned["acc"], tuned["nll"]),
}
"""Selections among the learning rates: what is minimised, on validation data."""
AS_MLE = ("ensemble",)
"""Methods trained at the learning rate chosen for ``mle``, whose members they are."""
POST_HOC = ("temperature", "laplace", "laplace_last", "tfb")
COMMON = ("train.batch_size=16", "eval.every=none", "eval.n_mc=10", "eval.batch_size=64")
TUNED = "tuned.json"


Tuned = dict[float, dict[str, float]]
"""Metrics on validation data by learning rate."""


class Job(NamedTuple):
    """One run."""

    folder: Path
    overrides: tuple[str, ...]
    test: bool
    """Whether to go on to the evaluation on test data."""


def tuning_job(task: str, method: str, rate: float, out: Path) -> Job:
    """One setting of the search."""
    return Job(out / "tune" / task / method / f"{rate:g}", settings_of(task, method, rate, TUNING_SEED), False)


def rates_beyond(method: str, found: Tuned) -> set[float]:
    """What to train next: a rate beyond the best by any rule, where that is at the end of those that finished."""
    factor = RATES[method][1] / RATES[method][0]
    beyond = set()
    for rule in RULES:
        if found:
            best = pick(found, rule)
            beyond |= {best / factor} if best == min(found) else set()
            beyond |= {best * factor} if best == max(found) else set()
    return {float(f"{rate:.3g}") for rate in beyond}


def pick(found: Tuned, rule: str) -> float:
    """The best learning rate by a rule."""
    return min(found, key=lambda rate: RULES[rule](found[rate]))


def tune(pool: Any, tasks: Sequence[str], out: Path, common: Sequence[str]) -> dict[tuple[str, str], Tuned]:
    """Metrics on validation data of every learning rate that finished, for every (task, method)."""
    found: dict[tuple[str, str], Tuned] = {(task, method): {} for task in tasks for method in RATES}
    for extension in range(1 + EXTENSIONS):
        jobs = {}
        for (task, method), known in found.items():
            for rate in rates_beyond(method, known) if extension else RATES[method]:
                jobs[task, method, rate] = tuning_job(task, method, rate, out)
        run_all(pool, jobs.values(), common)
        for (task, method, rate), job in jobs.items():
            if is_finished(job):
                found[task, method][rate] = json.loads((job.folder / TUNED).read_text())
    return found


def choose(found: dict[tuple[str, str], Tuned], rule: str) -> dict[str, dict[str, float]]:
    """The learning rate of every method on every task; methods none of whose runs finished are left out."""
    chosen: dict[str, dict[str, float]] = {task: {} for task, _ in found}
    for (task, method), known in found.items():
        if known:
            chosen[task][method] = pick(known, rule)
    for best in chosen.values():
        best |= {method: best["mle"] for method in AS_MLE if "mle" in best}
    return chosen


def final_jobs(task: str, out: Path, chosen: dict[str, float]) -> list[Job]:
    """Every method that trains, at its chosen rate, with all seeds."""
    return [
        Job(final_folder(out, task, method, rate, seed), settings_of(task, method, rate, seed), True)
        for method, rate in chosen.items()
        for seed in SEEDS
    ]


def post_hoc_jobs(task: str, out: Path, chosen: dict[str, float]) -> list[Job]:
    """Methods that start from the adapters of ``mle``."""
    jobs: list[Job] = []
    for method in POST_HOC if "mle" in chosen else ():
        rate = chosen["mle"]
        for seed in SEEDS:
            adapter = final_folder(out, task, "mle", rate, seed) / "adapter"
            overrides = (*settings_of(task, method, rate, seed), f"train.init_adapter={adapter}", "train.epochs=0")
            jobs.append(Job(final_folder(out, task, method, rate, seed), overrides, True))
    return jobs


def final_folder(out: Path, task: str, method: str, rate: float, seed: int) -> Path:
    """Where the run of a method with a learning rate and a seed is kept."""
    return out / "final" / task / method / f"lr{rate:g}" / f"seed{seed}"


def settings_of(task: str, method: str, rate: float, seed: int) -> tuple[str, ...]:
    """What tells a run from others."""
    return (*TASKS[task], f"method={method}", f"opt.lr={rate:g}", f"seed={seed}")


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
            write_json_atomic(job.folder / TUNED, {"step": step, **evaluate_predictions(logits, answer)})
    except train_script.USER_ERRORS as error:
        return f"{job.folder}: {one_line(error, CONFIGS)}"
    return None


def quiet() -> None:
    """A worker's lines are in its run folder."""
    logging.disable(logging.INFO)
    sys.stdout = open("/dev/null", "w")  # noqa: SIM115  # for as long as the worker lives


def work(arguments: tuple[Job, Sequence[str]]) -> tuple[Job, str | None]:
    """``execute``, with any error as text: one failing run must not end the others."""
    try:
        return arguments[0], execute(*arguments)
    except Exception as error:
        return arguments[0], f"{arguments[0].folder}: {type(error).__name__}: {error}"


def run_all(pool: Any, jobs: Iterable[Job], common: Sequence[str]) -> None:
    """Run what is not finished, many at once; failures are reported and left for the next call."""
    waiting = [(job, common) for job in jobs if not is_finished(job)]
    for i, (job, error) in enumerate(pool.imap_unordered(work, waiting), 1):
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
    with multiprocessing.get_context("spawn").Pool(arguments.jobs, quiet) as pool:
        compare(pool, tasks, out, common)


def compare(pool: Any, tasks: Sequence[str], out: Path, common: Sequence[str]) -> None:
    """Search, final runs and their lists, in the processes of ``pool``."""
    found = tune(pool, tasks, out, common)
    for make in (final_jobs, post_hoc_jobs):
        for rule in RULES:
            chosen = choose(found, rule)
            run_all(pool, [job for task in tasks for job in make(task, out, chosen[task])], common)
    for rule in RULES:
        chosen = choose(found, rule)
        write_json_atomic(out / f"chosen_by_{rule}.json", chosen)
        every = [job for task in tasks for make in (final_jobs, post_hoc_jobs) for job in make(task, out, chosen[task])]
        (out / f"by_{rule}.txt").write_text("".join(f"{job.folder}\n" for job in every if is_finished(job)))


if __name__ == "__main__":
    main()
