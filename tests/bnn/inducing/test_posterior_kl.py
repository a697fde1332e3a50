"""KL of a factor's posterior to its prior: closed form and the flow's one-sample estimate."""

import math
from dataclasses import replace

import pytest
import torch
from bnn_cases import noise_for, q_of
from torch.distributions import MultivariateNormal, kl_divergence

from bnn.inducing import posterior
from bnn.inducing.kl import conditional_kl
from bnn.inducing.posterior import FactorSpec

CPU = torch.device("cpu")


def test_kl_against_torch_distributions(make_tensors, generator):
    """Whitened and not, with a unit other than 1, plus the conditional term."""
    for whitened in (True, False):
        spec = FactorSpec(3, 4, 2, 3, family="full", whitened=whitened)
        tensors, _ = make_tensors(spec, 2)
        rows, cols = posterior.frames(spec, tensors)
        got = posterior.sample(spec, tensors, noise_for(spec, 2, 1, generator), None).kl
        for i in range(2):
            eye = torch.eye(6, dtype=torch.float64)
            prior = MultivariateNormal(
                torch.zeros_like(eye[0]), scale_tril=eye if whitened else torch.kron(rows.L[i], cols.L[i])
            )
            conditional = conditional_kl(posterior.lambda_of(spec, tensors)[i], 3, 4)
            torch.testing.assert_close(got[i], kl_divergence(q_of(tensors, i), prior) + conditional)


@pytest.mark.parametrize("whitened", [True, False])
def test_kl_of_a_point_mass_pulls_at_every_tensor_as_that_of_a_narrow_gaussian(whitened, make_tensors, generator):
    """At Z, D, sigma_p and the location alike: sigma_p, which scales U against the unit in W, is not left to grow."""
    spec = FactorSpec(3, 4, 2, 2, whitened=whitened)
    tensors, _ = make_tensors(spec, 1)
    points = {name: t for name, t in tensors.items() if name not in ("raw_loc", "raw_sd")}
    points["raw_members"] = tensors["raw_loc"][:, None]
    tensors["raw_sd"] = torch.full_like(tensors["raw_sd"], math.log(1e-7))
    noise = noise_for(spec, 1, 1, generator)

    def pulls(spec, tensors):
        tensors = {name: t.clone().requires_grad_() for name, t in tensors.items()}
        posterior.sample(spec, tensors, noise, None).kl.sum().backward()
        return {name: t.grad for name, t in tensors.items() if name != "raw_sd" and t.grad is not None}

    got, want = pulls(replace(spec, family="ensemble"), points), pulls(spec, tensors)
    assert float(want["raw_prior_sd"]) != 0
    want["raw_members"] = want.pop("raw_loc")[:, None]
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


def test_kl_is_zero_only_at_the_prior(make_tensors, generator):
    spec = FactorSpec(3, 4, 2, 2, lambda_max=2.0)
    tensors, _ = make_tensors(spec, 1, unit=1.0)
    tensors |= spec.make_family().init(torch.zeros(1, 2, 2, dtype=torch.float64), 1.0)
    tensors["raw_lambda"] = torch.zeros(1, dtype=torch.float64)
    noise = noise_for(spec, 1, 1, generator)
    torch.testing.assert_close(posterior.sample(spec, tensors, noise, None).kl, torch.zeros(1, dtype=torch.float64))
    for name in ("raw_loc", "raw_sd", "raw_lambda"):
        moved = tensors | {name: tensors[name] + 0.1}
        assert posterior.sample(spec, moved, noise, None).kl > 1e-3


@pytest.mark.parametrize("whitened", [True, False])
@pytest.mark.parametrize("family", ["diagonal", "matrix_normal", "full", "ensemble"])
def test_kl_of_an_identity_flow_is_the_closed_form_whatever_the_draw(family, whitened, make_tensors, generator):
    spec = FactorSpec(3, 4, 2, 2, family=family, members=3, whitened=whitened, flow_depth=1, flow_hidden=4)
    tensors, flow = make_tensors(spec, 1)
    for name, start in flow.named_parameters():
        tensors[f"flow.{name}"] = start.detach()[None]
    plain = replace(spec, flow_depth=0)
    exact = posterior.sample(plain, tensors, noise_for(plain, 1, 1, generator), None).kl
    for _ in range(3):
        torch.testing.assert_close(posterior.sample(spec, tensors, noise_for(spec, 1, 1, generator), flow).kl, exact)


@pytest.mark.parametrize("whitened", [True, False])
@pytest.mark.parametrize("family", ["diagonal", "matrix_normal", "full"])
def test_kl_estimate_under_a_flow_uses_normalised_densities(family, whitened, make_tensors, generator):
    """E_q[p(U) / q(U)] = 1 whatever the flow.

    The estimate less the base's KL plus the base's own log q_0(U_0) - log p(U_0), from torch.distributions, is
    log q(U) - log p(U). 20 000 draws (as many copies of one factor); 5 standard errors, and those must be small. The
    mean of the estimate is that of the plain log ratio, and its variance smaller.
    """
    copies = 20_000
    structure = {"flow_depth": 2, "flow_hidden": 8, "conditional_noise": False}
    spec = FactorSpec(3, 4, 1, 2, family=family, whitened=whitened, **structure)
    tensors, flow = make_tensors(spec, 1, unit=1.0 if whitened else 5.0, flow_scale=0.2)
    initial = spec.make_family().init(torch.full((1, 2), 0.3, dtype=torch.float64), 1.5)
    tensors |= {name: value[None] for name, value in initial.items()}
    many = {name: t.expand(copies, *t.shape[1:]) for name, t in tensors.items()}
    noise = noise_for(spec, copies, 1, generator)
    estimate = posterior.sample(spec, many, noise, flow).kl

    unit, (rows, cols) = posterior.unit_of(tensors)[0], posterior.frames(spec, tensors)
    base = MultivariateNormal(unit * torch.full((2,), 0.3, dtype=torch.float64), scale_tril=unit * 1.5 * torch.eye(2))
    eye = torch.eye(2, dtype=torch.float64)
    prior = MultivariateNormal(
        torch.zeros_like(eye[0]), scale_tril=eye if whitened else torch.kron(rows.L[0], cols.L[0])
    )
    U_0 = base.mean + unit * 1.5 * noise.eps[0].flatten(-2)
    log_ratio = estimate - kl_divergence(base, prior) + base.log_prob(U_0) - prior.log_prob(U_0)

    ratio = (-log_ratio).exp()
    standard_error = ratio.std() / math.sqrt(copies)
    assert standard_error < 0.02
    assert abs(ratio.mean() - 1) < 5 * standard_error
    assert abs(estimate.mean() - log_ratio.mean()) < 5 * (estimate - log_ratio).std() / math.sqrt(copies)
    assert estimate.std() < log_ratio.std()
