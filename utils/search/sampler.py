"""Samplers of proposals, seeded so that neither a restart nor a second process repeats or changes a draw."""

from collections.abc import Sequence
from typing import Any

from optuna import Study
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from utils.seeding import make_generator

SAMPLERS = ("gp", "tpe", "random")
WORKER = "worker"
"""User attribute of a trial: the process that runs it."""


class NumberedSampler(BaseSampler):
    """A sampler seeded anew by each trial's number.

    Proposals then depend on the seed, the number and the finished trials only: processes that start together differ,
    and a study that was stopped between two trials goes on as if it had not been.
    """

    def __init__(self, kind: str, seed: int, startup_trials: int, worker: str):
        self._kind, self._seed, self._startup, self._worker = kind, seed, startup_trials, worker
        self._inner = self._make(0)

    def _make(self, number: int) -> BaseSampler:
        seed = make_generator(self._seed, "search", number).initial_seed() % 2**32
        if self._kind == "gp":
            return GPSampler(seed=seed, n_startup_trials=self._startup, warn_independent_sampling=False)
        if self._kind == "tpe":
            return TPESampler(seed=seed, n_startup_trials=self._startup)
        return RandomSampler(seed=seed)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Seed for this trial, and mark it as this process's before the proposal is computed."""
        study._storage.set_trial_user_attr(trial._trial_id, WORKER, self._worker)
        self._inner = self._make(trial.number)
        self._inner.before_trial(study, trial)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, Any]:
        """As the sampler chosen does."""
        return self._inner.infer_relative_search_space(study, trial)

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, Any]) -> dict[str, Any]:
        """As the sampler chosen does, but no proposal of all values that another trial has or had: then each value is
        drawn independently, as random and tree-structured samplers always do.

        Near the end of a search proposals gather at the bounds of the space, and a run repeated tells nothing.
        """
        proposed = self._inner.sample_relative(study, trial, search_space)
        others = (other.params for other in study.get_trials(deepcopy=False) if other.number != trial.number)
        return {} if proposed and any(proposed == params for params in others) else proposed

    def sample_independent(self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: Any) -> Any:
        """As the sampler chosen does."""
        return self._inner.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """As the sampler chosen does."""
        self._inner.after_trial(study, trial, state, values)
