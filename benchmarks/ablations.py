"""What each part of SGP-LoRA does: one setting changed at a time, three seeds, on one task.

    python -m benchmarks.ablations --out outputs/ablations --rate 6e-4 --jobs 2 paths.data_dir=/data

The learning rate is held for all settings, and so is KEY=VALUE but by a setting that changes that key. Writes, in a
folder named after the task, ablations.csv, a row per run with the metrics on test data, and ablations.md, mean and
standard deviation over seeds. Finished runs are skipped; the tables hold all of them, also those of earlier calls. The
NLL on validation data stands beside the test metrics: choose by that one.
"""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.comparison import SEEDS, TASKS, Comparison, Setting, check_common
from benchmarks.options import GOES_ON, alone_in, one_line_errors, parse, parser_of
from benchmarks.workers import Job, carry_out, is_finished
from utils.markdown import markdown_table
from utils.report_rows import METRICS
from utils.run import read_metrics, write_csv_atomic, write_text_atomic

SETTINGS: dict[str, tuple[str, ...]] = {
    "default": (),
    "m = 4": ("inducing.inducing_rows=4", "inducing.inducing_cols=4"),
    "m = 16": ("inducing.inducing_rows=16", "inducing.inducing_cols=16"),
    "flow depth 2": ("inducing.flow_depth=2",),
    "q(U) matrix normal": ("inducing.family=matrix_normal",),
    "q(U) full": ("inducing.family=full",),
    "unwhitened": ("inducing.whitened=false",),
    "no conditional noise": ("inducing.conditional_noise=false",),
    "lambda_max = 0.1": ("inducing.lambda_max=0.1", "inducing.lambda_init=0.07"),
    "prior sds held": ("inducing.learn_prior_sd=false",),
    "prior sd of B 0.7": ("inducing.prior_sd_b=0.7",),
    "prior sd of B 2.8": ("inducing.prior_sd_b=2.8",),
    "prior sd of A 0.35": ("inducing.prior_sd=0.35",),
    "mean gain 1": ("inducing.mean_gain=1",),
    "q_sd = 0.1": ("inducing.q_sd=0.1",),
    "beta = 1": ("train.beta=1",),
    "beta = 0.1": ("train.beta=0.1",),
    "beta = 1e-5": ("train.beta=0.00001",),
    "beta warm-up": ("train.beta_warmup=0.5",),
    "2 samples per step": ("train.n_mc=2",),
    "on q, k, v, o": ("peft.target_modules=[q_proj,k_proj,v_proj,o_proj]",),
    "on all linear layers": ("peft.target_modules=[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]",),
}
"""What is changed, by label."""


def job_of(task: str, label: str, rate: float, seed: int, out: Path, common: Sequence[str] = ()) -> Job:
    """One setting with one seed."""
    name = "".join(c if c.isalnum() else "_" for c in label)
    overrides = Comparison(out, common).overrides(task, "sgp", seed, Setting(rate))
    return Job(out / task / name / f"seed{seed}", (*overrides, *SETTINGS[label]), True)


def results(jobs: dict[tuple[str, int], Job]) -> list[dict[str, str | int | float]]:
    """A row of metrics under the posterior per finished run: those on test, and the NLL on validation data."""
    rows: list[dict[str, str | int | float]] = []
    for (label, seed), job in jobs.items():
        if is_finished(job):
            records = {
                r["split"]: r
                for r in read_metrics(job.folder)
                if r["kind"] == "final" and r["mc"] not in ("mean", "zero_shot")
            }
            test = {name: records["test"][name] for name in METRICS}
            validation = records.get("validation", {}).get("nll", math.nan)
            rows.append({"setting": label, "seed": seed, **test, "validation_nll": validation})
    return rows


def markdown(rows: Sequence[dict[str, str | int | float]]) -> str:
    """Mean and standard deviation over seeds; ACC and ECE in per cent."""
    lines = []
    for label in dict.fromkeys(str(row["setting"]) for row in rows):
        own = [row for row in rows if row["setting"] == label]
        cells = []
        for name in (*METRICS, "validation_nll"):
            factor, digits = (100, 1) if name in ("acc", "ece") else (1, 3)
            values = [factor * float(row[name]) for row in own]
            spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.{digits}f}{spread}")
        lines.append([label, str(len(own)), *cells])
    return markdown_table(["setting", "seeds", "ACC %", "NLL", "ECE %", "Brier", "NLL, validation"], lines)


def write(rows: Sequence[dict[str, str | int | float]], out: Path) -> None:
    """ablations.csv and ablations.md."""
    write_csv_atomic(out / "ablations.csv", list(rows[0]), rows)
    write_text_atomic(out / "ablations.md", markdown(rows))


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing and write the tables."""
    parser = parser_of(__doc__, Path("outputs/ablations"))
    parser.add_argument("--task", choices=TASKS, default="sst2_500")
    parser.add_argument("--rate", type=float, required=True, help="learning rate of every setting")
    parser.add_argument("--only", nargs="*", choices=SETTINGS, default=list(SETTINGS), help="settings; all if absent")
    arguments = parse(parser, argv)
    out = arguments.out.resolve()
    jobs = {
        (label, seed): job_of(arguments.task, label, arguments.rate, seed, out, arguments.overrides)
        for label in SETTINGS
        for seed in SEEDS
    }
    asked = [job for (label, _), job in jobs.items() if label in arguments.only]
    with one_line_errors(GOES_ON):
        check_common(arguments.overrides)
        with alone_in(out):
            results(jobs)  # refuses a folder of other settings before any run
            carry_out([iter([(0, asked)])], arguments.jobs, arguments.seconds)
            if not (rows := results(jobs)):
                raise RuntimeError("no run has finished: see the lines above")
            write(rows, out / arguments.task)
        print(markdown(rows))


if __name__ == "__main__":
    main()
