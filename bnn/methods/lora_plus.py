"""LoRA+: a larger learning rate for B than for A (Hayou, Ghosh & Yu, ICML 2024)."""

from typing import Any

from torch import nn

from bnn.methods.base import trainable
from bnn.methods.mle import MLE

OUTPUT_FACTORS = ("lora_B", "lora_embedding_B")
"""PEFT's names of B."""


class LoRAPlus(MLE):
    """Maximum likelihood with eta_B = lr_ratio * eta_A.

    In the limit of large width, features are learned efficiently for eta_B / eta_A = Theta(width) (Hayou et al.,
    2024, Theorem 1), not for equal rates. PEFT's helper makes an optimiser rather than groups, hence the grouping
    here; it equals that helper's for plain LoRA on linear layers. DoRA's magnitude goes with A.

    Args:
        lr_ratio: eta_B / eta_A, at least 1; eta_A is the optimiser's learning rate.

    Raises:
        ValueError: for a ratio below 1.
    """

    def __init__(self, lr_ratio: float) -> None:
        if lr_ratio < 1:
            raise ValueError(f"method=lora_plus needs lr_ratio >= 1, got {lr_ratio}: B learns faster than A")
        self.lr_ratio = lr_ratio

    def parameter_groups(self, model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """A at ``lr``, then B at ``lr * lr_ratio``, both with ``weight_decay``."""
        A: list[nn.Parameter] = []
        B: list[nn.Parameter] = []
        for name, parameter in trainable(model):
            (B if any(part in OUTPUT_FACTORS for part in name.split(".")) else A).append(parameter)
        groups = [{"params": A, "lr": lr}, {"params": B, "lr": lr * self.lr_ratio}]
        return [group | {"weight_decay": weight_decay} for group in groups]
