"""KL terms against torch.distributions."""

import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

from bnn.inducing.kl import conditional_kl, log_det_kronecker
from bnn.inducing.prior import whiten


@pytest.mark.parametrize("lambda_", [1e-2, 0.3, 1.0, 1.7])
def test_conditional_kl_is_that_of_the_two_gaussians_whatever_the_mean(lambda_, generator):
    """q(W' | U) = N(M(U), lambda^2 S) against p(W' | U) = N(M(U), S); S has full rank because D is not small."""
    d_out, d_in = 2, 3
    sides = [
        whiten(
            torch.randn(m, d, generator=generator, dtype=torch.float64), torch.ones(m, dtype=torch.float64), jitter=0.0
        )
        for m, d in ((2, d_out), (4, d_in))
    ]
    explained = [frame.P.mT @ frame.P for frame in sides]
    S = torch.eye(d_out * d_in, dtype=torch.float64) - torch.kron(explained[1], explained[0])
    assert torch.linalg.eigvalsh(S).min() > 1e-2
    got = conditional_kl(torch.tensor(lambda_, dtype=torch.float64), d_out, d_in)
    for _ in range(3):
        V = torch.randn(2, 4, generator=generator, dtype=torch.float64)
        mean = (sides[0].P.mT @ V @ sides[1].P).mT.flatten()
        expected = kl_divergence(MultivariateNormal(mean, lambda_**2 * S), MultivariateNormal(mean, S))
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_conditional_kl_is_zero_with_zero_slope_at_lambda_one():
    lambda_ = torch.ones(2, dtype=torch.float64, requires_grad=True)
    kl = conditional_kl(lambda_, 7, 11)
    assert torch.equal(kl, torch.zeros_like(kl))
    (slope,) = torch.autograd.grad(kl.sum(), lambda_)
    assert torch.equal(slope, torch.zeros_like(slope))


def test_log_det_kronecker(generator):
    L_r, L_c = (
        torch.linalg.cholesky(A @ A.mT + torch.eye(m))
        for m, A in ((m, torch.randn(2, m, m, generator=generator, dtype=torch.float64)) for m in (2, 3))
    )
    got = log_det_kronecker(L_r, L_c)
    for i in range(2):
        dense = torch.kron(L_c[i] @ L_c[i].mT, L_r[i] @ L_r[i].mT)
        torch.testing.assert_close(got[i], torch.logdet(dense))
