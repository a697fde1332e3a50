"""An estimate of the memory that a run will need, made from the configuration before any weights are read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from utils.data.batch import AT_ONCE
from utils.llm.errors import LESS_MEMORY, TooLittleMemoryError

BITS = {"load_in_4bit": 4.5, "load_in_8bit": 8.0}
"""Bits per quantised weight; 4-bit blocks of 64 share a 32-bit scale (QLoRA, Dettmers et al., 2023, section 3)."""
DOUBLE_QUANT_BITS = 4.127
STATE_BYTES = 16
"""Of a trained number: value, gradient and AdamW's two moments in float32."""
CGROUP = Path("/sys/fs/cgroup")
"""Where Linux says what a container may use."""
UNCERTAIN = 0.25
"""Part of the estimated activations that may turn out not to be needed: a run is refused only beyond it."""


@dataclass(frozen=True)
class Shape:
    """A forward pass: rows (samples included), tokens of a row, and positions of it whose logits are formed."""

    rows: int
    tokens: int
    keep: int


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device, and what it has."""

    model: int
    adapter: int
    activations: int
    available: int

    @property
    def total(self) -> int:
        """Model, adapter and activations."""
        return self.model + self.adapter + self.activations

    def __str__(self) -> str:
        """One line for the log."""
        parts = (self.model, self.adapter, self.activations, self.total, self.available)
        sizes = [f"{value / 1e9:.2f} GB" for value in parts]
        return "memory: model {} + adapter {} + activations {} = {} of {} (estimate)".format(*sizes)

    def check(self) -> None:
        """Refuse what cannot fit.

        Raises:
            TooLittleMemoryError: with the estimate and the remedies.
        """
        if self.total - UNCERTAIN * self.activations > self.available:
            raise TooLittleMemoryError(f"{self}: that cannot fit; {LESS_MEMORY}")


def plan_memory(
    config: PreTrainedConfig,
    shape: Shape,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Mapping[str, Any] | None,
    targets: Sequence[str] | str,
    rank: int,
    checkpointing: bool,
    evaluation: Sequence[Shape],
    adapters: int = 1,
    shards: int = 1,
    graphs: bool = False,
) -> MemoryPlan:
    """Estimate a run's memory on one device.

    Activations count, for every token and layer, 7 * hidden + 4 * intermediate numbers kept for the backward pass
    (fits PEFT's LoRA on Llama-2-7B with fused attention, measured at 512 and 2048 tokens), or with checkpointing the
    hidden state alone and one layer in full; and the kept logits with their gradient, some of them in float32.
    Evaluation has those of one layer, 4 * hidden + 3 * intermediate numbers for every token (measured there too), and
    after the last layer the logits.

    Args:
        config: of the language model.
        shape: of the largest forward pass in training.
        dtype: of the base weights and activations.
        device: where the model will be.
        quantization: arguments of ``BitsAndBytesConfig``; None or empty for none.
        targets: suffixes of the names of the adapted modules, or ``all-linear``.
        rank: r, or the larger inducing size: an adapter has about rank * (d_in + d_out) numbers.
        checkpointing: whether activations are recomputed.
        evaluation: of the forward passes in evaluation.
        adapters: how many are trained.
        shards: processes that share the frozen weights.
        graphs: whether training steps are CUDA graphs, which keep their memory while a batch of a new shape runs.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    text = config.get_text_config()
    hidden, inner = text.hidden_size, intermediate_size(text)
    kept = hidden if checkpointing else 7 * hidden + 4 * inner
    once = 7 * hidden + 4 * inner if checkpointing else 0
    training = shape.rows * shape.tokens * (kept * text.num_hidden_layers + once) * dtype.itemsize
    training += logits_bytes(shape, text.vocab_size, dtype, copies=2)
    training *= 2 if graphs else 1
    layer = max((own.rows * own.tokens for own in evaluation), default=0) * (4 * hidden + 3 * inner) * dtype.itemsize
    logits = max((logits_bytes(own, text.vocab_size, dtype, copies=1) for own in evaluation), default=0)
    adapter = STATE_BYTES * adapters * rank * sum(sum(m.get_parameter("weight").shape) for m in adapted(model, targets))
    return MemoryPlan(
        model=weight_bytes(model, quantization) // shards,
        adapter=adapter,
        activations=max(training, layer, logits),
        available=available_bytes(device),
    )


def logits_bytes(shape: Shape, vocabulary: int, dtype: torch.dtype, copies: int) -> int:
    """Bytes of the logits that are formed, ``copies`` times, and of those that are in float32 at once."""
    scored = shape.rows * shape.keep
    in_float32 = min(scored, max(shape.keep, AT_ONCE // vocabulary))
    transient = 4 if dtype == torch.float32 else 8  # bytes: what comes of them, and a copy unless they are float32
    return (scored * copies * dtype.itemsize + in_float32 * transient) * vocabulary


def adapted(model: PreTrainedModel, targets: Sequence[str] | str) -> list[nn.Module]:
    """The linear layers whose names end in one of ``targets``; ``all-linear``: all but the output embedding."""
    linear = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    if targets == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        return [m for _, m in linear if m is not model.get_output_embeddings()]
    return [m for name, m in linear if name.rsplit(".", 1)[-1] in targets or name in targets]


def weight_bytes(model: nn.Module, quantization: Mapping[str, Any] | None) -> int:
    """Bytes of all weights, tied ones once; linear layers in fewer bits where ``quantization`` says so."""
    options = quantization or {}
    bits = next((value for key, value in BITS.items() if options.get(key)), None)
    if bits == BITS["load_in_4bit"] and options.get("bnb_4bit_use_double_quant"):
        bits = DOUBLE_QUANT_BITS
    skipped = options.get("llm_int8_skip_modules") or ()
    quantised = set()
    for name, module in model.named_modules():
        if bits and isinstance(module, nn.Linear | Conv1D) and not any(part in skipped for part in name.split(".")):
            quantised.add(module.weight)
    total = 0.0
    for p in model.parameters():
        total += p.numel() * (bits / 8 if bits and p in quantised else p.dtype.itemsize)
    return round(total)


def intermediate_size(config: PreTrainedConfig) -> int:
    """Width of the feed-forward layer; of a mixture of experts that of all experts which a token passes through."""
    if getattr(config, "moe_intermediate_size", None):
        return config.moe_intermediate_size * config.num_experts_per_tok
    return getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size


def available_bytes(device: torch.device) -> int:
    """Memory that is free on a device; on a CPU at most what the container may still take."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    free = psutil.virtual_memory().available
    try:
        limit, used, stat = ((CGROUP / f"memory.{name}").read_text().strip() for name in ("max", "current", "stat"))
    except OSError:  # no control group of version 2
        return free
    if limit == "max":
        return free
    counted = dict(line.split() for line in stat.splitlines())
    cache = int(counted["active_file"]) + int(counted["inactive_file"])  # given up when memory is needed
    return min(free, int(limit) - int(used) + cache)
