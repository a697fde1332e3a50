"""The search space: which configuration keys vary, read from YAML, proposed by Optuna, written as overrides."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from optuna import Trial

from utils.data.example import near_matches
from utils.settings import in_quotes

FIELDS = {
    "float": ({"low", "high"}, {"log", "step"}),
    "int": ({"low", "high"}, {"log", "step"}),
    "categorical": ({"choices"}, set()),
    "link": ({"to"}, {"times"}),
}
"""Fields that an entry of each type needs, and those it may have."""
Space = dict[str, dict[str, Any]]


def read_space(tree: Mapping[str, Any]) -> Space:
    """Dotted configuration keys and their entries, from the nested form of ``configs/search_space``.

    An entry is ``{type: float | int, low, high[, log][, step]}``, ``{type: categorical, choices}`` or
    ``{type: link, to: KEY[, times]}``, whose value is ``times`` that of another entry.

    Raises:
        ValueError: If nothing is to be searched, or an entry is malformed; the message names its key.
    """
    space = dict(_entries(tree))
    for key, entry in space.items():
        kind = str(entry["type"])
        if kind not in FIELDS:
            raise ValueError(f"search.space.{key}: unknown type {kind}; {near_matches(kind, tuple(FIELDS))}")
        needed, allowed = FIELDS[kind]
        given = set(entry) - {"type"}
        if not needed <= given <= needed | allowed:
            wanted = f"takes {sorted(needed)}" + (f", and may take {sorted(allowed)}" if allowed else "")
            raise ValueError(f"search.space.{key} has {sorted(given)}: type={kind} {wanted}")
        if kind in ("float", "int"):
            _check_range(key, entry, int if kind == "int" else (int, float))
        elif kind == "categorical":
            _check_choices(key, entry["choices"])
        elif kind == "link" and space.get(entry["to"], {}).get("type") not in ("float", "int"):
            raise ValueError(f"search.space.{key}.to={entry['to']}: expected a float or int key of search.space")
    if not any(entry["type"] != "link" for entry in space.values()):
        raise ValueError("search.space is empty: choose a file of configs/search_space, or add entries")
    return space


def suggest(trial: Trial, space: Space) -> dict[str, Any]:
    """The values of a trial for every key of the space."""
    for key, entry in space.items():
        options = {name: value for name, value in entry.items() if name in ("low", "high", "log", "step")}
        if entry["type"] == "float":
            trial.suggest_float(key, **options)
        elif entry["type"] == "int":
            trial.suggest_int(key, **options)
        elif entry["type"] == "categorical":
            trial.suggest_categorical(key, [_stored(choice) for choice in entry["choices"]])
    return values_of(trial.params, space)


def first_values(space: Space) -> dict[str, Any]:
    """One point of the space: every low end or first choice."""
    params = {key: entry["low"] for key, entry in space.items() if "low" in entry}
    params |= {key: _stored(entry["choices"][0]) for key, entry in space.items() if "choices" in entry}
    return values_of(params, space)


def values_of(params: Mapping[str, Any], space: Space) -> dict[str, Any]:
    """Configuration values of the parameters that a study has stored."""
    values = {}
    for key, entry in space.items():
        if entry["type"] == "link":
            value = params[entry["to"]]
            values[key] = value * entry["times"] if "times" in entry else value
        elif entry["type"] == "categorical":
            values[key] = next(choice for choice in entry["choices"] if _stored(choice) == params[key])
        else:
            values[key] = params[key]
    return values


def overrides_of(values: Mapping[str, Any], configs: Path) -> list[str]:
    """Command-line overrides; a key that is a folder of ``configs`` chooses a file of that group."""
    text = {k: v if (configs / k).is_dir() else _written(v) for k, v in values.items()}
    return [f"{key}={value}" for key, value in text.items()]


def _written(value: Any) -> str:
    if isinstance(value, str):
        return in_quotes(value)
    if isinstance(value, list):
        return f"[{','.join(map(_written, value))}]"
    return json.dumps(value)


def _entries(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    for name, value in tree.items():
        if not isinstance(value, Mapping):
            raise ValueError(
                f"search.space.{prefix}{name}={value}: expected an entry such as {{type: int, low: 1, high: 4}}"
            )
        if isinstance(value.get("type"), str):
            yield prefix + name, dict(value)
        else:
            yield from _entries(value, f"{prefix}{name}.")


def _check_range(key: str, entry: Mapping[str, Any], kinds: Any) -> None:
    low, high = entry["low"], entry["high"]

    def is_number(value: Any) -> bool:
        return isinstance(value, kinds) and not isinstance(value, bool)

    if not (is_number(low) and is_number(high)) or not low < high or (entry.get("log") and low <= 0):
        wanted = "low < high of that type, both above 0 with log"
        raise ValueError(f"search.space.{key}: low={low}, high={high}: expected {wanted}")
    if not isinstance(entry.get("log", False), bool):
        raise ValueError(f"search.space.{key}: log={entry['log']}: expected true or false")
    if "step" in entry:
        step = entry["step"]
        if not is_number(step) or not 0 < step <= high - low:
            raise ValueError(f"search.space.{key}: step={step}: expected one of that type, above 0, at most high - low")
        if entry.get("log"):
            raise ValueError(f"search.space.{key} has both log and step: leave one out")


def _check_choices(key: str, choices: Any) -> None:
    if not (isinstance(choices, list) and choices):
        raise ValueError(f"search.space.{key}.choices={choices}: expected a list of values")
    if "${" in str(choices):
        remedy = "${ begins a reference in a configuration: choose values without it"
        raise ValueError(f"search.space.{key}.choices={choices}: {remedy}")


def _stored(choice: Any) -> Any:
    """A choice as a study stores it: lists as JSON text."""
    return json.dumps(choice) if isinstance(choice, list) else choice
