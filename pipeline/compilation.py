"""Compiled decoder layers: a few fused kernels in the place of dozens, in training."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from utils.llm.layers import decoder_layers

VARIANTS = 8
"""Of a layer with one adapter, PyTorch's own limit: beyond it runs uncompiled. An ensemble's members have their own."""


class CompiledLayers(AbstractContextManager[None]):
    """Inside this context the decoder layers of a model compute by compiled forwards, adapters included.

    Layers of one structure share what is compiled, whatever the width of the batch, so the whole model costs about as
    much as one layer. Evaluation and fitting stay outside: they need hooks, or derivatives per example.

    Args:
        model: the adapted model; it must name the layers it repeats, as transformers' models do.

    Raises:
        ValueError: if it names none.
        RuntimeError: within the context, if they cannot be compiled.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = decoder_layers(model)
        if not layers:
            raise ValueError(f"{type(model).__name__} names no decoder layers to compile: set train.compile=false")
        torch._dynamo.config.recompile_limit = VARIANTS * max(1, len(getattr(model, "peft_config", ())))
        torch.compiler.reset()  # what a run before in this process has left counts towards the limit of variants
        self._forwards = [(layer, torch.compile(layer.forward, dynamic=True)) for layer in layers]

    def __enter__(self) -> None:
        for layer, forward in self._forwards:
            vars(layer)["forward"] = forward

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        for layer, _ in self._forwards:
            del vars(layer)["forward"]
        if isinstance(error, TorchDynamoException):
            reason = " ".join(str(error).splitlines()[:2])
            raise RuntimeError(f"the model cannot be compiled ({reason}): set train.compile=false") from error
