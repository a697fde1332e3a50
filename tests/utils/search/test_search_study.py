"""The study: seeds by number, resumption, dead processes, budget, failures."""

import re
import threading
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from utils.locks import try_lock
from utils.search.sampler import SAMPLERS, NumberedSampler
from utils.search.study import (
    METRICS,
    VALUES,
    Worker,
    is_lost,
    load_compared,
    open_storage,
    open_study,
    points_of,
    work,
)

OBJECTIVES = ["acc", "ece"]


def objective(trial: optuna.Trial) -> list[float]:
    x, y = trial.suggest_float("x", 0, 1), trial.suggest_int("y", 1, 9)
    trial.set_user_attr(VALUES, {"x": x, "y": y})
    trial.set_user_attr(METRICS, {"acc": x, "ece": x * y, "nll": y, "brier": x})
    return [x, x * y]


def open_at(
    folder: Path, worker: Worker, kind: str = "random", seed: int = 0, alone: bool = False, **begun: Any
) -> optuna.Study:
    sampler = NumberedSampler(kind, seed, 3, worker.name)
    settings = {"search.objectives": OBJECTIVES} | begun
    return open_study(str(folder / "journal.log"), "s", OBJECTIVES, sampler, settings, folder, alone)


def run(study, worker, trials, function=objective, seconds=None, max_failures=None, said=None):
    def say(trial, reason):
        if said is not None:
            said.append((trial.state.name, reason))

    budget = {"trials": trials, "seconds": seconds, "max_failures": max_failures}
    work(study, worker, function, **budget, failures=(ValueError,), say=say)


@pytest.mark.parametrize("kind", SAMPLERS)
def test_a_study_stopped_between_trials_goes_on_as_if_it_had_not_been(tmp_path, kind):
    params = {}
    for name, parts in (("whole", (6,)), ("parts", (2, 6))):
        for until in parts:
            worker = Worker(tmp_path / name)
            run(study := open_at(tmp_path / name, worker, kind), worker, until)
            worker.close()
        params[name] = [trial.params for trial in study.trials]
    assert params["whole"] == params["parts"]
    assert len({p["x"] for p in params["whole"]}) > 3
    worker = Worker(tmp_path / "other")
    run(other := open_at(tmp_path / "other", worker, kind, seed=1), worker, 2)
    assert [t.params for t in other.trials] != params["whole"][:2]


def test_directions_and_points(tmp_path):
    worker = Worker(tmp_path)
    study = open_at(tmp_path, worker)
    run(study, worker, 3)
    assert [d.name for d in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert [(p.number, p.values["x"], p.metrics["acc"]) for p in points_of(study)] == [
        (t.number, t.params["x"], t.values[0]) for t in study.trials
    ]


def test_failures_and_pruned_trials_are_recorded_and_the_study_goes_on(tmp_path):
    worker, said = Worker(tmp_path), []
    study = open_at(tmp_path, worker)

    def troubled(trial: optuna.Trial) -> list[float]:
        if trial.number == 1:
            raise ValueError("one\nline")
        if trial.number == 2:
            raise optuna.TrialPruned("hopeless")
        return objective(trial)

    run(study, worker, 4, troubled, max_failures=2, said=said)
    assert said == [("COMPLETE", ""), ("FAIL", "one line"), ("PRUNED", "hopeless"), ("COMPLETE", "")]
    assert [p.number for p in points_of(study)] == [0, 3]
    assert not any(is_lost(trial) for trial in study.trials)


def broken(trial: optuna.Trial) -> list[float]:
    raise ValueError("no such file")


def test_failures_in_a_row_end_the_study(tmp_path):
    worker = Worker(tmp_path)
    study = open_at(tmp_path, worker)
    with pytest.raises(RuntimeError, match="2 trials in a row failed, the last with: no such file"):
        run(study, worker, 9, broken, max_failures=2)
    assert len(study.trials) == 2


@pytest.mark.parametrize("change", [{"type": "float"}, {"choices": [1, 3]}])
def test_a_study_of_failures_keeps_the_kinds_of_its_values(tmp_path, change):
    def begun(**entry: Any) -> dict[str, Any]:
        return {f"search.space.x.{key}": value for key, value in entry.items()}

    worker, entry = Worker(tmp_path), {"type": "int", "low": 0, "choices": [1, 2]}
    run(open_at(tmp_path, worker, **begun(**entry)), worker, 2, broken)
    with pytest.raises(ValueError, match=rf"study s began otherwise: search\.space\.x\.{next(iter(change))} is"):
        open_at(tmp_path, worker, alone=True, **begun(**entry | change))
    open_at(tmp_path, worker, alone=True, **begun(**entry | {"low": 1}))


def test_a_study_of_failures_alone_goes_on_with_what_was_wrong_put_right(tmp_path):
    worker = Worker(tmp_path)
    run(open_at(tmp_path, worker, file="a"), worker, 2, broken)
    other = Worker(tmp_path)
    assert not worker.is_only()
    other.close()
    assert worker.is_only()
    with pytest.raises(ValueError, match="study s began otherwise: file is 'a' there and 'b' now"):
        open_at(tmp_path, worker, file="b")
    with pytest.raises(ValueError, match=r"study s began otherwise: .*search\.objectives"):
        open_at(tmp_path, worker, alone=True, **{"search.objectives": ["nll"]})
    run(study := open_at(tmp_path, worker, alone=True, file="b"), worker, 2)
    assert [p.number for p in points_of(study)] == [2, 3], "failures in vain are not counted"
    run(study := open_at(tmp_path, worker, file="b"), worker, 2)
    assert len(study.trials) == 4
    with pytest.raises(ValueError, match="study s began otherwise: file is 'b' there and 'a' now"):
        open_at(tmp_path, worker, alone=True, file="a")


def test_failures_between_successes_are_not_in_a_row(tmp_path):
    def every_second(trial: optuna.Trial) -> list[float]:
        if trial.number % 2:
            raise ValueError("odd")
        return objective(trial)

    worker = Worker(tmp_path)
    run(study := open_at(tmp_path, worker), worker, 6, every_second, max_failures=2)
    assert len(points_of(study)) == 3


def test_a_study_goes_on_after_a_disk_was_full_in_the_middle_of_a_line(tmp_path):
    worker = Worker(tmp_path)
    run(open_at(tmp_path, worker), worker, 3)
    journal = tmp_path / "journal.log"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines) + b'{"op_code":8,"trial_')
    run(study := open_at(tmp_path, worker), worker, 5)
    assert len(points_of(study)) == 5
    assert journal.read_bytes().startswith(b"".join(lines))
    assert not list(tmp_path.glob("journal.log.*")), "the lock is let go"

    journal.write_bytes(b"".join([*lines[:2], b"garbage\n", *lines[2:]]))
    with pytest.raises(ValueError, match=r"journal.log is no journal, or damaged: line 3 is no JSON: delete that line"):
        open_at(tmp_path, worker)


@pytest.mark.parametrize(
    ("location", "why"),
    [
        ("sqlite:////nowhere/at/all.db", "unable to open database file"),
        ("foo://me:secret@bar/db", "sqlalchemy.dialects:foo"),
    ],
)
def test_a_database_that_cannot_be_opened_is_one_line(location, why):
    shown = re.escape(location.replace("me:secret@", "***@"))
    with pytest.raises(ValueError, match=rf"^{shown} cannot be opened \(.*{why}.*\): correct the URL") as error:
        open_storage(location)
    assert "\n" not in str(error.value)


def test_a_trial_that_has_just_begun_and_names_no_process_is_left_alone(tmp_path, monkeypatch):
    """Between the moment a process asks for a trial and the moment it signs it."""
    worker = Worker(tmp_path)
    study = optuna.create_study(storage=open_storage(str(tmp_path / "journal.log")))
    study.ask()
    assert worker.running_elsewhere(study) == 1
    monkeypatch.setattr("utils.search.study.NAMELESS_SECONDS", 0)
    assert worker.running_elsewhere(study) == 0
    assert is_lost(study.trials[0])


def test_an_interrupted_trial_is_lost_and_made_up_for(tmp_path):
    def interrupted(trial: optuna.Trial) -> list[float]:
        raise KeyboardInterrupt

    worker = Worker(tmp_path)
    study = open_at(tmp_path, worker)
    run(study, worker, 1)
    with pytest.raises(KeyboardInterrupt):
        run(study, worker, 3, interrupted)
    run(study, worker, 3)
    states = [trial.state for trial in study.trials]
    assert states == [TrialState.COMPLETE, TrialState.FAIL, TrialState.COMPLETE, TrialState.COMPLETE]
    assert is_lost(study.trials[1])


def test_trials_of_dead_processes_are_made_up_for_and_those_of_living_ones_count(tmp_path):
    dead, alive = Worker(tmp_path), Worker(tmp_path)
    open_at(tmp_path, dead).ask()
    held = open_at(tmp_path, alive)
    running = held.ask()
    dead.close()
    me = Worker(tmp_path)
    study = open_at(tmp_path, me)
    run(study, me, 3)
    assert [t.state.name for t in study.trials] == ["FAIL", "RUNNING", "COMPLETE", "COMPLETE"]
    assert is_lost(study.trials[0])
    assert me.running_elsewhere(study) == 1
    held.tell(running, objective(running))
    assert me.running_elsewhere(study) == 0


def test_two_processes_that_find_the_same_dead_trial_go_on_both(tmp_path, monkeypatch):
    dead, me = Worker(tmp_path), Worker(tmp_path)
    open_at(tmp_path, dead).ask()
    dead.close()
    study, others_study = open_at(tmp_path, me), open_at(tmp_path, Worker(tmp_path))
    tell = study._storage.set_trial_state_values

    def told_before(*arguments, **more):
        assert Worker(tmp_path).running_elsewhere(others_study) == 0
        return tell(*arguments, **more)

    monkeypatch.setattr(study._storage, "set_trial_state_values", told_before)
    assert me.running_elsewhere(study) == 0
    assert [trial.state.name for trial in study.trials] == ["FAIL"]


def test_the_wall_clock_ends_it(tmp_path):
    worker = Worker(tmp_path)
    study = open_at(tmp_path, worker)
    run(study, worker, None, seconds=0)
    assert study.trials == []
    run(study, worker, None, seconds=0.3)
    assert 1 <= len(study.trials) < 10_000


def test_another_setting_is_named(tmp_path):
    worker = Worker(tmp_path)
    open_at(tmp_path, worker, n_mc=4)
    open_at(tmp_path, worker, n_mc=4)
    with pytest.raises(ValueError, match="n_mc is 4 there and 5 now"):
        open_at(tmp_path, worker, n_mc=5)


def test_a_study_of_an_earlier_version_goes_on_and_names_its_sampler_from_then_on(tmp_path):
    worker = Worker(tmp_path)
    run(open_at(tmp_path, worker), worker, 1)
    later = {"search.sampler": "random", "search.seed": 0}
    study = open_at(tmp_path, worker, **later)
    assert len(study.trials) == 1
    assert study.user_attrs["fingerprint"] == {"search.objectives": OBJECTIVES} | later
    with pytest.raises(ValueError, match=r"search\.seed is 0 there and 1 now"):
        open_at(tmp_path, worker, **later | {"search.seed": 1})


def test_a_worker_whose_file_goes_before_it_is_locked_has_another(tmp_path, monkeypatch):
    """Others remove files that nobody has locked; without one it would count as dead."""
    attempts = []

    def raced(path: Path):
        lock = try_lock(path)
        attempts.append(path)
        if len(attempts) == 1:
            path.unlink()
        return lock if len(attempts) != 2 else lock.close()

    monkeypatch.setattr("utils.search.study.try_lock", raced)
    worker = Worker(tmp_path)
    assert attempts == [tmp_path / worker.name] * 3, "removed, held by another, its own"
    other = Worker(tmp_path)
    assert not other.is_only()
    worker.close()
    assert other.is_only()


def test_a_compared_study_must_exist_and_have_the_same_objectives(tmp_path):
    for location in (str(tmp_path / "journal.log"), f"sqlite:///{tmp_path}/none.db"):
        with pytest.raises(ValueError, match="no such file"):
            load_compared(location, OBJECTIVES)
        assert not list(tmp_path.iterdir())
    worker = Worker(tmp_path)
    study = open_at(tmp_path, worker)
    with pytest.raises(ValueError, match="no complete trial"):
        load_compared(str(tmp_path / "journal.log"), OBJECTIVES)
    run(study, worker, 1)
    with pytest.raises(ValueError, match=r"has the objectives \['acc', 'ece'\], this search \['nll'\]"):
        load_compared(str(tmp_path / "journal.log"), ["nll"])
    assert load_compared(str(tmp_path / "journal.log"), OBJECTIVES).study_name == "s"


def test_a_compared_study_that_no_search_made_is_refused(tmp_path):
    optuna.create_study(storage=f"sqlite:///{tmp_path}/own.db", study_name="own", directions=["minimize"])
    with pytest.raises(ValueError, match="holds a study that no search here made"):
        load_compared(f"sqlite:///{tmp_path}/own.db", OBJECTIVES)


def test_processes_open_a_new_database_one_after_another(tmp_path):
    """Two that make its tables at once fail: the second waits until the first has left ``alone``."""
    first, second, order = Worker(tmp_path / "w"), Worker(tmp_path / "w"), []

    def enter() -> None:
        with second.alone():
            order.append("second")

    thread = threading.Thread(target=enter)
    with first.alone():
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
    for worker in (first, second):
        worker.close()


def test_an_optuna_url_is_a_storage_too(tmp_path):
    worker = Worker(tmp_path)
    sampler = NumberedSampler("random", 0, 3, worker.name)
    settings = {"search.objectives": OBJECTIVES}
    study = open_study(f"sqlite:///{tmp_path}/study.db", "s", OBJECTIVES, sampler, settings, tmp_path)
    run(study, worker, 2)
    assert len(load_compared(f"sqlite:///{tmp_path}/study.db", OBJECTIVES).trials) == 2


@pytest.mark.parametrize("location", ["sqlite:///{}/study.db", "{}/journal.log"])
def test_a_name_that_is_a_number_is_found_again(tmp_path, location):
    worker = Worker(tmp_path)
    settings = {"search.objectives": OBJECTIVES}
    for count in (1, 2):
        sampler = NumberedSampler("random", 0, 3, worker.name)
        study = open_study(location.format(tmp_path), 5, OBJECTIVES, sampler, settings, tmp_path)  # type: ignore[arg-type]
        run(study, worker, count)
        assert len(study.trials) == count


def test_a_proposal_is_not_made_twice(tmp_path, monkeypatch):
    class Stubborn(optuna.samplers.RandomSampler):
        def infer_relative_search_space(self, study, trial):
            return {
                "x": optuna.distributions.FloatDistribution(0, 1),
                "y": optuna.distributions.IntDistribution(1, 9),
            }

        def sample_relative(self, study, trial, search_space):
            return {"x": 0.5, "y": 3}

    monkeypatch.setattr(NumberedSampler, "_make", lambda self, number: Stubborn(seed=number))
    run(study := open_at(tmp_path, worker := Worker(tmp_path)), worker, 4)
    params = [trial.params for trial in study.trials]
    assert params[0] == {"x": 0.5, "y": 3}
    assert len({tuple(p.values()) for p in params}) == 4
