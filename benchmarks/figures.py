"""Figures of the benchmarks, drawn from their records."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


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
    names = [f"{name}\n{results[baseline][name]['median_ms']:.0f} ms" for name in workloads]
    axes.set_xticks(range(len(workloads)), names)
    axes.set_ylabel(f"time / {baseline}")
    axes.set_title(f"{record['command']['llm']}, {record['environment']['device']}", fontsize=10)
    axes.legend(ncols=3, fontsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=130)
