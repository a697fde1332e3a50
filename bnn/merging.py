"""What merging an adapter into quantised weights loses: their sum is rounded to quantised levels again."""

import statistics
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_bnb_weight, get_bnb_param_type
from torch import Tensor, nn


@contextmanager
def rounding_reported(model: nn.Module) -> Iterator[None]:
    """Warn, after merging inside the context, how much of the adapter's change the quantised layers could not take.

    For a layer with weight W, change Delta = scale * B A, and W' what it holds afterwards (all dequantised), the part
    lost is ||W' - W - Delta||_F / ||Delta||_F. It is 1 where rounding is as large as the change itself; PEFT's
    own warning, which gives no figure, is left out. Layers that are not quantised lose nothing and are not counted.
    """
    lost: dict[str, float] = {}
    layers = {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, LoraLayer) and get_bnb_param_type(getattr(m.get_base_layer(), "weight", None))
    }
    for name, layer in layers.items():
        vars(layer)["merge"] = partial(_merge, layer, name, lost)
    try:
        yield
    finally:
        for layer in layers.values():
            vars(layer).pop("merge")
    if lost:
        worst = max(lost, key=lambda name: lost[name])
        warnings.warn(
            f"merging into quantised weights rounds: {lost[worst]:.0%} of the adapter's change is lost in the worst "
            f"layer ({worst}), {statistics.median(lost.values()):.0%} in the median, and unmerging does not undo it; "
            "to keep the change, merge into a base model loaded without quantisation",
            stacklevel=4,
        )


@torch.no_grad()
def _merge(
    layer: LoraLayer,
    name: str,
    lost: dict[str, float],
    safe_merge: bool = False,
    adapter_names: list[str] | None = None,
) -> None:
    """The layer's own ``merge``, measured."""
    chosen = layer.active_adapters if adapter_names is None else adapter_names
    new = [adapter for adapter in chosen if adapter in layer.lora_A and adapter not in layer.merged_adapters]
    wanted = sum((layer.get_delta_weight(adapter).float() for adapter in new), start=torch.zeros(()))
    before = _dequantised(layer)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Merge lora module to")
        type(layer).merge(layer, safe_merge=safe_merge, adapter_names=adapter_names)
    if wanted.any():
        error = _dequantised(layer) - before - wanted.to(before.device)
        lost[name] = float(error.norm() / wanted.norm())


def _dequantised(layer: LoraLayer) -> Tensor:
    """The base weight (d_out, d_in) in float32."""
    base = layer.get_base_layer()
    return dequantize_bnb_weight(base.weight, state=getattr(base, "state", None)).float()
