"""The rule that stops a trial, and what a watched run reports."""

import math

import optuna
import pytest

from utils.run import read_metrics
from utils.search.pruning import CURVE, WatchedLogger, too_high, watcher


@pytest.mark.parametrize(
    ("nll", "finished", "factor", "min_trials", "stops"),
    [
        (1.51, [1.0, 0.5, 9.0], 1.5, 3, True),  # median 1.0
        (1.50, [1.0, 0.5, 9.0], 1.5, 3, False),  # not above
        (1.51, [1.0, 0.5, 9.0], 1.5, 4, False),  # too few finished
        (1.51, [1.0, 0.5, 9.0], None, 3, False),
        (1.6, [1.0, 1.2], 1.5, 2, False),  # median of an even number: 1.1
        (math.nan, [1.0], 1.5, 1, True),
        (math.inf, [1.0], 1.5, 1, True),
    ],
)
def test_rule(nll, finished, factor, min_trials, stops):
    assert too_high(nll, finished, factor, min_trials) is stops


def test_a_watched_log_hands_evaluations_on_and_prints_nothing(tmp_path, capsys):
    seen = []
    log = WatchedLogger(tmp_path, lambda step, nll: seen.append((step, nll)))
    for step in (0, 5):
        metrics = {"nll": 0.5 + step, "acc": 0.5, "ece": 0.1, "brier": 0.2}
        log.evaluation(epoch=1, step=step, lr=0.1, split="validation", mc="mean", metrics=metrics)
    log.close()
    assert seen == [(5, 5.5)], "step 0 is the untrained model"
    assert [record["step"] for record in read_metrics(tmp_path)] == [0, 5]
    assert capsys.readouterr().out == ""


def test_only_complete_trials_at_the_same_step_are_compared():
    study = optuna.create_study(directions=["minimize", "minimize"])

    def run(curve: dict[int, float], state: optuna.trial.TrialState) -> None:
        trial = study.ask()
        watch = watcher(study, trial, 1.5, 2)
        for step, nll in curve.items():
            watch(step, nll)
        complete = state == optuna.trial.TrialState.COMPLETE
        study.tell(trial, (0.0, 0.0) if complete else None, state=state)

    complete = optuna.trial.TrialState.COMPLETE
    run({2: 1.0}, complete)
    run({2: 100.0}, optuna.trial.TrialState.FAIL)
    run({2: 10.0}, complete)  # one finished trial so far: not stopped
    run({3: 99.0}, complete)  # nobody to compare with at step 3
    with pytest.raises(optuna.TrialPruned, match=r"NLL 9\.0000 at step 2, median of finished trials 5\.5000"):
        run({1: 99.0, 2: 9.0}, complete)  # 1.5 * median(1, 10) = 8.25
    assert study.trials[-1].user_attrs[CURVE] == {"1": 99.0, "2": 9.0}
