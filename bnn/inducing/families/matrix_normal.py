"""Matrix normal q(U) = MN(M, R R^T, C C^T), i.e. vec U ~ N(vec M, C C^T (x) R R^T)."""

import torch
from torch import Tensor

from bnn.inducing.families.base import Params, log_abs_diagonal, squared_norm
from bnn.inducing.kl import LOG_2PI
from bnn.linalg import inverse_softplus, lower_triangular


class MatrixNormal:
    """Row and column Cholesky factors ``raw_row`` (m_r, m_r) and ``raw_col`` (m_c, m_c)."""

    point_mass = False

    def init(self, loc: Tensor, sd: float) -> dict[str, Tensor]:
        """Both factors start at sqrt(sd) I, so that every entry has standard deviation sd."""
        root = inverse_softplus(torch.tensor(sd**0.5, dtype=loc.dtype))
        return {
            "raw_loc": loc.clone(),
            "raw_row": root * torch.eye(loc.shape[-2], dtype=loc.dtype),
            "raw_col": root * torch.eye(loc.shape[-1], dtype=loc.dtype),
        }

    def sample(self, params: Params, eps: Tensor) -> Tensor:
        """M + R eps C^T."""
        R, C = lower_triangular(params["raw_row"]), lower_triangular(params["raw_col"])
        return params["raw_loc"] + R @ eps @ C.mT

    def mean(self, params: Params) -> Tensor:
        """The location M."""
        return params["raw_loc"]

    def entropy(self, params: Params) -> Tensor:
        """m_c log|R| + m_r log|C| + (m_r m_c / 2)(1 + log 2 pi)."""
        m_r, m_c = params["raw_loc"].shape[-2:]
        log_r = log_abs_diagonal(lower_triangular(params["raw_row"]))
        log_c = log_abs_diagonal(lower_triangular(params["raw_col"]))
        return m_c * log_r + m_r * log_c + 0.5 * m_r * m_c * (1 + LOG_2PI)

    def energy(self, params: Params, A_r: Tensor | None, A_c: Tensor | None) -> Tensor:
        """||A_r M A_c^T||^2 + ||A_r R||^2 ||A_c C||^2."""
        R, C = lower_triangular(params["raw_row"]), lower_triangular(params["raw_col"])
        if A_r is not None and A_c is not None:
            R, C = A_r @ R, A_c @ C
        spread = R.square().sum((-2, -1)) * C.square().sum((-2, -1))
        return squared_norm(params["raw_loc"], A_r, A_c) + spread
