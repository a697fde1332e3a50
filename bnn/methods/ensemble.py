"""Deep ensembles (Lakshminarayanan et al., NeurIPS 2017) of LoRA adapters (Wang et al., arXiv 2310.00035, 2023)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME
from torch import Tensor, nn

from bnn.lora import KEEPING_BASE
from bnn.methods.base import Method, Schedule
from bnn.methods.mle import MLE


class Ensemble(Method):
    """p(y | x) = (1/K) sum_k p_k(y | x) over K adapters on one base model (Lakshminarayanan et al., 2017).

    Every member has its own initial A, drawn in turn from PyTorch's global generator by ``adapt``, and is trained by
    its method on the same batches in the same order: members differ by that A (and dropout, and draws), not by the
    order of the data or by bootstrapping, and independent runs with other seeds differ more. Where members have
    posteriors q_k, the ensemble's is their mixture, and a prediction's draws are shared out equally (Wilson & Izmailov,
    NeurIPS 2020). With k as a latent variable, q(k) = p(k) = 1/K, the mean of the members' ELBOs is its ELBO. The
    adapters are PEFT's, named ``member0``, ``member1``, ..., and each is what its method saves: PEFT or the method
    alone loads it.

    Args:
        members: K, at least 1.
        of: arguments of the members' method.

    Raises:
        ValueError: for K < 1.
    """

    member: type[Method] = MLE
    """The members' method: one that adapts by ``attach`` and has neither a ``state`` nor anything to ``fit``."""

    def __init__(self, members: int, **of: Any) -> None:
        if members < 1:
            raise ValueError(f"an ensemble needs members >= 1, got {members}")
        self.own = {f"member{k}": self.member(**of) for k in range(members)}
        self.names = list(self.own)
        for name, method in self.own.items():
            method.adapter_name = name
        self.stochastic = self.member.stochastic
        self._parameters: dict[str, set[int]] = {}

    def adapt(self, model: nn.Module, lora: dict[str, Any]) -> PeftModel:
        """See ``Method.adapt``.

        Raises:
            ValueError: for what changes the base model, an initialisation or its layers' replication: every member
                would do so to all.
        """
        if lora.get("layer_replication"):
            raise ValueError("an ensemble shares one base model, which peft.layer_replication changes: leave it out")
        start = lora.get("init_lora_weights", True)
        if isinstance(start, str) and start not in KEEPING_BASE:
            raise ValueError(
                f"an ensemble shares one base model, which peft.init_lora_weights={start} changes for every "
                f"member: use true or {' or '.join(KEEPING_BASE)}"
            )
        adapted: Any = model
        for method in self.own.values():
            adapted = method.adapt(adapted, lora)
        self._activate(adapted, self.names[0])
        return adapted  # type: ignore[no-any-return]

    def load(self, model: nn.Module, folder: str | Path) -> PeftModel:
        """Load all members from ``folder``.

        Raises:
            FileNotFoundError: naming the members that are missing.
            ValueError: if the folder holds more members than the method has, or those of another kind or model.
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
        loaded: Any = model
        for name, method in self.own.items():
            loaded = method.load(loaded, folder / name)
        self._activate(loaded, self.names[0])
        return loaded  # type: ignore[no-any-return]

    def save(self, model: PeftModel, folder: str | Path) -> None:
        """Write each member to a folder of its name."""
        for method in self.own.values():
            method.save(model, folder)

    def parameter_groups(self, model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Those of every member."""
        groups = []
        for name, method in self.own.items():
            self._activate(model, name, alone=True)
            found = method.parameter_groups(model, lr, weight_decay)
            self._parameters[name] = {id(p) for group in found for p in group["params"]}
            groups += found
        self._activate(model, self.names[0])
        return groups

    def clipped_together(self, model: nn.Module, parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
        """Each member by itself."""
        parts = []
        for name, method in self.own.items():
            parts += method.clipped_together(model, [p for p in parameters if id(p) in self._parameters[name]])
        return parts

    def start(self, model: nn.Module, schedule: Schedule) -> None:
        """See ``Method.start``."""
        for method in self.own.values():
            method.start(model, schedule)

    def members(self, model: nn.Module) -> Iterator[None]:
        """Activate each member in turn; all stay trainable, but only the active one gets gradients."""
        for name in self.names:
            self._activate(model, name)
            yield

    def sample(self, model: nn.Module, n: int, generator: torch.Generator | None) -> Any:
        """Draws of the active member. See ``Method.sample``."""
        return self.own[str(model.active_adapter)].sample(model, n, generator)

    def after_step(self, model: nn.Module, step: int, rate: float) -> None:
        """See ``Method.after_step``."""
        for method in self.own.values():
            method.after_step(model, step, rate)

    def predict(self, model: nn.Module, *args: Any, n: int | None, **kwargs: Any) -> Tensor:
        """Scores (S, N, C), the members' in turn, so that the first of them are shared out too.

        S is K for members that are deterministic and for n = None, which takes each one's mean, else n rounded up to a
        multiple of K. Member 0 is active afterwards.
        """
        each = None if n is None else -(-n // len(self.names))
        each_active = zip(self.own.values(), self.members(model), strict=True)
        results = [method.predict(model, *args, n=each, **kwargs) for method, _ in each_active]
        self._activate(model, self.names[0])
        return torch.stack(results, dim=1).flatten(0, 1)

    def modes(self, n: int) -> list[int | str]:
        """See ``Method.modes``; K for members that are deterministic, whatever n."""
        K = len(self.names)
        return [-(-n // K) * K, "mean"] if self.stochastic else [K]

    def _activate(self, model: Any, name: str, alone: bool = False) -> None:
        """Use one member; PEFT freezes those it deactivates, which is undone unless ``alone``: they remain trained."""
        if alone:
            model.set_requires_grad(self.names, requires_grad=False)  # PEFT leaves out some of their whole modules
        model.set_adapter(name)
        if not alone:
            model.set_requires_grad(self.names)
