"""What random factors ask of PEFT's LoRA layers."""

from collections.abc import Iterator

from peft.tuners.lora import LoraLayer
from torch import nn

KEEPING_BASE = ("gaussian", "orthogonal", "eva")
"""Initialisations of A and B, by PEFT's names, that leave the base model as it is."""


def check_plain(layer: LoraLayer, adapter_name: str, path: str, method: str) -> None:
    """Raise ValueError where A and B cannot be random matrices: no linear layer, a variant of LoRA (DoRA, ...), merged.

    Args:
        layer: one of the model's LoRA layers.
        adapter_name: which of its adapters.
        path: the layer's name in messages.
        method: who asks, in messages.
    """
    A = dict(layer.lora_A.items()).get(adapter_name)
    if not isinstance(A, nn.Linear):
        raise not_linear(layer.get_base_layer() if A is None else A, path, method)
    if adapter_name in layer.lora_variant:
        variant = type(layer.lora_variant[adapter_name]).__name__
        raise ValueError(f"{method} needs plain LoRA, but target {path!r} is a {variant}: remove its setting")
    if adapter_name in layer.merged_adapters:
        raise ValueError(f"adapter {adapter_name!r} is merged into {path!r}: call unmerge_adapter first")


def has_adapter(layer: LoraLayer, adapter_name: str) -> bool:
    """Whether the layer has an adapter of this name: it may only have others, or none any more."""
    return adapter_name in layer.lora_A or adapter_name in layer.lora_embedding_A


def active_adapters(model: nn.Module) -> Iterator[tuple[str, LoraLayer, str]]:
    """Path, layer and name of every active adapter of the LoRA layers of a model."""
    for path, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            yield from ((path, layer, name) for name in layer.active_adapters if has_adapter(layer, name))


def plain_layers(model: nn.Module, method: str) -> list[tuple[LoraLayer, str]]:
    """The LoRA layers of a model, each with every active adapter's name; ValueError as of ``check_plain``."""
    adapters = list(active_adapters(model))
    for path, layer, name in adapters:
        check_plain(layer, name, path, method)
    return [(layer, name) for _, layer, name in adapters]


def not_linear(module: nn.Module, path: str, method: str) -> ValueError:
    """The error for a target where ``module``, its layer or its A, is no linear layer."""
    kind = type(module).__name__
    return ValueError(f"{method} adapts linear layers, but target {path!r} is {kind}: remove it from target_modules")
