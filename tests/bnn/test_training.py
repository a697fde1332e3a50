"""Backward through held draws: checkpointing, mixed precision, accumulation, stale means."""

import pytest
import torch
from bnn_cases import FAMILIES, seeded
from torch import Tensor

import bnn
from bnn.sampler import active_factors


def loss_of(model, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


def gradients(model) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_gradient_checkpointing_changes_no_gradient(n, use_reentrant, make_adapted, ids):
    def run(checkpointing: bool) -> dict[str, Tensor]:
        model = make_adapted(lora_dropout=0.0).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        with bnn.sample(model, n, seeded()) as live:
            (loss_of(model, ids.repeat(n, 1)) + 1e-4 * live.kl()).backward()
        return gradients(model)

    plain, recomputed = run(False), run(True)
    assert plain.keys() == recomputed.keys()
    assert len(plain) > 0
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES.keys())
def test_every_trainable_parameter_gets_a_finite_gradient(config, make_adapted, ids):
    model = make_adapted(**config).train()
    with bnn.sample(model, 4, seeded()) as live:
        (loss_of(model, ids.repeat(4, 1)) + 1e-3 * live.kl()).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_bfloat16_is_finite_and_close(base, n, make_adapted, make_llama, ids):
    """bfloat16 autocast on a float32 base, or a bfloat16 base; the loss within 2 % of float64's."""
    model = make_adapted(make_llama(base)).train()
    reference = make_adapted().train()
    with bnn.sample(model, n, seeded()) as live:
        assert all(f.weight.dtype == base for f in active_factors(model))
        with torch.autocast("cpu", torch.bfloat16, enabled=base == torch.float32):
            loss = loss_of(model, ids.repeat(n, 1))
        (loss.float() + 1e-4 * live.kl()).backward()
    with bnn.sample(reference, n, seeded()), torch.no_grad():
        expected = loss_of(reference, ids.repeat(n, 1))
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)
    assert all(g.isfinite().all() and g.dtype == torch.float32 for g in gradients(model).values())


def test_gradient_accumulation_redraws_per_micro_batch(make_adapted, ids):
    """Two contexts, two backwards: their gradients add up to those of each alone."""
    model = make_adapted().train()
    alone = []
    for seed in (0, 1):
        model.zero_grad()
        with bnn.sample(model, 1, seeded(seed)) as live:
            (loss_of(model, ids) + 1e-4 * live.kl()).backward()
        alone.append(gradients(model))
    model.zero_grad()
    for seed in (0, 1):
        with bnn.sample(model, 1, seeded(seed)) as live:
            (loss_of(model, ids) + 1e-4 * live.kl()).backward()
    for name, total in gradients(model).items():
        torch.testing.assert_close(total, alone[0][name] + alone[1][name], rtol=1e-5, atol=1e-6)


def test_a_second_backward_on_one_draw_raises_or_adds_up(make_adapted, ids):
    """Never silently wrong: either autograd refuses it, or the gradient is that of the sum of both losses."""
    model = make_adapted().train()
    with bnn.sample(model, 1, seeded()):
        (loss_of(model, ids) + loss_of(model, ids.flip(0, 1))).backward()
    expected = gradients(model)
    model.zero_grad()
    refused = False
    with bnn.sample(model, 1, seeded()):
        loss_of(model, ids).backward()
        second = loss_of(model, ids.flip(0, 1))
        try:
            second.backward()
        except RuntimeError:
            refused = True
    if not refused:
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)
