"""AdaLoRA: phases of the budget, the penalty's gradient, saving and resuming with pruned ranks."""

import copy

import pytest
import torch

from bnn.methods.adalora import AdaLoRA, orthogonality_penalty
from bnn.methods.base import Schedule, trainable
from bnn.methods.mle import MLE

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
FULL, FINAL = 4 * 6, 4 * 4  # singular values of four layers, before and after pruning
STEPS = 20  # 3 with the full budget, the last 9 with the final one


def adalora(**changed) -> AdaLoRA:
    settings = {"init_rank_factor": 1.5, "initial_fraction": 0.15, "final_fraction": 0.45, "interval": 1}
    return AdaLoRA(**settings | {"beta1": 0.85, "beta2": 0.85, "orthogonality": 0.3} | changed)


def adapted(make_llama, method):
    torch.manual_seed(0)
    return method.adapt(make_llama(), LORA)


def started(make_llama, method=None):
    method = method or adalora()
    model = adapted(make_llama, method).train()
    method.start(model, Schedule(STEPS, STEPS, 3))
    return method, model, torch.optim.AdamW(method.parameter_groups(model, lr=0.05, weight_decay=0.0), foreach=False)


def loss_of(model, ids):
    return super(type(model.base_model), model.base_model).forward(input_ids=ids, labels=ids).loss  # no penalty


def run(method, model, optimizer, ids, steps) -> list[int]:
    """Train; returns the number of singular values that are not 0 after every step."""
    kept = []
    for step in steps:
        with method.sample(model, 1, None) as live:
            (loss_of(model, ids) + live.kl()).backward()
        optimizer.step()
        method.after_step(model, step, 1.0)
        optimizer.zero_grad()
        kept.append(sum(int(p.count_nonzero()) for name, p in trainable(model) if "lora_E" in name))
    return kept


def test_it_starts_at_the_base_model_with_the_raised_rank(make_llama, ids):
    model = adapted(make_llama, adalora()).eval()
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, make_llama()(input_ids=ids).logits)
    assert sum(p.numel() for name, p in trainable(model) if "lora_E" in name) == FULL
    assert all("lora_" in name for name, _ in trainable(model))
    config = model.peft_config["default"]
    assert (config.target_r, config.init_r, config.lora_alpha, config.deltaT) == (4, 6, 8, 1)


def test_the_budget_falls_cubically_to_the_asked_rank_and_the_loss_falls_too(make_llama, ids):
    method, model, optimizer = started(make_llama)
    before = loss_of(model, ids).item()
    kept = run(method, model, optimizer, ids, range(STEPS))
    t_i, t_f = 3, 9
    cubic = [
        int(FINAL + (FULL - FINAL) * (1 - (t - t_i) / (STEPS - t_i - t_f)) ** 3) for t in range(t_i + 1, STEPS - t_f)
    ]
    assert kept == [FULL] * t_i + cubic + [FINAL] * (t_f + 1)
    assert loss_of(model, ids).item() < 0.9 * before


@pytest.mark.parametrize(("final_fraction", "least"), [(0.45, 2), (2 / 3, 4), (0.8, 6)])
def test_fewer_steps_than_pruning_needs_are_refused_before_the_first(make_llama, ids, final_fraction, least):
    method = adalora(initial_fraction=0.1, final_fraction=final_fraction)
    model = adapted(make_llama, method).train()
    for steps in range(1, least):
        with pytest.raises(ValueError, match=rf"needs {least} steps or more, .* these are {steps}: train for longer"):
            method.start(model, Schedule(steps, steps, 3))
    method.start(model, Schedule(least, least, 3))
    optimizer = torch.optim.AdamW(method.parameter_groups(model, lr=0.05, weight_decay=0.0), foreach=False)
    assert run(method, model, optimizer, ids, range(least))[-1] == FINAL


def test_the_singular_values_kept_last_are_fixed(make_llama, ids):
    method, model, optimizer = started(make_llama)
    run(method, model, optimizer, ids, range(12))

    def nonzero():
        return {name: p != 0 for name, p in trainable(model) if "lora_E" in name}

    at_the_end_of_pruning = nonzero()
    run(method, model, optimizer, ids, range(12, STEPS))
    assert all(torch.equal(mask, at_the_end_of_pruning[name]) for name, mask in nonzero().items())
    assert len({int(mask.sum()) for mask in nonzero().values()}) > 1  # ranks differ between layers


def test_the_penalty_is_pefts(make_llama, ids):
    model = started(make_llama)[1]
    with_penalty, without = model(input_ids=ids, labels=ids).loss, loss_of(model, ids)
    torch.testing.assert_close(0.3 * orthogonality_penalty(model).float(), with_penalty - without)


def test_gradients_are_those_of_loss_plus_penalty_whatever_the_accumulation(make_llama, ids):
    method, model, optimizer = started(make_llama)
    run(method, model, optimizer, ids, range(2))
    parameters = dict(trainable(model))
    total = loss_of(model, ids) + 0.3 * orthogonality_penalty(model)
    expected = dict(zip(parameters, torch.autograd.grad(total, list(parameters.values())), strict=True))
    for part in ids.split(1):  # equally many tokens: the mean of the parts' losses is the loss
        with method.sample(model, 1, None) as live:
            (loss_of(model, part) / len(ids)).backward()
            assert live.kl().item() == 0
    for name, p in parameters.items():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("case", ["evaluation", "no backward", "weight 0"])
def test_no_penalty_where_nothing_is_trained_on(make_llama, ids, case):
    method, model, _ = started(make_llama, adalora(orthogonality=0.0) if case == "weight 0" else None)
    model.train(case != "evaluation")
    with method.sample(model, 1, None):
        loss = loss_of(model, ids)
        if case != "no backward":
            loss.backward()
    gradients = [p.grad for name, p in trainable(model) if "lora_A" in name]
    assert all(g is None or not g.any() for g in gradients)  # Lambda = 0: the loss does not reach Q


@pytest.mark.parametrize("steps", [2, 7, STEPS], ids=["full", "pruning", "final"])
def test_save_then_load_gives_the_same_predictions_and_trains_on(make_llama, ids, tmp_path, steps):
    method, model, optimizer = started(make_llama)
    run(method, model, optimizer, ids, range(steps))
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        pattern = model.peft_config["default"].rank_pattern
        method.save(model, tmp_path)
        assert model.peft_config["default"].rank_pattern is pattern  # training may go on after saving
        loaded = method.load(make_llama(), tmp_path).eval()
        assert torch.equal(loaded(input_ids=ids).logits, expected)
    method.start(loaded.train(), Schedule(STEPS, STEPS, 3))
    optimizer = torch.optim.AdamW(method.parameter_groups(loaded, lr=0.05, weight_decay=0.0), foreach=False)
    assert run(method, loaded, optimizer, ids, range(STEPS))[-1] == FINAL


def test_parameters_of_an_earlier_step_are_saved_whole(make_llama, ids, tmp_path):
    """What eval.keep=best does: singular values that the last pruning removed come back before saving."""
    method, model, optimizer = started(make_llama)
    run(method, model, optimizer, ids, range(3))
    best = {name: p.detach().clone() for name, p in trainable(model)}
    run(method, model, optimizer, ids, range(3, STEPS))
    with torch.no_grad():
        for name, p in trainable(model):
            p.copy_(best[name])
        expected = model.eval()(input_ids=ids).logits
        method.save(model, tmp_path)
        assert torch.equal(method.load(make_llama(), tmp_path).eval()(input_ids=ids).logits, expected)


@pytest.mark.parametrize(("stop", "end"), [(6, 9), (15, STEPS)], ids=["pruning", "final"])
def test_a_run_resumed_from_its_state_ends_the_same(make_llama, ids, stop, end):
    method, model, optimizer = started(make_llama)
    run(method, model, optimizer, ids, range(stop))
    state, moments = copy.deepcopy((method.state(model), optimizer.state_dict()))
    parameters = {name: p.detach().clone() for name, p in trainable(model)}
    method, resumed, optimizer_2 = started(make_llama)
    with torch.no_grad():
        for name, p in trainable(resumed):
            p.copy_(parameters[name])
    optimizer_2.load_state_dict(moments)
    method.load_state(resumed, state)
    run(method, model, optimizer, ids, range(stop, end))
    run(method, resumed, optimizer_2, ids, range(stop, end))
    for (_, p), (_, q) in zip(trainable(model), trainable(resumed), strict=True):
        assert torch.equal(p, q)
    torch.testing.assert_close(method.state(resumed), method.state(model), rtol=0, atol=0)


def test_refusals(make_llama, ids, tmp_path):
    with pytest.raises(ValueError, match=r"initial_fraction=0.5 and final_fraction=0.5 leave no step"):
        adalora(initial_fraction=0.5, final_fraction=0.5)
    with pytest.raises(ValueError, match=r"orthogonality >= 0, got -1"):
        adalora(orthogonality=-1)
    with pytest.raises(ValueError, match=r"interval >= 1, got 0"):
        adalora(interval=0)
    with pytest.raises(ValueError, match=r"round\(1.1 \* 4\) must exceed r=4"):
        adapted(make_llama, adalora(init_rank_factor=1.1))
    with pytest.raises(ValueError, match=r"method=adalora ignores peft\.use_rslora=True: leave it out"):
        adalora().adapt(make_llama(), LORA | {"use_rslora": True})
    method, model, optimizer = started(make_llama)
    with pytest.raises(ValueError, match="does not know what its last pruning kept: that step was left out"):
        run(method, model, optimizer, ids, [STEPS - 1])
    MLE().save(MLE().adapt(make_llama(), LORA), tmp_path / "plain")
    with pytest.raises(ValueError, match="holds an adapter of type LORA, and this method takes ADALORA"):
        method.load(make_llama(), tmp_path / "plain")
    method, model, optimizer = started(make_llama)
    run(method, model, optimizer, ids, range(STEPS))
    model.save_pretrained(str(tmp_path / "cut"))  # PEFT's own, with the ranks cut off
    with pytest.raises(ValueError, match="pruned ranks were cut off"):
        method.start(method.load(make_llama(), tmp_path / "cut"), Schedule(STEPS, STEPS, 3))
