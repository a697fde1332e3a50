"""Pareto front, hypervolume and the rules that choose a point of the front: pure functions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SIGNS = {"acc": -1.0, "ece": 1.0, "nll": 1.0, "brier": 1.0}
"""Objectives and the sign that makes lower better."""


@dataclass(frozen=True)
class Point:
    """A finished trial: its number in the study, the values of the searched keys and the validation metrics."""

    number: int
    values: dict[str, Any]
    metrics: dict[str, float]


def costs(points: Sequence[Point], objectives: Sequence[str]) -> np.ndarray:
    """(points, objectives) of which lower is better: ACC is negated."""
    rows = [[SIGNS[name] * point.metrics[name] for name in objectives] for point in points]
    return np.array(rows, dtype=float).reshape(len(points), len(objectives))


def pareto_mask(values: np.ndarray) -> np.ndarray:
    """(n,) whether no other row is at most as large everywhere and smaller somewhere; equal rows all stay."""
    below = (values[:, None] <= values[None]).all(2) & (values[:, None] < values[None]).any(2)
    return np.logical_not(below.any(axis=0))


def pareto_front(points: Sequence[Point], objectives: Sequence[str]) -> list[Point]:
    """The points that no other dominates, in the order given."""
    return [point for point, kept in zip(points, pareto_mask(costs(points, objectives)), strict=True) if kept]


def hypervolume(values: np.ndarray, reference: np.ndarray) -> float:
    """Volume dominated by rows of costs (n, m) and bounded by ``reference`` (m,).

    Exact, by slicing along the last objective (While et al., IEEE Trans. Evol. Comput. 10(1), 2006, HSO); for the
    small fronts of a search. Rows that are not below the reference everywhere add nothing.
    """
    inside = values[(values < reference).all(1)]
    if len(inside) == 0:
        return 0.0
    if inside.shape[1] == 1:
        return float(reference[0] - inside.min())
    inside = inside[pareto_mask(inside)]
    inside = inside[np.argsort(inside[:, -1], kind="stable")]
    ends = np.append(inside[1:, -1], reference[-1])
    return sum(
        float(end - row[-1]) * hypervolume(inside[: k + 1, :-1], reference[:-1])
        for k, (row, end) in enumerate(zip(inside, ends, strict=True))
        if end > row[-1]
    )


def knee(front: Sequence[Point], objectives: Sequence[str]) -> Point:
    """The point that bulges most towards the ideal one.

    With every objective scaled to [0, 1] over the front, the greatest distance below the plane on which the
    objectives sum to 1; with two objectives that of Das (Structural Optimization 18, 1999). Ties: the earliest trial.
    """
    values = costs(front, objectives)
    low, extent = values.min(0), np.ptp(values, axis=0)
    scaled = (values - low) / np.where(extent > 0, extent, 1.0)
    return min(zip(scaled.sum(1), front, strict=True), key=lambda pair: (pair[0], pair[1].number))[1]


def lowest_nll(front: Sequence[Point], acc_within: float) -> Point:
    """The lowest NLL (nats) among points whose ACC is at most ``acc_within`` below the best."""
    best = max(point.metrics["acc"] for point in front)
    near = [point for point in front if point.metrics["acc"] >= best - acc_within - 1e-12]  # rounding of the difference
    return min(near, key=lambda point: (point.metrics["nll"], point.number))


RULES = ("lowest_nll", "knee")


def select(
    front: Sequence[Point], rules: Sequence[str], objectives: Sequence[str], acc_within: float
) -> dict[str, Point]:
    """The chosen point of each rule."""
    choices = {"lowest_nll": lambda: lowest_nll(front, acc_within), "knee": lambda: knee(front, objectives)}
    return {rule: choices[rule]() for rule in rules}
