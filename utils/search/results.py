"""Tables of a search: front.csv and front.md, and the test values of points trained again."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.markdown import markdown_table
from utils.run import RELIABILITY_FILE, read_metrics, write_csv_atomic, write_text_atomic
from utils.search.selection import SIGNS, Point

Tests = Mapping[int, Sequence[Mapping[str, float]]]
"""Number of a trial -> test metrics of its runs with fresh seeds."""


def final_test(run_dir: Path) -> dict[str, float] | None:
    """Test metrics of a finished run under its method's own prediction; None if it has not finished."""
    if not (run_dir / "metrics.jsonl").is_file() or not (run_dir / RELIABILITY_FILE).is_file():
        return None
    records = [r for r in read_metrics(run_dir) if r["kind"] == "final" and r["split"] == "test"]
    own = [r for r in records if r["mc"] != "zero_shot"]
    return {name: own[0][name] for name in SIGNS} if own else None


def mean_sd(runs: Sequence[Mapping[str, float]], name: str) -> tuple[float, float]:
    """Mean and standard deviation (n - 1; 0 for one run) of a metric over runs."""
    values = [run[name] for run in runs]
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def write_front(folder: Path, front: Sequence[Point], selected: Mapping[str, Point], tests: Tests) -> list[Path]:
    """Write front.csv (full precision) and front.md, in the order of falling validation ACC."""
    rows = [_row(p, selected, tests) for p in sorted(front, key=lambda p: (-p.metrics["acc"], p.number))]
    names = list(dict.fromkeys(name for row in rows for name in row))
    paths = [folder / "front.csv", folder / "front.md"]
    write_csv_atomic(paths[0], names, rows)
    write_text_atomic(paths[1], markdown_table(names, [[_short(row.get(name, "")) for name in names] for row in rows]))
    return paths


def _row(point: Point, selected: Mapping[str, Point], tests: Tests) -> dict[str, Any]:
    rules = "; ".join(rule for rule, chosen in selected.items() if chosen.number == point.number)
    row: dict[str, Any] = {"trial": point.number, "selected": rules}
    row |= {f"validation_{name}": point.metrics[name] for name in SIGNS}
    if runs := tests.get(point.number):
        row["test_runs"] = len(runs)
        for name in SIGNS:
            row[f"test_{name}"], row[f"test_{name}_sd"] = mean_sd(runs, name)
    return row | point.values


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split()).replace("|", "\\|")
