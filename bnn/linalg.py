"""Small linear-algebra helpers. Everything runs in float32 or better and accepts leading batch dimensions."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def safe_cholesky(K: Tensor, jitter: float = 0.0) -> Tensor:
    """Cholesky factor of ``K + jitter * mean(diag K) * I`` without host synchronisation.

    Args:
        K: symmetric positive semi-definite, shape (..., m, m), float32 or better.
        jitter: added to the diagonal, relative to its mean (dimensionless).

    Returns:
        Lower triangular L with L L^T = K + jitter term, shape (..., m, m). Where a matrix is not positive definite
        the factor holds NaN, which the training loop's check of the loss reports: nothing is averaged in silently.

    Raises:
        ValueError: if K is not square or is narrower than float32.
    """
    if K.shape[-1] != K.shape[-2]:
        raise ValueError(f"safe_cholesky expects square matrices, got shape {tuple(K.shape)}")
    if K.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"safe_cholesky needs float32 or float64, got {K.dtype}: convert before the factorisation")
    scale = K.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    eye = torch.eye(K.shape[-1], dtype=K.dtype, device=K.device)
    L, info = torch.linalg.cholesky_ex(K + jitter * scale * eye)
    return torch.where((info == 0)[..., None, None], L, torch.full_like(L, math.nan))


def triangular_inverse(L: Tensor) -> Tensor:
    """Inverse of a lower triangular (..., m, m)."""
    eye = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device).expand_as(L)
    return torch.linalg.solve_triangular(L, eye, upper=False)


def inverse_softplus(x: Tensor) -> Tensor:
    """The y with softplus(y) = x, for x > 0; stable for large and small x."""
    return x + torch.log(-torch.expm1(-x))


def lower_triangular(raw: Tensor) -> Tensor:
    """Lower triangular (..., m, m) with a positive diagonal (softplus) from an unconstrained matrix.

    An entry left of the diagonal is in units of its row's diagonal entry / sqrt(m): steps that move all of ``raw``
    alike, as Adam's do, change a row relative to its size, and no faster where m is large.
    """
    diagonal = F.softplus(raw.diagonal(dim1=-2, dim2=-1))
    return diagonal[..., None] * torch.tril(raw, -1) / math.sqrt(raw.shape[-1]) + torch.diag_embed(diagonal)
