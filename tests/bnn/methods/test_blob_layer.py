"""BLoB's and ScalaBL's random A against their formulae."""

import pytest
import torch
from bnn_cases import seeded
from torch import Tensor

from bnn.methods.blob_layer import BLoBA
from bnn.methods.scalabl_layer import SubspaceA

R, D = 3, 5


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def blob_a(prior_sd: float = 0.2) -> BLoBA:
    return BLoBA(normal(R, D, seed=1), 0.4 * normal(R, D, seed=2), prior_sd)


def scalabl_a(prior_sd: float = 0.7) -> SubspaceA:
    return SubspaceA(0.5 * normal(R, seed=1), 0.5 * normal(R, seed=2) - 1, normal(R, D, seed=3), prior_sd)


def scales(layer: BLoBA | SubspaceA) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of what is random."""
    if isinstance(layer, BLoBA):
        return layer.M.detach(), layer.G.detach() ** 2
    return layer.raw_mu.detach().exp(), layer.raw_sd.detach().exp()


@pytest.mark.parametrize("make", [blob_a, scalabl_a])
def test_kl_is_that_of_q_to_the_prior(make):
    layer = make()
    mean, sd = scales(layer)
    q, p = torch.distributions.Normal(mean, sd), torch.distributions.Normal(torch.zeros_like(mean), layer.prior_sd)
    torch.testing.assert_close(layer.kl(), torch.distributions.kl_divergence(q, p).sum())
    assert not torch.allclose(layer.kl(), torch.distributions.kl_divergence(p, q).sum())


@pytest.mark.parametrize("make", [blob_a, scalabl_a])
def test_kl_step_is_gradient_descent_on_the_kl(make):
    """Small enough a step that no entry of BLoB's would jump over the minimum."""
    stepped, reference = make(), make()
    names = {n for n, _ in reference.named_parameters()}
    optimizer = torch.optim.SGD(reference.parameters(), lr=1e-6)
    reference.kl().backward()
    optimizer.step()
    stepped.kl_step(1e-6)
    moved = 0
    for name in names:
        torch.testing.assert_close(stepped.get_parameter(name), reference.get_parameter(name), rtol=0, atol=1e-14)
        moved += not torch.equal(stepped.get_parameter(name), make().get_parameter(name))
    assert moved == 2  # mean and spread, not ScalaBL's projection


def test_blobs_kl_steps_end_at_the_prior_from_everywhere():
    """G near 0 has a slope of 2e6: plain gradient descent would jump to 1e4 and diverge."""
    G = torch.tensor([[1e-6, -1e-6, 0.0, 3.0, -0.04]], dtype=torch.float64)
    layer = BLoBA(torch.ones_like(G), G, 0.2)
    for _ in range(300):
        layer.kl_step(0.01)
    torch.testing.assert_close(layer.G.detach().square(), torch.full_like(G, 0.2), rtol=1e-6, atol=0)
    assert (layer.G.detach().sign() == torch.tensor([[1, -1, 1, 1, -1]])).all()
    assert layer.kl().item() == pytest.approx(0, abs=1e-9)


def test_one_of_blobs_kl_steps_goes_no_further_than_the_prior():
    layer = BLoBA(torch.ones(1, 2), torch.tensor([[0.1, -3.0]]), 0.2)
    layer.kl_step(1e3)
    assert torch.equal(layer.M, torch.zeros(1, 2))
    torch.testing.assert_close(layer.G.square(), torch.full((1, 2), 0.2))


def test_draws_of_blob_are_weight_matrices_tiled_over_the_rows():
    layer, x, eps = blob_a().eval(), normal(4, 2, D, seed=5), normal(2, R, D, seed=6)
    layer.hold(eps)
    for i in range(2):
        A = layer.M + eps[i] * layer.G**2
        torch.testing.assert_close(layer(x)[2 * i : 2 * i + 2], x[2 * i : 2 * i + 2] @ A.T)
    layer.hold(None)
    torch.testing.assert_close(layer(x), x @ layer.M.T)


def test_draws_of_scalabl_scale_the_projections():
    layer, x, eps = scalabl_a(), normal(4, 2, D, seed=5), normal(2, R, seed=6)
    layer.hold(eps)
    for i in range(2):
        s = layer.raw_mu.exp() + layer.raw_sd.exp() * eps[i]
        torch.testing.assert_close(layer(x)[2 * i : 2 * i + 2], x[2 * i : 2 * i + 2] @ (torch.diag(s) @ layer.Vh).T)
    layer.hold(None)
    torch.testing.assert_close(layer(x), x @ layer.weight.T)


def test_flipout_gives_every_row_its_own_signs_of_one_noise():
    layer, x, eps = blob_a().train(), normal(1, 2, D, seed=5).repeat(6, 1, 1), normal(2, R, D, seed=6)
    layer.hold(eps, seeded(3))
    y = layer(x)
    s, t = layer.signs(x)
    assert s.shape == (6, 1, D)
    assert t.shape == (6, 1, R)
    assert set(s.unique().tolist()) == set(t.unique().tolist()) == {-1.0, 1.0}
    for row in range(6):
        noise = eps[row // 3] * layer.G**2 * t[row, 0, :, None] * s[row, 0]
        torch.testing.assert_close(y[row], x[row] @ (layer.M + noise).T)
    assert torch.equal(layer(x), y)  # recomputation sees the same signs
    layer.hold(eps, seeded(4))
    assert not torch.allclose(layer(x), y)  # a new sample has new ones


@torch.no_grad()
def test_flipout_rows_have_the_moments_of_the_weight_distribution_and_are_uncorrelated():
    """40,000 samples of A x for two rows: mean and covariance within 5 standard errors of sd/200 and var/140."""
    layer, x, n = blob_a().train(), normal(1, D, seed=5), 40_000
    layer.hold(normal(n, R, D, seed=7), seeded(8))
    y = layer(x.expand(2 * n, D)).reshape(n, 2, R)
    variance = (layer.G**4) @ x[0] ** 2
    assert ((y.mean(0) - x @ layer.M.T).abs() < 5 * variance.sqrt() / n**0.5).all()
    assert ((y.var(0) / variance - 1).abs() < 5 * (6 / n) ** 0.5).all()
    centred = y - y.mean(0)
    assert ((centred[:, 0] * centred[:, 1]).mean(0).abs() < 5 * 2 * variance / n**0.5).all()


@pytest.mark.parametrize("make", [blob_a, scalabl_a])
def test_one_draw_serves_several_backward_passes(make):
    layer, x = make().train(), normal(4, D, seed=5)
    layer.hold(normal(1, *layer.noise_shape, seed=6), seeded())
    for _ in range(2):
        layer(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


def test_rows_that_are_no_multiple_of_the_draws_are_refused():
    layer = blob_a()
    layer.hold(normal(2, R, D, seed=0))
    with pytest.raises(ValueError, match=r"2 draws are live, but the batch has 3 rows"):
        layer(normal(3, D, seed=1))


def test_scalabl_starts_at_the_svd_and_blob_at_the_stated_spread():
    A = normal(R, D, seed=9)
    layer, U = SubspaceA.start(A, 0.05, 1.0)
    torch.testing.assert_close(U @ layer.weight, A)
    torch.testing.assert_close(layer.Vh @ layer.Vh.T, torch.eye(R, dtype=A.dtype), rtol=0, atol=1e-12)
    spreads = [layer.raw_sd.exp(), BLoBA.start(A, 0.05, 0.2).G]
    assert all(((g >= 0.05 / 2**0.5) & (g <= 0.05)).all() and g.std() > 0 for g in spreads)
    with pytest.raises(ValueError, match=r"r=6 > 5: lower peft.r"):
        SubspaceA.start(normal(6, 5, seed=0), 0.05, 1.0)
