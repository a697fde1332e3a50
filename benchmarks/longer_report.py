"""What further training does to every method: the results of a comparison beside those of ``benchmarks.longer``.

    python -m benchmarks.longer_report benchmarks/results/comparison/by_acc/results.csv \
        benchmarks/results/longer/by_acc/results.csv --out benchmarks/results/longer/by_acc

Both files are written by ``python -m utils.report``. Writes longer.md (ACC, NLL and ECE before and after) and
longer.png (NLL and ECE, a column per task).
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import matplotlib
from matplotlib.figure import Figure

from benchmarks.options import one_line_errors
from benchmarks.tried import FOREMOST
from utils.markdown import markdown_table
from utils.plots import COLOURS, STYLE, TITLES, drawn_line_look, save_figure
from utils.report_figures import per_row
from utils.report_rows import ZERO_SHOT, Row, read_csv
from utils.report_tables import columns, values
from utils.run import write_text_atomic

LOOK = {"color": "black", "marker": "s", "linewidth": 3.0}
"""How the foremost method is drawn."""
DRAWN = ("nll", "ece")
Ends = dict[str, tuple[list[Row], list[Row]]]
"""By method its rows before and after, one per seed."""


def read(before: Path, after: Path) -> dict[str, Ends]:
    """By task the methods that both files have, with the seeds that both have, if at least two.

    Raises:
        ValueError: if the later file is of several models, or nothing is in both.
    """
    later = read_csv(after)
    if len(models := {row.model for row in later}) > 1:
        raise ValueError(f"{after} is of several models ({', '.join(sorted(models))}): report one at a time")
    model = models.pop()
    first, last = columns(read_csv(before), model, "test"), columns(later, model, "test")
    tasks: dict[str, Ends] = {}
    for task, of in last.items():
        for name in [name for name in of if name != ZERO_SHOT]:
            begun, ended = (
                {row.seed: row for row in found.get(name, []) if is_known(row)} for found in (first.get(task, {}), of)
            )
            seeds = sorted(begun.keys() & ended.keys())
            if len(seeds) > 1:
                tasks.setdefault(task, {})[name] = ([begun[seed] for seed in seeds], [ended[seed] for seed in seeds])
    if not tasks:
        raise ValueError(
            f"{before} and {after} share no task and method of {model} with two seeds: name reports that do"
        )
    return tasks


def is_known(row: Row) -> bool:
    """Whether a row has all that is shown."""
    return None not in (row.acc, row.nll, row.ece)


def steps(of: Ends) -> tuple[int, int]:
    """Optimiser steps before and after: the most of any method, since what starts from an adapter takes none."""
    before, after = (max(row.steps for ends in of.values() for row in ends[when]) for when in (0, 1))
    return before, after


def markdown(tasks: dict[str, Ends]) -> str:
    """NLL in nats; ACC and ECE in per cent; means over seeds; MC is what they predict by; before and after."""
    head = ["task (steps)", "method", "seeds", "MC", "ACC %", "NLL", "ECE %"]
    lines = []
    for task, of in tasks.items():
        begun, ended = steps(of)
        for name, ends in of.items():
            cells = [" → ".join(rows[0].mc for rows in ends)]
            for metric in ("acc", "nll", "ece"):
                factor, digits = (1, 3) if metric == "nll" else (100, 1)
                cells.append(" → ".join(f"{factor * fmean(values(rows, metric)):.{digits}f}" for rows in ends))
            lines.append([f"{task} ({begun} → {ended})", name, str(len(ends[0])), *cells])
    return markdown_table(head, lines)


def draw(tasks: dict[str, Ends], path: Path) -> Path:
    """A column per task, in blocks of a row per metric; methods that take no steps of their own are left out."""
    trained = {name for of in tasks.values() for name, (_, after) in of.items() if after[0].steps}
    names = sorted(trained, key=lambda name: (name == FOREMOST, name))
    across = per_row(len(tasks))
    blocks = math.ceil(len(tasks) / across)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.4 * across + 1.8, 2.8 * len(DRAWN) * blocks), layout="constrained")
        grid = figure.subplots(len(DRAWN) * blocks, across, squeeze=False)
        for ax in grid.flat:
            ax.set_axis_off()
        lines = {}
        for place, (task, of) in enumerate(tasks.items()):
            block, column = divmod(place, across)
            for row, metric in enumerate(DRAWN):
                ax = grid[block * len(DRAWN) + row, column]
                ax.set_axis_on()
                for index, name in enumerate(names):
                    if name in of:
                        coloured = index + index // (len(COLOURS) - 1)  # passes over black, the last colour
                        style = LOOK if name == FOREMOST else drawn_line_look(coloured)
                        means = [fmean(values(rows, metric)) for rows in of[name]]
                        (lines[name],) = ax.plot(steps(of), means, **style)
                ax.set_xticks(steps(of))
                if row == 0:
                    ax.set_title(task)
                if row == len(DRAWN) - 1:
                    ax.set_xlabel("optimiser steps")
                if column == 0:
                    ax.set_ylabel(TITLES[metric])
        figure.legend([lines[name] for name in names], names, loc="outside right center")
        return save_figure(figure, path)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="results.csv of the comparison")
    parser.add_argument("after", type=Path, help="results.csv of benchmarks.longer")
    parser.add_argument("--out", type=Path, default=Path())
    arguments = parser.parse_args(argv)
    with one_line_errors():
        tasks = read(arguments.before, arguments.after)
        write_text_atomic(arguments.out / "longer.md", markdown(tasks))
        draw(tasks, arguments.out / "longer.png")


if __name__ == "__main__":
    main()
