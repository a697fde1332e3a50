"""Quantised base weights through bitsandbytes."""

import importlib.util
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import BitsAndBytesConfig

from utils.llm.errors import LLMLoadError


def quantization_config(options: Mapping[str, Any]) -> BitsAndBytesConfig:
    """Turn options, e.g. `{"load_in_4bit": True}`, into a configuration.

    Raises:
        LLMLoadError: bitsandbytes is not installed, or an option is unknown.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise LLMLoadError("quantised weights need bitsandbytes: pip install bitsandbytes, or set quantization=none")
    config, unknown = BitsAndBytesConfig.from_dict(dict(options), return_unused_kwargs=True)
    if unknown:
        raise LLMLoadError(f"unknown quantization options {sorted(unknown)}: see transformers.BitsAndBytesConfig")
    return config


def keep_differentiable(model: nn.Module) -> None:
    """Have 4-bit layers on a CPU keep the layout that gradients pass through.

    On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks such a layer in its first forward pass in evaluation mode, for a
    kernel without a derivative: an evaluation before training would silently cut off the gradients of all that follow.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
