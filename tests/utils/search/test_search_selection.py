"""Front, hypervolume and choices against brute force and cases worked by hand."""

import itertools

import numpy as np
import pytest

from utils.search.selection import Point, costs, hypervolume, knee, lowest_nll, pareto_front, pareto_mask, select


def point(number: int, acc: float, ece: float, nll: float = 0.0) -> Point:
    return Point(number, {}, {"acc": acc, "ece": ece, "nll": nll, "brier": 2 * nll})


def test_accuracy_is_a_cost_with_its_sign_changed():
    assert costs([point(0, 0.75, 0.25, 2.0)], ("nll", "acc", "brier", "ece")).tolist() == [[2.0, -0.75, 4.0, 0.25]]


@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_front_equals_the_definition(m):
    values = np.random.default_rng(m).integers(0, 4, (40, m))  # a coarse grid: with ties and repeated rows
    expected = []
    for row in values:
        expected.append(not any(all(o <= r) and any(o < r) for o, r in ((other, row) for other in values)))
    assert pareto_mask(values).tolist() == expected
    assert 0 < sum(expected) < 40


def test_equal_points_both_stay_on_the_front():
    points = [point(0, 0.8, 0.1), point(1, 0.8, 0.1), point(2, 0.8, 0.2), point(3, 0.9, 0.2), point(4, 0.7, 0.2)]
    assert [p.number for p in pareto_front(points, ("acc", "ece"))] == [0, 1, 3]


@pytest.mark.parametrize("m", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_hypervolume_counts_the_unit_cells_it_dominates(m, seed):
    """On an integer grid the volume is the number of cells whose lower corner some point dominates."""
    values = np.random.default_rng(seed).integers(0, 7, (9, m))  # some beyond the corner at 5
    cells = itertools.product(range(5), repeat=m)
    expected = sum(bool((values <= np.array(cell)).all(1).any()) for cell in cells)
    assert hypervolume(values.astype(float), np.full(m, 5.0)) == expected


def test_hypervolume_without_points_inside_is_zero():
    assert hypervolume(np.empty((0, 2)), np.ones(2)) == 0.0
    assert hypervolume(np.array([[1.0, 0.0], [0.0, 2.0]]), np.ones(2)) == 0.0


def test_knee_is_the_greatest_distance_below_the_line_through_the_extremes():
    # scaled costs (x, y): (0, 1), (0.25, 0.5), (0.5, 0.4), (1, 0); sums 1, 0.75, 0.9, 1
    front = [point(n, 1 - x * 0.2, y * 0.1) for n, (x, y) in enumerate([(0, 1), (0.25, 0.5), (0.5, 0.4), (1, 0)])]
    assert knee(front, ("acc", "ece")).number == 1
    ends = [np.array([0.0, 1.0]), np.array([1.0, 0.0])]
    direction = (ends[1] - ends[0]) / np.linalg.norm(ends[1] - ends[0])
    scaled = np.array([[0, 1], [0.25, 0.5], [0.5, 0.4], [1, 0]])
    distance = [abs(direction[0] * (s - ends[0])[1] - direction[1] * (s - ends[0])[0]) for s in scaled]
    assert int(np.argmax(distance)) == 1


def test_knee_ignores_an_objective_without_extent_and_breaks_ties_by_number():
    assert knee([point(7, 0.8, 0.1, 0.5)], ("acc", "ece", "nll")).number == 7
    assert knee([point(5, 0.9, 0.2, 0.5), point(3, 0.8, 0.1, 0.5)], ("acc", "ece", "nll")).number == 3


@pytest.mark.parametrize(("within", "number"), [(0.0, 0), (0.009, 0), (0.01, 1), (0.03, 2)])
def test_lowest_nll_within_a_distance_of_the_best_accuracy(within, number):
    front = [point(0, 0.90, 0.3, 0.5), point(1, 0.89, 0.2, 0.4), point(2, 0.87, 0.1, 0.3), point(3, 0.5, 0.0, 0.1)]
    assert lowest_nll(front, within).number == number
    assert select(front, ["lowest_nll"], ("acc", "nll"), within)["lowest_nll"].number == number


def test_select_gives_each_rule_its_own_point():
    front = [point(0, 0.9, 0.3, 0.1), point(1, 0.88, 0.1, 0.2), point(2, 0.6, 0.0, 0.4)]
    assert {rule: p.number for rule, p in select(front, ["knee", "lowest_nll"], ("acc", "ece"), 0.01).items()} == {
        "knee": 1,
        "lowest_nll": 0,
    }
