"""What every setting that a comparison tried gives on validation data: how much hangs on finding the right one.

    python -m benchmarks.tried outputs/comparison/tuning.json --out benchmarks/results/comparison

Writes tried.md (per task and method the median over the settings, and the worst, of NLL and ECE; and the setting of
highest accuracy; how many diverged or were not run, which the others leave out) and tried.png (ACC against ECE, a point
per setting). A setting counts once, with the mean over the seeds it was trained with.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

from benchmarks import tuning
from benchmarks.options import one_line_errors
from benchmarks.tuning import NAMES, REMEDY, BySeed
from utils.markdown import markdown_table
from utils.plots import STYLE, TITLES, line_look, save_figure
from utils.report_figures import panel_grid
from utils.run import write_text_atomic


class Found(NamedTuple):
    """What the settings of a method came to."""

    metrics: list[dict[str, float]]
    """The means of each setting that has a result."""
    missing: int
    """How many diverged or were not run."""


Tried = dict[str, dict[str, Found]]
"""By task and method."""
FOREMOST = "sgp"
"""The method drawn above the others."""
LOOK = {"marker": "s", "color": "#F0E442", "markersize": 9, "markeredgecolor": "black"}
"""And how."""
LOWEST = 0.15
"""Settings whose accuracy is so much below the best of the task are left out of the drawing."""


def read(path: Path) -> Tried:
    """What a ``tuning.json`` holds. Tasks without a run are left out.

    Raises:
        ValueError: if the file cannot be read, holds something else, or no run.
    """

    def found(settings: dict[str, BySeed]) -> Found:
        whole = [list(runs.values()) for runs in settings.values() if runs]
        metrics = [{name: statistics.mean(run[name] for run in runs) for name in NAMES} for runs in whole]
        return Found(metrics, len(settings) - len(whole))

    table = {
        task: {method: own for method, settings in of.items() if (own := found(settings)).metrics}
        for task, of in tuning.read(path).of.items()
    }
    if not any(table.values()):
        raise ValueError(f"{path} has no finished run: {REMEDY} that has begun")
    return {task: of for task, of in table.items() if of}


def markdown(tried: Tried) -> str:
    """NLL in nats; ACC and ECE in per cent."""
    head = ["task", "method", "settings", "no result", "NLL, median", "NLL, worst", "ECE %, median", "ECE %, worst"]
    head.append("most accurate: ACC % / NLL / ECE %")
    rows = []
    for task, of in tried.items():
        for method, (found, missing) in of.items():
            nll, ece = [m["nll"] for m in found], [100 * m["ece"] for m in found]
            best = min(found, key=lambda m: (-m["acc"], m["nll"]))
            cells = [f"{statistics.median(nll):.3f}", f"{max(nll):.3f}"]
            cells += [f"{statistics.median(ece):.1f}", f"{max(ece):.1f}"]
            most = f"{100 * best['acc']:.1f} / {best['nll']:.3f} / {100 * best['ece']:.1f}"
            rows.append([task, method, str(len(found)), str(missing), *cells, most])
    return markdown_table(head, rows)


def draw(tried: Tried, path: Path) -> Path:
    """A panel per task; ``FOREMOST`` last."""
    names = sorted({method for of in tried.values() for method in of}, key=lambda name: (name == FOREMOST, name))
    with matplotlib.rc_context(STYLE):
        figure, panels = panel_grid(len(tried), 3.6, 3.3)
        for ax, (task, of) in zip(panels, tried.items(), strict=True):
            best = max(m["acc"] for found in of.values() for m in found.metrics)
            for index, name in enumerate(names):
                points = [m for m in of.get(name, Found([], 0)).metrics if m["acc"] >= best - LOWEST]
                look = LOOK if name == FOREMOST else line_look(index)
                x, y = [m["ece"] for m in points], [m["acc"] for m in points]
                ax.plot(x, y, linestyle="", alpha=0.8, label=name, zorder=3 + index, **look)
            ax.set(title=task, xlabel=TITLES["ece"], ylabel=TITLES["acc"])
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        return save_figure(figure, path)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tuning", type=Path, help="tuning.json of benchmarks.comparison")
    parser.add_argument("--tasks", nargs="+", help="all if absent")
    parser.add_argument("--out", type=Path, default=Path())
    arguments = parser.parse_args(argv)
    with one_line_errors():
        tried = read(arguments.tuning)
        if missing := set(arguments.tasks or ()) - tried.keys():
            parser.error(f"{arguments.tuning} has no runs of {', '.join(sorted(missing))}: it has {', '.join(tried)}")
        tried = {task: of for task, of in tried.items() if task in (arguments.tasks or tried)}
        write_text_atomic(arguments.out / "tried.md", markdown(tried))
        draw(tried, arguments.out / "tried.png")


if __name__ == "__main__":
    main()
