"""q(W) of a factor: moments, KL, the families' shared contract, and an ELBO that is exact where it can be."""

import math
from dataclasses import replace

import pytest
import torch
from bnn_cases import noise_for, q_of, raw_of
from torch.nn import functional as F

from bnn.inducing import posterior
from bnn.inducing.posterior import FactorSpec
from bnn.linalg import lower_triangular
from bnn.noise import Noise

CPU = torch.device("cpu")
SPECS = {
    "diagonal": FactorSpec(3, 5, 2, 4, jitter=0.0),
    "matrix_normal": FactorSpec(5, 3, 4, 2, family="matrix_normal"),
    "full": FactorSpec(2, 4, 3, 3, family="full"),
    "ensemble": FactorSpec(3, 4, 2, 2, family="ensemble", members=3),
    "unwhitened": FactorSpec(3, 4, 2, 2, family="full", whitened=False),
    "no conditional noise": FactorSpec(3, 4, 2, 2, conditional_noise=False),
    "flow": FactorSpec(3, 4, 2, 2, flow_depth=2, flow_hidden=8),
    "unwhitened flow": FactorSpec(3, 4, 2, 2, flow_depth=1, flow_hidden=8, whitened=False),
    "flow of matrix_normal": FactorSpec(3, 4, 2, 3, family="matrix_normal", flow_depth=1, flow_hidden=8),
    "flow of full": FactorSpec(3, 4, 2, 3, family="full", flow_depth=1, flow_hidden=8),
}


@pytest.fixture(params=SPECS.values(), ids=SPECS.keys())
def spec(request) -> FactorSpec:
    return request.param


def test_noise_has_the_shapes_it_says_and_follows_the_generator(spec):
    noise = noise_for(spec, 3, 2, torch.Generator().manual_seed(0))
    assert noise.eps.shape == (2, 3, spec.m_r, spec.m_c)
    fields = noise[1:]
    if spec.conditional_noise:
        assert fields[0].shape == (2, 3, spec.d_out, spec.d_in)
        assert all(x.dtype == torch.float64 and x.shape[:2] == (2, 3) for x in fields)
    else:
        assert fields == (None, None, None)
    again = noise_for(spec, 3, 2, torch.Generator().manual_seed(0))
    other = noise_for(spec, 3, 2, torch.Generator().manual_seed(1))
    assert torch.equal(noise.eps, again.eps)
    assert not torch.equal(noise.eps, other.eps)


def test_sample_and_kl_of_stacked_factors_are_those_of_each_alone(spec, make_tensors, generator):
    tensors, flow = make_tensors(spec, 3)
    noise = noise_for(spec, 3, 4, generator)
    draw = posterior.sample(spec, tensors, noise, flow)
    mean = posterior.mean(spec, tensors, flow)
    assert draw.W.shape == (4, 3, spec.d_out, spec.d_in)
    assert draw.kl.shape == (3,)
    for i in range(3):
        one = {name: t[i : i + 1] for name, t in tensors.items()}
        part = Noise(*(x[:, i : i + 1] for x in noise if x is not None))
        alone = posterior.sample(spec, one, part, flow)
        torch.testing.assert_close(draw.W[:, i : i + 1], alone.W, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(draw.kl[i : i + 1], alone.kl, rtol=1e-10, atol=1e-10)
    if flow is None:
        for i in range(3):
            one = {name: t[i : i + 1] for name, t in tensors.items()}
            torch.testing.assert_close(mean[i : i + 1], posterior.mean(spec, one, flow), rtol=1e-10, atol=1e-10)


def test_draws_joined_are_the_draws_made_one_by_one(spec, make_tensors, generator):
    tensors, flow = make_tensors(spec, 2)
    noises = [noise_for(spec, 2, 1, generator) for _ in range(3)]
    stacked = Noise(*(torch.cat(parts) for parts in zip(*noises, strict=True) if parts[0] is not None))
    joined = posterior.sample(spec, tensors, stacked, flow).W
    single = torch.cat([posterior.sample(spec, tensors, noise, flow).W for noise in noises])
    torch.testing.assert_close(joined, single, rtol=1e-10, atol=1e-10)


def test_full_sample_has_the_moments_of_the_model(make_tensors, generator):
    """Mean sigma_p P_r^T E[V] P_c; covariance sigma_p^2 (P^T Cov(V) P + lambda^2 (I - P^T P)).

    200 000 draws; the tolerance is 5 standard errors of each moment (that of a covariance entry bounded by
    sqrt(2 / S) times the largest variance), passed by chance all but once in ten thousand over the 36 entries.
    """
    spec, draws = FactorSpec(2, 3, 3, 2, family="full", jitter=0.0), 200_000
    tensors, _ = make_tensors(spec, 1)
    W = posterior.sample(spec, tensors, noise_for(spec, 1, draws, generator), None).W[:, 0].flatten(-2)
    rows, cols = posterior.frames(spec, tensors)
    P = torch.kron(rows.P[0].mT.contiguous(), cols.P[0].mT.contiguous())
    variance, lambda_ = posterior.prior_sd_of(tensors)[0] ** 2, posterior.lambda_of(spec, tensors)[0]
    q = q_of(tensors)
    explained = torch.kron(rows.P[0].mT @ rows.P[0], cols.P[0].mT @ cols.P[0])
    covariance = variance * (P @ q.covariance_matrix @ P.mT + lambda_**2 * (torch.eye(6) - explained))
    mean = variance.sqrt() * P @ q.mean
    top = covariance.diagonal().max()
    assert (W.mean(0) - mean).abs().max() < 5 * math.sqrt(top / draws)
    assert (W.T.cov() - covariance).abs().max() < 5 * top * math.sqrt(2 / draws)
    torch.testing.assert_close(posterior.mean(spec, tensors, None)[0].flatten(), mean)


def test_mean_is_the_average_of_samples(spec, make_tensors, generator):
    """10 000 draws, 5 standard errors; a flow's mean is itself an average of 256 antithetic draws: 5 of its own."""
    tensors, flow = make_tensors(spec, 1, flow_scale=0.1)
    W = posterior.sample(spec, tensors, noise_for(spec, 1, 10_000, generator), flow).W[:, 0]
    draws = 10_000 if flow is None else posterior.MEAN_DRAWS
    error = (W.mean(0) - posterior.mean(spec, tensors, flow)[0]).abs()
    assert (error < 5 * W.std(0) / math.sqrt(draws) + 1e-12).all()


def test_mean_of_an_identity_flow_is_the_location(make_tensors):
    """Its fixed draws come in pairs of opposite sign, so that an affine map adds no error of its own."""
    spec = SPECS["flow"]
    tensors, flow = make_tensors(spec, 2)
    for name, start in flow.named_parameters():
        tensors[f"flow.{name}"] = start.detach().expand_as(tensors[f"flow.{name}"])
    exact = posterior.mean(replace(spec, flow_depth=0), tensors, None)
    torch.testing.assert_close(posterior.mean(spec, tensors, flow), exact, rtol=0, atol=1e-12)


def test_mean_of_a_flow_does_not_change_from_call_to_call(make_tensors):
    spec = SPECS["flow"]
    tensors, flow = make_tensors(spec, 2)
    assert torch.equal(posterior.mean(spec, tensors, flow), posterior.mean(spec, tensors, flow))


def test_whitened_and_unwhitened_posteriors_agree(make_tensors, generator):
    """U = L_r V L_c^T maps q(V) = N(m, S S^T) to N((L_r (x) L_c) m, ...): the same draws, mean and KL."""
    whitened = FactorSpec(3, 4, 2, 3, family="full")
    spec = replace(whitened, whitened=False)
    tensors, _ = make_tensors(whitened, 1)
    rows, cols = posterior.frames(whitened, tensors)
    L = torch.kron(rows.L[0], cols.L[0])
    raw = raw_of(L @ lower_triangular(tensors["raw_tril"][0]))
    loc = rows.L @ tensors["raw_loc"] @ cols.L.mT
    mapped = tensors | {"raw_loc": loc, "raw_tril": raw[None]}
    noise = noise_for(spec, 1, 5, generator)
    a = posterior.sample(whitened, tensors, noise, None)
    b = posterior.sample(spec, mapped, noise, None)
    torch.testing.assert_close(a.W, b.W, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(a.kl, b.kl, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(posterior.mean(whitened, tensors, None), posterior.mean(spec, mapped, None))


@pytest.mark.parametrize("name", ["diagonal", "ensemble", "no conditional noise"])
def test_unit_only_changes_the_scale_of_the_parameters(name, make_tensors, generator):
    """Parameters divided by c under a unit multiplied by c describe the same posterior."""
    spec = SPECS[name]
    tensors, flow = make_tensors(spec, 2, unit=1.0)
    moved = tensors | {"W_unit": tensors["W_unit"] * 4}
    for name in ("raw_loc", "raw_members"):
        if name in tensors:
            moved[name] = tensors[name] / 4
    if "raw_sd" in tensors:
        sd = F.softplus(tensors["raw_sd"]) / 4
        moved["raw_sd"] = sd + torch.log(-torch.expm1(-sd))
    noise = noise_for(spec, 2, 3, generator)
    a, b = posterior.sample(spec, tensors, noise, flow), posterior.sample(spec, moved, noise, flow)
    torch.testing.assert_close(a.W, b.W, rtol=1e-9, atol=1e-9)
    points = spec.m_r * spec.m_c * math.log(4) if "raw_members" in tensors else 0.0  # their densities are by the unit
    torch.testing.assert_close(a.kl, b.kl + points, rtol=1e-9, atol=1e-9)


def test_point_mass_and_vanishing_lambda_give_a_fixed_matrix(make_tensors, generator):
    """LoRA is the limit: the spread of W shrinks in proportion to lambda, down to the fixed mean."""
    spec = FactorSpec(3, 4, 2, 2, family="ensemble")
    tensors, _ = make_tensors(spec, 1)
    mean = posterior.mean(spec, tensors, None)
    noise = noise_for(spec, 1, 5, generator)
    spreads = []
    for raw in (-10.0, -20.0, -40.0):
        tensors["raw_lambda"] = torch.full((1,), raw, dtype=torch.float64)
        spreads.append(float((posterior.sample(spec, tensors, noise, None).W - mean).abs().max()))
    assert spreads[1] / spreads[0] == pytest.approx(math.exp(-10), rel=1e-3)
    assert spreads[2] < 1e-12
    exact = replace(spec, conditional_noise=False)
    W = posterior.sample(exact, tensors, noise_for(exact, 1, 5, generator), None).W
    assert torch.equal(W, mean.expand_as(W))


def test_gradients_reach_every_tensor(spec, make_tensors, generator):
    tensors, flow = make_tensors(spec, 2)
    learned = {k: t.requires_grad_() for k, t in tensors.items() if t.is_floating_point() and k != "W_unit"}
    draw = posterior.sample(spec, tensors, noise_for(spec, 2, 8, generator), flow)
    (draw.W.square().sum() + draw.kl.sum()).backward()
    for name, tensor in learned.items():
        if name == "raw_lambda" and not spec.conditional_noise:
            continue
        assert tensor.grad is not None, name
        assert tensor.grad.isfinite().all(), name
        assert tensor.grad.any(), name


@pytest.mark.parametrize(("scaling", "width"), [("width", 50), ("fan_in", 8), ("none", 1)])
def test_prior_sd_scaling(scaling, width):
    assert posterior.log_of_scaled_prior_sd(0.3, scaling, 50, 8) == pytest.approx(math.log(0.3 / math.sqrt(width)))


def test_prior_sd_errors():
    with pytest.raises(ValueError, match="must be positive, got 0"):
        posterior.log_of_scaled_prior_sd(0, "width", 2, 2)
    with pytest.raises(ValueError, match=r"'fan_out'.*width, fan_in or none"):
        posterior.log_of_scaled_prior_sd(0.3, "fan_out", 2, 2)
