"""The order in which examples are visited."""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from utils.data.example import Example


def epoch_generator(seed: int, epoch: int) -> np.random.Generator:
    """Generator of one epoch's order: a function of (seed, epoch) only, so a resumed run sees the same batches."""
    return np.random.default_rng([seed, epoch])


def batches(
    examples: Sequence[Example], batch_size: int, generator: np.random.Generator | None = None
) -> Iterator[list[Example]]:
    """Batches of at most `batch_size` examples, shuffled by `generator`, in the given order where it is None."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    order = np.arange(len(examples)) if generator is None else generator.permutation(len(examples))
    for start in range(0, len(order), batch_size):
        yield [examples[i] for i in order[start : start + batch_size]]


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
    """Examples of one optimiser step: a function of (seed, epoch, index), so that a resumed run sees the same."""
    order = _order(seed, epoch, len(examples))
    return [examples[i] for i in order[index * size : (index + 1) * size]]


@lru_cache(maxsize=1)
def _order(seed: int, epoch: int, n: int) -> np.ndarray:
    """Kept for the next step of the epoch: to permute hundreds of thousands takes as long as a small model's step."""
    return epoch_generator(seed, epoch).permutation(n)
