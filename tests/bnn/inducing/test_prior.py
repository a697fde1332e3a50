"""Whitening: the identities of the frame [P, C]."""

import pytest
import torch

from bnn.inducing.prior import whiten

SIZES = [(3, 5), (5, 5), (6, 4)]
"""(m, d): fewer, as many and more inducing rows than dimensions (then Z Z^T is singular)."""


def inputs(m: int, d: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    Z = torch.randn(2, m, d, generator=generator, dtype=torch.float64)
    D = 0.1 + torch.rand(2, m, generator=generator, dtype=torch.float64)
    return Z, D


@pytest.mark.parametrize(("m", "d"), SIZES)
@pytest.mark.parametrize("jitter", [0.0, 1e-6, 1e-2])
def test_factorises_the_prior_covariance(m, d, jitter, generator):
    Z, D = inputs(m, d, generator)
    frame = whiten(Z, D, jitter)
    K = Z @ Z.mT + torch.diag_embed(D**2)
    K = K + jitter * K.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * torch.eye(m)
    torch.testing.assert_close(frame.L @ frame.L.mT, K, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(frame.L @ frame.P, Z, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(frame.L_inv @ frame.L, torch.eye(m, dtype=Z.dtype).expand(2, m, m))


@pytest.mark.parametrize(("m", "d"), SIZES)
@pytest.mark.parametrize("jitter", [0.0, 1e-6, 1e-2])
def test_frame_has_orthonormal_rows(m, d, jitter, generator):
    Z, D = inputs(m, d, generator)
    frame = whiten(Z, D, jitter)
    eye = torch.eye(m, dtype=Z.dtype).expand(2, m, m)
    torch.testing.assert_close(frame.P @ frame.P.mT + frame.C @ frame.C.mT, eye, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("m", "d"), SIZES[:2])
def test_frame_becomes_orthonormal_as_the_diagonal_vanishes(m, d, generator):
    Z, D = inputs(m, d, generator)
    gaps = []
    for scale in (1e-2, 1e-3, 1e-4):
        P = whiten(Z, scale * D, jitter=0.0).P
        gaps.append(float((P @ P.mT - torch.eye(m)).abs().max()))
    assert gaps[0] > gaps[1] > gaps[2]
    # the gap is L^{-1} D^2 L^{-T}: quadratic in D
    assert gaps[2] / gaps[1] == pytest.approx(1e-2, rel=0.1)


def test_zero_inducing_inputs_explain_nothing():
    frame = whiten(torch.zeros(3, 4, dtype=torch.float64), torch.full((3,), 0.3, dtype=torch.float64), jitter=0.0)
    assert not frame.P.any()
    torch.testing.assert_close(frame.C, torch.eye(3, dtype=torch.float64))


def test_stacked_sides_are_whitened_one_by_one(generator):
    Z, D = inputs(3, 5, generator)
    stacked = whiten(Z, D, 1e-6)
    for i in range(2):
        for all_of_it, one in zip(stacked, whiten(Z[i], D[i], 1e-6), strict=True):
            torch.testing.assert_close(all_of_it[i], one, rtol=1e-12, atol=1e-12)


def test_gradients_agree_with_finite_differences(generator):
    Z, D = inputs(3, 2, generator)
    assert torch.autograd.gradcheck(lambda Z, D: whiten(Z, D, 1e-6)[:3], (Z[0].requires_grad_(), D[0].requires_grad_()))
