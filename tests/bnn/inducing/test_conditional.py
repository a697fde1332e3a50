"""The conditional p(W' | U): its exact linear maps against the dense covariances of the mathematics.

Nothing here is Monte Carlo: a Jacobian J with respect to the stacked standard normal noise gives the covariance J J^T.
Vectors stack columns (``vec``), so Cov(A X B) for standard normal X is (B^T B) (x) (A A^T).
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bnn.inducing.conditional import conditional_mean, conditional_sample, matheron_correction, noise_shapes, times
from bnn.inducing.prior import Frame, whiten

CASES = {
    "d_out < d_in": (3, 5, 2, 4, 1.0),
    "d_out > d_in": (5, 3, 4, 2, 1.0),
    "square": (4, 4, 3, 3, 1.0),
    "m_r > d_out": (2, 5, 4, 3, 1.0),
    "m_c > d_in": (5, 2, 3, 4, 1.0),
    "both singular": (3, 2, 5, 4, 1.0),
    "Z_r = 0": (3, 5, 2, 4, 0.0),
    "Z_r = 0, d_out > d_in": (5, 3, 4, 2, 0.0),
}


def vec(X: Tensor) -> Tensor:
    return X.mT.flatten(-2)


class Case:
    """One shape with its whitened frames and the dense K_r, K_c, T_r, T_c (Eq. 8)."""

    def __init__(self, d_out: int, d_in: int, m_r: int, m_c: int, scale: float) -> None:
        noise = torch.Generator().manual_seed(0)
        Z_r = scale * torch.randn(m_r, d_out, generator=noise, dtype=torch.float64)
        Z_c = torch.randn(m_c, d_in, generator=noise, dtype=torch.float64)
        D_r = 0.1 + torch.rand(m_r, generator=noise, dtype=torch.float64)
        D_c = 0.1 + torch.rand(m_c, generator=noise, dtype=torch.float64)
        self.d_out, self.d_in, self.m_r, self.m_c = d_out, d_in, m_r, m_c
        self.rows: Frame = whiten(Z_r, D_r, jitter=0.0)
        self.cols: Frame = whiten(Z_c, D_c, jitter=0.0)
        self.K_r, self.K_c = Z_r @ Z_r.mT + torch.diag(D_r**2), Z_c @ Z_c.mT + torch.diag(D_c**2)
        self.T_r, self.T_c = Z_r.mT @ torch.linalg.inv(self.K_r), torch.linalg.inv(self.K_c) @ Z_c
        self.V = torch.randn(m_r, m_c, generator=noise, dtype=torch.float64)
        explained = torch.kron(self.T_c.mT @ self.K_c @ self.T_c, self.T_r @ self.K_r @ self.T_r.mT)
        self.covariance = torch.eye(d_out * d_in, dtype=torch.float64) - explained

    def jacobian(self, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """Matrix of the map from the stacked noise (E1, E2, E3) to vec(function)."""
        shapes = noise_shapes(self.d_out, self.d_in, self.m_r, self.m_c)
        sizes = [a * b for a, b in shapes]

        def stacked(e: Tensor) -> Tensor:
            parts = [part.reshape(shape) for part, shape in zip(e.split(sizes), shapes, strict=True)]
            return vec(function(*parts))

        return torch.func.jacrev(stacked)(torch.zeros(sum(sizes), dtype=torch.float64))

    def noise_map(self) -> Tensor:
        zero, one = torch.zeros_like(self.V), torch.ones((), dtype=torch.float64)
        return self.jacobian(lambda *E: conditional_sample(zero, one, *E, self.rows, self.cols))

    def correction_map(self) -> Tensor:
        return self.jacobian(lambda *E: matheron_correction(*E, self.rows, self.cols))


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request) -> Case:
    return Case(*request.param)


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


def test_mean_is_that_of_the_dense_formula(case):
    U = case.rows.L @ case.V @ case.cols.L.mT
    assert_equal(conditional_mean(case.V, case.rows, case.cols), case.T_r @ U @ case.T_c)


def test_noise_covariance_is_that_of_the_conditional(case):
    J = case.noise_map()
    assert_equal(J @ J.mT, case.covariance)


def test_correction_is_standard_normal(case):
    J = case.correction_map()
    assert_equal(J @ J.mT, torch.eye(case.m_r * case.m_c, dtype=torch.float64))


def test_correction_has_the_joint_covariance_with_the_prior_draw(case):
    """Cov(G, E1) = P_r (x) P_c, the covariance of the whitened U_bar and W' under the joint prior."""
    E1 = case.jacobian(lambda E1, *_: E1)
    assert_equal(case.correction_map() @ E1.mT, torch.kron(case.cols.P, case.rows.P))


def test_noise_is_independent_of_the_inducing_variables(case):
    """Jointly Gaussian and uncorrelated with G, which plays U in the joint draw."""
    assert_equal(
        case.noise_map() @ case.correction_map().mT,
        torch.zeros(case.d_out * case.d_in, case.m_r * case.m_c, dtype=torch.float64),
    )


def test_prior_over_inducing_variables_gives_back_the_prior_over_weights(case):
    """V ~ N(0, I) and lambda = 1 must give vec W' ~ N(0, I): the two parts of the variance add up to it."""
    mean_map = torch.kron(case.cols.P.mT, case.rows.P.mT)
    J = case.noise_map()
    assert_equal(mean_map @ mean_map.mT + J @ J.mT, torch.eye(case.d_out * case.d_in, dtype=torch.float64))


def test_lambda_scales_the_noise_only(case):
    half = torch.tensor(0.5, dtype=torch.float64)
    J = case.jacobian(lambda *E: conditional_sample(case.V, half, *E, case.rows, case.cols))
    assert_equal(J @ J.mT, 0.25 * case.covariance)
    zeros = [torch.zeros(s, dtype=torch.float64) for s in noise_shapes(case.d_out, case.d_in, case.m_r, case.m_c)]
    W = conditional_sample(case.V, half, *zeros, case.rows, case.cols)
    assert_equal(W, conditional_mean(case.V, case.rows, case.cols))


def test_gradients_are_defined_where_the_spectrum_is_degenerate(generator):
    """Z_r = 0 with equal D: every eigenvalue coincides, so a gradient through eigenvectors would be NaN."""
    D = torch.full((2,), 0.3, dtype=torch.float64)
    V = torch.randn(2, 2, generator=generator, dtype=torch.float64)
    E = [torch.randn(s, generator=generator, dtype=torch.float64) for s in noise_shapes(2, 3, 2, 2)]
    Z_r = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    Z_c = torch.eye(2, 3, dtype=torch.float64, requires_grad=True)
    lambda_ = torch.tensor(0.5, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda Z_r, Z_c: conditional_sample(V, lambda_, *E, whiten(Z_r, D, 0.0), whiten(Z_c, D, 0.0)), (Z_r, Z_c)
    )


def test_auxiliary_draw_lies_on_the_short_side():
    assert noise_shapes(8, 4096, 9, 9)[1] == (8, 9)
    assert noise_shapes(4096, 8, 9, 9)[1] == (9, 8)


@pytest.mark.parametrize("batch", [(), (4,), (2, 4)])
def test_one_matrix_times_many_samples(batch, generator):
    X = torch.randn(3, *batch, 5, 6, generator=generator, dtype=torch.float64)
    M = torch.randn(*batch, 6, 2, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(times(X, M), X @ M)
    torch.testing.assert_close(times(X[0], M), X[0] @ M)
