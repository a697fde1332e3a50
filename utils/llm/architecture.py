"""Model configurations from plain values."""

import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig

from utils.llm.errors import LLMLoadError

_UNDECLARED = ("head_dim",)
"""Keys that models read though some configuration classes (that of Qwen3-MoE) do not declare them."""


def build_config(architecture: Mapping[str, Any], overrides: Mapping[str, Any]) -> PreTrainedConfig:
    """Build a configuration from `architecture` (`model_type` and sizes) with `overrides` on top.

    Raises:
        LLMLoadError: The model type or a key is unknown, or a value of another kind.
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
    with _in_one_line():
        return config_class(**values)


def override_config(config: PreTrainedConfig, overrides: Mapping[str, Any]) -> PreTrainedConfig:
    """A copy of a loaded configuration with `overrides` on top.

    Lists that a configuration derives from its number of layers are derived anew when that number changes.

    Raises:
        LLMLoadError: A key is unknown, or a value of another kind.
    """
    if not overrides:
        return config
    changes = _known(config, overrides, "config_overrides")
    values = {**config.to_dict(), **changes}
    if changes.get("num_hidden_layers", config.num_hidden_layers) != config.num_hidden_layers:
        values.pop("layer_types", None)
    with _in_one_line():
        return type(config).from_dict(values)


@contextmanager
def _in_one_line() -> Iterator[None]:
    """Raise LLMLoadError for a value of a kind that the configuration does not take."""
    try:
        yield
    except (TypeError, StrictDataclassError) as error:
        raise LLMLoadError(f"llm.architecture or llm.config_overrides: {' '.join(str(error).split())}") from error


def _known(config: PreTrainedConfig, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`values` under the configuration's own key names, e.g. n_embd for hidden_size; unknown keys raise."""
    own_names = config.attribute_map
    renamed = {own_names.get(key, key): value for key, value in values.items()}
    known = {**config.to_dict(), **dict.fromkeys(_UNDECLARED)}
    for key in renamed:
        if key not in known:
            raise LLMLoadError(f"unknown key {key!r} in llm.{where} of a {config.model_type}{_near(key, known)}")
    return renamed


def _near(name: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, list(known), n=3)
    return f": did you mean {' or '.join(close)}?" if close else ": see the model's configuration class in transformers"
