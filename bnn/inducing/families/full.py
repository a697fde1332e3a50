"""Full-covariance Gaussian q(vec U) = N(vec M, S S^T), vec row-major (as ``Tensor.flatten``)."""

import torch
from torch import Tensor

from bnn.inducing.families.base import Params, log_abs_diagonal, squared_norm
from bnn.inducing.kl import LOG_2PI
from bnn.linalg import inverse_softplus, lower_triangular


class FullGaussian:
    """One Cholesky factor ``raw_tril`` of size (m_r m_c, m_r m_c)."""

    point_mass = False

    def init(self, loc: Tensor, sd: float) -> dict[str, Tensor]:
        """See ``Family.init``."""
        eye = torch.eye(loc.numel(), dtype=loc.dtype)
        return {"raw_loc": loc.clone(), "raw_tril": inverse_softplus(torch.tensor(sd, dtype=loc.dtype)) * eye}

    def sample(self, params: Params, eps: Tensor) -> Tensor:
        """vec U = vec M + S vec eps."""
        S = lower_triangular(params["raw_tril"])
        return params["raw_loc"] + (S @ eps.flatten(-2)[..., None]).squeeze(-1).reshape(eps.shape)

    def mean(self, params: Params) -> Tensor:
        """The location M."""
        return params["raw_loc"]

    def entropy(self, params: Params) -> Tensor:
        """log|S| + (m_r m_c / 2)(1 + log 2 pi)."""
        S = lower_triangular(params["raw_tril"])
        return log_abs_diagonal(S) + 0.5 * S.shape[-1] * (1 + LOG_2PI)

    def energy(self, params: Params, A_r: Tensor | None, A_c: Tensor | None) -> Tensor:
        """||A_r M A_c^T||^2 + ||(A_r (x) A_c) S||^2 (row-major vec)."""
        loc = params["raw_loc"]
        m_r, m_c = loc.shape[-2:]
        S = lower_triangular(params["raw_tril"])
        columns = S.mT.reshape(*S.shape[:-2], m_r * m_c, m_r, m_c)
        if A_r is not None and A_c is not None:
            columns = A_r[..., None, :, :] @ columns @ A_c[..., None, :, :].mT
        return squared_norm(loc, A_r, A_c) + columns.square().sum((-3, -2, -1))
