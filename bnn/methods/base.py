"""What a method of adapting and predicting offers to the training script: one file and one YAML per method."""

import difflib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import Tensor, nn


class Sample(Protocol):
    """Draws that are live while a context is open."""

    def kl(self) -> Tensor:
        """KL term of the objective, nats, a scalar."""
        ...


class Method(Protocol):
    """Adapts a model, draws its weights, groups its parameters."""

    def adapt(self, model: nn.Module, lora: dict[str, Any]) -> PeftModel:
        """Add the method's adapter; ``lora`` holds LoraConfig's arguments (r, lora_alpha, target_modules, ...)."""
        ...

    def sample(self, model: nn.Module, n: int, generator: torch.Generator | None) -> AbstractContextManager[Sample]:
        """Context in which a batch of n*B rows uses draw i for rows i*B to (i+1)*B."""
        ...

    def parameter_groups(self, model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Optimiser groups with their learning rates and weight decays."""
        ...

    @property
    def stochastic(self) -> bool:
        """Whether prediction needs samples; if not, one deterministic pass is the prediction."""
        ...


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Named parameters with gradient."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def check_targets(model: nn.Module, targets: list[str]) -> None:
    """Refuse target modules that match nothing, before PEFT silently leaves them out.

    Raises:
        ValueError: naming the target, near matches and what the model has.
    """
    linear = {name for name, m in model.named_modules() if hasattr(m, "weight") and m.weight.dim() == 2}
    suffixes = sorted({name.rsplit(".", 1)[-1] for name in linear})
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            near = difflib.get_close_matches(target, suffixes)
            hint = f"did you mean {', '.join(near)}?" if near else f"the model has {', '.join(suffixes)}"
            raise ValueError(f"target module {target!r} matches no linear layer of the model: {hint}")
