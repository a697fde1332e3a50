"""One ``InducingFactor``: its start, its mean, its tiled forward, its cache."""

import math
import warnings

import pytest
import torch
from bnn_cases import draw_alone, flat_noise, seeded
from torch import Tensor
from torch.nn import functional as F

from bnn.inducing import posterior
from bnn.layers import InducingFactor

R, WIDTH = 4, 12
"""The shape of the fixture ``A``."""


VARIANTS = [
    {},
    {"family": "matrix_normal"},
    {"family": "full"},
    {"family": "ensemble", "members": 1},
    {"family": "ensemble", "members": 3},
    {"whitened": False},
    {"conditional_noise": False},
    {"d_init": 1e-3},
    {"d_init": 3.0},
    {"m": (4, 4)},
    {"m": (9, 9)},
    {"m": (14, 20)},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_mean_starts_at_the_weight_given(variant, A, make_factor):
    for weight in (A, A.mT):
        factor = make_factor(weight, tuple(weight.shape), **variant)
        torch.testing.assert_close(factor.mean_weight(), weight, rtol=0, atol=2e-5)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_zero_start_has_mean_exactly_zero(variant, make_factor):
    factor = make_factor(None, (WIDTH, R), **variant)
    assert not factor.mean_weight().any()
    assert not make_factor(torch.zeros(WIDTH, R), (WIDTH, R), **variant).mean_weight().any()


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_zero_start_has_the_gradient_of_lora(variant, make_factor, generator):
    """Whatever the loss, Z_r^T moves as LoRA's B would: the gradients are equal, column by column."""
    G = torch.randn(WIDTH, R, generator=generator)
    factor = make_factor(None, (WIDTH, R), **variant)
    (factor.mean_weight() * G).sum().backward()
    torch.testing.assert_close(factor.Z_r.grad[:R].mT, G, rtol=1e-4, atol=1e-4)
    assert not factor.Z_c.grad.any()


def test_the_gain_is_the_speed_and_the_bound_of_a_zero_started_mean(make_factor, generator):
    G = torch.randn(WIDTH, R, generator=generator)
    factor = make_factor(None, (WIDTH, R), mean_gain=3.0, d_init_zero=0.5)
    (factor.mean_weight() * G).sum().backward()
    torch.testing.assert_close(factor.Z_r.grad[:R].mT, 3 * G, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        factor.Z_r.normal_(0, 1e3, generator=generator)
        assert torch.linalg.matrix_norm(factor.mean_weight(), 2) == pytest.approx(3.0 * 0.5, rel=1e-2)


def test_zero_start_follows_lora_over_several_steps(make_factor, generator):
    """Noise off, plain gradient descent on a quadratic: the mean stays near LoRA's B (K_r changes at second order)."""
    target = 0.02 * torch.randn(WIDTH, R, generator=generator)
    B = torch.zeros(WIDTH, R, requires_grad=True)
    factor = make_factor(None, (WIDTH, R), family="ensemble", conditional_noise=False)
    for _ in range(5):
        for weight, leaf in ((B, B), (factor.mean_weight(), factor.Z_r)):
            (gradient,) = torch.autograd.grad(0.5 * (weight - target).square().sum(), leaf)
            with torch.no_grad():
                leaf.sub_(0.2 * gradient)
    assert (factor.mean_weight() - B).norm() < 0.05 * B.norm()
    assert B.norm() > 0.5 * target.norm()


def test_too_small_inducing_matrix_warns_and_keeps_the_leading_part(A, make_factor):
    U, S, Vh = torch.linalg.svd(A)
    message = f"3 x 6 cannot represent a weight of rank 4: relative error {S[3] / S.norm():.2g}; .*inducing sizes >= 4"
    with pytest.warns(UserWarning, match=message):
        factor = make_factor(A, m=(3, 6))
    best = (U[:, :3] * S[:3]) @ Vh[:3]
    torch.testing.assert_close(factor.mean_weight(), best, rtol=0, atol=2e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_factor(A, m=(4, 4))


@pytest.mark.parametrize("start", ["mean", "zero"])
def test_rows_that_the_mean_leaves_free_are_random_and_of_norm_d_init(start, A, make_factor):
    """20 of them in 48 dimensions: the root of the mean of chi^2_48 / 48 is known to 2.3 %; 5 of that."""
    weight = torch.nn.functional.pad(A, (0, 36)) if start == "mean" else None
    factor = make_factor(weight, (R, 48), m=(4, 24), d_init=0.3)
    free = factor.Z_c[4:]
    assert free.square().sum(1).mean().sqrt().item() == pytest.approx(0.3, rel=0.12)
    assert free.unique().numel() == free.numel()


def test_one_inducing_row_and_column_are_enough_for_rank_one(make_factor, generator):
    weight = torch.randn(R, 1, generator=generator) @ torch.randn(1, WIDTH, generator=generator)
    torch.testing.assert_close(make_factor(weight, m=(1, 1)).mean_weight(), weight, rtol=0, atol=1e-5)


def test_low_rank_weight_needs_only_its_rank(make_factor, generator):
    weight = torch.randn(R, 2, generator=generator) @ torch.randn(2, WIDTH, generator=generator)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        factor = make_factor(weight, m=(2, 2))
    torch.testing.assert_close(factor.mean_weight(), weight, rtol=0, atol=1e-4)


@pytest.mark.parametrize("start", ["mean", "zero"])
def test_scales_start_where_they_are_told(start, A, make_factor):
    weight, shape = (A, (R, WIDTH)) if start == "mean" else (None, (WIDTH, R))
    factor = make_factor(weight, shape, lambda_init=0.2, lambda_max=0.9, q_sd=0.4, d_init_zero=0.7)
    stacked = {name: t[None] for name, t in factor.tensors().items()}
    assert posterior.lambda_of(factor.spec, stacked).item() == pytest.approx(0.2, rel=1e-5)
    assert posterior.prior_sd_of(stacked).item() == pytest.approx(math.exp(-1.3), rel=1e-5)
    torch.testing.assert_close(posterior.unit_of(factor.tensors()) * F.softplus(factor.raw_sd), torch.full((5, 6), 0.4))
    torch.testing.assert_close(F.softplus(factor.raw_D_c), torch.full((6,), 0.3))
    expected = 0.3 if start == "mean" else 0.7
    torch.testing.assert_close(F.softplus(factor.raw_D_r), torch.full((5,), expected))


def test_parameters_are_float32_and_learned_as_asked(A, make_factor):
    factor = make_factor(A.bfloat16(), learn_prior_sd=False, learn_lambda=False)
    assert {p.dtype for p in factor.parameters()} == {torch.float32}
    assert {name for name, _ in factor.named_parameters()} == {
        "Z_r",
        "Z_c",
        "raw_D_r",
        "raw_D_c",
        "raw_loc",
        "raw_sd",
    }
    assert {"raw_prior_sd", "raw_lambda", "W_unit"} <= set(factor.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_conversion_of_the_model_leaves_the_factor_in_float32(dtype, A, make_factor):
    """As ``model.to(torch.bfloat16)`` does, or PEFT when it loads with low_cpu_mem_usage: not even a round trip."""
    factor = make_factor(A)
    before = {name: t.clone() for name, t in factor.tensors().items()}
    torch.nn.Sequential(factor).to(dtype)
    for name, tensor in factor.tensors().items():
        assert torch.equal(tensor, before[name]), name
        assert tensor.dtype == torch.float32, name
    assert factor.to("meta").Z_r.device.type == "meta"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lambda_init": 0.0}, r"lambda_init must lie in \(0, lambda_max=1.0\), got 0.0"),
        ({"lambda_init": 1.0}, r"lambda_init must lie in \(0, lambda_max=1.0\), got 1.0"),
        ({"lambda_init": 1 - 1e-9}, "raw_lambda is not finite in float32: stay nearer the defaults"),
        ({"q_sd": 1e-50}, "is not finite in float32"),
        ({"log_prior_sd": -150.0}, "the mean is not finite in float32, or 0: stay nearer the defaults"),
        ({"m": (0, 3)}, "at least 1, got 0 x 3"),
    ],
)
def test_refuses_impossible_settings(settings, message, A, make_factor):
    with pytest.raises(ValueError, match=message):
        make_factor(A, **settings)


def draw(factor: InducingFactor, samples: int) -> Tensor:
    return draw_alone([factor], flat_noise(factor.spec, 1, samples, seeded(5), torch.float32))[0][:, 0]


@pytest.mark.parametrize("trailing", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("samples", [1, 2, 4])
def test_rows_are_tiled_over_the_draws(samples, trailing, A, make_factor, generator):
    factor = make_factor(A)
    x = torch.randn(samples * 3, *trailing, WIDTH, generator=generator)
    W = draw(factor, samples)
    factor.hold(W)
    assert torch.equal(factor.weight, W)
    y = factor(x)
    expected = torch.cat([F.linear(x[i * 3 : (i + 1) * 3], W[i]) for i in range(samples)])
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    factor.hold(None)
    torch.testing.assert_close(factor(x), F.linear(x, A), rtol=0, atol=1e-4)


def test_a_batch_that_is_no_multiple_of_the_draws_is_refused(A, make_factor):
    factor = make_factor(A)
    factor.hold(draw(factor, 2))
    with pytest.raises(ValueError, match=r"2 posterior samples are live, but the batch has 3 rows"):
        factor(torch.ones(3, WIDTH))


def test_output_has_the_dtype_of_the_input(A, make_factor):
    factor = make_factor(A)
    x = torch.ones(2, WIDTH, dtype=torch.bfloat16)
    assert factor(x).dtype == torch.bfloat16
    factor.hold(draw(factor, 2))
    assert factor(x).dtype == torch.bfloat16
