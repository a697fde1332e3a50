"""Deep ensembles (Lakshminarayanan et al., NeurIPS 2017) of LoRA adapters (Wang et al., arXiv 2310.00035, 2023)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import CONFIG_NAME
from torch import Tensor, nn

from bnn.lora import KEEPING_BASE
from bnn.methods.base import Method, check_layers, check_targets


class Ensemble(Method):
    """p(y | x) = (1/K) sum_k softmax(scores_k) over K LoRA adapters (Lakshminarayanan et al., 2017).

    Every member has its own initial A, drawn in turn from PyTorch's global generator by ``adapt``, and is trained by
    maximum likelihood on the same batches in the same order: members differ by their initial values (and dropout),
    not by the order of the data or by bootstrapping, and independent runs with other seeds differ more. Weight decay
    is ``opt.weight_decay``. The adapters are PEFT's, named ``member0``, ``member1``, ...

    Args:
        members: K, at least 1.

    Raises:
        ValueError: for K < 1.
    """

    def __init__(self, members: int) -> None:
        if members < 1:
            raise ValueError(f"method=ensemble needs members >= 1, got {members}")
        self.names = [f"member{k}" for k in range(members)]

    def adapt(self, model: nn.Module, lora: dict[str, Any]) -> PeftModel:
        """See ``Method.adapt``.

        Raises:
            ValueError: for an initialisation that changes the base model: every member would do so to all.
        """
        check_targets(model, lora["target_modules"])
        start = lora.get("init_lora_weights", True)
        if isinstance(start, str) and start not in KEEPING_BASE:
            raise ValueError(
                f"method=ensemble shares one base model, which peft.init_lora_weights={start} changes for every "
                f"member: use true or {' or '.join(KEEPING_BASE)}"
            )
        first, *others = self.names
        adapted = get_peft_model(model, LoraConfig(**lora), adapter_name=first)
        for name in others:
            adapted.add_adapter(name, LoraConfig(**lora))
        self._activate(adapted, first)
        return adapted

    def load(self, model: nn.Module, folder: str | Path) -> PeftModel:
        """Load all members from ``folder``.

        Raises:
            FileNotFoundError: naming the members that are missing.
            ValueError: if the folder holds more members than the method has, or those of a model of other layers.
        """
        folder = Path(folder)
        missing = [name for name in self.names if not (folder / name / CONFIG_NAME).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{folder} lacks {', '.join(missing)} of an ensemble with members={len(self.names)}: give the folder "
                "of a whole ensemble, or the number of members it was trained with"
            )
        extra = sorted(p.parent.name for p in folder.glob(f"member*/{CONFIG_NAME}") if p.parent.name not in self.names)
        if extra:
            raise ValueError(
                f"{folder} also holds {', '.join(extra)}, but the method has members={len(self.names)}: "
                "set the number of members to that of the saved ensemble"
            )
        first, *others = self.names
        loaded = PeftModel.from_pretrained(model, str(folder / first), adapter_name=first, is_trainable=True)  # type: ignore[arg-type]
        for name in others:
            loaded.load_adapter(str(folder / name), name, is_trainable=True)
        for name in self.names:
            check_layers(loaded, folder / name, name)
        return loaded

    def members(self, model: nn.Module) -> Iterator[None]:
        """Activate each member in turn; all stay trainable, but only the active one gets gradients."""
        for name in self.names:
            self._activate(model, name)
            yield

    def clipped_together(self, model: nn.Module, parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
        """Each member by itself."""
        own = {id(p): name for path, p in model.named_parameters() for name in self.names if name in path.split(".")}
        return [[p for p in parameters if own.get(id(p)) == name] for name in self.names]

    def predict(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Scores (K, N, C) of every example under every member, whatever n. Member 0 is active afterwards."""
        results = [super(Ensemble, self).predict(model, *args, **kwargs) for _ in self.members(model)]
        self._activate(model, self.names[0])
        return torch.cat(results)

    def modes(self, n: int) -> list[int | str]:
        """K: an ensemble has no other prediction, whatever n."""
        return [len(self.names)]

    def _activate(self, model: Any, name: str) -> None:
        """Use one member, and undo that PEFT freezes those it deactivates: they remain the optimiser's."""
        model.set_adapter(name)
        model.set_requires_grad(self.names)
