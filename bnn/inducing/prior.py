"""Prior of the inducing matrix and its whitening (Ritter et al., 2021, section 3; notation: README, "Glossary")."""

from typing import NamedTuple

from torch import Tensor

from bnn.linalg import safe_cholesky, triangular_inverse


class Frame(NamedTuple):
    """One side (rows or columns) of the inducing prior, whitened.

    K = Z Z^T + D^2 = L L^T. Since P P^T + C C^T = L^{-1} (Z Z^T + D^2) L^{-T} = I, [P, C] has orthonormal rows: P is
    a contraction, and an orthonormal frame as D -> 0.
    """

    P: Tensor
    """L^{-1} Z, shape (..., m, d)."""
    C: Tensor
    """L^{-1} D, shape (..., m, m)."""
    L: Tensor
    """Cholesky factor of K, shape (..., m, m)."""
    L_inv: Tensor
    """L^{-1}, shape (..., m, m)."""


def whiten(Z: Tensor, D: Tensor, jitter: float) -> Frame:
    """Whiten one side of the prior p(vec U) = N(0, K_c (x) K_r).

    Args:
        Z: inducing inputs, (..., m, d).
        D: positive diagonal, a standard deviation, (..., m).
        jitter: see ``safe_cholesky``; it also enters C, so that P P^T + C C^T = I stays exact to rounding.

    Returns:
        The ``Frame`` of this side.
    """
    K = Z @ Z.mT
    variance = D.square()
    variance = variance + jitter * (K.diagonal(dim1=-2, dim2=-1) + variance).mean(-1, keepdim=True)
    L = safe_cholesky(K + variance.diag_embed())
    L_inv = triangular_inverse(L)
    return Frame(P=L_inv @ Z, C=L_inv * variance.sqrt()[..., None, :], L=L, L_inv=L_inv)
