"""LoRA's A as a random matrix: what such layers have in common, and BLoB's Gaussian A with Flipout."""

import math
from abc import ABC, abstractmethod
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def gaussian_kl(mean: Tensor, sd: Tensor, prior_sd: float) -> Tensor:
    """KL[N(mean, sd^2) || N(0, prior_sd^2)] summed over entries, nats; sd and prior_sd are standard deviations."""
    return (math.log(prior_sd) - sd.log() + (sd.square() + mean.square()) / (2 * prior_sd**2) - 0.5).sum()


class RandomA(nn.Module, ABC):
    """Stands where LoRA has ``lora_A`` and computes A x for a random A (r x d_in).

    Outside a sample it computes with the mean. Inside, the S draws handed over by ``hold`` are used: of a batch of
    S*B rows, rows i*B to (i+1)*B use draw i. Noise is combined with the parameters in every forward, so several
    forward passes under one draw have graphs of their own, and recomputation sees the same draw.
    """

    bias = None
    prior_sd: float

    def __init__(self) -> None:
        super().__init__()
        self.eps: Tensor | None = None
        """Standard normal noise of the live draws, (S, *noise_shape)."""
        self.generator: torch.Generator | None = None
        """For the noise that depends on the number of rows, in training."""

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy: no draws."""
        return self.__dict__ | {"eps": None, "generator": None}

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """Mean of A, (r, d_in)."""

    @property
    @abstractmethod
    def noise_shape(self) -> torch.Size:
        """Shape of one draw's noise."""

    @abstractmethod
    def extra_tensors(self) -> dict[str, Tensor]:
        """What a saved adapter needs beyond the mean, by parameter name."""

    @abstractmethod
    def kl(self) -> Tensor:
        """KL[q || p], nats, a scalar with gradient."""

    @abstractmethod
    def kl_step(self, size: float) -> None:
        """One step of gradient descent on ``kl()`` with this step size."""

    def hold(self, eps: Tensor | None, generator: torch.Generator | None = None) -> None:
        """Make ``eps`` (S, *noise_shape) the live draws, or None to go back to the mean."""
        self.eps, self.generator = eps, generator

    def expect(self, rows: int) -> None:
        """Draw what depends on the number of rows of the forward pass to come: nothing, if not overridden."""

    def tiles(self, x: Tensor) -> int:
        """S, the number of live draws.

        Raises:
            ValueError: if the rows of ``x`` are no multiple of S.
        """
        assert self.eps is not None
        S = self.eps.shape[0]
        if x.shape[0] % S:
            raise ValueError(f"{S} draws are live, but the batch has {x.shape[0]} rows: tile it to a multiple of {S}")
        return S


class BLoBA(RandomA):
    """A ~ N(M, Omega^2) entrywise with standard deviation Omega = G^2 (Wang et al., NeurIPS 2024, Section 3.3).

    In training, Flipout (Wen et al., ICLR 2018, Eq. 4) turns a draw's E into pseudo-independent noise for every row:
    A x = M x + [(E o Omega)(x o s)] o t with random signs s (d_in,) and t (r,) of the row. In evaluation mode every
    row of a draw sees the same A = M + E o Omega.

    Args:
        M: mean, (r, d_in).
        G: square root of the standard deviation, (r, d_in).
        prior_sd: sigma_p, standard deviation of the prior.
    """

    def __init__(self, M: Tensor, G: Tensor, prior_sd: float) -> None:
        super().__init__()
        self.M, self.G = nn.Parameter(M), nn.Parameter(G)
        self.prior_sd = prior_sd
        self._signs: dict[int, Tensor] = {}

    @classmethod
    def start(cls, M: Tensor, init_eps: float, prior_sd: float) -> Self:
        """The mean M with G ~ U[init_eps / sqrt(2), init_eps], as the reference code draws it."""
        return cls(M, torch.empty_like(M).uniform_(init_eps / math.sqrt(2), init_eps), prior_sd)

    @property
    def weight(self) -> Tensor:
        """Mean of A, (r, d_in)."""
        return self.M

    @property
    def noise_shape(self) -> torch.Size:
        """Shape of E."""
        return self.M.shape

    def extra_tensors(self) -> dict[str, Tensor]:
        """G."""
        return {"G": self.G}

    def kl(self) -> Tensor:
        """KL[N(M, Omega^2) || N(0, sigma_p^2)], nats (Theorem 3.2: it equals the KL of the full weight)."""
        return gaussian_kl(self.M, self.G.square(), self.prior_sd)

    @torch.no_grad()
    def kl_step(self, size: float) -> None:
        """One gradient step on the KL, dKL/dM = M / sigma_p^2 and dKL/dG = 2 G^3 / sigma_p^2 - 2 / G, that stops short
        of overshooting.

        Where an entry would jump over the KL's minimum (M = 0, |G| = sqrt(sigma_p)) it stops there: the slope in G
        is unbounded near 0, and plain gradient descent diverges from an entry that comes close to it.
        """
        variance, best = self.prior_sd**2, math.sqrt(self.prior_sd)
        self.M.mul_(max(0.0, 1 - size / variance))
        magnitude = self.G.abs()
        moved = magnitude - size * (2 * magnitude**3 / variance - 2 / magnitude)
        moved = torch.where(magnitude < best, moved.clamp(max=best), moved.clamp(min=best))
        self.G.copy_(moved.copysign(self.G))

    def __getstate__(self) -> dict[str, Any]:
        """See ``RandomA.__getstate__``."""
        return super().__getstate__() | {"_signs": {}}

    def hold(self, eps: Tensor | None, generator: torch.Generator | None = None) -> None:
        """See ``RandomA.hold``."""
        super().hold(eps, generator)
        self._signs = {}

    def expect(self, rows: int) -> None:
        """In training, draw the signs for batches of ``rows`` rows, unless this draw has had such a batch before."""
        if self.training and rows not in self._signs:
            where = self.M.device if self.generator is None else self.generator.device
            bits = torch.randint(2, (rows, sum(self.M.shape)), generator=self.generator, device=where)
            self._signs[rows] = (2 * bits - 1).to(self.M)

    def signs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """s (rows, 1, ..., d_in) and t (rows, 1, ..., r)."""
        self.expect(x.shape[0])
        r, d_in = self.M.shape
        signs = self._signs[x.shape[0]].to(x.dtype)
        s, t = signs.reshape(len(signs), *[1] * (x.dim() - 2), d_in + r).split([d_in, r], dim=-1)
        return s, t

    def forward(self, x: Tensor) -> Tensor:
        """A x for x (rows, ..., d_in)."""
        y = F.linear(x, self.M.to(x.dtype))
        if self.eps is None:
            return y
        S = self.tiles(x)
        noise = (self.eps * self.G.square()).to(x.dtype)
        s, t = self.signs(x) if self.training else (None, None)
        z = x if s is None else x * s
        z = torch.bmm(z.reshape(S, -1, x.shape[-1]), noise.mT).reshape(y.shape)
        return y + (z if t is None else z * t)
