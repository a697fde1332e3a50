"""Draws every factor of a model at once, before the forward, and holds the draws until the context ends.

Factors of equal structure are stacked, so that the whole model costs a handful of batched operations; nothing here
waits for the device.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bnn.inducing import posterior
from bnn.inducing.posterior import Draw, FactorSpec, Noise
from bnn.layers import InducingFactor


class LiveSample:
    """What ``bnn.sample`` yields: the number of draws, and the KL that belongs to them.

    The model and ``kl()`` see the draws as leaves, cut off from the parameters; ``push`` carries what backward has
    accumulated in them through the sampler once. Several backward passes, also those which reentrant checkpointing
    runs inside one, therefore share one draw and add up.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        self._kls: list[Tensor] = []
        self._cuts: list[tuple[Tensor, Tensor]] = []
        self._open = True

    def kl(self) -> Tensor:
        """KL[q || p] summed over all factors drawn, nats, a scalar with gradient."""
        return torch.cat(self._kls).sum()

    def add(self, draw: Draw, dtype: torch.dtype) -> Tensor:
        """Take in the draws of one group; returns the weights (S, n, d_out, d_in) in ``dtype`` for the model."""
        self._kls.append(self._cut(draw.kl))
        return self._cut(draw.W.to(dtype))

    def _cut(self, t: Tensor) -> Tensor:
        if not t.requires_grad:
            return t
        leaf = t.detach().requires_grad_()
        leaf.register_hook(self._refuse_when_closed)
        self._cuts.append((t, leaf))
        return leaf

    def _refuse_when_closed(self, grad: Tensor) -> None:
        if not self._open:
            raise RuntimeError("backward after bnn.sample has ended would be lost: call it inside the context")

    def push(self) -> None:
        """Carry the gradients through the sampler to the parameters, and refuse any that come later."""
        self._open = False
        reached = [(root, leaf.grad) for root, leaf in self._cuts if leaf.grad is not None]
        if reached:
            torch.autograd.backward([root for root, _ in reached], [grad for _, grad in reached])


def active_factors(model: nn.Module) -> list[InducingFactor]:
    """The factors of the active adapters, in the order of the model's modules.

    Raises:
        ValueError: if there are none.
    """
    factors: list[InducingFactor] = []
    for module in model.modules():
        sides = (getattr(module, "lora_A", None), getattr(module, "lora_B", None))
        for side in sides:
            if isinstance(side, nn.ModuleDict):
                chosen = (side[name] for name in getattr(module, "active_adapters", []) if name in side)
                factors.extend(f for f in chosen if isinstance(f, InducingFactor))
    if not factors:
        raise ValueError(
            "the model has no active SGP-LoRA factor: adapt it with get_peft_model(model, SGPLoraConfig(...)) "
            "or activate its adapter with set_adapter"
        )
    return factors


def group_by_spec(
    factors: list[InducingFactor],
) -> dict[tuple[FactorSpec, torch.device], list[InducingFactor]]:
    """Factors that can be stacked: equal structure, one device. The order is that of first appearance."""
    groups: dict[tuple[FactorSpec, torch.device], list[InducingFactor]] = defaultdict(list)
    for factor in factors:
        groups[factor.spec, factor.unit.device].append(factor)
    return dict(groups)


def stack_tensors(factors: list[InducingFactor]) -> dict[str, Tensor]:
    """Tensors of n factors of one structure, each stacked to (n, ...)."""
    per_factor = [factor.tensors() for factor in factors]
    return {name: torch.stack([t[name] for t in per_factor]) for name in per_factor[0]}


def draw_group(factors: list[InducingFactor], noise: Noise) -> Draw:
    """Draw factors of one structure from explicit noise with leading dimensions (S, n)."""
    return posterior.sample(factors[0].spec, stack_tensors(factors), noise, factors[0].flow)


@contextmanager
def sample(model: nn.Module, n: int = 1, generator: torch.Generator | None = None) -> Iterator[LiveSample]:
    """Hold ``n`` posterior draws of every active factor while the context is open.

    Inside, a batch of n*B rows uses draw i for rows i*B to (i+1)*B (with n = 1, one draw for every row). The draws
    are made here and nowhere else, so recomputation under gradient checkpointing sees them again. Run backward before
    the context ends: the parameters receive their gradients when it ends. Draw anew for every micro-batch. Noise is
    drawn sample by sample, so n draws at once are the same as n draws of one, and results do not depend on how
    samples are split over forwards.

    Args:
        model: a PEFT model with SGP-LoRA adapters.
        n: number of draws, >= 1.
        generator: source of randomness; the global one of the device if None.

    Yields:
        A ``LiveSample``; its ``kl()`` is the KL term of the objective.

    Raises:
        ValueError: for n < 1, no active factor, a merged adapter, or a context that is already open.
        RuntimeError: from a backward pass that comes after the context has ended.
    """
    if n < 1:
        raise ValueError(f"the number of posterior samples must be at least 1, got {n}")
    if any(getattr(module, "merged_adapters", None) for module in model.modules()):
        raise ValueError("the adapter is merged, so there is nothing to draw: call unmerge_adapter first")
    factors = active_factors(model)
    if any(factor.has_sample for factor in factors):
        raise ValueError("posterior samples are already live: leave the outer bnn.sample context first")
    groups = group_by_spec(factors)
    per_sample = [
        [
            posterior.draw_noise(spec, len(group), 1, device, generator, group[0].unit.dtype)
            for (spec, device), group in groups.items()
        ]
        for _ in range(n)
    ]
    live = LiveSample(n)
    try:
        for group, noises in zip(groups.values(), zip(*per_sample, strict=True), strict=True):
            draw = draw_group(group, posterior.concatenate_noise(noises))
            weights = live.add(draw, group[0].compute_dtype)
            for factor, W in zip(group, weights.unbind(dim=1), strict=True):
                factor.hold(W)
        yield live
        live.push()
    finally:
        for factor in factors:
            factor.hold(None)
