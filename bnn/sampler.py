"""Draws every factor of a model at once, before the forward, and holds the draws until the context ends.

Factors of equal structure are stacked, so that the whole model costs a handful of batched operations; nothing here
waits for the device.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bnn.graph import SamplerGraph
from bnn.inducing.posterior import FactorSpec
from bnn.layers import InducingFactor, without_autocast
from bnn.noise import Source, draw_noise
from bnn.stack import FactorStack


class LiveSample:
    """What ``bnn.sample`` yields: the number of draws, and the KL that belongs to them.

    The model and ``kl()`` see the draws as leaves, cut off from the parameters; ``push`` carries what backward has
    accumulated in them through the sampler once. Several backward passes, also those which reentrant checkpointing
    runs inside one, therefore share one draw and add up, in the dtype of the draws.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        self._kl = torch.zeros(())
        self._cuts: list[tuple[Tensor, Tensor]] = []
        self._open = True

    def kl(self) -> Tensor:
        """KL[q || p] summed over all factors drawn, nats, a scalar with gradient."""
        return self._kl

    def add(self, weights: list[Tensor], kl: Tensor) -> list[Tensor]:
        """Take in the draws of all stacks and their KL; returns the weights for the model to use."""
        self._kl = self._cut(kl)
        return [self._cut(W) for W in weights]

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

    def close(self) -> None:
        """Refuse gradients that come later; let go of the draws, which the hooks that do so would hold in a cycle."""
        self._open = False
        self._cuts.clear()

    def push(self) -> None:
        """Carry the gradients through the sampler to the parameters."""
        reached = [(root, leaf.grad) for root, leaf in self._cuts if leaf.grad is not None]
        if reached:
            torch.autograd.backward([root for root, _ in reached], [grad for _, grad in reached])


def active_factors(model: nn.Module) -> list[InducingFactor]:
    """The factors of the active adapters, in the order of the model's modules.

    Raises:
        ValueError: if there are none.
    """
    return [factor for _, _, factor in _places(model)]


def _places(model: nn.Module) -> list[tuple[Mapping[str, Any], str, InducingFactor]]:
    """Every active factor, with where it stands: the modules of its side of a layer, by adapter, and the adapter."""
    places: list[tuple[Mapping[str, Any], str, InducingFactor]] = []
    for module in model.modules():
        for side in (getattr(module, "lora_A", None), getattr(module, "lora_B", None)):
            if isinstance(side, nn.ModuleDict):
                chosen = ((name, side._modules.get(name)) for name in getattr(module, "active_adapters", []))
                places.extend((side._modules, name, f) for name, f in chosen if isinstance(f, InducingFactor))
    if not places:
        raise ValueError(
            "the model has no active SGP-LoRA factor: adapt it with get_peft_model(model, SGPLoraConfig(...)) "
            "or activate its adapter with set_adapter"
        )
    return places


Kind = tuple[FactorSpec, torch.device, torch.dtype, frozenset[str]]
"""Structure, device and compute dtype of a factor, and which of its tensors are trained."""


def group_by_kind(factors: list[InducingFactor]) -> dict[Kind, list[InducingFactor]]:
    """Factors that can be stacked: of one kind. The order is that of first appearance."""
    groups: dict[Kind, list[InducingFactor]] = defaultdict(list)
    for factor in factors:
        groups[factor.spec, factor.W_unit.device, factor.compute_dtype, factor.learned].append(factor)
    return dict(groups)


class Sampler:
    """Draws the factors of a model's active adapters; made once for as long as these stay the same.

    Args:
        model: a PEFT model with SGP-LoRA adapters.
        own: move the parameters into stacked ones (``FactorStack.own``), to be trained as ``parameters()``; which of
            them are trained is settled then.
        cuda_graph: with ``own``, and all factors on one GPU, make training draws by CUDA graphs.

    Raises:
        ValueError: if there is no active factor.
    """

    def __init__(self, model: nn.Module, own: bool = False, cuda_graph: bool = False) -> None:
        self._places = _places(model)
        self.factors = [factor for _, _, factor in self._places]
        self.stacks = [FactorStack(group) for group in group_by_kind(self.factors).values()]
        self._layers: list[Any] = [module for module in model.modules() if hasattr(module, "merged_adapters")]
        self._active = self._adapters()
        devices = {stack.device for stack in self.stacks}
        self._graph = SamplerGraph() if own and cuda_graph and len(devices) == 1 else None
        self._owns = own
        if own:
            for stack in self.stacks:
                stack.own()

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The stacked parameters, each with its name in a factor.

        As long as they are held, by this Sampler or an optimiser, gradients go to them and not to the model's own.

        Raises:
            ValueError: of a Sampler that does not own them.
        """
        if not self._owns:
            raise ValueError("this Sampler does not own the parameters: make it with own=True, or train the model's")
        return [named for stack in self.stacks for named in stack.own().items()]

    def _adapters(self) -> list[list[str]]:
        return [list(layer.active_adapters) for layer in self._layers]

    @contextmanager
    def draw(self, n: int = 1, generator: Source = None) -> Iterator[LiveSample]:
        """See ``bnn.sample``."""
        if n < 1:
            raise ValueError(f"the number of posterior samples must be at least 1, got {n}")
        if self._active != self._adapters():
            raise ValueError("another adapter was made active after this Sampler was made: make it anew")
        if any(modules.get(name) is not factor for modules, name, factor in self._places):
            raise ValueError("an adapter was replaced after this Sampler was made: make it anew")
        if any(layer.merged_adapters for layer in self._layers):
            raise ValueError("the adapter is merged, so there is nothing to draw: call unmerge_adapter first")
        if any(factor.has_sample for factor in self.factors):
            raise ValueError("posterior samples are already live: leave the outer bnn.sample context first")
        live = LiveSample(n)
        try:
            with without_autocast(self.stacks[0].device):
                weights, kl = self._draw(self._noise(n, generator))
            for stack, W in zip(self.stacks, live.add(weights, kl), strict=True):
                for factor, own in zip(stack.factors, (W[0] if n == 1 else W).unbind(-3), strict=True):
                    factor.hold(own)
            yield live
            with without_autocast(self.stacks[0].device):
                live.push()
        finally:
            live.close()
            for factor in self.factors:
                factor.hold(None)

    def _noise(self, n: int, source: Source) -> Tensor:
        """Noise of n draws, sample by sample, (n, all stacks' noise)."""
        size = sum(stack.noise_size for stack in self.stacks)
        first = self.stacks[0]
        drawn = [draw_noise(size, first.device, source, first.factors[0].W_unit.dtype) for _ in range(n)]
        return torch.stack(drawn)

    def _draw(self, noise: Tensor) -> tuple[list[Tensor], Tensor]:
        """Weights (S, n, d_out, d_in) of every stack, and the total KL."""
        tensors = [stack.tensors() for stack in self.stacks]
        own_graph = self._graph if noise.is_cuda and torch.is_grad_enabled() else None
        if own_graph is None or torch.cuda.is_current_stream_capturing():  # a graph of the whole step holds the draw
            *weights, kl = draw_stacks(self.stacks, tensors, noise)
        else:
            *weights, kl = own_graph(draw_stacks, self.stacks, tensors, noise)
        return weights, kl


def draw_stacks(stacks: list[FactorStack], tensors: list[dict[str, Tensor]], noise: Tensor) -> tuple[Tensor, ...]:
    """Every stack's weights, then the KL summed over all factors, nats, a scalar."""
    parts = noise.split([stack.noise_size for stack in stacks], dim=1)
    drawn = [s.draw(t, part.to(s.device)) for s, t, part in zip(stacks, tensors, parts, strict=True)]
    return *(W for W, _ in drawn), torch.stack([kl.sum().to(noise.device) for _, kl in drawn]).sum()


def sample(model: nn.Module, n: int = 1, generator: Source = None) -> AbstractContextManager[LiveSample]:
    """Hold ``n`` posterior draws of every active factor while the context is open.

    Inside, a batch of n*B rows uses draw i for rows i*B to (i+1)*B (with n = 1, one draw for every row); that is the
    first dimension of what every adapted layer sees, so no time-major model and no chosen tokens of an expert. Draws
    are made here and nowhere else, so recomputation under gradient checkpointing sees them again. Run backward before
    the context ends: the parameters receive their gradients when it ends, all that want one, which
    ``backward(inputs=...)`` and the transforms of ``torch.func`` cannot see. Draw anew for every micro-batch. Noise is
    drawn sample by sample, so n draws at once are the same as n draws of one, and results do not depend on how
    samples are split over forwards. A loop that draws often keeps a ``Sampler``.

    Args:
        model: a PEFT model with SGP-LoRA adapters.
        n: number of draws, >= 1.
        generator: source of randomness, or ``Antithetic``; the global one of the device if None.

    Returns:
        A context that yields a ``LiveSample``; its ``kl()`` is the KL term of the objective.

    Raises:
        ValueError: for n < 1, no active factor, a merged adapter, or a context that is already open.
        RuntimeError: from a backward pass that comes after the context has ended; reentrant checkpointing would
            recompute with the mean instead, which only a loss with ``kl()`` in it tells.
    """
    return Sampler(model).draw(n, generator)
