"""Checks of the keys below ``search``, and what of a command line concerns training."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from utils.data.example import near_matches
from utils.search.figures import CROSSES
from utils.search.sampler import SAMPLERS
from utils.search.selection import SIGNS
from utils.settings import RANGES, key_of

NAMES = {"sampler": SAMPLERS, "final_points": ("selected", "front")}
LISTS = {"objectives": (tuple(SIGNS), 1), "select.rules": (tuple(CROSSES), 0)}
"""Known entries, and the fewest allowed."""
COUNTS = {
    **{"startup_trials": 1, "n_mc": 1, "seed": 0, "trials": 1, "max_failures": 1},
    **{"prune.min_trials": 1, "final_jobs": 1},
}
"""Whole numbers and their lowest value."""
NUMBERS = {"seconds": 0.0, "prune.factor": 1.0, "select.acc_within": 0.0}
"""Numbers and their lowest value."""
TEXTS: dict[str, Any] = {"name": str | int | float, "storage": str, "compare": str | None}
"""Texts, of which a name may read as a number."""
MAY_BE_NULL = ("trials", "max_failures", "seconds", "prune.factor")
NOT_TRAINING = ("search", "search_space", "paths.output_dir", "resume", "overwrite", "hydra")


def check_search(values: Mapping[str, Any]) -> None:
    """Refuse settings of a search that would fail, or mislead, only after hours. Raises ValueError naming the key."""
    search, seed, split = values["search"], values["seed"], values["eval"]["split"]
    if values["resume"] or values["overwrite"]:
        raise ValueError("a search goes on with the study it finds: leave out resume and overwrite, or name a new one")
    if split != "validation":
        raise ValueError(f"eval.split={split}: a search judges on validation data only, leave it out")
    for key, known in NAMES.items():
        if search[key] not in known:
            raise ValueError(f"unknown search.{key}={search[key]}; {near_matches(str(search[key]), known)}")
    for key, (known, fewest) in LISTS.items():
        chosen = _get(search, key)
        if not isinstance(chosen, list) or len(set(map(str, chosen))) != len(chosen) or len(chosen) < fewest:
            raise ValueError(f"search.{key}={chosen}: expected a list without repetition of {', '.join(known)}")
        for value in chosen:
            if value not in known:
                raise ValueError(f"unknown search.{key}={value}; {near_matches(str(value), known)}")
    for key, low in {**COUNTS, **NUMBERS}.items():
        value, kinds = _get(search, key), (int,) if key in COUNTS else (int, float)
        good = type(value) in kinds and low <= value < math.inf
        if not good and not (value is None and key in MAY_BE_NULL):
            what = "a whole number" if key in COUNTS else "a finite number"
            raise ValueError(f"search.{key}={value}: expected {what}, at least {low}")
    for name in SIGNS:
        value = _get(search, f"reference.{name}")
        if value is not None and not (type(value) in (int, float) and math.isfinite(value)):
            raise ValueError(f"search.reference.{name}={value}: expected a finite number or null")
    for key, types in TEXTS.items():
        if not isinstance(_get(search, key), types) or search[key] == "":
            raise ValueError(f"search.{key}={search[key]}: expected a text, or leave it out")
    if search["trials"] is None and search["seconds"] is None:
        raise ValueError("search.trials=null and search.seconds=null would never end: set one of them")
    seeds, (low, high) = search["final_seeds"], RANGES["seed"]
    good = isinstance(seeds, list) and all(type(s) is int and low <= s <= high for s in seeds)
    if not good or len(set(seeds)) != len(seeds):
        wanted = f"a list of different whole numbers from {low} to {high}, such as [1,2,3]"
        raise ValueError(f"search.final_seeds={seeds}: expected {wanted}")
    if seed in seeds:
        raise ValueError(f"search.final_seeds={seeds} holds seed={seed} of the search itself: take fresh ones")


def training_overrides(arguments: Sequence[str]) -> list[str]:
    """The arguments that ``train_script.py`` takes too; trials choose their own folder."""
    keys = {a: key_of(a) for a in arguments}
    return [a for a in arguments if not any(keys[a] == n or keys[a].startswith(f"{n}.") for n in NOT_TRAINING)]


def _get(search: Mapping[str, Any], key: str) -> Any:
    group, _, name = key.rpartition(".")
    place = search[group] if group else search
    if not (isinstance(place, Mapping) and name in place):
        raise ValueError(f"search.{key} is missing: only its value can be changed")
    return place[name]
