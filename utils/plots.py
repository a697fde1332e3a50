"""Figures of finished or running runs, drawn only from what runs have written.

python -m utils.plots RUN_DIR [RUN_DIR ...] [--compare PATH.png --label NAME ...]
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from utils.run import RELIABILITY_FILE, open_atomic, read_metrics

Record = dict[str, Any]
Runs = Mapping[str, str | Path | Sequence[str | Path]]

# Okabe and Ito's palette, which the common colour-vision deficiencies leave distinct
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "savefig.dpi": 150,
}
TITLES = {
    "loss": "objective (nats per example)",
    "nll": "NLL (nats)",
    "kl": "KL (nats)",
    "acc": "ACC",
    "ece": "ECE",
}


def plot_curves(run_dir: str | Path) -> Path:
    """Draw training loss, NLL and KL and validation ACC, NLL and ECE against step as `curves.png`.

    Raises:
        FileNotFoundError: If the folder is no run.
        ValueError: If the run has recorded neither training nor validation yet.
    """
    records = read_metrics(run_dir)
    training = [r for r in records if r["kind"] == "train"]
    validation = [r for r in records if r["kind"] == "eval" and r["split"] == "validation"]
    rows = [
        (name, series, keys)
        for name, series, keys in (
            ("Training", {"": training}, ("loss", "nll", "kl")),
            ("Validation", _by_mc(validation), ("acc", "nll", "ece")),
        )
        if any(series.values())
    ]
    if not rows:
        raise ValueError(f"{run_dir} has no training or validation records yet: wait for its first line")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 3.1 * len(rows)), layout="constrained")
        for axes, (name, series, keys) in zip(figure.subplots(len(rows), 3, squeeze=False), rows, strict=True):
            for ax, key in zip(axes, keys, strict=True):
                for index, (label, points) in enumerate(series.items()):
                    steps, values = [p["step"] for p in points], [_number(p[key]) for p in points]
                    ax.plot(steps, values, label=label, **line_look(index, len(points)))
                ax.set_title(f"{name} {TITLES[key]}")
                _step_axis(ax)
            if len(series) > 1:
                axes[0].legend()
        return save_figure(figure, Path(run_dir) / "curves.png")


def plot_reliability(run_dir: str | Path) -> Path:
    """Draw accuracy against confidence and the count histogram of `reliability.json` as `reliability.png`.

    Raises:
        FileNotFoundError: If the run has written no `reliability.json`.
        ValueError: If that is damaged.
    """
    path = Path(run_dir) / RELIABILITY_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{run_dir} has no {RELIABILITY_FILE}: it is written by a run's final evaluation")
    try:
        diagrams = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): evaluate the run anew") from error
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.2 * len(diagrams), 5.2), layout="constrained")
        grid = figure.subplots(2, len(diagrams), squeeze=False, sharex=True, height_ratios=(3, 1))
        for column, (label, bins) in enumerate(diagrams.items()):
            reliability_panel(grid[0, column], bins, f"{label}: ECE = {bins['ece']:.4f}")
            edges = np.asarray(bins["edges"])
            grid[1, column].bar(edges[:-1], bins["count"], np.diff(edges), align="edge", color="0.55", ec="white")
            grid[1, column].set_xlabel("Confidence")
            grid[1, column].yaxis.set_major_locator(MaxNLocator(3, integer=True))
        grid[0, 0].set_ylabel("Accuracy")
        grid[1, 0].set_ylabel("Examples")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3 if len(diagrams) > 1 else 2)
        return save_figure(figure, Path(run_dir) / "reliability.png")


def plot_learning_comparison(runs: Runs, path: str | Path) -> Path:
    """Draw validation and test ACC and NLL against step for several runs.

    A label with several run folders is drawn as their mean over the steps that all of them have, with a
    band of one standard deviation (n - 1). Of a run's evaluations those with the most Monte-Carlo samples
    are taken, or those of the mean where it has no others. A split evaluated at one step only is drawn
    side by side, with that step below.

    Args:
        runs: For each label one run folder, or one per seed.
        path: The PNG file to write.

    Raises:
        ValueError: If a label has no evaluation, or its runs share no step.
    """
    folders = {label: [d] if isinstance(d, str | Path) else list(d) for label, d in runs.items()}
    records = {label: [read_metrics(d) for d in dirs] for label, dirs in folders.items()}
    found = {
        split: {label: s for label, runs_of in records.items() if (s := _summary(label, split, runs_of))}
        for split in ("validation", "test")
    }
    rows = {split: series for split, series in found.items() if series}
    for label, dirs in folders.items():
        if not any(label in series for series in rows.values()):
            raise ValueError(f"{label} has no validation or test record yet in {', '.join(map(str, dirs))}")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.3 * len(rows) + 0.4), layout="constrained")
        for axes, (split, series) in zip(figure.subplots(len(rows), 2, squeeze=False), rows.items(), strict=True):
            draw = _draw_points if all(len(s["step"]) == 1 for s in series.values()) else _draw_lines
            for ax, key in zip(axes, ("acc", "nll"), strict=True):
                draw(ax, series, key, list(runs))
                ax.set_title(f"{split.capitalize()} {TITLES[key]}")
        handles = []
        for index, (label, dirs) in enumerate(folders.items()):
            samples = sorted({str(series[label]["mc"]) for series in rows.values() if label in series})
            spread = f", mean ± 1 sd of {len(dirs)} runs" if len(dirs) > 1 else ""
            text = f"{label} (MC={'/'.join(samples)}{spread})"
            handles.append(Line2D([], [], label=text, **line_look(index)))
        columns = 2 if max(len(str(handle.get_label())) for handle in handles) < 50 else 1
        figure.legend(handles=handles, loc="outside lower center", ncols=columns)
        return save_figure(figure, Path(path))


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the figures of the run folders named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m utils.plots", description="Draw the figures of runs.")
    parser.add_argument("run_dir", nargs="+", type=Path, help="folder that a run wrote")
    parser.add_argument("--compare", type=Path, metavar="PATH", help="also draw the runs in one figure")
    parser.add_argument(
        "--label", action="append", help="label of each run in --compare, in order; equal ones are seeds"
    )
    options = parser.parse_args(arguments)
    labels = options.label or [str(d) for d in options.run_dir]
    if len(labels) != len(options.run_dir):
        parser.error(f"{len(labels)} --label for {len(options.run_dir)} run folders: give one each")
    try:
        for run_dir in options.run_dir:
            trained = any(record["kind"] == "train" for record in read_metrics(run_dir))
            evaluated = (run_dir / RELIABILITY_FILE).is_file()
            if not trained and not evaluated:
                raise ValueError(f"{run_dir} has neither training records nor {RELIABILITY_FILE} yet: nothing to draw")
            if trained:
                print(plot_curves(run_dir))
            if evaluated:
                print(plot_reliability(run_dir))
        if options.compare:
            runs: dict[str, list[Path]] = {}
            for label, run_dir in zip(labels, options.run_dir, strict=True):
                runs.setdefault(label, []).append(run_dir)
            print(plot_learning_comparison(runs, options.compare))
    except (OSError, ValueError) as error:
        parser.error(str(error))


def _summary(label: str, split: str, runs_of: Sequence[Sequence[Record]]) -> dict[str, Any] | None:
    """Steps common to the runs of a label, their mc, and (mean, sd) of acc and nll; None without a record."""
    evaluations = [r for run in runs_of for r in run if r["kind"] != "train" and r["split"] == split]
    if not evaluations:
        return None
    mc = next(reversed(_by_mc(evaluations).values()))[0]["mc"]
    by_step = [
        {r["step"]: r for r in run if r["kind"] != "train" and r["split"] == split and r["mc"] == mc} for run in runs_of
    ]
    steps = sorted(set.intersection(*map(set, by_step)))
    if not steps:
        raise ValueError(f"the runs of {label} share no step with a {split} record of MC={mc}: give them other labels")
    summary: dict[str, Any] = {"step": steps, "mc": mc}
    for key in ("acc", "nll"):
        values = np.array([[_number(run[step][key]) for step in steps] for run in by_step])
        sd = values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(len(steps))
        summary[key] = (values.mean(axis=0), sd)
    return summary


def _draw_lines(ax: Axes, series: Mapping[str, dict[str, Any]], key: str, labels: Sequence[str]) -> None:
    for label, summary in series.items():
        index, steps, (mean, sd) = labels.index(label), summary["step"], summary[key]
        look = line_look(index, len(steps))
        ax.plot(steps, mean, **look)
        ax.fill_between(steps, mean - sd, mean + sd, color=look["color"], alpha=0.2, linewidth=0)
    _step_axis(ax)


def _draw_points(ax: Axes, series: Mapping[str, dict[str, Any]], key: str, labels: Sequence[str]) -> None:
    for position, (label, summary) in enumerate(series.items()):
        index, (mean, sd) = labels.index(label), summary[key]
        ax.errorbar(position, mean[0], sd[0] or None, capsize=4, **line_look(index))
    ax.set_xticks(range(len(series)), [str(s["step"][0]) for s in series.values()])
    ax.set_xlabel("Step")
    ax.set_xlim(-0.6, len(series) - 0.4)


def reliability_panel(ax: Axes, bins: Record, title: str) -> None:
    """Accuracy of every confidence bin as a bar, and its distance from the mean confidence."""
    edges, filled = np.asarray(bins["edges"]), np.asarray(bins["count"]) > 0
    left, width = edges[:-1][filled], np.diff(edges)[filled]
    confidence, accuracy = (np.asarray(bins[key])[filled] for key in ("confidence", "accuracy"))
    ax.bar(left, accuracy, width, align="edge", color=COLOURS[0], ec="white", label="Accuracy")
    ax.plot(confidence, confidence, "_", color=COLOURS[1], markersize=11, mew=2.2, label="Mean confidence")
    ax.vlines(confidence, accuracy, confidence, color=COLOURS[1], lw=1.6)
    ax.plot([0, 1], [0, 1], "--", color="black", lw=1, label="Perfect calibration")
    ax.set(xlim=(0, 1), ylim=(0, 1.02), title=title)


def _by_mc(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Group evaluations by their samples: those without an adapter, "MC=mean", then by number."""
    rank = {"zero_shot": -2, "mean": -1}
    found = sorted({r["mc"] for r in records}, key=lambda mc: rank.get(str(mc), mc))
    return {f"MC={mc}": [r for r in records if r["mc"] == mc] for mc in found}


def line_look(index: int, points: int = 1) -> dict[str, Any]:
    """Colour and marker of the series `index`; a line of many points has no markers."""
    cycle, place = divmod(index, len(COLOURS))
    marker = MARKERS[(place + cycle) % len(MARKERS)]
    return {"color": COLOURS[place], "marker": marker if points <= 30 else ""}


def drawn_line_look(index: int) -> dict[str, Any]:
    """``line_look`` for lines that are drawn: those that have the colour of an earlier one are dashed."""
    return {**line_look(index), "linestyle": "-" if index < len(COLOURS) else "--"}


def _number(value: float | None) -> float:
    """Undo null, which stands for a non-finite value, as NaN: a gap in a line."""
    return math.nan if value is None else value


def _step_axis(ax: Axes) -> None:
    ax.set_xlabel("Step")
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, whole or not at all; returns where."""
    with open_atomic(path) as file:
        figure.savefig(file, format="png")
    return path


if __name__ == "__main__":
    main()
