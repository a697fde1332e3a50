"""LoRA with weight decay."""

import pytest
import torch

from bnn.methods.base import trainable
from bnn.methods.map import MAP

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def adapted(make_llama, method=None):
    torch.manual_seed(0)
    return (method or MAP(0.1)).adapt(make_llama(), LORA)


def test_one_group_with_the_methods_own_decay(make_llama):
    model = adapted(make_llama)
    (group,) = MAP(0.25).parameter_groups(model, lr=0.01, weight_decay=0.0)
    assert (group["lr"], group["weight_decay"]) == (0.01, 0.25)
    assert {id(p) for p in group["params"]} == {id(p) for _, p in trainable(model)}
    assert not MAP(0.25).stochastic


def test_a_step_multiplies_by_one_minus_lr_times_decay_beside_the_gradient(make_llama, ids):
    """The difference to the step without decay is -lr * weight_decay * theta, on A and B."""
    lr, decay = 0.01, 0.3
    after, start = [], []
    for groups_decay in (0.0, decay):
        model = adapted(make_llama)
        with torch.no_grad():
            for _, p in trainable(model):
                p.add_(0.1)
        start = [p.detach().clone() for _, p in trainable(model)]
        groups = MAP(decay).parameter_groups(model, lr, 0.0)
        if not groups_decay:
            groups = [group | {"weight_decay": 0.0} for group in groups]
        optimizer = torch.optim.AdamW(groups)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        after.append([p.detach().clone() for _, p in trainable(model)])
    for theta, without, with_decay in zip(start, *after, strict=True):
        torch.testing.assert_close(with_decay - without, -lr * decay * theta, rtol=1e-5, atol=1e-7)


def test_training_lowers_the_loss_and_decay_shrinks_the_adapter(make_llama, ids):
    norms = []
    for method in (MAP(1e-5), MAP(2.0)):
        model = adapted(make_llama, method)
        optimizer = torch.optim.AdamW(method.parameter_groups(model, lr=0.02, weight_decay=0.0))
        before = model(input_ids=ids, labels=ids).loss.item()
        for _ in range(15):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        assert model(input_ids=ids, labels=ids).loss.item() < 0.9 * before
        norms.append(sum(p.detach().square().sum().item() for _, p in trainable(model)))
    assert norms[1] < 0.8 * norms[0]


def test_save_then_load_gives_the_same_predictions(make_llama, ids, tmp_path):
    model = adapted(make_llama).eval()
    with torch.no_grad():
        for _, p in trainable(model):
            p.add_(0.1)
        expected = model(input_ids=ids).logits
        MAP(0.1).save(model, tmp_path)
        loaded = MAP(0.1).load(make_llama(), tmp_path).eval()
        assert torch.equal(loaded(input_ids=ids).logits, expected)


def test_a_second_decay_is_refused(make_llama):
    with pytest.raises(ValueError, match=r"weight_decay=0.2: opt.weight_decay=0.1 would be a second prior, set it to"):
        MAP(0.2).parameter_groups(adapted(make_llama), lr=0.01, weight_decay=0.1)


@pytest.mark.parametrize("decay", [0.0, -0.1])
def test_no_decay_is_refused(decay):
    with pytest.raises(ValueError, match=rf"weight_decay > 0, got {decay}: use method=mle"):
        MAP(decay)


def test_a_decay_that_rounding_would_swallow_is_refused(make_llama):
    theta = torch.tensor(1.0)
    assert theta * (1 - 1e-4 * 1e-5) == theta
    with pytest.raises(ValueError, match="lost in float32's rounding"):
        MAP(1e-5).parameter_groups(adapted(make_llama), lr=1e-4, weight_decay=0.0)
    MAP(1e-2).parameter_groups(adapted(make_llama), lr=1e-4, weight_decay=0.0)


def test_what_is_no_adapter_is_not_decayed(make_llama):
    """The prior is one of A and B: a head that is trained as a whole and biases keep their size without a gradient."""
    method = MAP(1.0)
    model = method.adapt(make_llama(), LORA | {"modules_to_save": ["lm_head"]})
    decayed, others = method.parameter_groups(model, 1e-3, 0.0)
    assert (decayed["weight_decay"], others["weight_decay"]) == (1.0, 0.0)
    named = dict(trainable(model))
    adapter = {name for name in named if ".lora_" in name}
    assert {id(p) for p in decayed["params"]} == {id(named[name]) for name in adapter}
    assert {id(p) for p in others["params"]} == {id(named[name]) for name in named.keys() - adapter}
    assert len(named) > len(adapter)


@pytest.mark.parametrize(
    ("setting", "other"),
    [({"use_dora": True}, "magnitude_vector.default.weight"), ({"lora_bias": True}, "B.default.bias")],
    ids=str,
)
def test_the_prior_is_on_both_matrices_alone(setting, other, make_llama):
    """Not on their biases, nor on DoRA's magnitude, which starts at the base model's norms."""
    model = MAP(0.1).adapt(make_llama(), LORA | setting)
    decayed, others = MAP(0.1).parameter_groups(model, lr=0.01, weight_decay=0.0)
    names = {id(p): name for name, p in trainable(model)}
    assert all(names[id(p)].endswith((".lora_A.default.weight", ".lora_B.default.weight")) for p in decayed["params"])
    assert {names[id(p)].rpartition(".lora_")[2] for p in others["params"]} == {other}
    assert others["weight_decay"] == 0
