"""Every family of q(U): one set of shared cases against torch.distributions, then what is particular to each.

Vectors here are row-major (``flatten``), so the covariance of R X C^T is (R R^T) (x) (C C^T).
"""

import math

import pytest
import torch
from bnn_cases import raw_of
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal, kl_divergence
from torch.nn import functional as F

from bnn.inducing.families import FamilyName, make_family
from bnn.inducing.families.base import Params
from bnn.inducing.kl import gaussian_kl, log_det_kronecker
from bnn.linalg import lower_triangular, safe_cholesky, triangular_inverse

M_R, M_C, N = 2, 3, 2
SIZE = M_R * M_C
GAUSSIANS = ["diagonal", "matrix_normal", "full"]


def random_params(name: str, members: int = 1) -> dict[str, Tensor]:
    """Generic parameters of N stacked factors, float64."""
    noise = torch.Generator().manual_seed(3)

    def one() -> dict[str, Tensor]:
        loc = torch.randn(M_R, M_C, generator=noise, dtype=torch.float64)
        init = make_family(name, members).init(loc, 0.7)
        return {k: v + 0.5 * torch.randn(v.shape, generator=noise, dtype=v.dtype) for k, v in init.items()}

    factors = [one() for _ in range(N)]
    return {key: torch.stack([f[key] for f in factors]) for key in factors[0]}


def scale_tril(name: str, params: Params) -> Tensor:
    """The dense Cholesky factor of Cov(vec U), (N, SIZE, SIZE)."""
    if name == "diagonal":
        return torch.diag_embed(F.softplus(params["raw_sd"]).flatten(-2))
    if name == "full":
        return lower_triangular(params["raw_tril"])
    R, C = lower_triangular(params["raw_row"]), lower_triangular(params["raw_col"])
    return torch.stack([torch.kron(R[i], C[i]) for i in range(N)])


def reference(name: str, params: Params) -> MultivariateNormal:
    return MultivariateNormal(params["raw_loc"].flatten(-2), scale_tril=scale_tril(name, params))


def random_prior() -> tuple[Tensor, Tensor]:
    """Cholesky factors L_r, L_c of the inducing prior, (N, m, m)."""
    noise = torch.Generator().manual_seed(4)
    A_r, A_c = (torch.randn(N, m, m + 1, generator=noise, dtype=torch.float64) for m in (M_R, M_C))
    return safe_cholesky(A_r @ A_r.mT), safe_cholesky(A_c @ A_c.mT)


@pytest.fixture(params=GAUSSIANS)
def name(request) -> str:
    return request.param


def test_sample_has_the_moments_of_the_reference(name):
    """U is affine in eps, so its value at 0 and its Jacobian J are all there is to it: Cov = J J^T."""
    params, family = random_params(name), make_family(name)
    expected = reference(name, params)
    eps = torch.zeros(N, SIZE, dtype=torch.float64)

    def vec_sample(e: Tensor) -> Tensor:
        return family.sample(params, e.reshape(1, N, M_R, M_C))[0].flatten(-2)

    J = torch.func.jacrev(vec_sample)(eps)
    torch.testing.assert_close(vec_sample(eps), expected.mean)
    torch.testing.assert_close(family.mean(params).flatten(-2), expected.mean)
    for i in range(N):
        torch.testing.assert_close(J[i, :, i] @ J[i, :, i].mT, expected.covariance_matrix[i])
        assert not J[i, :, 1 - i].any()


def test_entropy(name):
    params = random_params(name)
    torch.testing.assert_close(make_family(name).entropy(params), reference(name, params).entropy())


@pytest.mark.parametrize("whitened", [True, False])
def test_energy_against_the_dense_formula(name, whitened):
    """E ||A_r U A_c^T||^2 = tr[(A_r (x) A_c)(Cov + m m^T)(A_r (x) A_c)^T]."""
    params, q = random_params(name), reference(name, random_params(name))
    A = (None, None) if whitened else tuple(triangular_inverse(L) for L in random_prior())
    second = q.covariance_matrix + q.mean[:, :, None] * q.mean[:, None, :]
    for i in range(N):
        big = torch.eye(SIZE, dtype=torch.float64) if whitened else torch.kron(A[0][i], A[1][i])
        torch.testing.assert_close(make_family(name).energy(params, *A)[i], (big @ second[i] @ big.mT).trace())


def test_energy_against_monte_carlo(name, generator):
    """20 000 draws; 5 standard errors, passed by chance all but once in a million."""
    params, family = random_params(name), make_family(name)
    A_r, A_c = (triangular_inverse(L) for L in random_prior())
    eps = torch.randn(20_000, N, M_R, M_C, generator=generator, dtype=torch.float64)
    draws = (A_r @ family.sample(params, eps) @ A_c.mT).square().sum((-2, -1))
    error = (draws.mean(0) - family.energy(params, A_r, A_c)).abs()
    assert (error < 5 * draws.std(0) / math.sqrt(len(draws))).all()


@pytest.mark.parametrize("whitened", [True, False])
def test_kl_to_the_prior(name, whitened):
    """Against N(0, I), and against the dense N(0, K_c (x) K_r), which is K_r (x) K_c for row-major vectors."""
    params, family, q = random_params(name), make_family(name), reference(name, random_params(name))
    L_r, L_c = random_prior()
    A = (None, None) if whitened else (triangular_inverse(L_r), triangular_inverse(L_c))
    log_det = torch.zeros((), dtype=torch.float64) if whitened else log_det_kronecker(L_r, L_c)
    got = gaussian_kl(family.entropy(params), family.energy(params, *A), log_det, SIZE)
    eye = torch.eye(SIZE, dtype=torch.float64)
    tril = torch.stack([eye if whitened else torch.kron(L_r[i], L_c[i]) for i in range(N)])
    expected = kl_divergence(q, MultivariateNormal(torch.zeros_like(q.mean), scale_tril=tril))
    torch.testing.assert_close(got, expected)


def test_init_has_the_mean_and_sd_asked_for(name, generator):
    loc = torch.randn(M_R, M_C, generator=generator, dtype=torch.float64)
    params = {key: value[None].expand(N, *value.shape) for key, value in make_family(name).init(loc, 0.3).items()}
    q = reference(name, params)
    torch.testing.assert_close(q.mean[0], loc.flatten())
    torch.testing.assert_close(q.covariance_matrix[0], 0.09 * torch.eye(SIZE, dtype=torch.float64))


@pytest.mark.parametrize("name", ["diagonal", "matrix_normal"])
def test_is_a_special_case_of_the_full_gaussian(name, generator):
    """The full Gaussian with this family's covariance: the same draws from the same eps, and the same terms."""
    params, special, full = random_params(name), make_family(name), make_family("full")
    as_full = {"raw_loc": params["raw_loc"], "raw_tril": raw_of(scale_tril(name, params))}
    A = tuple(triangular_inverse(L) for L in random_prior())
    eps = torch.randn(4, N, M_R, M_C, generator=generator, dtype=torch.float64)
    U = special.sample(params, eps)
    torch.testing.assert_close(full.sample(as_full, eps), U)
    torch.testing.assert_close(full.entropy(as_full), special.entropy(params))
    torch.testing.assert_close(full.energy(as_full, *A), special.energy(params, *A))


def test_diagonal_against_independent_normals():
    params = random_params("diagonal")
    q = Normal(params["raw_loc"], F.softplus(params["raw_sd"]))
    torch.testing.assert_close(make_family("diagonal").entropy(params), q.entropy().sum((-2, -1)))


def test_every_name_makes_a_family_and_others_are_refused():
    assert {type(make_family(name)).__name__ for name in FamilyName} == {
        "DiagonalGaussian",
        "MatrixNormal",
        "FullGaussian",
        "Ensemble",
    }
    with pytest.raises(ValueError, match=r"'gaussian'.*diagonal, matrix_normal, full, ensemble"):
        make_family("gaussian")
    with pytest.raises(ValueError, match="at least 1 member, got 0"):
        make_family("ensemble", 0)
