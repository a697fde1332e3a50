"""Monte-Carlo prediction: the scores of every example under every posterior sample."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn


class Tileable(Protocol):
    """A batch that can be repeated below itself."""

    input_ids: Tensor

    def tile(self, n: int) -> Self:
        """n copies, copy i in rows i*N to (i+1)*N."""
        ...


B = TypeVar("B", bound=Tileable)


@torch.no_grad()
def predict(
    model: nn.Module,
    score: Callable[[nn.Module, B], Tensor],
    batches: Sequence[B],
    *,
    n: int | None,
    sample: Callable[..., AbstractContextManager[Any]],
    generator: torch.Generator | None,
    max_tokens_per_forward: int,
) -> Tensor:
    """Scores of every example under every draw.

    The same n draws serve all batches: sample i of the result is one function over the whole data set. As many draws
    as fit into ``max_tokens_per_forward`` go through one forward; the split does not change the result.

    Args:
        model: in evaluation mode.
        score: (model, batch) -> unnormalised log-scores (rows, C), C equal or padded with -inf.
        batches: on the model's device.
        n: number of draws; None for one pass without any (the posterior mean).
        sample: ``bnn.sample`` or a method's own, called as sample(model, k, generator).
        generator: source of randomness.
        max_tokens_per_forward: bound on rows * tokens of a tiled batch; at least one draw always goes.

    Returns:
        (n, N, C) float32 on the CPU; (1, N, C) for n = None.

    Raises:
        ValueError: in training mode, without batches, or for n < 1.
    """
    if model.training:
        raise ValueError("prediction in training mode would apply dropout: call model.eval() first")
    if not batches:
        raise ValueError("nothing to predict: there are no batches")
    if n is None:
        return _join([score(model, batch)[None] for batch in batches])
    if n < 1:
        raise ValueError(f"the number of posterior samples must be at least 1, got {n}")
    largest = max(batch.input_ids.numel() for batch in batches)
    chunk = max(1, min(n, max_tokens_per_forward // largest))
    results = []
    for start in range(0, n, chunk):
        k = min(chunk, n - start)
        with sample(model, k, generator):
            scored = [score(model, batch.tile(k) if k > 1 else batch).unflatten(0, (k, -1)) for batch in batches]
        results.append(_join(scored))
    return torch.cat(results)


def _join(scores: list[Tensor]) -> Tensor:
    """Concatenate (k, rows, C) over rows, absent choices filled with -inf."""
    width = max(s.shape[-1] for s in scores)
    return torch.cat(
        [nn.functional.pad(s.float().cpu(), (0, width - s.shape[-1]), value=-torch.inf) for s in scores], dim=1
    )
