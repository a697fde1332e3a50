"""``tuning.json``: what the searches of a comparison have found, on validation data."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from utils.run import write_json_atomic

Metrics = dict[str, float]
BySeed = dict[int, Metrics]
NAMES = ("acc", "nll", "ece")
"""Metrics of a run that are read."""
UNFINISHED = "unfinished"
"""Beside the tasks in the file: task -> method of the searches that have not ended, in the shape of no runs."""
REMEDY = "name the tuning.json of a comparison"


class Tuning(NamedTuple):
    """What a file holds."""

    of: dict[str, dict[str, dict[str, BySeed]]]
    """Task -> method -> setting -> seed -> metrics; a setting that diverged, or has not been run, is without seeds."""
    unfinished: Mapping[str, set[str]] | None
    """Task -> methods whose search has not ended; None in a file that does not say."""


def write(path: Path, of: Mapping[str, Mapping[str, Mapping[str, BySeed]]], unfinished: Mapping[str, set[str]]) -> None:
    """Write the file; see ``Tuning``."""
    no_runs: dict[str, BySeed] = {}
    table = {task: dict.fromkeys(sorted(methods), no_runs) for task, methods in unfinished.items()}
    write_json_atomic(path, {**of, UNFINISHED: table})


def read(path: Path) -> Tuning:
    """Read the file.

    Raises:
        ValueError: if it cannot be read, or holds something else.
    """
    try:
        table = json.loads(path.read_text())
        said = table.pop(UNFINISHED, None)
        unfinished = None if said is None else {task: set(methods.keys()) for task, methods in said.items()}
        of = {
            task: {
                method: {setting: _by_seed(runs) for setting, runs in settings.items()}
                for method, settings in methods.items()
            }
            for task, methods in table.items()
        }
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}: {REMEDY}") from error
    except (ValueError, AttributeError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"{path} is damaged or of another kind: {REMEDY}") from error
    return Tuning(of, unfinished)


def _by_seed(runs: Mapping[str, Mapping[str, float]]) -> BySeed:
    return {int(seed): {name: _number(run[name]) for name in NAMES} for seed, run in runs.items()}


def _number(value: float) -> float:
    if type(value) not in (int, float):
        raise TypeError
    return float(value)
