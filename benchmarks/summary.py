"""SGP-LoRA among the methods that train, over all tasks of each comparison: the README's summary, from its results.

    python -m benchmarks.summary --figure images/comparison_summary.png    # prints its Markdown tables

The first counts the tasks on which its mean over the seeds is the best, and in brackets, where that is more, those on
which it is the best or within one standard error of it (that of the best, over its seeds); and it has the median over
the tasks of what it takes off LoRA's NLL and ECE. The others have the means over nine tasks, each with one standard
error over the seeds: without and with early stopping for every method and with adapters on all linear layers, where
post-hoc methods, which start from what another has learned, have rows too; and with a temperature for each of those
that train. The second counts the same with ensembles of posteriors (``MIXTURES``) in the place of the methods that they
are of, as they cost so many times the training as they have members.
"""

import argparse
import csv
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median, stdev
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.comparison import AS, POST_HOC, RATES, TASKS
from benchmarks.options import one_line_errors
from benchmarks.tried import FOREMOST
from benchmarks.workers import by_key
from utils.markdown import markdown_table
from utils.plots import COLOURS, STYLE, TITLES, save_figure
from utils.report_rows import Row, column_name, read_csv
from utils.report_tables import TIE, Column, columns, values

RESULTS = Path(__file__).parent / "results"
BASELINE = "mle"
TRAINED = tuple(method for first in RATES for method in (first, *(AS[first] if first == BASELINE else ())))
"""Methods that are compared."""
MIXTURES = {first: ensemble for first in RATES if first != BASELINE for ensemble in AS.get(first, ())}
"""By method the ensemble of its posteriors."""
SHOWN = (*TRAINED, *(method for first in RATES for method in POST_HOC.get(first, ())))
"""Methods that every comparison has."""
LEARNED = (*TRAINED, *MIXTURES.values())
ROWS = (*LEARNED, *(method for method in SHOWN if method not in TRAINED))
"""Those of the tables of means, ensembles of posteriors where there are any."""
METRICS = {"acc": (100, 1), "nll": (1, 3), "ece": (100, 1), "nll_scaled": (1, 3), "ece_scaled": (100, 1)}
"""With the factor and the digits in which they are shown: ACC and ECE in per cent, NLL in nats."""
DRAWN = ("nll", "ece")
SCALED = ("nll_scaled", "ece_scaled")
"""Those after a temperature fitted on validation data; see ``utils.report``."""
HALF_A_POINT = 0.005
SMOLLM2, GEMMA = "SmolLM2-135M-Instruct", "gemma-3-270m"


class Grid(NamedTuple):
    """Tasks and methods with the settings of one search, in a folder of results."""

    label: str
    folder: str
    model: str = SMOLLM2
    rules: tuple[str, ...] = ("acc", "nll")
    stopping: int | None = None
    """The times of a task's epochs, where every method may stop early: what that changes is in files of its own."""
    mixtures: int | None = None
    """The times of a task's epochs, where there are ensembles of posteriors (of SGP-LoRA's all): files of their own."""


Found = Mapping[tuple[Grid, str], dict[str, Column]]
"""By grid and rule its tasks, by task each method's rows."""
TABLES = (Grid("1 to 15 epochs", "comparison", mixtures=1), Grid("four times the epochs", "longer_tuned", mixtures=4))
"""Those of all tasks."""
STOPPING = (
    Grid("1 to 15 epochs, every method may stop early", "comparison", stopping=1),
    Grid("four times the epochs, every method may stop early", "longer_tuned", stopping=4),
)
"""The same with early stopping for every method."""
ALL_LINEAR = Grid("1 to 15 epochs, all linear layers", "all_linear", rules=("acc",))
"""With adapters on all linear layers, settings of a smaller search; ``laplace`` lacks a task."""
FEWER = (
    Grid("four times the epochs, the settings of the first row", "longer", rules=("acc",)),
    Grid("Gemma, 1 to 15 epochs", "comparison", model=GEMMA),
)
"""Those of some tasks."""
ALL = (TABLES[0], STOPPING[0], TABLES[1], STOPPING[1], ALL_LINEAR, *FEWER)


def read(grid: Grid, rule: str, results: Path = RESULTS) -> dict[str, Column]:
    """By task each method's rows on test, one per seed.

    Raises:
        ValueError: for files that are none of a report, or lack runs that others of the task have.
    """
    tasks = columns(read_csv(results / grid.folder / f"by_{rule}" / "results.csv"), grid.model, "test")
    if grid.stopping is not None:
        folder = results / "early_stopping"
        changed = columns(read_csv(folder / f"times_{grid.stopping}.csv"), grid.model, "test")
        for task, method in choices_changed(folder / "chosen.csv", grid.stopping, rule):
            tasks[task][method] = changed.get(task, {}).get(method, [])
    mixtures: dict[str, Column] = {}
    if grid.mixtures is not None:
        path = results / "mixtures" / f"times_{grid.mixtures}_by_{rule}.csv"
        mixtures = columns(read_csv(path), grid.model, "test")
    for task, column in tasks.items():
        seeds = {row.seed for row in column[BASELINE]}
        if lacking := [name for name in SHOWN if name in column and {row.seed for row in column[name]} != seeds]:
            raise ValueError(f"{grid.label}, by {rule}: {lacking[0]} on {task} has not all seeds that LoRA has")
        whole = {name: rows for name, rows in mixtures.get(task, {}).items() if {row.seed for row in rows} == seeds}
        if grid.mixtures is not None and MIXTURES[FOREMOST] not in whole:
            raise ValueError(f"{path}: {MIXTURES[FOREMOST]} on {task} has not all seeds that LoRA has")
        column.update(whole)
    return tasks


def choices_changed(path: Path, times: int, rule: str) -> list[tuple[str, str]]:
    """Task, as a report names it, and method of the choices that early stopping changes, post-hoc methods included."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if (int(row["times"]), row["rule"]) == (times, rule)]
    return [
        (task_name(row["task"]), method)
        for row in rows
        if row["without"] != row["with"]
        for method in (row["method"], *POST_HOC.get(row["method"], ()))
    ]


def task_name(task: str) -> str:
    """What a report calls a task of the comparison."""
    of = by_key(TASKS[task])
    return column_name(of["dset"], of.get("dset.train_subset", "all"))


def mean(rows: Sequence[Row], metric: str) -> float:
    """Over the seeds."""
    return fmean(values(rows, metric))


def standard_error(rows: Sequence[Row], metric: str) -> float:
    """Of that mean."""
    return stdev(values(rows, metric)) / math.sqrt(len(rows))


def behind(column: Column, metric: str) -> tuple[float, float]:
    """How far ``FOREMOST`` is from the best of ``TRAINED``, and the standard error of the best."""
    sign = -1 if metric == "acc" else 1
    losses = {name: sign * mean(column[name], metric) for name in TRAINED}
    best = min(losses, key=lambda name: losses[name])
    return losses[FOREMOST] - losses[best], standard_error(column[best], metric)


def mixed(tasks: dict[str, Column], methods: Collection[str]) -> dict[str, Column]:
    """The same with the ensembles of these methods' posteriors in their place, where there are any."""
    return {
        task: column | {name: column[MIXTURES[name]] for name in methods if MIXTURES[name] in column}
        for task, column in tasks.items()
    }


def counts(tasks: dict[str, Column]) -> list[str]:
    """The cells of a row of the first table."""
    cells = [str(len(tasks))]
    for metric in ("nll", "ece", "acc"):
        found = [behind(column, metric) for column in tasks.values()]
        best = sum(distance <= TIE for distance, _ in found)
        tied = sum(distance <= max(error, TIE) for distance, error in found)
        cells.append(f"{best} ({tied})" if tied > best else f"{best}")
    cells.append(str(sum(behind(column, "acc")[0] <= HALF_A_POINT + TIE for column in tasks.values())))
    for metric in ("nll", "ece"):
        taken = [1 - mean(column[FOREMOST], metric) / mean(column[BASELINE], metric) for column in tasks.values()]
        cells.append(f"{100 * median(taken):.0f} %")
    return cells


def over_tasks(tasks: dict[str, Column], method: str, metric: str) -> tuple[float, float] | None:
    """The mean over the tasks and one standard error of it over the seeds; None if a task lacks it or a run's value."""
    of = [column.get(method, []) for column in tasks.values()]
    if any(not rows or len(values(rows, metric)) < len(rows) for rows in of):
        return None
    error = math.hypot(*(standard_error(rows, metric) for rows in of)) / len(of)
    return fmean(mean(rows, metric) for rows in of), error


def means(tasks: dict[str, Column], method: str, metrics: Sequence[str]) -> str:
    """A cell of a table of means."""
    shown = []
    for metric in metrics:
        if (found := over_tasks(tasks, method, metric)) is None:
            return ""
        factor, digits = METRICS[metric]
        shown.append(" ± ".join(f"{factor * value:.{digits}f}" for value in found))
    return " / ".join(shown)


def counted(found: Found) -> str:
    """The first table."""
    rows = []
    for (grid, rule), tasks in found.items():
        label = f"{grid.label}, by {rule.upper()}" if rule == grid.rules[0] else f"the same, by {rule.upper()}"
        rows.append([label, *counts(tasks)])
    return table_of_counts(rows)


def counted_mixtures(found: Found) -> str:
    """The second: the ensemble of SGP-LoRA's posteriors, and by accuracy against BLoB's."""
    rows = []
    for (grid, rule), tasks in found.items():
        rows.append([f"{grid.label}, by {rule.upper()}", *counts(mixed(tasks, [FOREMOST]))])
        if rule == "acc":
            rows.append(["the same, BLoB's ensemble too", *counts(mixed(tasks, MIXTURES))])
    return table_of_counts(rows)


def table_of_counts(rows: Sequence[Sequence[str]]) -> str:
    """Cells of ``counts`` under their titles, each row with a label."""
    head = ["", "tasks", "NLL lowest", "ECE lowest", "ACC highest", "ACC within half a point"]
    return markdown_table([*head, "off LoRA's NLL", "off LoRA's ECE"], rows)


def averaged(found: Found, methods: Sequence[str] = ROWS, metrics: Sequence[str] = ("acc", "nll", "ece")) -> str:
    """A table of means: a row for each method, a column for each grid by a rule."""
    shown = " / ".join(metric.removesuffix("_scaled").upper() for metric in metrics)
    head = [shown, *(f"{grid.label}, by {rule.upper()}" for grid, rule in found)]
    cells = {method: [means(tasks, method, metrics) for tasks in found.values()] for method in methods}
    return markdown_table(head, [[f"`{name}`", *of] for name, of in cells.items() if any(of) or name in SHOWN])


def draw(found: Found, path: Path) -> Path:
    """NLL and ECE over the tasks, a column for each grid by a rule, a line for each method."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.1 * len(found) + 1.4, 7.6), layout="constrained")
        axes = figure.subplots(len(DRAWN), len(found), sharex="row", sharey=True, squeeze=False)
        for row, metric in zip(axes, DRAWN, strict=True):
            for ax, ((grid, rule), tasks) in zip(row, found.items(), strict=True):
                for at, method in enumerate(ROWS):
                    if (of := over_tasks(tasks, method, metric)) is not None:
                        look = {"color": COLOURS[1] if method.startswith(FOREMOST) else COLOURS[0], "capsize": 3}
                        filled = {"markerfacecolor": "white"} if method not in LEARNED else {}
                        ax.errorbar(of[0], at, xerr=of[1], fmt="o", **look, **filled)
                ax.set_xlabel(TITLES[metric])
                ax.xaxis.set_major_locator(MaxNLocator(5))
                if metric == DRAWN[0]:
                    ax.set_title(f"{grid.label},\nby {rule.upper()}")
        axes[0, 0].set_yticks(range(len(ROWS)), ROWS)
        axes[0, 0].invert_yaxis()
        return save_figure(figure, path)


def main(argv: Sequence[str] | None = None) -> None:
    """Print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", type=Path, help="where to draw the means without early stopping, as PNG")
    arguments = parser.parse_args(argv)
    with one_line_errors():
        found = {(grid, rule): read(grid, rule) for grid in ALL for rule in grid.rules}
        shown = (TABLES, STOPPING, (ALL_LINEAR,))
        tables, stopping, all_linear = ({key: found[key] for key in found if key[0] in grids} for grids in shown)
        print(counted(found))
        print(counted_mixtures(tables))
        print(averaged(tables))
        print(averaged(stopping))
        print(averaged(all_linear))
        print(averaged(tables, LEARNED, SCALED), end="")
        if arguments.figure:
            draw(tables, arguments.figure)


if __name__ == "__main__":
    main()
