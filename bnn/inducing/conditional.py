"""The conditional p(W' | U): its mean, and exact samples of its noise by Matheron's rule."""

from torch import Tensor

from bnn.inducing.prior import Frame


def conditional_mean(V: Tensor, rows: Frame, cols: Frame) -> Tensor:
    """M_W / sigma_p = P_r^T V P_c (Eq. 8, whitened).

    Args:
        V: whitened inducing matrix, (..., m_r, m_c).
        rows: row frame, P of shape (..., m_r, d_out).
        cols: column frame, P of shape (..., m_c, d_in).

    Returns:
        (..., d_out, d_in).
    """
    return _two_sided(rows.P, V, cols.P)


def noise_shapes(d_out: int, d_in: int, m_r: int, m_c: int) -> tuple[tuple[int, int], ...]:
    """Shapes of the three independent standard normal draws that ``matheron_correction`` consumes.

    The auxiliary draw lies on the factor's short side, so that for a LoRA factor it is m x r and not m x d.
    """
    auxiliary = (d_out, m_c) if d_out <= d_in else (m_r, d_in)
    return (d_out, d_in), auxiliary, (m_r, m_c)


def matheron_correction(E1: Tensor, E2: Tensor, E3: Tensor, rows: Frame, cols: Frame) -> Tensor:
    """The G for which E1 - P_r^T G P_c is exact noise of p(W' | U).

    Matheron's rule draws the joint (W', U_bar) and returns W' - T_r U_bar T_c. In whitened coordinates
    G = L_r^{-1} U_bar L_c^{-T} must be standard normal with Cov(G, E1) = P_r (x) P_c. Because [P, C] has orthonormal
    rows on each side, two sequential steps give exactly that, with no eigendecomposition (so gradients are defined
    where the spectrum is degenerate, Z = 0 included) and for any m, also m_r > d_out:

        H = E1 P_c^T + E2 C_c^T   ~ N(0, I), d_out x m_c
        G = P_r H + C_r E3        ~ N(0, I), m_r x m_c,      Cov(G, E1) = P_r (x) P_c.

    (Derived here: the part of G independent of E1 has covariance C_c C_c^T (x) P_r P_r^T + I (x) C_r C_r^T, which
    equals I - (P_c P_c^T) (x) (P_r P_r^T).) If d_out > d_in the two sides change places.

    Args:
        E1: standard normal, (..., d_out, d_in).
        E2: standard normal, (..., d_out, m_c) if d_out <= d_in else (..., m_r, d_in).
        E3: standard normal, (..., m_r, m_c).
        rows: row frame.
        cols: column frame.

    Returns:
        G, (..., m_r, m_c).
    """
    if E1.shape[-2] <= E1.shape[-1]:
        H = times(E1, cols.P.mT) + times(E2, cols.C.mT)
        return rows.P @ H + rows.C @ E3
    H = times(E1.mT, rows.P.mT).mT + times(E2.mT, rows.C.mT).mT
    return H @ cols.P.mT + E3 @ cols.C.mT


def conditional_sample(
    V: Tensor, lambda_: Tensor, E1: Tensor, E2: Tensor, E3: Tensor, rows: Frame, cols: Frame
) -> Tensor:
    """W / sigma_p = P_r^T V P_c + lambda (E1 - P_r^T G P_c) = P_r^T (V - lambda G) P_c + lambda E1.

    Args:
        V: whitened inducing matrix, (..., m_r, m_c).
        lambda_: conditional scale, broadcastable to (..., 1, 1).
        E1: see ``matheron_correction``.
        E2: see ``matheron_correction``.
        E3: see ``matheron_correction``.
        rows: row frame.
        cols: column frame.

    Returns:
        (..., d_out, d_in).
    """
    G = matheron_correction(E1, E2, E3, rows, cols)
    return _two_sided(rows.P, V - lambda_ * G, cols.P) + lambda_ * E1


def _two_sided(P_r: Tensor, V: Tensor, P_c: Tensor) -> Tensor:
    """P_r^T V P_c, multiplied on the factor's short side first (the intermediate is m x r, not m x d)."""
    if P_r.shape[-1] <= P_c.shape[-1]:
        return times(P_r.mT @ V, P_c)
    return times((V @ P_c).mT, P_r).mT


def times(X: Tensor, M: Tensor) -> Tensor:
    """X @ M for X (S, ..., a, b) and M (..., b, c), one matrix for all S samples.

    The samples' rows are laid below one another, (..., S a, b): S times fewer and larger products than those of a
    batch, which would copy M for every sample.
    """
    if X.dim() == M.dim():
        return X @ M
    stacked = X.movedim(0, -3).flatten(-3, -2) @ M
    return stacked.unflatten(-2, (X.shape[0], X.shape[-2])).movedim(-3, 0)
