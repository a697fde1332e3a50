"""Stopping a hopeless trial early. Optuna's pruners serve one objective only, so the rule is this project's own."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from optuna import Study, Trial, TrialPruned
from optuna.trial import TrialState

from utils.run import RunLogger

CURVE = "validation_nll"
"""User attribute of a trial: optimiser step (as text) -> NLL."""


def too_high(nll: float, finished: Sequence[float], factor: float | None, min_trials: int) -> bool:
    """Whether a trial stops: its NLL exceeds ``factor`` times the median of finished trials at the same step.

    Args:
        nll: Intermediate validation NLL of the trial, nats; one that is not finite counts as too high.
        finished: That of the finished trials at this step.
        factor: None never stops a trial.
        min_trials: So many finished trials are needed before any is stopped.
    """
    if factor is None or len(finished) < min_trials:
        return False
    return not math.isfinite(nll) or nll > factor * median(finished)


class WatchedLogger(RunLogger):
    """A run's log that hands evaluations on and prints nothing: many trials share one output.

    Args:
        run_dir: Folder of the run.
        watch: Called with the step and the NLL of every evaluation after step 0; may raise.
    """

    def __init__(self, run_dir: str | Path, watch: Callable[[int, float], None]):
        super().__init__(run_dir, stream=io.StringIO(), resumed_step=-1)
        self._watch = watch

    def evaluation(
        self, *, epoch: int, step: int, lr: float, split: str, mc: int | str, metrics: Mapping[str, float]
    ) -> None:
        """Log as ``RunLogger`` does, then call ``watch``."""
        super().evaluation(epoch=epoch, step=step, lr=lr, split=split, mc=mc, metrics=metrics)
        if step:
            self._watch(step, metrics["nll"])


def watcher(study: Study, trial: Trial, factor: float | None, min_trials: int) -> Callable[[int, float], None]:
    """Record each intermediate NLL in the trial; raise ``TrialPruned`` when the rule says so."""
    curve: dict[str, float] = {}

    def watch(step: int, nll: float) -> None:
        curve[str(step)] = nll
        trial.set_user_attr(CURVE, curve)
        others: list[Any] = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        finished = [t.user_attrs[CURVE][str(step)] for t in others if str(step) in t.user_attrs.get(CURVE, {})]
        if too_high(nll, finished, factor, min_trials):
            raise TrialPruned(f"NLL {nll:.4f} at step {step}, median of finished trials {median(finished):.4f}")

    return watch
