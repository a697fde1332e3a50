"""The flow on the inducing matrix: identity at the start, exact Jacobian, stacked application."""

import pytest
import torch

from bnn.inducing.flow import InducingFlow, apply_stacked

M_R, M_C = 2, 3
SIZE = M_R * M_C


def make_flow(depth: int, seed: int | None) -> InducingFlow:
    """A flow at its start (seed None), or with every parameter perturbed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        flow = InducingFlow(SIZE, depth, hidden=8).double()
    if seed is not None:
        noise = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in flow.parameters():
                p.add_(0.4 * torch.randn(p.shape, generator=noise, dtype=p.dtype))
    return flow.requires_grad_(False)


def jacobian(flow: InducingFlow, U_0: torch.Tensor) -> torch.Tensor:
    return torch.func.jacrev(lambda x: flow(x.reshape(M_R, M_C))[0].flatten())(U_0.flatten())


@pytest.fixture(name="U_0")
def base_draws(generator):
    return torch.randn(4, M_R, M_C, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("depth", [1, 3])
def test_starts_as_the_identity(depth, U_0):
    U, log_det = make_flow(depth, None)(U_0)
    assert torch.equal(U, U_0)
    assert torch.equal(log_det, torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("depth", [1, 3])
def test_log_det_is_that_of_the_autograd_jacobian(depth, U_0):
    flow = make_flow(depth, seed=1)
    U, log_det = flow(U_0)
    assert (U - U_0).abs().max() > 0.1
    for i in range(4):
        torch.testing.assert_close(log_det[i], torch.linalg.slogdet(jacobian(flow, U_0[i])).logabsdet)


def test_one_layer_is_autoregressive_and_two_alternate_the_order(U_0):
    one = jacobian(make_flow(1, seed=1), U_0[0])
    assert torch.equal(one, one.tril())
    assert one.tril(-1).any()
    two = jacobian(make_flow(2, seed=1), U_0[0])
    assert two.tril(-1).any()
    assert two.triu(1).any()


@pytest.mark.parametrize("depth", [1, 3])
def test_every_parameter_that_matters_gets_gradient_after_one_step(depth, U_0):
    """The last layers start at zero, so the hidden ones move from the second step on."""
    flow = make_flow(depth, None).requires_grad_()
    optimizer = torch.optim.SGD(flow.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        U, log_det = flow(U_0)
        (U.square().sum() - log_det.sum()).backward()
        optimizer.step()
    assert all(p.grad.any() for p in flow.parameters())


@pytest.mark.parametrize("depth", [1, 3])
def test_stacked_application_is_the_loop_over_flows(depth, generator):
    flows = [make_flow(depth, seed) for seed in (1, 2, 3)]
    named = [dict(f.named_parameters()) | dict(f.named_buffers()) for f in flows]
    tensors = {name: torch.stack([n[name] for n in named]) for name in named[0]}
    U_0 = torch.randn(5, 3, M_R, M_C, generator=generator, dtype=torch.float64)
    U, log_det = apply_stacked(make_flow(depth, None), tensors, U_0)
    for i, flow in enumerate(flows):
        expected, expected_log_det = flow(U_0[:, i])
        torch.testing.assert_close(U[:, i], expected)
        torch.testing.assert_close(log_det[:, i], expected_log_det)


def test_depth_zero_is_refused():
    with pytest.raises(ValueError, match="depth >= 1, got 0"):
        InducingFlow(SIZE, 0, 8)


def test_a_flow_of_one_variable_starts_as_the_identity():
    """The smallest inducing matrix, 1 x 1, is allowed elsewhere."""
    U_0 = torch.ones(2, 1, 1)
    assert torch.equal(InducingFlow(1, 1, 8)(U_0)[0], U_0)
