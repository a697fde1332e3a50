"""CUDA graphs: those of the sampler, and what any recording needs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def recording(*generators: torch.Generator) -> Iterator[None]:
    """Around the recording of a CUDA graph: if it fails, give its random generators, and the GPU's own, new states.

    A capture that could not end leaves the states marked as being captured, and no random number could be drawn from
    them again in this process; and it leaves its stream the current one. A GPU that broke the capture off may refuse
    the stream too, so the states come first.
    """
    stream = torch.cuda.current_stream()
    drawn_from = (torch.cuda.default_generators[torch.cuda.current_device()], *generators)
    try:
        yield
    except RuntimeError:
        for generator in drawn_from:
            generator.graphsafe_set_state(generator.clone_state())
        torch.cuda.set_stream(stream)
        raise


class SamplerGraph:
    """A draw and its backward as two CUDA graphs: two launches instead of a thousand.

    The graphs read the parameters where they are, so these must stay in place (``FactorStack.own``); the weights live
    in the graph's memory until the next draw, which is why only one context can be open. They are captured with
    aliases of the parameters, whose own gradients then are accumulated on the stream of the training.
    """

    def __init__(self) -> None:
        self._graphs: dict[int, Any] = {}
        self._gradients: list[Tensor] = []

    def __call__(
        self, draw: Callable[..., tuple[Tensor, ...]], stacks: Any, tensors: list[dict[str, Tensor]], noise: Tensor
    ) -> tuple[Tensor, ...]:
        """``draw(stacks, tensors, noise)``; captured at the first call with this number of samples."""
        places = [(i, name) for i, own in enumerate(tensors) for name, t in own.items() if t.requires_grad]
        leaves = [tensors[i][name] for i, name in places]
        if len(noise) not in self._graphs:

            def replayed(noise: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
                filled = [dict(own) for own in tensors]
                for (i, name), value in zip(places, values, strict=True):
                    filled[i][name] = value
                return draw(stacks, filled, noise)

            static = (noise.clone(), *(leaf.detach().requires_grad_() for leaf in leaves))
            _warm_up(replayed, static)
            with recording():
                self._graphs[len(noise)] = torch.cuda.make_graphed_callables(
                    replayed, static, num_warmup_iters=0, allow_unused_input=True
                )
        self._own_gradients(leaves)
        return self._graphs[len(noise)](noise, *leaves)

    def _own_gradients(self, leaves: list[Tensor]) -> None:
        """Give leaves without a gradient one of zeros: autograd would else keep the graph's, which is reused."""
        if not self._gradients:
            self._gradients = [torch.empty_like(leaf) for leaf in leaves]
        missing = [(leaf, own) for leaf, own in zip(leaves, self._gradients, strict=True) if leaf.grad is None]
        for leaf, own in missing:
            leaf.grad = own
        if missing:
            torch._foreach_zero_([own for _, own in missing])


def _warm_up(draw: Callable[..., tuple[Tensor, ...]], static: tuple[Tensor, ...]) -> None:
    """A draw with its backward on another stream: what is initialised at its first use cannot be captured.

    That of ``make_graphed_callables`` keeps its autograd graph, whose nodes the capture on a third stream would use.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        drawn = [weights for weights in draw(*static) if weights.requires_grad]
        if drawn:
            leaves = [tensor for tensor in static if tensor.requires_grad]
            torch.autograd.grad(drawn, leaves, [torch.zeros_like(weights) for weights in drawn], allow_unused=True)
    torch.cuda.current_stream().wait_stream(stream)
