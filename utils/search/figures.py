"""Figures of a search: the two trade-offs, hypervolume over trials, and the importance of the searched keys."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from utils.plots import COLOURS, MARKERS, STYLE, TITLES, save_figure
from utils.search.results import Tests, mean_sd
from utils.search.selection import SIGNS, Point, costs, pareto_mask

TRADE_OFFS = {"acc_ece": ("ece", "acc", "nll"), "ece_nll": ("nll", "ece", "acc")}
"""Name of the file -> metrics on the x axis, on the y axis and as colour."""
NAMES = {**TITLES, "brier": "Brier score"}
CROSSES = {"lowest_nll": "x", "knee": "+"}


def plot_search(
    folder: Path,
    points: Sequence[Point],
    front: Sequence[Point],
    selected: Mapping[str, Point],
    tests: Tests,
    volumes: Mapping[str, Sequence[float]],
    shares: Mapping[str, Mapping[str, float]],
    objectives: Sequence[str],
) -> None:
    """Draw all figures of a search into its folder; without ``shares`` none of importance."""
    for name in TRADE_OFFS:
        plot_trade_off(folder / f"{name}.png", name, points, front, selected, tests)
    plot_hypervolume(folder / "hypervolume.png", volumes, objectives)
    if shares:
        plot_importance(folder / "importance.png", shares)


def plot_trade_off(
    path: Path, name: str, points: Sequence[Point], front: Sequence[Point], selected: Mapping[str, Point], tests: Tests
) -> Path:
    """Draw every finished trial in two metrics, a third as colour, after the Pareto figures of Lin et al. (2026).

    The region that the trials dominate in these two metrics is shaded; circles ring the Pareto front of the search's
    own objectives, which may hold points that are dominated in these two; crosses mark the selected points. Squares
    are test means over fresh seeds, with one standard deviation, joined to their validation values.
    """
    x, y, colour = TRADE_OFFS[name]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 5.2), layout="constrained")
        ax = figure.subplots()
        at = np.array([[point.metrics[x], point.metrics[y], point.metrics[colour]] for point in points])
        shown = ax.scatter(at[:, 0], at[:, 1], c=at[:, 2], s=34, cmap="viridis", zorder=3)
        ax.scatter([], [], s=34, color="0.5", label="Trial")
        figure.colorbar(shown, ax=ax, label=f"Validation {NAMES[colour]}")
        ringed = np.array([[point.metrics[x], point.metrics[y]] for point in front])
        ax.scatter(
            ringed[:, 0],
            ringed[:, 1],
            s=110,
            facecolors="none",
            edgecolors=COLOURS[1],
            lw=1.6,
            zorder=4,
            label="Pareto front",
        )
        for rule, point in selected.items():
            where = (point.metrics[x], point.metrics[y])
            text = f"Selected: {rule.replace('_nll', ' NLL')}"
            ax.scatter(*where, s=170, marker=CROSSES[rule], c="black", lw=2.2, zorder=5, label=text)
        for index, point in enumerate(p for p in points if tests.get(p.number)):
            (mx, sx), (my, sy) = (mean_sd(tests[point.number], key) for key in (x, y))
            label = "Test, mean ± sd over seeds" if index == 0 else None
            ax.plot([point.metrics[x], mx], [point.metrics[y], my], ":", color="0.4", lw=1, zorder=2)
            ax.errorbar(mx, my, sy or None, sx or None, fmt="s", mfc="white", color=COLOURS[3], capsize=3, label=label)
        ax.margins(0.08)
        ax.set(xlim=ax.get_xlim(), ylim=ax.get_ylim())  # as the data want them: the shading fills them
        _shade(ax, points, x, y)
        ax.set(
            xlabel=NAMES[x], ylabel=NAMES[y], title=f"{NAMES[y].split()[0]} against {NAMES[x].split()[0]}, validation"
        )
        figure.legend(loc="outside lower center", ncols=3, fontsize=8)
        return save_figure(figure, path)


def _shade(ax: Axes, points: Sequence[Point], x: str, y: str) -> None:
    """Fill what the points dominate within the axes, bounded by their two-dimensional front."""
    values = costs(points, (x, y))
    edge = np.unique(values[pareto_mask(values)], axis=0)  # by rising x cost, thus falling y cost
    x_far, y_far = (max(SIGNS[key] * limit for limit in lim) for key, lim in ((x, ax.get_xlim()), (y, ax.get_ylim())))
    steps = [(edge[0, 0], y_far)]
    for (here, height), beyond in zip(edge, [*edge[1:, 0], x_far], strict=True):
        steps += [(here, height), (beyond, height)]
    border = np.array(steps) * [SIGNS[x], SIGNS[y]]
    corner = [x_far * SIGNS[x], y_far * SIGNS[y]]
    ax.fill(*np.vstack([border, corner]).T, color=COLOURS[5], alpha=0.18, lw=0, zorder=0, label="Dominated")
    ax.plot(*border.T, color=COLOURS[5], lw=1.2, zorder=1)


def plot_hypervolume(path: Path, curves: Mapping[str, Sequence[float]], objectives: Sequence[str]) -> Path:
    """Draw the hypervolume over the trials of one or more studies."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        ax = figure.subplots()
        for index, (label, curve) in enumerate(curves.items()):
            look: dict[str, Any] = {"color": COLOURS[index], "marker": MARKERS[index] if len(curve) <= 30 else ""}
            ax.plot(range(1, len(curve) + 1), curve, drawstyle="steps-post", label=label, **look)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        names = ", ".join(name.upper() for name in objectives)
        ax.set(xlabel="Trials", ylabel="Hypervolume", title=f"Dominated hypervolume ({names})")
        ax.legend()
        return save_figure(figure, path)


def plot_importance(path: Path, importance: Mapping[str, Mapping[str, float]]) -> Path:
    """Draw, for each objective, how the searched keys share the importance (sum 1) as bars."""
    keys = list(next(iter(importance.values())))
    height = 0.8 / len(importance)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 1.6 + 0.7 * len(keys)), layout="constrained")
        ax = figure.subplots()
        for index, (label, shares) in enumerate(importance.items()):
            places = np.arange(len(keys)) + index * height
            ax.barh(places, [shares[key] for key in keys], height, color=COLOURS[index], label=label)
        ax.set_yticks(np.arange(len(keys)) + 0.4 - height / 2, keys)
        ax.invert_yaxis()
        ax.set(xlabel="Share of importance (PED-ANOVA)", xlim=(0, None))
        ax.grid(axis="y", visible=False)
        figure.legend(loc="outside lower center", ncols=len(importance))
        return save_figure(figure, path)
