"""Draws of a whole model: tiling, reproducibility, contexts, checkpointing, mixed precision."""

import copy
import gc
import weakref

import pytest
import torch
from bnn_cases import FAMILIES, draw_alone, flat_noise, seeded
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.func import functional_call

import bnn
from bnn.inducing.posterior import noise_shapes_of
from bnn.layers import InducingFactor
from bnn.noise import shape_noise
from bnn.sampler import active_factors, group_by_kind
from bnn.stack import FactorStack


def logits_of(model, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def loss_of(model, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


@pytest.fixture
def lora(make_llama):
    """Plain LoRA on the same base: its A and B can be set to any draw."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        return get_peft_model(make_llama(), config).eval()


@torch.no_grad()
def put_into_lora(lora, model, draw: int | None) -> None:
    """Copy draw ``draw`` (None: the mean) of every factor of ``model`` into plain LoRA's A and B."""
    for name, module in model.named_modules():
        if isinstance(module, InducingFactor):
            W = module.weight
            lora.get_submodule(name).weight.copy_(W if draw is None else W[draw])


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES.keys())
def test_rows_of_draw_i_are_plain_lora_with_that_draw(config, make_adapted, lora, ids):
    """Rows i*B..(i+1)*B of the tiled pass against a separate pass of PEFT's LoRA holding A_i and B_i."""
    model = make_adapted(**config)
    with bnn.sample(model, 3, seeded()) as live:
        assert live.n == 3
        tiled = logits_of(model, ids.repeat(3, 1)).reshape(3, *ids.shape, -1)
        for i in range(3):
            put_into_lora(lora, model, i)
            torch.testing.assert_close(tiled[i], logits_of(lora, ids), rtol=0, atol=1e-5)
    assert (tiled[0] - tiled[1]).abs().max() > 1e-3


def test_one_draw_serves_every_row(make_adapted, ids):
    model = make_adapted()
    with bnn.sample(model, 1, seeded()):
        whole = logits_of(model, ids)
        rows = torch.cat([logits_of(model, ids[i : i + 1]) for i in range(len(ids))])
    torch.testing.assert_close(whole, rows, rtol=0, atol=1e-6)


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES.keys())
def test_n_draws_at_once_are_n_draws_of_one(config, make_adapted, ids):
    model = make_adapted(**config)
    generator = seeded()
    single = []
    for _ in range(3):
        with bnn.sample(model, 1, generator):
            single.append(logits_of(model, ids))
    with bnn.sample(model, 3, seeded()):
        torch.testing.assert_close(logits_of(model, ids.repeat(3, 1)), torch.cat(single), rtol=0, atol=1e-5)


def test_same_seed_same_logits_other_seed_others(make_adapted, ids):
    model = make_adapted()

    def run(seed: int) -> Tensor:
        with bnn.sample(model, 2, seeded(seed)):
            return logits_of(model, ids.repeat(2, 1))

    assert torch.equal(run(0), run(0))
    assert (run(0) - run(1)).abs().max() > 1e-3


def test_the_global_generator_is_used_only_without_another(make_adapted):
    model = make_adapted()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = torch.get_rng_state()
        with bnn.sample(model, 2, seeded()):
            assert torch.equal(torch.get_rng_state(), state)
        with bnn.sample(model, 2):
            assert not torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES.keys())
def test_stacked_draw_is_the_draw_of_each_factor(config, make_adapted):
    """Three factors of one structure (q_proj, o_proj and gate_proj share d_in = 16) under the same noise slices."""
    model = make_adapted(target_modules=["q_proj", "o_proj", "gate_proj"], layers_to_transform=[0], **config)
    (spec, *_), factors = max(group_by_kind(active_factors(model)).items(), key=lambda item: len(item[1]))
    assert len(factors) == 3
    noise = flat_noise(spec, 3, 2, seeded(), torch.float32)
    W, kl = draw_alone(factors, noise)
    for i, factor in enumerate(factors):
        fields = [x for x in shape_noise(noise, noise_shapes_of(spec), 3) if x is not None]
        W_alone, kl_alone = draw_alone([factor], torch.cat([x[:, i].flatten(1) for x in fields], dim=1))
        torch.testing.assert_close(W[:, i : i + 1], W_alone, rtol=0, atol=1e-6)
        torch.testing.assert_close(kl[i : i + 1], kl_alone, rtol=1e-6, atol=1e-4)


def test_factors_are_grouped_by_structure(make_adapted):
    model = make_adapted()
    groups = group_by_kind(active_factors(model))
    assert sum(len(g) for g in groups.values()) == len(active_factors(model)) == 2 * 2 * 2
    # A of q and v alike (4 x 16); B of q is 16 x 4, B of v, with one key-value head, 8 x 4
    assert sorted(len(g) for g in groups.values()) == [2, 2, 4]


def test_kl_is_the_sum_over_factors(make_adapted):
    model = make_adapted()
    with bnn.sample(model, 2, seeded()) as live:
        total = live.kl()
    each = []
    for factor in active_factors(model):
        each.append(draw_alone([factor], flat_noise(factor.spec, 1, 1, seeded(), torch.float32))[1])
    torch.testing.assert_close(total, torch.cat(each).sum(), rtol=1e-5, atol=0)
    assert total.requires_grad
    assert total.dim() == 0


def test_nested_contexts_are_refused_and_leave_the_outer_one_alone(make_adapted, ids):
    model = make_adapted()
    with bnn.sample(model, 1, seeded()):
        before = logits_of(model, ids)
        with pytest.raises(ValueError, match="already live"), bnn.sample(model, 1, seeded(1)):
            pass
        assert torch.equal(logits_of(model, ids), before)


def test_impossible_requests_are_refused(make_adapted, make_llama, lora, ids):
    model = make_adapted()
    with pytest.raises(ValueError, match="at least 1, got 0"), bnn.sample(model, 0):
        pass
    with pytest.raises(ValueError, match="batch has 3 rows"), bnn.sample(model, 2, seeded()):
        logits_of(model, ids)
    for other in (make_llama(), lora):
        with pytest.raises(ValueError, match="no active SGP-LoRA factor"), bnn.sample(other, 1):
            pass


@pytest.mark.parametrize("exception", [RuntimeError, KeyboardInterrupt])
def test_context_clears_after_an_exception(exception, make_adapted, ids):
    model = make_adapted()
    expected = logits_of(model, ids)

    def fail() -> None:
        with bnn.sample(model, 1, seeded()):
            raise exception

    with pytest.raises(exception):
        fail()
    assert not any(f.has_sample for f in active_factors(model))
    assert torch.equal(logits_of(model, ids), expected)
    with bnn.sample(model, 1, seeded()):
        pass


def test_draws_do_not_outlive_their_context(make_adapted, ids):
    """Not even until cycles are collected: they are as large as all weights of the adapter, S times over."""
    model = make_adapted().train()
    gc.collect()
    gc.disable()
    try:
        with bnn.sample(model, 2) as live:
            (model(input_ids=ids.repeat(2, 1)).logits.square().mean() + live.kl()).backward()
            drawn = [weakref.ref(factor.weight._base) for factor in active_factors(model)]
            assert all(ref() is not None for ref in drawn)
        del live
        assert not any(ref() is not None for ref in drawn)
    finally:
        gc.enable()


def test_a_failed_draw_leaves_nothing_live(make_adapted, ids, monkeypatch):
    model = make_adapted()
    calls = []
    draw = FactorStack.draw

    def fail_at_second(stack, *arguments):
        calls.append(stack)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return draw(stack, *arguments)

    monkeypatch.setattr(FactorStack, "draw", fail_at_second)
    with pytest.raises(RuntimeError, match="out of memory"), bnn.sample(model, 1, seeded()):
        pass
    assert not any(f.has_sample for f in active_factors(model))


@pytest.mark.parametrize("training", [False, True])
def test_outside_a_context_the_mean_is_used_in_either_mode(training, make_adapted, lora, ids):
    model = make_adapted().train(training)
    put_into_lora(lora, model, None)
    torch.testing.assert_close(logits_of(model, ids), logits_of(lora, ids), rtol=0, atol=1e-5)
    with_grad = model(input_ids=ids).logits
    torch.testing.assert_close(with_grad.detach(), logits_of(model, ids), rtol=0, atol=1e-6)


def test_the_mean_is_never_stale_after_an_optimizer_step_or_a_load(make_adapted, lora, ids):
    model = make_adapted()
    start = {name: t.clone() for name, t in model.state_dict().items()}
    first = logits_of(model, ids)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    with bnn.sample(model, 1, seeded()):
        loss_of(model, ids).backward()
    optimizer.step()
    stepped = logits_of(model, ids)
    assert (stepped - first).abs().max() > 1e-3
    put_into_lora(lora, model, None)
    torch.testing.assert_close(stepped, logits_of(lora, ids), rtol=0, atol=1e-5)
    model.load_state_dict(start)
    assert torch.equal(logits_of(model, ids), first)


@torch.no_grad()
def test_the_mean_is_that_of_the_parameters_that_a_functional_call_passes(make_adapted, ids):
    """Of ever new tensors, which may lie where those before did."""
    model = make_adapted()
    own = {name: p for name, p in model.named_parameters() if "raw_loc" in name}

    def logits(forget: bool) -> list[list]:
        found = []
        for k in range(40):
            passed = {name: p + 0.3 * torch.randn(p.shape, generator=seeded(k)) for name, p in own.items()}
            if forget:
                model.eval()  # nothing is cached then
            found.append(functional_call(model, passed, (), {"input_ids": ids}).logits.tolist())
            del passed
        return found

    assert logits(forget=False) == logits(forget=True)


@torch.no_grad()
def test_the_mean_is_that_of_data_that_were_set_again_and_again(make_adapted, ids):
    """As averaging weights does; what was set before is freed, and the next may lie there."""
    model = make_adapted()
    for _ in range(30):
        for factor in active_factors(model):
            factor.raw_loc.data = factor.raw_loc.data * 1.1
            factor.raw_loc.data = factor.raw_loc.data / 1.05
        got = logits_of(model, ids)
        model.eval()
        assert torch.equal(got, logits_of(model, ids))


@pytest.mark.parametrize("training", [False, True])
def test_the_mean_follows_a_fused_step_after_a_look_at_it(training, make_adapted, ids):
    """Fused optimisers leave the version counters alone."""
    model = make_adapted().train(training)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, fused=True)
    loss_of(model, ids).backward()
    before = logits_of(model, ids)
    optimizer.step()
    assert (logits_of(model, ids) - before).abs().max() > 1e-3


def test_autocast_changes_neither_draws_nor_mean_nor_gradients(make_adapted):
    """Factorisations stay in float32; a mean computed inside is what is used, and merged, outside."""
    model = make_adapted()
    factors = active_factors(model)

    def gradients(autocast: bool) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), bnn.sample(model, 2, seeded()) as live:
            (sum(f.weight.square().sum() for f in factors) + live.kl()).backward()
        of = [f.Z_c.grad for f in factors]
        model.zero_grad()
        return of

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        means = [f.mean_weight() for f in factors]
        with bnn.sample(model, 2, seeded()):
            draws = [f.weight for f in factors]
    for factor, mean in zip(factors, means, strict=True):
        factor.train()  # forgets the mean
        assert torch.equal(factor.mean_weight().detach(), mean)
    with torch.no_grad(), bnn.sample(model, 2, seeded()):
        assert all(torch.equal(f.weight, draw) for f, draw in zip(factors, draws, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(gradients(True), gradients(False), strict=True))


def test_backward_after_a_context_that_an_error_ended_is_refused(make_adapted, ids):
    model, losses = make_adapted(), []

    def fail() -> None:
        with bnn.sample(model):
            losses.append(loss_of(model, ids))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    with pytest.raises(RuntimeError, match=r"backward after bnn\.sample has ended"):
        losses[0].backward()


def test_a_copy_of_a_trained_model_is_drawn_from_like_any(make_adapted, ids):
    model = make_adapted()
    bnn.Sampler(model, own=True)
    twin = copy.deepcopy(model)
    for one in (model, twin):
        with bnn.sample(one, 1, seeded()):
            loss_of(one, ids).backward()
    pairs = list(zip(active_factors(model), active_factors(twin), strict=True))
    with torch.no_grad():
        assert all(torch.equal(a.mean_weight(), b.mean_weight()) for a, b in pairs)
        pairs[0][0].Z_c.zero_()
    assert all(b.Z_c.grad.any() and b.Z_c.any() for _, b in pairs)


def test_draws_follow_the_model_to_another_dtype(make_llama, make_adapted, ids):
    model = make_adapted(make_llama().to(torch.bfloat16))
    for dtype in (torch.bfloat16, torch.float32):
        model.to(dtype)
        with torch.no_grad(), bnn.sample(model, 1, seeded()):
            assert {f.weight.dtype for f in active_factors(model)} == {dtype}
            assert {f.Z_c.dtype for f in active_factors(model)} == {torch.float32}
