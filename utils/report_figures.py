"""Figures of a report: reliability side by side, accuracy against calibration, and metrics against samples."""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from utils.plots import STYLE, TITLES, drawn_line_look, line_look, reliability_panel, save_figure
from utils.report_rows import ZERO_SHOT
from utils.report_scores import Prediction, ece, example_losses, reliability, running_log_probs
from utils.report_tables import Column, values

PER_ROW = 4
"""Most panels side by side."""
LONGEST = 100
"""Characters of a file's name, but for its kind and ending: the names of data files can be part of it."""
FAR = 0.1
"""Methods whose accuracy is so much below the best of a panel are named below it: all others would be one spot."""
SampleCurve = tuple[list[int], list[float], list[float]]
"""Numbers of samples, and for each the NLL (nats) and the ECE."""


def file_names(figures: Sequence[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """For the names that tell each of some figures apart the end of a file's name, name_name_....png.

    What a file name should not hold is replaced. A long one, and one that several figures would have, whatever the case
    of its letters, ends in a hash of the names.
    """
    texts = {names: "_".join(re.sub(r"[^\w.-]+", "-", name).strip("-") for name in names) for names in figures}
    count = Counter(text.casefold() for text in texts.values())
    for names, text in texts.items():
        if len(text) > LONGEST or count[text.casefold()] > 1:
            texts[names] = f"{text[:LONGEST]}_{hashlib.sha256(repr(names).encode()).hexdigest()[:8]}"
    return {names: f"{text}.png" for names, text in texts.items()}


def draw_reliability(predictions: Mapping[str, Mapping[int, Prediction]], path: Path) -> Path:
    """One panel per method, the examples of its seeds pooled; the title's ECE is the mean over seeds."""
    with matplotlib.rc_context(STYLE):
        figure, panels = panel_grid(len(predictions), 2.9, 3.2, share="all")
        for ax, (name, of_seeds) in zip(panels, predictions.items(), strict=True):
            error = fmean(ece(p.log_probs, p.answer) for p in of_seeds.values())
            bins = {key: value.tolist() for key, value in reliability(list(of_seeds.values())).items()}
            reliability_panel(ax, bins, f"{_wrap(name)}\nECE = {error:.4f}")
            ax.set(xlabel="Confidence", ylabel="Accuracy")
            ax.label_outer()
        for ax in panels[-per_row(len(panels)) :]:  # what is lowest in its column, also above an empty place
            ax.set_xlabel("Confidence")
            ax.tick_params(labelbottom=True)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(panels) + 1))
        return save_figure(figure, path)


def draw_accuracy_calibration(panels_of: Mapping[str, Column], path: Path) -> Path:
    """ACC against ECE: a panel per task, a colour and marker per method, bars of one sd over seeds.

    The base model, often far from all others, is left out where there are others, and tasks that have it alone. Other
    methods that are far below the best (``FAR``) are named below the panel instead, with their means.
    """
    everything = sorted({name for column in panels_of.values() for name in column})
    names = [name for name in everything if name != ZERO_SHOT] or everything
    shown = {title: column for title, column in panels_of.items() if not column.keys().isdisjoint(names)}
    with matplotlib.rc_context(STYLE):
        figure, panels = panel_grid(len(shown), 3.6, 3.3)
        for ax, (title, column) in zip(panels, shown.items(), strict=True):
            points = {
                name: (x, y)
                for name in names
                if (x := values(column.get(name, []), "ece")) and (y := values(column.get(name, []), "acc"))
            }
            lowest = max((fmean(y) for _, y in points.values()), default=0.0) - FAR
            below = [TITLES["ece"]]
            for name, (x, y) in points.items():
                if fmean(y) < lowest:
                    below.append(f"{name} far below: {fmean(y):.3f} at ECE {fmean(x):.3f}")
                    continue
                bars: dict[str, Any] = {f"{a}err": stdev(v) if len(v) > 1 else None for a, v in (("x", x), ("y", y))}
                ax.errorbar(fmean(x), fmean(y), capsize=3, lw=1.2, linestyle="", **bars, **line_look(names.index(name)))
            ax.set(title=title, xlabel="\n".join(below), ylabel=TITLES["acc"])
            ax.xaxis.set_major_locator(MaxNLocator(5))
        looks = [Line2D([], [], linestyle="", label=name, **line_look(index)) for index, name in enumerate(names)]
        figure.legend(handles=looks, loc="outside lower center", ncols=min(len(names), 2 * per_row(len(panels))))
        return save_figure(figure, path)


def sample_curve(logits: np.ndarray, answer: np.ndarray) -> SampleCurve:
    """NLL and ECE of the first 1, 2, 4, ... and all samples of the scores (S, N, C)."""
    counts = sorted({*(2**k for k in range(len(logits).bit_length()) if 2**k <= len(logits)), len(logits)})
    log_probs = [running_log_probs(logits)[count - 1] for count in counts]
    nlls = [float(example_losses(lp, answer)["nll"].mean()) for lp in log_probs]
    return counts, nlls, [ece(lp, answer) for lp in log_probs]


def draw_samples(curves: Mapping[str, Sequence[SampleCurve]], path: Path) -> Path:
    """NLL and ECE against the number of samples: mean over seeds with a band of one sd, log-2 axis."""
    with matplotlib.rc_context(STYLE):
        figure, panels = panel_grid(2, 4.2, 3.2)
        ticks: set[int] = set()
        for index, (name, of_seeds) in enumerate(curves.items()):
            counts = sorted(set.intersection(*(set(curve[0]) for curve in of_seeds)))
            ticks |= set(counts)
            for ax, place in zip(panels, (1, 2), strict=True):
                found = np.array([[curve[place][curve[0].index(count)] for count in counts] for curve in of_seeds])
                mean, sd = found.mean(axis=0), found.std(axis=0, ddof=1) if len(found) > 1 else 0.0
                look = drawn_line_look(index)
                ax.plot(counts, mean, label=name, **look)
                ax.fill_between(counts, mean - sd, mean + sd, color=look["color"], alpha=0.2, linewidth=0)
        shown = [tick for tick in sorted(ticks) if tick & (tick - 1) == 0]
        for ax, key in zip(panels, ("nll", "ece"), strict=True):
            ax.set_xscale("log", base=2)
            ax.set_xticks(shown, [str(tick) for tick in shown])
            ax.set(title=TITLES[key], xlabel="Samples S")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)))
        return save_figure(figure, path)


def per_row(count: int) -> int:
    """Panels in a row, where as few rows as `PER_ROW` allows share them evenly."""
    return math.ceil(count / math.ceil(count / PER_ROW))


def panel_grid(count: int, width: float, height: float, share: str = "none") -> tuple[Figure, list[Axes]]:
    """Panels in rows of `per_row`; the unused places of the last row are empty."""
    columns = per_row(count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(max(5.0, width * columns), height * rows + 0.5), layout="constrained")
    shared = share == "all"
    panels = list(figure.subplots(rows, columns, squeeze=False, sharex=shared, sharey=shared).flat)
    for ax in panels[count:]:
        ax.remove()
    return figure, panels[:count]


def _wrap(name: str) -> str:
    return name.replace(" [", "\n[", 1)
