"""Quantised base weights through bitsandbytes."""

import importlib.util
from collections.abc import Mapping
from typing import Any

from transformers import BitsAndBytesConfig

from utils.llm.errors import LLMLoadError


def quantization_config(options: Mapping[str, Any]) -> BitsAndBytesConfig:
    """Turn options, e.g. `{"load_in_4bit": True}`, into a configuration.

    Raises:
        LLMLoadError: bitsandbytes is not installed, or an option is unknown.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise LLMLoadError("quantised weights need bitsandbytes: pip install bitsandbytes, or quantization=none")
    config, unknown = BitsAndBytesConfig.from_dict(dict(options), return_unused_kwargs=True)
    if unknown:
        raise LLMLoadError(f"unknown quantization options {sorted(unknown)}: see transformers.BitsAndBytesConfig")
    return config
