"""Zero-shot: the base model as it is."""

from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from bnn.methods.mle import MLE


class ZeroShot(MLE):
    """A LoRA adapter at its zero start, B = 0 (Hu et al., ICLR 2022, Sec. 4.1), which is never trained."""

    trains = False

    def adapt(self, model: nn.Module, lora: dict[str, Any]) -> PeftModel:
        """See ``Method.adapt``.

        Raises:
            ValueError: for an initialisation other than B = 0.
        """
        return _checked(super().adapt(model, lora))

    def load(self, model: nn.Module, folder: str | Path) -> PeftModel:
        """See ``Method.load``.

        Raises:
            ValueError: for an adapter that changes the base model.
        """
        return _checked(super().load(model, folder))


def _checked(model: PeftModel) -> PeftModel:
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and any(p.any() for p in layer.lora_B.parameters() if not p.is_meta):
            raise ValueError(
                f"method=zero_shot is the base model, but B of {name} is not 0: leave out train.init_adapter and "
                "peft.init_lora_weights"
            )
    return model
