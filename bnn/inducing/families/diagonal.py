"""Diagonal Gaussian q(U) = prod_ij N(U_ij; m_ij, s_ij^2)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from bnn.inducing.families.base import Params, inverse_covariance_diagonal, squared_norm
from bnn.inducing.kl import LOG_2PI
from bnn.linalg import inverse_softplus


class DiagonalGaussian:
    """Independent entries; parameters ``raw_loc`` and ``raw_sd`` (softplus), both (m_r, m_c)."""

    point_mass = False

    def init(self, loc: Tensor, sd: float) -> dict[str, Tensor]:
        """See ``Family.init``."""
        return {"raw_loc": loc.clone(), "raw_sd": inverse_softplus(torch.full_like(loc, sd))}

    def sample(self, params: Params, eps: Tensor) -> Tensor:
        """m + s * eps."""
        return params["raw_loc"] + F.softplus(params["raw_sd"]) * eps

    def mean(self, params: Params) -> Tensor:
        """The location."""
        return params["raw_loc"]

    def entropy(self, params: Params) -> Tensor:
        """sum_ij log s_ij + (m_r m_c / 2)(1 + log 2 pi)."""
        sd = F.softplus(params["raw_sd"])
        return (sd.log() + 0.5 * (1 + LOG_2PI)).sum((-2, -1))

    def energy(self, params: Params, A_r: Tensor | None, A_c: Tensor | None) -> Tensor:
        """||A_r m A_c^T||^2 + sum_ij s_ij^2 (K_r^{-1})_ii (K_c^{-1})_jj."""
        variance = F.softplus(params["raw_sd"]).square()
        if A_r is not None and A_c is not None:
            k_r, k_c = inverse_covariance_diagonal(A_r), inverse_covariance_diagonal(A_c)
            variance = variance * k_r[..., :, None] * k_c[..., None, :]
        return squared_norm(params["raw_loc"], A_r, A_c) + variance.sum((-2, -1))
