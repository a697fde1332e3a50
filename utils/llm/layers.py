"""The repeated part of a model."""

from torch import nn


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that a model repeats, by its own word (``_no_split_modules``); empty if it has none."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]
