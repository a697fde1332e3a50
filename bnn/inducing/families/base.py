"""What every family of q(U) offers: pure functions of a dictionary of parameters.

A family owns no tensors. ``init`` creates the parameters of one factor; every other function takes them with any
leading batch dimensions (the sampler stacks factors of equal shape), so that the stacked and the plain path are the
same code. ``A_r`` and ``A_c`` below are L_r^{-1}, L_c^{-1} of the prior, or None for the whitened prior N(0, I).
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

Params = Mapping[str, Tensor]


class Family(Protocol):
    """A family of distributions over an (m_r, m_c) matrix."""

    point_mass: bool
    """True if q has no density: then ``entropy`` leaves out the (infinite, constant) entropy of a point."""

    def init(self, loc: Tensor, sd: float) -> dict[str, Tensor]:
        """Unconstrained parameters of one factor with mean ``loc`` (m_r, m_c) and standard deviation ``sd``."""
        ...

    def sample(self, params: Params, eps: Tensor) -> Tensor:
        """Reparametrised draws from standard normal ``eps`` (S, ..., m_r, m_c); same shape."""
        ...

    def mean(self, params: Params) -> Tensor:
        """E[U], (..., m_r, m_c)."""
        ...

    def entropy(self, params: Params) -> Tensor:
        """H[q], nats, (...)."""
        ...

    def energy(self, params: Params, A_r: Tensor | None, A_c: Tensor | None) -> Tensor:
        """E ||A_r U A_c^T||_F^2, (...)."""
        ...


def squared_norm(U: Tensor, A_r: Tensor | None, A_c: Tensor | None) -> Tensor:
    """||A_r U A_c^T||_F^2 over the last two dimensions; None stands for the identity."""
    if A_r is not None and A_c is not None:
        U = A_r @ U @ A_c.mT
    return U.square().sum((-2, -1))


def inverse_covariance_diagonal(A: Tensor) -> Tensor:
    """diag(A^T A) = diag(K^{-1}) for A = L^{-1}, (..., m)."""
    return A.square().sum(-2)


def log_abs_diagonal(L: Tensor) -> Tensor:
    """log |det| of triangular (..., m, m)."""
    return torch.log(L.diagonal(dim1=-2, dim2=-1)).sum(-1)
