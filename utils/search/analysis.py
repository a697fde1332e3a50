"""What a study as a whole tells: hypervolume over its trials, and the importance of the searched keys."""

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
from optuna import Study
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState

from utils.search.selection import SIGNS, costs, hypervolume, pareto_mask
from utils.search.study import is_lost, points_of

FEWEST = 4
"""Complete trials below which nothing is said about importance."""


def hypervolume_curves(
    studies: Mapping[str, Study], objectives: Sequence[str], reference: Mapping[str, float | None]
) -> dict[str, list[float]]:
    """Hypervolume after each trial of each study, towards one common corner.

    Pruned and failed trials count as trials and add nothing; those lost with their process, or running, do not count.

    Args:
        studies: Studies of the same objectives; each needs a complete trial.
        objectives: Names in ``SIGNS``, in the studies' order.
        reference: The corner; where it is null, the worst value of all these studies.
    """
    points = {label: points_of(study) for label, study in studies.items()}
    corner = np.concatenate([costs(some, objectives) for some in points.values()]).max(0)
    for index, name in enumerate(objectives):
        given = reference[name]
        corner[index] = corner[index] if given is None else SIGNS[name] * given
    curves = {}
    for label, study in studies.items():
        values, numbers = costs(points[label], objectives), np.array([point.number for point in points[label]])
        ended = [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]
        counted = [trial.number for trial in ended if not is_lost(trial)]
        curves[label] = _running_hypervolume(values, numbers, counted, corner)
    return curves


def _running_hypervolume(
    values: np.ndarray, numbers: np.ndarray, counted: Sequence[int], corner: np.ndarray
) -> list[float]:
    """After each counted trial that of the front so far, computed anew only where a trial has moved the front."""
    curve, front, volume = [], values[:0], 0.0
    for number in counted:
        tried = np.vstack([front, values[numbers == number]])
        kept = pareto_mask(tried)
        if kept[len(front) :].any():
            front = tried[kept]
            volume = hypervolume(front, corner)
        curve.append(volume)
    return curve


def importances(study: Study, objectives: Sequence[str]) -> dict[str, dict[str, float]]:
    """Share of each searched key in reaching the best trials of each objective (PED-ANOVA, Watanabe et al., 2023).

    Empty with fewer than ``FEWEST`` complete trials.
    """
    if len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))) < FEWEST:
        return {}
    found = {}
    for index, name in enumerate(objectives):

        def cost(trial: FrozenTrial, index: int = index, sign: float = SIGNS[name]) -> float:
            return sign * trial.values[index]

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*low `target` values", category=UserWarning)  # as cost has them
            warnings.filterwarnings("ignore", message="Target and region quantiles", category=UserWarning)  # few trials
            found[name.upper()] = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator(), target=cost)
    return found
