"""LoRA+: B at a larger learning rate."""

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer

from bnn.methods.base import trainable
from bnn.methods.lora_plus import LoRAPlus

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def adapted(make_llama):
    torch.manual_seed(0)
    return LoRAPlus(16.0).adapt(make_llama(), LORA)


def test_groups_hold_both_factors_at_their_rates(make_llama):
    model = adapted(make_llama)
    names = {id(p): name for name, p in trainable(model)}
    A, B = LoRAPlus(16.0).parameter_groups(model, lr=0.01, weight_decay=0.2)
    assert len(A["params"]) == len(B["params"]) == 4
    assert {id(p) for p in A["params"] + B["params"]} == set(names)
    assert all("lora_A" in names[id(p)] for p in A["params"])
    assert all("lora_B" in names[id(p)] for p in B["params"])
    assert (A["lr"], B["lr"]) == (0.01, pytest.approx(0.16))  # the script logs the first group's rate
    assert A["weight_decay"] == B["weight_decay"] == 0.2


def test_rates_and_decays_are_those_of_pefts_helper(make_llama):
    model = adapted(make_llama)
    ours = LoRAPlus(16.0).parameter_groups(model, lr=0.01, weight_decay=0.2)
    theirs = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.2
    ).param_groups

    def settings(groups):
        return {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}

    assert settings(ours) == settings(theirs)


def test_factors_of_an_embedding_are_told_apart(make_llama):
    method = LoRAPlus(16.0)
    model = method.adapt(make_llama(), {**LORA, "target_modules": ["embed_tokens"]})
    A, B = method.parameter_groups(model, lr=0.01, weight_decay=0.0)
    (embedding,) = (m for m in model.modules() if getattr(m, "lora_embedding_A", None))
    assert A["params"][0] is embedding.lora_embedding_A["default"]
    assert B["params"][0] is embedding.lora_embedding_B["default"]


def test_training_lowers_the_loss_and_saves(make_llama, ids, tmp_path):
    method, model = LoRAPlus(16.0), adapted(make_llama)
    optimizer = torch.optim.AdamW(method.parameter_groups(model, lr=0.002, weight_decay=0.0))
    before = model(input_ids=ids, labels=ids).loss.item()
    for _ in range(15):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    assert model(input_ids=ids, labels=ids).loss.item() < 0.9 * before
    method.save(model, tmp_path)
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        assert torch.equal(method.load(make_llama(), tmp_path).eval()(input_ids=ids).logits, expected)


def test_the_ratio_is_exact_from_equal_gradients(make_llama):
    """AdamW's first step has size lr in every entry with gradient 1: B must move ratio times as far as A."""
    model = adapted(make_llama)
    start = {name: p.detach().clone() for name, p in trainable(model)}
    for _, p in trainable(model):
        p.grad = torch.ones_like(p)
    torch.optim.AdamW(LoRAPlus(4.0).parameter_groups(model, lr=0.001, weight_decay=0.0)).step()
    for name, p in trainable(model):
        expected = torch.full_like(p, 0.004 if "lora_B" in name else 0.001)
        torch.testing.assert_close(start[name] - p, expected, rtol=1e-4, atol=1e-7)


def test_a_ratio_below_one_is_refused():
    with pytest.raises(ValueError, match=r"lr_ratio >= 1, got 0.5"):
        LoRAPlus(0.5)
