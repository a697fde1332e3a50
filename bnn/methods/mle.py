"""Maximum likelihood (MLE, or MAP with weight decay): PEFT's LoRA (Hu et al., 2022)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from bnn.methods.base import check_targets, trainable


class PointEstimate:
    """What ``MLE.sample`` yields: nothing is drawn and there is no KL."""

    def kl(self) -> Tensor:
        """Zero nats."""
        return torch.zeros(())


class MLE:
    """One deterministic LoRA adapter."""

    stochastic = False

    def adapt(self, model: nn.Module, lora: dict[str, Any]) -> PeftModel:
        """See ``Method.adapt``."""
        check_targets(model, lora["target_modules"])
        return get_peft_model(model, LoraConfig(**lora))

    @contextmanager
    def sample(self, model: nn.Module, n: int, generator: torch.Generator | None) -> Iterator[PointEstimate]:
        """The deterministic model, whatever ``n``."""
        yield PointEstimate()

    def parameter_groups(self, model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """One group."""
        return [{"params": [p for _, p in trainable(model)], "lr": lr, "weight_decay": weight_decay}]
