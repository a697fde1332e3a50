"""Maximum likelihood (MLE): PEFT's LoRA (Hu et al., 2022)."""

from typing import Any

from peft import LoraConfig, PeftModel
from torch import nn

from bnn.methods.base import Method, check_targets


class MLE(Method):
    """One deterministic LoRA adapter."""

    def adapt(self, model: nn.Module, lora: dict[str, Any]) -> PeftModel:
        """See ``Method.adapt``."""
        check_targets(model, lora["target_modules"])
        return self.attach(model, LoraConfig(**lora))
