"""Model objects: with weights read from files, or random."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from utils.llm.errors import LLMLoadError
from utils.llm.quantization import keep_differentiable, quantization_config
from utils.llm.sources import Source

ATTENTION = "sdpa"
"""The kernels of attention that take the mask of packed choices."""


def pretrained_model(
    source: Source,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Mapping[str, Any] | None,
) -> PreTrainedModel:
    """Read a model's weights from `source` onto `device`.

    Raises:
        LLMLoadError: Quantisation is asked for and bitsandbytes is missing; a file is damaged; weights are missing.
    """
    extra = {"quantization_config": quantization_config(quantization)} if quantization else {}
    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(
            source.location,
            revision=source.revision,
            config=config,
            dtype=dtype,
            device_map={"": device},
            attn_implementation=ATTENTION,
            output_loading_info=True,
            **extra,
        )
    except (SafetensorError, UnpicklingError) as error:
        raise LLMLoadError(f"{source.location} has weights that cannot be read ({error}): copy it again") from error
    if missing := sorted(loaded["missing_keys"]):
        raise LLMLoadError(
            f"{source.location} lacks {len(missing)} of the weights ({missing[0]} is the first): it holds no causal "
            "language model"
        )
    keep_differentiable(model)
    return model


def random_model(config: PreTrainedConfig, seed: int, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Draw a model's weights with `seed`, on `device`; the global generators are left as they were.

    One token is tried: sizes that do not fit each other may fail there alone.
    """
    with _seeded(seed, device), device, torch.no_grad():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION)
        if device.type != "meta":
            model(torch.zeros(1, 1, dtype=torch.long))
    return model


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the generators that weights are drawn from, and give them their state back afterwards."""
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
