"""Write a chosen configuration as a file for ``configs/experiment``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra
from omegaconf import OmegaConf

from utils.run import write_text_atomic
from utils.settings import compose, flat, plain

LEFT_OUT = ("paths", "resume", "overwrite")
"""Keys and groups that belong to a run, not to its setting."""


def experiment_of(configs: Path, overrides: list[str]) -> dict[str, Any]:
    """What an experiment file must hold so that it alone does what the overrides do: ``defaults``, then keys.

    Raises:
        ValueError: If the overrides delete a key, which no such file can do.
    """
    with hydra.initialize_config_dir(str(configs), version_base="1.3"):
        default = hydra.compose("train", return_hydra_config=True).hydra.runtime.choices
        choices = hydra.compose("train", overrides, return_hydra_config=True).hydra.runtime.choices
    groups = {
        name: choice
        for name, choice in choices.items()
        if name not in ("experiment", *LEFT_OUT) and not name.startswith("hydra/") and choice != default.get(name)
    }
    tree = plain(compose(configs, overrides), resolve=False)
    wanted = flat(tree)
    given = flat(plain(compose(configs, [f"{name}={choice}" for name, choice in groups.items()]), resolve=False))
    if missing := [key for key in given if not _is_inside(key, tree)]:
        raise ValueError(f"an experiment file cannot leave out {missing[0]}: do not delete keys with ~ in a search")
    changed: dict[str, Any] = {}
    for key, value in wanted.items():
        if key.split(".")[0] not in LEFT_OUT and (key not in given or given[key] != value):
            *parents, name = key.split(".")
            place = changed
            for parent in parents:
                place = place.setdefault(parent, {})
            place[name] = value
    defaults = [{f"override /{name}": choice} for name, choice in groups.items()]
    return ({"defaults": defaults} if defaults else {}) | changed


def write_experiment(path: Path, configs: Path, overrides: list[str], comment: str) -> Path:
    """Write the experiment file of these overrides, headed by ``comment``."""
    head = f"# @package _global_\n# {comment}\n# Copy it to configs/experiment, then: experiment={path.stem}\n"
    write_text_atomic(path, head + OmegaConf.to_yaml(OmegaConf.create(experiment_of(configs, overrides))))
    return path


def _is_inside(key: str, values: Mapping[str, Any]) -> bool:
    """Whether the dotted key names something in nested ``values``, or a part of what a value replaced."""
    place: Any = values
    for name in key.split("."):
        if not isinstance(place, Mapping):
            return True
        if name not in place:
            return False
        place = place[name]
    return True
