"""Model configurations from plain values."""

import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig

from utils.llm.errors import LLMLoadError, lacks_memory

_UNDECLARED = ("head_dim",)
"""Keys that models read though some configuration classes (that of Qwen3-MoE) do not declare them."""


def build_config(architecture: Mapping[str, Any], overrides: Mapping[str, Any]) -> PreTrainedConfig:
    """Build a configuration from `architecture` (`model_type` and sizes) with `overrides` on top.

    Raises:
        LLMLoadError: The model type or a key is unknown, or no model has these values.
    """
    values = dict(architecture)
    model_type = values.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        raise LLMLoadError(
            f"unknown model_type {model_type!r} in llm.architecture{_near(str(model_type), CONFIG_MAPPING)}"
        )
    config_class = CONFIG_MAPPING[model_type]
    values = {
        **_known(config_class(), values, "architecture"),
        **_known(config_class(), overrides, "config_overrides"),
    }
    with named_in_errors({"model_type": model_type, **values}):
        return _of_a_model(config_class(**values))


def override_config(config: PreTrainedConfig, overrides: Mapping[str, Any]) -> PreTrainedConfig:
    """A copy of a loaded configuration with `overrides` on top.

    Lists that a configuration derives from its number of layers are derived anew when that number changes.

    Raises:
        LLMLoadError: A key is unknown, or no model has these values.
    """
    if not overrides:
        return config
    changes = _known(config, overrides, "config_overrides")
    values = {**config.to_dict(), **changes}
    if changes.get("num_hidden_layers", config.num_hidden_layers) != config.num_hidden_layers:
        values.pop("layer_types", None)
    with named_in_errors(changes):
        return _of_a_model(type(config).from_dict(values))


@contextmanager
def named_in_errors(values: Mapping[str, Any]) -> Iterator[None]:
    """Raise LLMLoadError, naming `values`, for whatever is raised where a configuration or a model is made of them.

    Few values are checked by those who take them: no attention heads, for example, are a division by zero somewhere.
    """
    try:
        yield
    except Exception as error:
        if not values or lacks_memory(error):
            raise
        why = " ".join(f"{type(error).__name__}: {error}".split())
        given = ", ".join(f"{key}={value}" for key, value in values.items())
        raise LLMLoadError(f"llm.architecture or llm.config_overrides: {why}: correct one of {given}") from error


def _of_a_model(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration itself, once a model without weights has been made of it."""
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(config)
    return config


def _known(config: PreTrainedConfig, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`values` under the configuration's own key names, e.g. n_embd for hidden_size; unknown keys raise.

    So do counts below 0: of -1 layers, for example, torch makes a model that has none.
    """
    own_names = config.attribute_map
    renamed = {own_names.get(key, key): value for key, value in values.items()}
    known = {**config.to_dict(), **dict.fromkeys(_UNDECLARED)}
    for key, value in renamed.items():
        if key not in known:
            raise LLMLoadError(f"unknown key {key!r} in llm.{where} of a {config.model_type}{_near(key, known)}")
        counts = type(value) is type(known[key]) is int and not key.endswith("_id")
        if counts and value < 0 <= known[key]:
            raise LLMLoadError(f"llm.{where}.{key}={value}: expected a whole number, at least 0")
    return renamed


def _near(name: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, list(known), n=3)
    return f": did you mean {' or '.join(close)}?" if close else ": see the model's configuration class in transformers"
