"""The comparison of methods: a small declared search on validation data, then three seeds on test data.

    python -m benchmarks.comparison --out outputs/comparison --tasks sst2_500 arc_e_500 --jobs 2 paths.data_dir=/data
    python -m utils.report outputs/comparison/final --out benchmarks/results/comparison

For every task and every method that trains, each of the settings in ``SEARCH`` is trained once with ``TUNING_SEED``
and the one with the lowest validation NLL (of the method's own prediction) is kept; test data is not read there. That
setting is then trained with the seeds 0, 1, 2 and evaluated on test. Methods that only add to a trained LoRA adapter
(``POST_HOC``) start from those of ``mle``. Finished runs are skipped, so the command can be repeated after a kill.
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

import hydra
from omegaconf import OmegaConf

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
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
RATES = ("opt.lr=5e-4", "opt.lr=1e-3", "opt.lr=2e-3")
SEARCH: dict[str, tuple[str, ...]] = {
    "mle": RATES,
    "map": RATES,
    "mc_dropout": RATES,
    "ensemble": RATES,
    "lora_plus": ("opt.lr=1e-4", "opt.lr=2.5e-4", "opt.lr=5e-4"),
    "adalora": RATES,
    "blob": RATES,
    "scalabl": ("opt.lr=1e-3", "opt.lr=3e-3", "opt.lr=1e-2"),
    "sgp": RATES,
}
"""Three settings a method: the learning rate, in the range that suits the parametrisation."""
POST_HOC = ("temperature", "laplace", "laplace_last", "tfb")
COMMON = ("eval.every=100000", "eval.every_n_mc=10", "eval.n_mc=10", "eval.batch_size=64")


class Job(NamedTuple):
    """One run."""

    folder: Path
    overrides: tuple[str, ...]
    test: bool
    """Whether to go on to the evaluation on test data."""


def tuning_jobs(task: str, out: Path) -> dict[str, list[Job]]:
    """The search of every method on one task."""
    return {
        method: [
            Job(
                out / "tune" / task / method / str(i),
                (*TASKS[task], f"method={method}", setting, f"seed={TUNING_SEED}"),
                False,
            )
            for i, setting in enumerate(settings)
        ]
        for method, settings in SEARCH.items()
    }


def final_jobs(task: str, out: Path, chosen: dict[str, str]) -> list[Job]:
    """Every method that trains, at its chosen setting, with all seeds."""
    return [
        Job(final_folder(out, task, method, s), (*TASKS[task], f"method={method}", setting, f"seed={s}"), True)
        for method, setting in chosen.items()
        for s in SEEDS
    ]


def post_hoc_jobs(task: str, out: Path, chosen: dict[str, str]) -> list[Job]:
    """Methods that start from the adapters of ``mle``."""
    jobs: list[Job] = []
    for method in POST_HOC if "mle" in chosen else ():
        for s in SEEDS:
            start = f"train.init_adapter={final_folder(out, task, 'mle', s) / 'adapter'}"
            overrides = (*TASKS[task], f"method={method}", chosen["mle"], f"seed={s}", start, "train.epochs=0")
            jobs.append(Job(final_folder(out, task, method, s), overrides, True))
    return jobs


def final_folder(out: Path, task: str, method: str, seed: int) -> Path:
    """Where the run of a method with a seed is kept."""
    return out / "final" / task / method / f"seed{seed}"


def choose(task: str, out: Path) -> dict[str, str]:
    """For each method the setting with the lowest validation NLL at the end of training.

    Methods none of whose settings finished are left out.
    """
    chosen = {}
    for method, jobs in tuning_jobs(task, out).items():
        found = {setting: validation_nll(job.folder) for setting, job in zip(SEARCH[method], jobs, strict=True)}
        finished = {setting: value for setting, value in found.items() if value is not None}
        if finished:
            chosen[method] = min(finished, key=finished.__getitem__)
    return chosen


def validation_nll(folder: Path) -> float | None:
    """NLL of the last evaluation on validation data, once training has ended; None before."""
    done, log = folder / "tuned.json", folder / "metrics.jsonl"
    if not done.exists():
        return None
    records = [json.loads(line) for line in log.read_text().splitlines()]
    return [r["nll"] for r in records if r["kind"] == "eval" and r["split"] == "validation"][-1]


def is_finished(job: Job) -> bool:
    """Whether the run's last record is there."""
    return (job.folder / ("reliability.json" if job.test else "tuned.json")).exists()


def execute(job: Job, common: Sequence[str]) -> str | None:
    """Run one job in this process; returns what went wrong, if anything."""
    import train_script as ts

    arguments = [*COMMON, *job.overrides, *common, f"paths.output_dir={job.folder}", "overwrite=true"]
    try:
        with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
            cfg = hydra.compose("train", arguments)
        run = ts.prepare(cfg)
        OmegaConf.save(cfg, run.folder / "config.yaml", resolve=True)
        ts.write_json_atomic(run.folder / "environment.json", ts.environment_record())
        step = ts.train(run)
        if job.test:
            ts.finish(run, step)
        else:
            ts.write_json_atomic(job.folder / "tuned.json", {"step": step})
    except ts.USER_ERRORS as error:
        return f"{job.folder}: {ts.one_line(error, CONFIGS)}"
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
        run_all(pool, [job for task in tasks for jobs in tuning_jobs(task, out).values() for job in jobs], common)
        chosen = {task: choose(task, out) for task in tasks}
        out.mkdir(parents=True, exist_ok=True)
        (out / "chosen.json").write_text(json.dumps(chosen, indent=1))
        run_all(pool, [job for task in tasks for job in final_jobs(task, out, chosen[task])], common)
        run_all(pool, [job for task in tasks for job in post_hoc_jobs(task, out, chosen[task])], common)


if __name__ == "__main__":
    main()
