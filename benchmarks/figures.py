"""Figures of the benchmarks, drawn from their records."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator


def draw_speed(record: dict[str, Any], baseline: str, path: Path) -> None:
    """Median time of every variant relative to ``baseline``, one group of bars per workload."""
    results = record["results"]
    workloads = [name for name in results[baseline] if name != "parameters"]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(results)
    for i, (label, row) in enumerate(results.items()):
        ratios = [row[name]["median_ms"] / results[baseline][name]["median_ms"] for name in workloads]
        places = [j + (i - (len(results) - 1) / 2) * width for j in range(len(workloads))]
        axes.bar(places, ratios, width, label=label, color=f"C{i}")
    axes.axhline(1, color="0.3", linewidth=0.8)
    lines = [name.replace(", ", "\n").replace("samples ", "samples\n") for name in workloads]
    medians = [results[baseline][name]["median_ms"] for name in workloads]
    names = [f"{name}\n{median:.0f} ms" for name, median in zip(lines, medians, strict=True)]
    axes.set_xticks(range(len(workloads)), names)
    axes.set_ylabel(f"time / {baseline}")
    axes.set_title(f"{record['command']['llm']}, {record['environment']['device']}", fontsize=10)
    axes.legend(ncols=3, fontsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=130)


def draw_sampler_cost(record: dict[str, Any], path: Path) -> None:
    """Time, and where it is known memory, of drawing all factors, against each quantity that was varied."""
    results, hidden = record["results"], record["command"]["hidden"]
    rows = list(results["layers"])
    variants = [name for name, value in rows[0].items() if isinstance(value, dict)]
    known = rows[0][variants[0]]["peak_bytes"] is not None
    measured = [("median_ms", 1.0, "time (ms)"), *([("peak_bytes", 2.0**20, "peak memory (MiB)")] if known else [])]
    names = {"layers": "layers", "r": "rank r", "m": "inducing size m", "S": "samples S"}
    figure = Figure(figsize=(12, 1.0 + 2.9 * len(measured)), layout="constrained")
    grid = figure.subplots(len(measured), len(results), sharex="col", sharey="row", squeeze=False)
    for line, (key, unit, label) in zip(grid, measured, strict=True):
        for axes, (axis, rows) in zip(line, results.items(), strict=True):
            values = [row[axis] for row in rows]
            for i, variant in enumerate(variants):
                heights = [row[variant][key] / unit for row in rows]
                axes.plot(values, heights, color=f"C{i}", marker="os^"[i], markersize=4, label=variant)
            _log_log(axes, values)
        line[0].set_ylabel(label)
    for axes, axis in zip(grid[-1], results, strict=True):
        axes.set_xlabel(names[axis])
    grid[0, 0].legend(fontsize=8, frameon=False)
    default = ", ".join(f"{axis}={_shared(results, axis)}" for axis in names)
    figure.suptitle(
        f"Drawing all factors: {default} unless varied, q and v of {hidden} x {hidden}, "
        f"{record['environment']['device']}",
        fontsize=10,
    )
    figure.savefig(path, dpi=130)


def draw_sample_error(record: dict[str, Any], path: Path) -> None:
    """Standard deviation of the NLL over repeated predictions, and its mean, against the number of samples.

    Bands are one standard error of what is drawn.
    """
    figure = Figure(figsize=(9.5, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, (kind, rows) in enumerate(record["results"].items()):
        S, sd, mean = (np.array([row[key] for row in rows]) for key in ("S", "nll_sd", "nll_mean"))
        sd_factor = np.exp([row["sd_relative_error"] for row in rows])
        mean_error = np.array([row["nll_mean_error"] for row in rows])
        if i == 0:
            guide, counts = sd[0] / np.sqrt(S), S
            left.plot(S, guide, color="0.4", linestyle="--", linewidth=1, label=r"$\propto 1/\sqrt{S}$")
        style: Any = {"color": f"C{i}", "marker": "os"[i], "markersize": 4, "label": kind}
        left.fill_between(S, sd / sd_factor, sd * sd_factor, color=f"C{i}", alpha=0.2, linewidth=0)
        left.plot(S, sd, **style)
        right.fill_between(S, mean - mean_error, mean + mean_error, color=f"C{i}", alpha=0.2, linewidth=0)
        right.plot(S, mean, **style)
    for axes in (left, right):
        _log_log(axes, counts)
    right.set_yscale("linear")
    left.set_ylabel("standard deviation of the NLL (nats)")
    right.set_ylabel("mean NLL (nats)")
    for axes in (left, right):
        axes.set_xlabel("samples S")
        axes.legend(fontsize=8, frameon=False)
    task = record["task"]
    figure.suptitle(f"{task['llm']}, {task['dset']}: {task['examples']} {task['split']} examples", fontsize=10)
    figure.savefig(path, dpi=130)


def _log_log(axes: Axes, values: Sequence[int] | np.ndarray) -> None:
    """Logarithmic axes with ticks at ``values``."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(values, [str(value) for value in values])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _shared(results: dict[str, list[dict[str, Any]]], axis: str) -> int:
    """The value that ``axis`` has where another one is varied."""
    return next(rows[0][axis] for name, rows in results.items() if name != axis)
