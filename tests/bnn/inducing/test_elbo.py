"""The ELBO in a linear-Gaussian model, where the evidence and the posterior are known exactly.

y = W x + noise of variance s^2. W is linear in V (row-major vec W = sigma_p (P_r^T (x) P_c^T) vec V), so the posterior
of V is Gaussian, and a full Gaussian q(V) can be exact. The expected log-likelihood is quadratic in the noise, so the
symmetric set +-sqrt(n) e_i (mean 0, covariance I) integrates it without error: no Monte Carlo.
"""

import math
from typing import NamedTuple

import pytest
import torch
from bnn_cases import raw_of
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from bnn.inducing import posterior
from bnn.inducing.posterior import FactorSpec, Noise

D_OUT, D_IN, ROWS, NOISE_SD = 2, 3, 7, 0.6
SIZE = D_OUT * D_IN


class Problem(NamedTuple):
    spec: FactorSpec
    tensors: dict[str, Tensor]
    x: Tensor
    y: Tensor
    design: Tensor
    """Row-major vec y = design @ vec V + noise."""


def as_tensors(q: MultivariateNormal) -> dict[str, Tensor]:
    return {"raw_loc": q.mean.reshape(1, D_OUT, D_IN), "raw_tril": raw_of(q.scale_tril)[None]}


def make_problem(make_tensors, *, conditional_noise: bool, D: float, lambda_: float) -> Problem:
    spec = FactorSpec(
        D_OUT, D_IN, D_OUT, D_IN, family="full", conditional_noise=conditional_noise, jitter=0.0, lambda_max=2.0
    )
    tensors, _ = make_tensors(spec, 1, D=D, unit=1.0)
    tensors["raw_lambda"] = torch.logit(torch.tensor([lambda_ / 2.0], dtype=torch.float64))
    noise = torch.Generator().manual_seed(9)
    x = torch.randn(ROWS, D_IN, generator=noise, dtype=torch.float64)
    y = torch.randn(ROWS, D_OUT, generator=noise, dtype=torch.float64)
    rows, cols = posterior.frames(spec, tensors)
    P = torch.kron(rows.P[0].mT.contiguous(), cols.P[0].mT.contiguous())
    to_y = torch.kron(torch.eye(D_OUT, dtype=torch.float64), x)  # row-major (D_OUT, ROWS) layout of y^T
    return Problem(spec, tensors, x, y, posterior.prior_sd_of(tensors)[0] * to_y @ P)


def exact_posterior(problem: Problem) -> MultivariateNormal:
    precision = torch.eye(SIZE, dtype=torch.float64) + problem.design.mT @ problem.design / NOISE_SD**2
    mean = torch.linalg.solve(precision, problem.design.mT @ problem.y.mT.flatten()) / NOISE_SD**2
    return MultivariateNormal(mean, precision_matrix=precision)


def log_evidence(design: Tensor, y: Tensor) -> Tensor:
    covariance = design @ design.mT + NOISE_SD**2 * torch.eye(len(design), dtype=torch.float64)
    return MultivariateNormal(torch.zeros(len(design), dtype=torch.float64), covariance).log_prob(y.mT.flatten())


def sigma_points(spec: FactorSpec) -> Noise:
    """All of +-sqrt(n) e_i over the stacked noise of dimension n, as 2n draws."""
    shapes = [(spec.m_r, spec.m_c)]
    if spec.conditional_noise:
        shapes += posterior.noise_shapes(spec.d_out, spec.d_in, spec.m_r, spec.m_c)
    sizes = [a * b for a, b in shapes]
    eye = math.sqrt(sum(sizes)) * torch.eye(sum(sizes), dtype=torch.float64)
    parts = torch.cat([eye, -eye]).split(sizes, dim=1)
    fields = [part.reshape(-1, 1, *shape) for part, shape in zip(parts, shapes, strict=True)]
    return Noise(*fields, *[None] * (4 - len(fields)))


def elbo(problem: Problem, q: dict[str, Tensor]) -> Tensor:
    """E_q[log p(y | x, W)] - KL[q || p], nats."""
    draw = posterior.sample(problem.spec, problem.tensors | q, sigma_points(problem.spec), None)
    prediction = problem.x @ draw.W[:, 0].mT
    errors = (problem.y - prediction).square().sum((-2, -1)).mean()
    log_normaliser = problem.y.numel() * math.log(2 * math.pi * NOISE_SD**2)
    return -0.5 * (errors / NOISE_SD**2 + log_normaliser) - draw.kl[0]


@pytest.mark.parametrize("D", [0.5, 1e-4])
def test_elbo_of_the_exact_posterior_is_the_log_evidence(D, make_tensors):
    problem = make_problem(make_tensors, conditional_noise=False, D=D, lambda_=1.0)
    got = elbo(problem, as_tensors(exact_posterior(problem)))
    torch.testing.assert_close(got, log_evidence(problem.design, problem.y), rtol=0, atol=1e-9)


def test_elbo_of_any_other_q_is_lower_by_its_kl(make_tensors, generator):
    problem = make_problem(make_tensors, conditional_noise=False, D=0.5, lambda_=1.0)
    exact, evidence = exact_posterior(problem), log_evidence(problem.design, problem.y)
    for scale in (1e-3, 0.1, 1.0):
        shift = scale * torch.randn(SIZE, generator=generator, dtype=torch.float64)
        tril = exact.scale_tril + scale * torch.rand(SIZE, SIZE, generator=generator, dtype=torch.float64).tril()
        other = MultivariateNormal(exact.mean + shift, scale_tril=tril)
        gap = evidence - elbo(problem, as_tensors(other))
        assert gap > 0
        torch.testing.assert_close(gap, kl_divergence(other, exact), rtol=1e-6, atol=1e-9)


def test_elbo_is_stationary_at_the_exact_posterior(make_tensors):
    problem = make_problem(make_tensors, conditional_noise=False, D=0.5, lambda_=1.0)
    q = {name: t.requires_grad_() for name, t in as_tensors(exact_posterior(problem)).items()}
    for gradient in torch.autograd.grad(elbo(problem, q), list(q.values())):
        assert gradient.abs().max() < 1e-9


def test_elbo_reaches_the_evidence_of_bayesian_linear_regression(make_tensors):
    """With conditional noise and D -> 0 nothing of W is left unexplained by V: the prior is N(0, sigma_p^2 I) itself.

    The rest is of order D^2 = 1e-10 times the conditioning of Z Z^T; tolerance 1e-6.
    """
    problem = make_problem(make_tensors, conditional_noise=True, D=1e-5, lambda_=1.0)
    got = elbo(problem, as_tensors(exact_posterior(problem)))
    design = posterior.prior_sd_of(problem.tensors)[0] * torch.kron(torch.eye(D_OUT, dtype=torch.float64), problem.x)
    torch.testing.assert_close(got, log_evidence(design, problem.y), rtol=0, atol=1e-6)


@pytest.mark.parametrize("lambda_", [0.3, 0.9, 1.0, 1.5])
def test_elbo_bounds_the_evidence_where_the_noise_matters(lambda_, make_tensors):
    """Large D: W keeps prior noise given V, q(W) cannot be exact, and the bound must be strict."""
    problem = make_problem(make_tensors, conditional_noise=True, D=1.0, lambda_=lambda_)
    design = posterior.prior_sd_of(problem.tensors)[0] * torch.kron(torch.eye(D_OUT, dtype=torch.float64), problem.x)
    assert elbo(problem, as_tensors(exact_posterior(problem))) < log_evidence(design, problem.y) - 1e-3
