"""Outside autograd the mean is computed once, and again as soon as a tensor behind it has changed."""

import copy

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, vmap

from bnn.inducing import posterior
from bnn.layers import InducingFactor

WIDTH = 12


@pytest.fixture
def factor(A, make_factor) -> InducingFactor:
    return make_factor(A)


def fresh(factor: InducingFactor) -> Tensor:
    stacked = {name: t.detach()[None] for name, t in factor.tensors().items()}
    return posterior.mean(factor.spec, stacked, factor.flow)[0]


@torch.no_grad()
def test_is_reused_while_nothing_changes(factor):
    assert factor.mean_weight() is factor.mean_weight()


def test_is_not_used_where_a_gradient_is_wanted(factor):
    with torch.no_grad():
        factor.mean_weight()
    assert factor.mean_weight().requires_grad


def test_follows_a_fused_step_that_a_prediction_came_before(factor):
    """Fused steps raise no version: where gradients wait for one, nothing is kept."""
    steps = torch.optim.AdamW(factor.train().parameters(), lr=0.05, fused=True)
    factor.mean_weight().square().sum().backward()
    with torch.no_grad():
        before = factor.mean_weight().clone()
        steps.step()
        assert torch.equal(factor.mean_weight(), fresh(factor))
        assert not torch.equal(factor.mean_weight(), before)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
def test_follows_the_optimizer(factor, optimizer, options):
    steps = optimizer(factor.parameters(), lr=0.05, **options)
    for _ in range(3):
        with torch.no_grad():
            before = factor.mean_weight().clone()
        factor.mean_weight().square().sum().backward()
        steps.step()
        with torch.no_grad():
            assert torch.equal(factor.mean_weight(), fresh(factor))
            assert not torch.equal(factor.mean_weight(), before)


@torch.no_grad()
@pytest.mark.parametrize("assign", [False, True])
def test_follows_load_state_dict(factor, make_factor, A, assign):
    factor.mean_weight()
    factor.load_state_dict(make_factor(2 * A).state_dict(), assign=assign)
    torch.testing.assert_close(factor.mean_weight(), 2 * A, rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["Z_r", "Z_c", "raw_D_r", "raw_D_c", "raw_loc", "W_unit"])
def test_follows_every_tensor(factor, name):
    before = factor.mean_weight().clone()
    getattr(factor, name).add_(0.1)
    assert not torch.equal(factor.mean_weight(), before)
    assert torch.equal(factor.mean_weight(), fresh(factor))


@torch.no_grad()
def test_follows_an_update_that_autograd_does_not_count(factor):
    """``.data`` in place leaves the version counter alone; weight averaging writes so between two evaluations."""
    factor.eval()
    factor.mean_weight()
    factor.train()
    factor.raw_loc.data.mul_(2)
    factor.eval()
    assert torch.equal(factor.mean_weight(), fresh(factor))


def test_made_in_inference_mode_serves_a_later_backward_to_the_input(factor):
    factor.requires_grad_(False)
    with torch.inference_mode():
        factor.mean_weight()
    x = torch.ones(1, WIDTH, requires_grad=True)
    factor(x).sum().backward()
    assert x.grad.any()


@torch.no_grad()
def test_is_not_copied_stale(factor):
    factor.mean_weight()
    twin = copy.deepcopy(factor)
    twin.raw_loc.mul_(2)
    assert torch.equal(twin.mean_weight(), fresh(twin))


@pytest.mark.parametrize("warm", [False, True])
def test_is_not_used_under_forward_mode_differentiation(factor, warm):
    """A dual number has the address and the version of its value."""
    values = dict(factor.named_parameters())
    with torch.no_grad():
        if warm:
            factor.mean_weight()
        with forward_ad.dual_level():
            duals = {name: forward_ad.make_dual(p, torch.ones_like(p)) for name, p in values.items()}
            tangent = forward_ad.unpack_dual(functional_call(factor, duals, torch.eye(WIDTH))).tangent
    assert tangent is not None
    weights = torch.randn(tangent.shape, generator=torch.Generator().manual_seed(0))
    (factor(torch.eye(WIDTH)) * weights).sum().backward()
    backward = sum(p.grad.sum() for p in values.values() if p.grad is not None)
    torch.testing.assert_close((tangent * weights).sum(), backward, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_is_not_kept_once_its_reader_has_written_to_it(factor):
    expected = factor.mean_weight().clone()
    factor.weight.zero_()
    assert torch.equal(factor.mean_weight(), expected)


@torch.no_grad()
@pytest.mark.parametrize("flow_depth", [0, 1])
def test_is_not_used_under_vmap(flow_depth, A, make_factor):
    """Many sets of parameters at once, in the usual recipe; the draws behind a flow's mean are the same for all."""
    x, factor = torch.eye(WIDTH), make_factor(A, flow_depth=flow_depth, flow_hidden=8)
    values = {name: torch.stack([p, 1.1 * p]) for name, p in factor.named_parameters()}
    factor.mean_weight()
    both = vmap(lambda own: functional_call(factor, own, x))(values)
    one_by_one = [functional_call(factor, {name: t[i] for name, t in values.items()}, x) for i in range(2)]
    torch.testing.assert_close(both, torch.stack(one_by_one), rtol=1e-4, atol=1e-5)
    assert torch.equal(factor.mean_weight(), fresh(factor))
