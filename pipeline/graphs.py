"""Training on a GPU by CUDA graphs: one launch in the place of the thousands that a small model is bound by."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bnn.graph import recording
from bnn.objective import Loss
from utils.data.batch import Batch
from utils.llm.errors import lacks_memory

Body = Callable[[Batch, Any, Any], Loss]
"""(batch, weight, beta) -> the weighted loss and its parts; adds gradients to the parameters."""


class Recorded(NamedTuple):
    """A graph with what it reads and writes."""

    graph: Any
    batch: Batch
    loss: Loss
    gradients: list[Tensor | None]
    """What the graph writes anew, of parameters that had no gradient before it; the others are added to in place."""


class StepGraphs:
    """Forward and backward of a micro-batch, draws included, replayed as CUDA graphs: one per shape of batch.

    The first batch of a shape runs as usual, the second is recorded, later ones are replayed; all give the same
    gradients. A recording fixes everything but the batch's tensors, the two scalars and the random numbers, so what
    else differs between steps belongs into ``variant``. The graphs keep their memory: a batch of a new shape needs as
    much again.

    Args:
        parameters: what is trained; they must stay in place.
        generator: of the draws inside the recorded part, seeded anew between steps.
        device: the current GPU.
        num_choices: C of every batch.
        multiple: of what the widths of batches must be multiples, so that there are few shapes.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        generator: torch.Generator,
        device: torch.device,
        num_choices: int = 1,
        multiple: int = 1,
    ) -> None:
        self.padding = {"num_choices": num_choices, "multiple": multiple}
        """What ``Encoder.collate`` must be told."""
        self._parameters = parameters
        self._generator = generator
        self._device = device
        self._own = [torch.empty_like(p) for p in parameters]
        self._scalars = torch.empty(2, device=device)
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[Any, Recorded | None] = {}

    @property
    def recorded(self) -> int:
        """Number of graphs."""
        return sum(graph is not None for graph in self._graphs.values())

    def __call__(self, body: Body, batch: Batch, weight: float, beta: float, variant: Any) -> Loss:
        """``body(batch, weight, beta)`` by the graph for this shape, variant, and set of parameters with a gradient.

        Raises:
            RuntimeError: if a step cannot be recorded: the model waits for the device (a mixture of experts does).
            RuntimeError, torch.OutOfMemoryError: if there is too little memory (``want_of_memory`` tells).
        """
        fresh = tuple(p.grad is None for p in self._parameters)
        key = (variant, fresh, batch.keep, *(t.shape for t in _tensors(batch)))
        if key not in self._graphs:
            self._graphs[key] = None
            return body(batch.to(self._device), weight, beta)
        self._keep_gradients()
        recorded = self._graphs[key] = self._graphs[key] or self._record(body, batch.to(self._device))
        for fixed, t in zip(_tensors(recorded.batch), _tensors(batch), strict=True):
            fixed.copy_(t, non_blocking=True)
        self._scalars.copy_(torch.tensor([weight, beta]))
        recorded.graph.replay()
        self._take_gradients(recorded.gradients)
        return Loss(*(t.clone() for t in recorded.loss))

    def _record(self, body: Body, batch: Batch) -> Recorded:
        before = [p.grad for p in self._parameters]
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self._generator)
        try:
            with recording(self._generator), torch.cuda.graph(graph, pool=self._pool):
                loss = body(batch, *self._scalars)
        except RuntimeError as error:
            if lacks_memory(error):
                raise
            reason = str(error).splitlines()[0]
            raise RuntimeError(
                f"a training step cannot be recorded as a CUDA graph ({reason}): set train.graph_padding=null; a run "
                "that has a checkpoint can be resumed with it"
            ) from error
        finally:
            after = [p.grad for p in self._parameters]
            for p, grad in zip(self._parameters, before, strict=True):
                p.grad = grad  # recording computes nothing
        return Recorded(graph, batch, loss, [g if b is None else None for g, b in zip(after, before, strict=True)])

    def _keep_gradients(self) -> None:
        """Move gradients that steps outside a graph have made to where graphs add to them."""
        for p, own in zip(self._parameters, self._own, strict=True):
            if p.grad is not None and p.grad is not own:
                own.copy_(p.grad)
                p.grad = own

    def _take_gradients(self, written: list[Tensor | None]) -> None:
        """Copy what a graph has written, since the next replay writes there again."""
        new = [(own, g) for own, g in zip(self._own, written, strict=True) if g is not None]
        if new:
            torch._foreach_copy_([own for own, _ in new], [g for _, g in new])
        for p, own, g in zip(self._parameters, self._own, written, strict=True):
            if g is not None:
                p.grad = own


def _tensors(batch: Batch) -> list[Tensor]:
    return [value for f in fields(batch) if isinstance(value := getattr(batch, f.name), Tensor)]
