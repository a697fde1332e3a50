"""Stacked parameters: the same draws, gradients and updates as the factors' own."""

import pytest
import torch
from bnn_cases import FAMILIES, gap, logits_of, seeded
from peft import PeftModel
from torch import Tensor

import bnn
from bnn.layers import InducingFactor
from bnn.sampler import Sampler, active_factors


def own_gradients(model, ids: Tensor, *, n: int = 2) -> dict[str, Tensor]:
    """Gradients of the plain path, by parameter name."""
    with bnn.sample(model, n, seeded()) as live:
        (model(input_ids=ids.repeat(n, 1)).logits.square().mean() + 1e-3 * live.kl()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def stacked_gradients(model, sampler: Sampler) -> dict[str, Tensor]:
    """Slices of the stacked parameters' gradients, by the factors' parameter names."""
    found = {}
    for stack in sampler.stacks:
        for i, factor in enumerate(stack.factors):
            prefix = next(name for name, module in model.named_modules() if module is factor)
            found |= {f"{prefix}.{n}": t.grad[i] for n, t in stack.leaves.items() if t.grad is not None}
    return found


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES.keys())
def test_gradients_are_those_of_the_plain_path(config, make_adapted, ids):
    plain, stacked = make_adapted(**config), make_adapted(**config)
    sampler = Sampler(stacked, own=True)
    expected = own_gradients(plain, ids)
    with sampler.draw(2, seeded()) as live:
        (stacked(input_ids=ids.repeat(2, 1)).logits.square().mean() + 1e-3 * live.kl()).backward()
    found = stacked_gradients(stacked, sampler)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in stacked.parameters())


def test_an_update_of_the_stacks_is_one_of_the_model(make_adapted, ids):
    plain, stacked = make_adapted(), make_adapted()
    sampler = Sampler(stacked, own=True)
    optimizers = [
        torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=0.1),
        torch.optim.SGD([p for _, p in sampler.parameters()], lr=0.1),
    ]
    before = logits_of(stacked, ids)
    for _ in range(3):
        own_gradients(plain, ids)
        with sampler.draw(2, seeded()) as live:
            (stacked(input_ids=ids.repeat(2, 1)).logits.square().mean() + 1e-3 * live.kl()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert gap(logits_of(stacked, ids), before) > 1e-3
    assert gap(logits_of(stacked, ids), logits_of(plain, ids)) < 1e-4
    for a, b in zip(plain.parameters(), stacked.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_gradients_of_the_mean_path_reach_the_stacks(make_adapted, ids):
    plain, stacked = make_adapted(), make_adapted()
    sampler = Sampler(stacked, own=True)
    for model in (plain, stacked):
        model(input_ids=ids).logits.square().mean().backward()
    found = stacked_gradients(stacked, sampler)
    expected = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    assert found.keys() >= expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6)


def test_bnn_sample_sees_stacked_parameters(make_adapted, ids):
    model = make_adapted()
    with torch.no_grad(), bnn.sample(model, 1, seeded()):
        expected = logits_of(model, ids)
    sampler = Sampler(model, own=True)
    with torch.no_grad(), bnn.sample(model, 1, seeded()):
        assert torch.equal(logits_of(model, ids), expected)
    with bnn.sample(model, 1, seeded()) as live:
        live.kl().backward()
    assert all(leaf.grad is not None for name, leaf in sampler.parameters() if name == "raw_lambda")


def test_saving_and_loading_know_nothing_of_stacks(make_adapted, make_llama, ids, tmp_path):
    model = make_adapted()
    Sampler(model, own=True)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path).eval()
    assert gap(logits_of(loaded, ids), logits_of(model, ids)) < 2e-5


@pytest.mark.parametrize("replace", ["move", "assign", "assign locations", "move lambda"])
def test_replaced_parameters_are_refused(replace, make_adapted):
    model = make_adapted()
    sampler = Sampler(model, own=True)
    if replace == "move":
        for factor in active_factors(model):
            factor.Z_r.data = factor.Z_r.data.clone()
    elif replace == "move lambda":
        last = active_factors(model)[-1].raw_lambda
        last.data = last.data.clone()
    else:
        new = {k: v.clone() for k, v in model.state_dict().items() if replace == "assign" or "raw_loc" in k}
        model.load_state_dict(new, strict=False, assign=True)
    with pytest.raises(RuntimeError, match="moved, replaced or stacked anew"), sampler.draw(1):
        pass
    with pytest.raises(RuntimeError, match="moved, replaced or stacked anew"):
        active_factors(model)[-1].mean_weight()  # with gradients, which would reach the stacked tensors
    again = Sampler(model, own=True)  # the remedy
    with again.draw(1, seeded()) as live:
        live.kl().backward()
    assert all(leaf.grad is not None for name, leaf in again.parameters() if name == "raw_lambda")


def test_of_two_owners_the_first_draws_no_more(make_adapted):
    """Its tensors would be neither drawn from nor trained by anything else."""
    model = make_adapted()
    first, second = Sampler(model, own=True), Sampler(model, own=True)
    with pytest.raises(RuntimeError, match="stacked anew"), first.draw(1):
        pass
    with second.draw(1):
        pass


def test_factors_of_another_dtype_are_another_stack(make_adapted):
    """Each keeps its own layer's dtype."""
    model = make_adapted()
    for factor in active_factors(model)[:4]:
        factor.compute_dtype = torch.bfloat16
    with torch.no_grad(), bnn.sample(model, 2, seeded()):
        assert all(factor.weight.dtype == factor.compute_dtype for factor in active_factors(model))
        assert len({factor.weight.dtype for factor in active_factors(model)}) == 2


@torch.no_grad()
def test_the_cached_mean_follows_the_stacks(make_adapted, ids):
    model = make_adapted()
    sampler = Sampler(model, own=True)
    before = logits_of(model, ids)
    for name, leaf in sampler.parameters():
        if name == "raw_loc":
            leaf.mul_(2)
    assert gap(logits_of(model, ids), before) > 1e-3


def test_antithetic_draws_mirror_earlier_ones_across_contexts(make_adapted):
    model = make_adapted()
    factor = active_factors(model)[0]

    def draws(*sizes: int, ahead: int = 1) -> Tensor:
        source = bnn.Antithetic(seeded(), ahead)
        found = []
        with torch.no_grad():
            for size in sizes:
                with bnn.sample(model, size, source):
                    found.append(factor.weight.reshape(size, *factor.weight.shape[-2:]).clone())
        return torch.cat(found)

    W = draws(4)
    with torch.no_grad():
        torch.testing.assert_close(W[0] + W[1], 2 * factor.mean_weight().double(), rtol=0, atol=1e-6)
        torch.testing.assert_close(W[2] + W[3], W[0] + W[1], rtol=0, atol=1e-6)
    assert gap(W[0], W[2]) > 1e-3
    torch.testing.assert_close(draws(1, 2, 1), W, rtol=0, atol=1e-7)
    torch.testing.assert_close(draws(3, 1, ahead=2), W[[0, 2, 1, 3]], rtol=0, atol=1e-7)
    torch.testing.assert_close(draws(8, ahead=2)[4:], draws(8)[[4, 6, 5, 7]], rtol=0, atol=1e-7)


def test_draws_that_nothing_can_mirror_are_refused(make_adapted):
    with pytest.raises(ValueError, match="ahead=0: a mirror image comes at least one draw later"):
        bnn.Antithetic(None, 0)
    source = bnn.Antithetic(seeded())
    with bnn.sample(make_adapted(), 1, source):
        pass
    other = make_adapted(target_modules=["q_proj"])
    with pytest.raises(ValueError, match="cannot mirror one of"), bnn.sample(other, 1, source):
        pass


@pytest.mark.parametrize("layer", [0, 1])
def test_what_is_frozen_stays_so_when_stacked(layer, make_adapted):
    """Whichever factor comes first: those of one layer are frozen, those of the other are trained."""
    model = make_adapted()
    factors = [(f".{layer}." in name, m) for name, m in model.named_modules() if isinstance(m, InducingFactor)]
    for is_frozen, factor in factors:
        factor.requires_grad_(not is_frozen)
    before = [factor.Z_c.detach().clone() for _, factor in factors]
    sampler = Sampler(model, own=True)
    optimizer = torch.optim.SGD([p for _, p in sampler.parameters()], lr=0.1)
    with sampler.draw(1, seeded()):
        torch.stack([factor.weight.square().sum() for _, factor in factors]).sum().backward()
    optimizer.step()
    assert sum(is_frozen for is_frozen, _ in factors) == len(factors) // 2
    for (is_frozen, factor), old in zip(factors, before, strict=True):
        assert torch.equal(factor.Z_c, old) == is_frozen


def test_parameters_are_only_of_a_sampler_that_owns_them(make_adapted):
    with pytest.raises(ValueError, match="does not own the parameters: make it with own=True"):
        Sampler(make_adapted()).parameters()


@pytest.mark.parametrize("held", [True, False])
def test_gradients_go_to_the_stacks_for_as_long_as_these_are_held(held, make_adapted, ids):
    """By an optimiser too; when nobody trains the stacks, the model's own parameters can be trained again."""
    plain, model = make_adapted(), make_adapted()
    leaves = [p for _, p in Sampler(model, own=True).parameters()]
    if not held:
        del leaves
    expected = own_gradients(plain, ids)
    found = own_gradients(model, ids)
    assert found.keys() == (set() if held else expected.keys())
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6)
    assert not held or all(leaf.grad is not None for leaf in leaves)
