"""KL terms of the objective, in nats (Lin et al., 2026, Eq. 31; Ritter et al., 2021, section 3)."""

import math

from torch import Tensor

LOG_2PI = math.log(2 * math.pi)


def conditional_kl(lambda_: Tensor, d_out: int, d_in: int) -> Tensor:
    """KL[q(W | U) || p(W | U)] = (d_out d_in / 2) (lambda^2 - 1 - 2 log lambda), Eq. 31; independent of U.

    Args:
        lambda_: conditional scale, any shape.
        d_out: rows of W.
        d_in: columns of W.

    Returns:
        Nats, same shape as ``lambda_``.
    """
    return 0.5 * d_out * d_in * (lambda_.square() - 1.0 - 2.0 * lambda_.log())


def gaussian_kl(entropy: Tensor, energy: Tensor, log_det_prior: Tensor, size: int) -> Tensor:
    """KL[q(U) || p(U)] = -H[q] - E_q[log p(U)] for the prior p(vec U) = N(0, K_c (x) K_r).

    Args:
        entropy: H[q], nats.
        energy: E_q ||L_r^{-1} U L_c^{-T}||_F^2 (dimensionless).
        log_det_prior: log |K_c (x) K_r|; 0 for the whitened prior.
        size: m_r m_c.

    Returns:
        Nats, the broadcast shape of the arguments.
    """
    return -entropy + 0.5 * (energy + log_det_prior + size * LOG_2PI)


def log_det_kronecker(L_r: Tensor, L_c: Tensor) -> Tensor:
    """log |K_c (x) K_r| = 2 m_c log|L_r| + 2 m_r log|L_c| from Cholesky factors (..., m, m)."""
    log_r = L_r.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    log_c = L_c.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return 2 * (L_c.shape[-1] * log_r + L_r.shape[-1] * log_c)
