"""The standard normal noise behind posterior draws, independent or mirrored."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Noise(NamedTuple):
    """Standard normal draws behind S samples of n factors; every field has leading dimensions (S, n)."""

    eps: Tensor
    """For q(U), (S, n, m_r, m_c)."""
    E1: Tensor | None = None
    """For the conditional, (S, n, d_out, d_in); with E2 and E3 None where there is no conditional noise."""
    E2: Tensor | None = None
    E3: Tensor | None = None


class Antithetic:
    """A source of randomness whose draws have mirror images: e_1, ..., e_k, -e_1, ..., -e_k, and so on anew.

    Each draw has the same distribution as before, so averages over draws stay unbiased; what is odd in the noise
    cancels within a pair (Hammersley and Morton, 1956). Draws are handed out one by one, so a pair may be split over
    forward passes.

    Args:
        generator: source of the first of each pair; the device's global one if None.
        ahead: k, how many draws later the mirror image of a draw comes.

    Raises:
        ValueError: for ahead < 1; from a mirrored draw asked for at another size than its pair's first.
    """

    def __init__(self, generator: torch.Generator | None, ahead: int = 1) -> None:
        if ahead < 1:
            raise ValueError(f"ahead={ahead}: a mirror image comes at least one draw later")
        self.generator = generator
        self.ahead = ahead
        self._mirrored: list[Tensor] = []
        self._fresh = ahead

    def next(self, size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """A new draw (size,), or the mirror image of an earlier one."""
        if self._fresh:
            drawn = draw_noise(size, device, self.generator, dtype)
            self._mirrored.append(-drawn)
            self._fresh -= 1
            return drawn
        drawn = self._mirrored.pop(0)
        if drawn.numel() != size:
            raise ValueError(f"a draw of {size} numbers cannot mirror one of {drawn.numel()}: a source for each model")
        if not self._mirrored:
            self._fresh = self.ahead
        return drawn


Source = torch.Generator | Antithetic | None
"""Where draws come from; None is the device's global generator."""


def draw_noise(size: int, device: torch.device, source: Source, dtype: torch.dtype) -> Tensor:
    """The noise of one draw of everything, (size,), made on the generator's device if there is one."""
    if isinstance(source, Antithetic):
        return source.next(size, device, dtype)
    made_on = device if source is None else source.device
    return torch.randn(size, generator=source, device=made_on, dtype=dtype).to(device)


def noise_size(shapes: Sequence[tuple[int, int]], n: int) -> int:
    """Numbers behind one draw of ``n`` factors whose noise has these shapes."""
    return n * sum(rows * columns for rows, columns in shapes)


def shape_noise(flat: Tensor, shapes: Sequence[tuple[int, int]], n: int) -> Noise:
    """``Noise`` for n factors as views of ``flat`` (S, noise_size(shapes, n))."""
    parts = flat.split([n * rows * columns for rows, columns in shapes], dim=1)
    return Noise(*(part.unflatten(1, (n, *shape)) for part, shape in zip(parts, shapes, strict=True)))
