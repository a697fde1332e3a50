"""The ensemble of point masses."""

import math

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from bnn.inducing.families import make_family
from bnn.inducing.kl import gaussian_kl, log_det_kronecker
from bnn.linalg import safe_cholesky, triangular_inverse

M_R, M_C, N = 2, 3, 2
SIZE = M_R * M_C


def random_params(members: int = 1) -> dict[str, Tensor]:
    """Members of N stacked ensembles, float64."""
    noise = torch.Generator().manual_seed(3)
    return {"raw_members": torch.randn(N, members, M_R, M_C, generator=noise, dtype=torch.float64)}


def random_prior() -> tuple[Tensor, Tensor]:
    """Cholesky factors L_r, L_c of the inducing prior, (N, m, m)."""
    noise = torch.Generator().manual_seed(4)
    A_r, A_c = (torch.randn(N, m, m + 1, generator=noise, dtype=torch.float64) for m in (M_R, M_C))
    return safe_cholesky(A_r @ A_r.mT), safe_cholesky(A_c @ A_c.mT)


def test_ensemble_of_one_is_deterministic(generator):
    params, family = random_params(), make_family("ensemble")
    eps = torch.randn(6, N, M_R, M_C, generator=generator, dtype=torch.float64)
    expected = params["raw_members"][:, 0]
    assert torch.equal(family.sample(params, eps), expected.expand(6, N, M_R, M_C))
    assert torch.equal(family.mean(params), expected)
    assert torch.equal(family.entropy(params), torch.zeros(N, dtype=torch.float64))


def test_ensemble_members_are_equally_likely_and_chosen_per_factor(generator):
    """30 000 draws of 3 members: a frequency's standard error is 0.0027, the tolerance 5 of them."""
    params, family = random_params(3), make_family("ensemble", 3)
    eps = torch.randn(30_000, N, M_R, M_C, generator=generator, dtype=torch.float64)
    chosen = (family.sample(params, eps)[:, :, None] == params["raw_members"]).all(-1).all(-1)
    assert (chosen.sum(-1) == 1).all()
    assert (chosen.double().mean(0) - 1 / 3).abs().max() < 0.0136
    both = (chosen[:, 0, 0] & chosen[:, 1, 0]).double().mean()
    assert abs(both - 1 / 9) < 5 * math.sqrt(8 / 81 / 30_000)


def test_ensemble_choice_is_valid_at_extreme_noise():
    params, family = random_params(3), make_family("ensemble", 3)
    for value, member in ((60.0, 2), (-60.0, 0)):
        eps = torch.full((1, N, M_R, M_C), value, dtype=torch.float64)
        assert torch.equal(family.sample(params, eps)[0], params["raw_members"][:, member])


def test_ensemble_gradients_reach_the_member_drawn(generator):
    params = {"raw_members": random_params(3)["raw_members"].requires_grad_()}
    eps = torch.randn(200, N, M_R, M_C, generator=generator, dtype=torch.float64)
    make_family("ensemble", 3).sample(params, eps).sum().backward()
    counts = params["raw_members"].grad[..., 0, 0]
    assert (counts > 0).all()
    torch.testing.assert_close(counts.sum(-1), torch.full((N,), 200.0, dtype=torch.float64))


def test_ensemble_terms_of_the_objective():
    """-H + E is the members' average of -log p(U), minus log K."""
    params, family = random_params(3), make_family("ensemble", 3)
    L_r, L_c = random_prior()
    energy = family.energy(params, triangular_inverse(L_r), triangular_inverse(L_c))
    got = gaussian_kl(family.entropy(params), energy, log_det_kronecker(L_r, L_c), SIZE)
    for i in range(N):
        prior = MultivariateNormal(torch.zeros(SIZE, dtype=torch.float64), scale_tril=torch.kron(L_r[i], L_c[i]))
        expected = -prior.log_prob(params["raw_members"][i].flatten(-2)).mean() - math.log(3)
        torch.testing.assert_close(got[i], expected)


def test_ensemble_init_spreads_distinct_members_around_the_mean():
    loc = torch.arange(6.0, dtype=torch.float64).reshape(M_R, M_C)
    assert torch.equal(make_family("ensemble", 1).init(loc, 0.3)["raw_members"], loc[None])
    members = make_family("ensemble", 4).init(loc, 0.3)["raw_members"]
    torch.testing.assert_close(members.mean(0), loc)
    assert torch.pdist(members.flatten(1)).min() > 0.1
