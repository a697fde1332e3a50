"""The order in which examples are visited."""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from utils.data.example import Example


def length_sorted(
    examples: Sequence[Example], lengths: Sequence[int], batch_size: int
) -> Iterator[tuple[np.ndarray, list[Example]]]:
    """Batches for evaluation, longest first, so that little is padding and memory runs out early if at all.

    Args:
        examples: The examples.
        lengths: Their lengths in tokens.
        batch_size: Largest number of examples per batch.

    Yields:
        (indices, examples): `results[indices] = ...` puts results back into the original order.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        yield indices, [examples[i] for i in indices]


def nth_batch(examples: list[Example], size: int, seed: int, epoch: int, index: int) -> list[Example]:
    """Examples of step `index` of an epoch: of (seed, epoch, index) alone, so that a resumed run sees the same."""
    order = _order(seed, epoch, len(examples))
    return [examples[i] for i in order[index * size : (index + 1) * size]]


@lru_cache(maxsize=1)
def _order(seed: int, epoch: int, n: int) -> np.ndarray:
    """Kept for the next step of the epoch: to permute hundreds of thousands takes as long as a small model's step."""
    return np.random.default_rng([seed, epoch]).permutation(n)
