"""AdaLoRA: a rank budget that moves to where it matters (Zhang et al., ICLR 2023), with PEFT's implementation."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import AdaLoraConfig, AdaLoraModel, PeftModel, get_peft_model
from peft.tuners.adalora import AdaLoraLayer
from torch import Tensor, nn

from bnn.methods.base import Method, PointEstimate, Schedule, check_targets

IGNORED = ("use_rslora", "rank_pattern", "alpha_pattern", "lora_bias")
"""Arguments of LoRA that PEFT's AdaLoRA takes and does not use."""


class AdaLoRA(Method):
    """Maximum likelihood of W + (alpha / r_0) P Lambda Q (Eq. 3) with pruned singular values Lambda and r_0 >= r.

    P, Lambda and Q are PEFT's ``lora_B``, ``lora_E`` and ``lora_A``. The number of singular values of the whole model
    falls cubically from r_0 to r per layer (Eq. 12), the least important (Eq. 7 to 11) being set to 0; r is the rank
    that is asked for, so the final budget is that of the other methods; an adapter of a step before the last pruning,
    which ``eval.keep=best`` may keep, has a larger one. The loss gains
    ``orthogonality`` * ``orthogonality_penalty``. Its gradient is added once per optimiser step when ``sample``
    closes, rather than through the KL: it is no KL, and beta / N would scale it. So it is in no logged loss.

    Args:
        init_rank_factor: r_0 / r, greater than 1.
        initial_fraction: t_i, fraction of all steps with the full budget.
        final_fraction: t_f, fraction of all steps with the final budget and fixed ranks.
        interval: Delta_T, steps between two prunings.
        beta1: decay rate of the sensitivity's moving average (Eq. 9), in (0, 1).
        beta2: decay rate of its uncertainty's moving average (Eq. 10), in (0, 1).
        orthogonality: gamma, weight of the penalty, nats.

    Raises:
        ValueError: for fractions that leave no step to prune in, and a value out of its range.
    """

    peft_type = "ADALORA"

    def __init__(
        self,
        init_rank_factor: float,
        initial_fraction: float,
        final_fraction: float,
        interval: int,
        beta1: float,
        beta2: float,
        orthogonality: float,
    ) -> None:
        if min(initial_fraction, final_fraction) < 0 or initial_fraction + final_fraction >= 1:
            raise ValueError(
                f"initial_fraction={initial_fraction} and final_fraction={final_fraction} leave no step to prune in: "
                "choose fractions >= 0 whose sum is below 1"
            )
        if orthogonality < 0:
            raise ValueError(f"expected orthogonality >= 0, got {orthogonality}")
        for name, beta in (("beta1", beta1), ("beta2", beta2)):
            if not 0 < beta < 1:
                raise ValueError(f"method=adalora needs {name} in (0, 1), got {beta}")
        if interval < 1:
            raise ValueError(f"method=adalora needs interval >= 1, got {interval}")
        self.init_rank_factor = init_rank_factor
        self.initial_fraction = initial_fraction
        self.final_fraction = final_fraction
        self.allocation = {"deltaT": interval, "beta1": beta1, "beta2": beta2}
        self.orthogonality = orthogonality

    def adapt(self, model: nn.Module, lora: dict[str, Any]) -> PeftModel:
        """See ``Method.adapt``. PEFT wants a number of steps at once: ``start`` puts in the true one.

        Raises:
            ValueError: for an initial rank that is not greater than r, and for what PEFT's AdaLoRA would ignore.
        """
        check_targets(model, lora["target_modules"])
        if ignored := [key for key in IGNORED if lora.get(key)]:
            raise ValueError(f"method=adalora ignores peft.{ignored[0]}={lora[ignored[0]]}: leave it out")
        r = lora["r"]
        init_r = round(self.init_rank_factor * r)
        if init_r <= r:
            raise ValueError(
                f"the initial rank round({self.init_rank_factor} * {r}) must exceed r={r}: raise the factor"
            )
        rest = {key: value for key, value in lora.items() if key != "r"}
        config = AdaLoraConfig(
            **rest, **self.allocation, target_r=r, init_r=init_r, orth_reg_weight=self.orthogonality, total_step=1
        )
        return _ranks_frozen(get_peft_model(model, config))

    def load(self, model: nn.Module, folder: str | Path) -> PeftModel:
        """See ``Method.load``."""
        return _ranks_frozen(super().load(model, folder))

    def save(self, model: PeftModel, folder: str | Path) -> None:
        """See ``Method.save``; pruned singular values are saved as zeros.

        PEFT would cut off what its last pruning chose. That is wrong for parameters of an earlier step, and a
        cut adapter cannot be trained further.
        """
        config = _config(model)
        pattern, config.rank_pattern = config.rank_pattern, None
        try:
            super().save(model, folder)
        finally:
            config.rank_pattern = pattern

    def start(self, model: nn.Module, schedule: Schedule) -> None:
        """Set the phases of the budget, in steps, and forget what an earlier training found important.

        Raises:
            ValueError: for so few steps that the last pruning is after the first, which has found nothing important
                yet; for an adapter whose pruned ranks were cut off, which PEFT's allocation cannot train.
        """
        total = schedule.total_steps
        if not total:
            return
        if not self._enough(total):
            least = next(steps for steps in itertools.count(total) if self._enough(steps))
            raise ValueError(
                f"method=adalora with final_fraction={self.final_fraction} needs {least} steps or more, one before the "
                f"last pruning, and these are {total}: train for longer"
            )
        config = _config(model)
        if any(len(E) != config.init_r for _, E, _ in _factors(model)):
            raise ValueError("the adapter's pruned ranks were cut off: start from one that method=adalora has saved")
        config.total_step = total
        config.tinit = int(self.initial_fraction * total)
        config.tfinal = int(self.final_fraction * total)
        config.deltaT, config.beta1, config.beta2 = self.allocation.values()
        config.orth_reg_weight = self.orthogonality
        self.load_state(model, {"sensitivity": {}, "uncertainty": {}, "kept": None})

    def _enough(self, steps: int) -> bool:
        """Whether a step is left before the last pruning, from which that knows what is important."""
        return steps - int(self.final_fraction * steps) > 1

    @contextmanager
    def sample(self, model: nn.Module, n: int, generator: torch.Generator | None) -> Iterator[PointEstimate]:
        """See ``Method.sample``; nothing is drawn.

        On leaving it the gradient of the orthogonality penalty is added, if backward ran inside, in training mode,
        and found no gradients (None): it was the first of this optimiser step.
        """
        Q = _factors(model)[0][0]
        first = model.training and Q.grad is None
        yield PointEstimate()
        if first and Q.grad is not None and self.orthogonality:
            processes = dist.get_world_size() if dist.is_initialized() else 1  # whose gradients will be summed
            (self.orthogonality / processes * orthogonality_penalty(model)).backward()

    def after_step(self, model: nn.Module, step: int, rate: float) -> None:
        """Update the importance of every singular value and prune (Algorithm 1); t = step + 1.

        Raises:
            ValueError: after the last pruning, if which singular values it kept is not known.
        """
        config = _config(model)
        if step + 1 > config.total_step - config.tfinal and config.rank_pattern is None:
            raise ValueError(
                "method=adalora does not know what its last pruning kept: that step was left out (train.on_nonfinite) "
                "or the run resumed without its state; start afresh, with a lower opt.lr if a loss was not finite"
            )
        _tuner(model).update_and_allocate(step + 1)

    def state(self, model: nn.Module) -> dict[str, Any]:
        """What a resumed run needs beyond the parameters: moving averages, and which singular values are kept."""
        allocator = _tuner(model).rankallocator
        averages = {"sensitivity": dict(allocator.exp_avg_ipt), "uncertainty": dict(allocator.exp_avg_unc)}
        return averages | {"kept": _config(model).rank_pattern}

    def load_state(self, model: nn.Module, state: dict[str, Any]) -> None:
        """Continue from what ``state`` returned; after ``start``."""
        allocator = _tuner(model).rankallocator
        device = {name: p.device for name, p in _tuner(model).model.named_parameters()}
        sensitivity, uncertainty = (
            {name: t.to(device[name]) for name, t in state[key].items()} for key in ("sensitivity", "uncertainty")
        )
        allocator.exp_avg_ipt, allocator.exp_avg_unc = sensitivity, uncertainty
        allocator.ipt = dict(sensitivity)  # PEFT only asks whether a name is there, then replaces the value
        _config(model).rank_pattern = state["kept"]


def orthogonality_penalty(model: nn.Module) -> Tensor:
    """Mean over the matrices P and Q of the distance of P^T P and Q Q^T from I in the Frobenius norm, a scalar.

    The paper has the sum of the squares (Eq. 4); this is what its reference code and PEFT use, to which the published
    values of gamma belong.
    """
    factors = _factors(model)
    grams = torch.stack([Q @ Q.T for Q, _, _ in factors] + [P.T @ P for _, _, P in factors])
    return torch.linalg.matrix_norm(grams - torch.eye(len(grams[0]), dtype=grams.dtype, device=grams.device)).mean()


def _ranks_frozen(model: PeftModel) -> PeftModel:
    """Undo that moving PEFT's constant r_0 (``ranknum``, not saved) to another device or dtype makes it trainable."""
    for layer in model.modules():
        if isinstance(layer, AdaLoraLayer):
            layer.ranknum.requires_grad_(False)
    return model


def _tuner(model: nn.Module) -> AdaLoraModel:
    return model.base_model


def _config(model: nn.Module) -> AdaLoraConfig:
    tuner = _tuner(model)
    return tuner.peft_config[tuner.trainable_adapter_name]


def _factors(model: nn.Module) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Q (r_0, d_in), Lambda (r_0, 1) and P (d_out, r_0) of every layer."""
    name = _tuner(model).trainable_adapter_name
    layers = [m for m in model.modules() if isinstance(m, AdaLoraLayer)]
    return [(layer.lora_A[name], layer.lora_E[name], layer.lora_B[name]) for layer in layers]
