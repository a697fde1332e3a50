"""ScalaBL's A: projections with random scales, one per rank."""

import math
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnn.methods.blob_layer import RandomA, gaussian_kl


class SubspaceA(RandomA):
    """A = diag(s) Vh with s ~ N(mu, diag(sigma^2)), r numbers (Samplawski et al., UAI 2025).

    mu = exp(raw_mu) and sigma = exp(raw_sd) as in the authors' code; Vh (r, d_in), the right singular vectors of the
    initial A, is learned like LoRA's A and not kept orthonormal. All rows of a draw share its s.

    Args:
        raw_mu: log of the mean, (r,).
        raw_sd: log of the standard deviation, (r,).
        Vh: the projection, (r, d_in).
        prior_sd: standard deviation of the prior N(0, prior_sd^2) on every s.
    """

    def __init__(self, raw_mu: Tensor, raw_sd: Tensor, Vh: Tensor, prior_sd: float) -> None:
        super().__init__()
        self.raw_mu, self.raw_sd, self.Vh = nn.Parameter(raw_mu), nn.Parameter(raw_sd), nn.Parameter(Vh)
        self.prior_sd = prior_sd

    @classmethod
    def start(cls, A: Tensor, init_eps: float, prior_sd: float) -> tuple[Self, Tensor]:
        """The SVD A = U diag(mu) Vh, with sigma ~ U[init_eps / sqrt(2), init_eps].

        Returns:
            The layer, and U (r, r): B A = (B U) diag(mu) Vh, so B U takes the place of B.

        Raises:
            ValueError: if A has more rows than columns.
        """
        r, d_in = A.shape
        if r > d_in:
            raise ValueError(
                f"ScalaBL needs a rank of at most the layer's input size, got r={r} > {d_in}: lower peft.r"
            )
        U, mu, Vh = torch.linalg.svd(A, full_matrices=False)
        mu = mu.clamp(min=torch.finfo(A.dtype).eps)  # a rank-deficient A: log 0
        sigma = torch.empty_like(mu).uniform_(init_eps / math.sqrt(2), init_eps)
        return cls(mu.log(), sigma.log(), Vh.contiguous(), prior_sd), U

    @property
    def weight(self) -> Tensor:
        """Mean of A, (r, d_in)."""
        return self.raw_mu.exp()[:, None] * self.Vh

    @property
    def noise_shape(self) -> torch.Size:
        """(r,)."""
        return self.raw_mu.shape

    def extra_tensors(self) -> dict[str, Tensor]:
        """All parameters."""
        return {"raw_mu": self.raw_mu, "raw_sd": self.raw_sd, "Vh": self.Vh}

    def kl(self) -> Tensor:
        """KL[N(mu, sigma^2) || N(0, prior_sd^2)], nats."""
        return gaussian_kl(self.raw_mu.exp(), self.raw_sd.exp(), self.prior_sd)

    @torch.no_grad()
    def kl_step(self, size: float) -> None:
        """One gradient step on the KL: mu^2 / prior_sd^2 in log mu, sigma^2 / prior_sd^2 - 1 in log sigma."""
        self.raw_mu.sub_(size * (self.raw_mu.exp() / self.prior_sd).square())
        self.raw_sd.sub_(size * ((self.raw_sd.exp() / self.prior_sd).square() - 1))

    def forward(self, x: Tensor) -> Tensor:
        """A x for x (rows, ..., d_in)."""
        h = F.linear(x, self.Vh.to(x.dtype))
        s = self.raw_mu.exp()
        if self.eps is None:
            return h * s.to(x.dtype)
        S = self.tiles(x)
        s = (s + self.raw_sd.exp() * self.eps).to(x.dtype)
        return (h.reshape(S, -1, s.shape[-1]) * s[:, None]).reshape(h.shape)
