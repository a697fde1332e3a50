"""The Optuna study: storage, several processes at once, budget, and trials whose process died."""

import contextlib
import json
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

import optuna
from optuna import Study, Trial, TrialPruned
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, JournalStorage, get_storage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from utils.locks import try_lock, wait_for_lock
from utils.search.place import check_place, keep_place
from utils.search.sampler import WORKER
from utils.search.selection import SIGNS, Point
from utils.settings import differing

REASON, FINGERPRINT, VALUES, METRICS = "reason", "fingerprint", "values", "metrics"
"""User attributes of trials and studies."""
NOT_ALWAYS_RECORDED = ("search.sampler", "search.seed")
"""Settings that studies of earlier versions do not name: they go on with any, and name them from then on."""
_IS_FIXED = re.compile(r"search\.space\..*\.(type|choices)$")
"""Settings that Optuna keeps for a study's life: what kind of values a key may have."""
NAMELESS_SECONDS = 60
"""A running trial that after so long bears no worker's name was lost in its first moment."""


def open_storage(location: str) -> BaseStorage:
    """A database, by a URL as Optuna takes it, or a journal file.

    Raises:
        ValueError: If a line of the file is damaged, or no database can be opened there.
    """
    if "://" in location:
        try:
            return get_storage(location)
        except (SQLAlchemyError, ImportError) as error:
            why = str(error).partition("\n")[0]
            shown = re.sub("://[^/@]*@", "://***@", location)
            raise ValueError(f"{shown} cannot be opened ({why}): correct the URL, or name a journal file") from error
    Path(location).parent.mkdir(parents=True, exist_ok=True)
    try:
        return JournalStorage(JournalFileBackend(location))
    except ValueError as error:  # Optuna's names neither the file nor the line
        raise ValueError(f"{location} is no journal, or damaged: {_damage(Path(location)) or error}") from error


def mend(journal: Path) -> None:
    """Cut off the half line that a full disk or a kill has left at the end: the next would be joined to it."""
    if not journal.is_file() or journal.read_bytes()[-1:] in (b"", b"\n"):
        return
    lock = JournalFileSymlinkLock(str(journal))
    lock.acquire()
    try:
        with journal.open("r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)  # all of it, if whoever wrote has come to the end meanwhile
    finally:
        lock.release()


def _damage(journal: Path) -> str:
    for number, line in enumerate(journal.read_bytes().splitlines(), start=1):
        try:
            json.loads(line)
        except ValueError:
            return f"line {number} is no JSON: delete that line"
    return ""


def open_study(
    location: str,
    name: str,
    objectives: Sequence[str],
    sampler: BaseSampler,
    fingerprint: Mapping[str, Any],
    folder: Path,
    alone: bool = False,
) -> Study:
    """Create the study, or go on with it.

    Args:
        location: Journal file or URL.
        name: Of the study.
        objectives: Names in ``SIGNS``.
        sampler: Proposes trials.
        fingerprint: Flat settings that must be those the study began with.
        folder: Where the study works, and no other.
        alone: Whether no other process works on it. Then it may have other settings after all, but for its objectives
            and what kind of values a key may have, if all of its trials have failed: what was wrong is put right.

    Raises:
        ValueError: If the study began with other settings or in another folder, or if the folder holds another study.
    """
    if "://" not in location:
        mend(Path(location))
    directions: Any = ["maximize" if SIGNS[objective] < 0 else "minimize" for objective in objectives]
    storage = open_storage(location)
    summaries = {str(s.study_name): s for s in optuna.get_all_study_summaries(storage, include_best_trial=False)}
    name = str(name)  # a number to Hydra, maybe, and so in a journal
    known = summaries.get(name)
    stored, attributes = (known.study_name, known.user_attrs) if known else (name, None)
    check_place(folder, location, name, attributes)
    later = {key: value for key, value in fingerprint.items() if key in NOT_ALWAYS_RECORDED}
    begun = later | (attributes or {}).get(FINGERPRINT, fingerprint)
    kept = ["search.objectives", *(key for key in begun.keys() & fingerprint.keys() if _IS_FIXED.match(key))]
    may_differ = alone and all(begun[key] == fingerprint[key] for key in kept)
    others = differing(begun, fingerprint)
    if others and not (may_differ and _in_vain(optuna.load_study(study_name=stored, storage=storage))):
        remedy = "go on with the settings there, or use another search.name and paths.output_dir"
        raise ValueError(f"study {name} began otherwise: {', '.join(others)}; {remedy}")
    study = optuna.create_study(
        storage=storage, sampler=sampler, study_name=stored, directions=directions, load_if_exists=True
    )
    if study.user_attrs.get(FINGERPRINT) != fingerprint:
        study.set_user_attr(FINGERPRINT, dict(fingerprint))
    keep_place(folder, location, study)
    return study


def _in_vain(study: Study) -> int:
    """How many trials there are if all have failed, else 0."""
    trials = study.get_trials(deepcopy=False)
    return len(trials) if all(trial.state == TrialState.FAIL for trial in trials) else 0


def load_compared(location: str, objectives: Sequence[str]) -> Study:
    """The study in a storage that holds exactly one, of these objectives; raises ValueError otherwise."""
    path = Path(location.removeprefix("sqlite:///").partition("?")[0])  # SQLite would make it
    if ("://" not in location or location.startswith("sqlite:///")) and not path.is_file():
        raise ValueError(f"search.compare={location}: no such file; name the journal.log of another search")
    storage = open_storage(location)
    names = optuna.get_all_study_names(storage)
    if len(names) != 1:
        raise ValueError(f"search.compare={location} holds {len(names)} studies: expected one")
    study = optuna.load_study(study_name=names[0], storage=storage)
    if FINGERPRINT not in study.user_attrs:
        raise ValueError(
            f"search.compare={location} holds a study that no search here made: name that of another search"
        )
    if (others := study.user_attrs[FINGERPRINT]["search.objectives"]) != list(objectives):
        raise ValueError(f"search.compare={location} has the objectives {others}, this search {list(objectives)}")
    if not points_of(study):
        raise ValueError(f"search.compare={location} has no complete trial yet")
    return study


class Worker:
    """This process among those that work on a study; a file lock, which ends with the process, tells it is alive."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.name = folder, uuid.uuid4().hex
        self._lock = _held(folder / self.name)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep the others waiting: databases are made by one process at a time."""
        with wait_for_lock(self.folder / "opening"):
            yield

    def is_only(self) -> bool:
        """Whether no other process works on the study."""
        others = [path.name for path in self.folder.glob("?" * len(self.name)) if path.name != self.name]
        return not any(map(self._is_alive, others))

    def close(self) -> None:
        """Leave the study."""
        (self.folder / self.name).unlink(missing_ok=True)
        self._lock.close()

    def running_elsewhere(self, study: Study) -> int:
        """Fail the running trials of dead processes; returns how many run in others that live."""
        alive = 0
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            owner, started = trial.user_attrs.get(WORKER), trial.datetime_start
            young = started is not None and (datetime.now() - started).total_seconds() < NAMELESS_SECONDS
            if self._is_alive(owner) if owner else young:
                alive += 1
            else:
                with contextlib.suppress(UpdateFinishedTrialError):  # another process has just done so
                    study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
        return alive

    def _is_alive(self, owner: str) -> bool:
        path = self.folder / owner
        if not path.exists():
            return False
        if held := try_lock(path):
            path.unlink(missing_ok=True)
            held.close()
        return held is None


def _held(path: Path) -> TextIO:
    """Lock a file of one's own: others remove what nobody has locked, so between its making and its locking too."""
    while True:
        if lock := try_lock(path):
            if os.fstat(lock.fileno()).st_nlink:
                return lock
            lock.close()


def is_lost(trial: FrozenTrial) -> bool:
    """Whether the trial ended with its process, not by itself."""
    return trial.state == TrialState.FAIL and REASON not in trial.user_attrs


def points_of(study: Study) -> list[Point]:
    """The complete trials in order."""
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return [Point(t.number, t.user_attrs[VALUES], t.user_attrs[METRICS]) for t in done]


def work(
    study: Study,
    worker: Worker,
    objective: Callable[[Trial], Sequence[float]],
    *,
    trials: int | None,
    seconds: float | None,
    max_failures: int | None,
    failures: tuple[type[Exception], ...],
    say: Callable[[FrozenTrial, str], None],
) -> None:
    """Run trials until the study has ``trials``, or ``seconds`` have passed; the trial in progress ends first.

    Args:
        study: May be worked on by other processes.
        worker: This process.
        objective: Runs a trial; ``TrialPruned`` records it as pruned, one of ``failures`` as failed.
        trials: Complete, pruned, failed and running ones together, but not those lost with their process, nor those
            that had failed before when nothing had come of any.
        seconds: Wall-clock time of this process.
        max_failures: RuntimeError after so many failures in a row, with the last one's message.
        failures: Errors that fail one trial only.
        say: Called with each finished trial and the reason why it was pruned or failed.
    """
    deadline = time.monotonic() + (float("inf") if seconds is None else seconds)
    in_a_row, in_vain = 0, _in_vain(study)
    while time.monotonic() < deadline:
        worker.running_elsewhere(study)
        counted = [t for t in study.get_trials(deepcopy=False)[in_vain:] if not is_lost(t)]
        if trials is not None and len(counted) >= trials:
            return
        trial = study.ask()
        values, state, reason = None, TrialState.FAIL, ""
        try:
            values, state = objective(trial), TrialState.COMPLETE
        except TrialPruned as stop:
            state, reason = TrialState.PRUNED, str(stop)
        except failures as error:
            reason = " ".join(str(error).split()) or type(error).__name__
        finally:  # an interrupt ends here too: failed, without a reason
            if reason:
                trial.set_user_attr(REASON, reason)
            done = study.tell(trial, values, state=state)
        say(done, reason)
        in_a_row = in_a_row + 1 if state == TrialState.FAIL else 0
        if max_failures is not None and in_a_row >= max_failures:
            raise RuntimeError(f"{in_a_row} trials in a row failed, the last with: {reason}; see search.max_failures")
