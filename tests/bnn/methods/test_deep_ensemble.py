"""An ensemble of LoRA adapters: independent members that train, predict and travel together."""

import shutil
from dataclasses import dataclass

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from bnn.methods.base import trainable
from bnn.methods.ensemble import Ensemble
from bnn.methods.mle import MLE

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
K = 3


@dataclass
class Rows:
    input_ids: Tensor


def score(model, batch):
    return model(input_ids=batch.input_ids).logits[:, -1, :4]


def predict(method, model, ids, n=None):
    return method.predict(model, score, [Rows(ids), Rows(ids[:1])], n=n, generator=None, max_tokens_per_forward=9)


def of(model, name: str) -> dict[str, Tensor]:
    return {n.replace(f".{name}.", "."): p for n, p in model.named_parameters() if f".{name}." in n}


def step(method, model, optimizer, ids) -> list[float]:
    """One optimiser step, as the training script makes it; the loss of each member."""
    losses = []
    optimizer.zero_grad()
    for _ in method.members(model):
        with method.sample(model, 1, None) as live:
            loss = model(input_ids=ids, labels=ids).loss + live.kl()
            loss.backward()
        losses.append(loss.item())
    optimizer.step()
    return losses


def optimizer_of(method, model):
    return torch.optim.AdamW(method.parameter_groups(model, lr=0.02, weight_decay=0.0), foreach=False)


@pytest.fixture
def model(make_llama):
    torch.manual_seed(0)
    return Ensemble(K).adapt(make_llama(), LORA)


@pytest.fixture
def trained(model, ids):
    method = Ensemble(K)
    optimizer = optimizer_of(method, model)
    for _ in range(5):
        step(method, model, optimizer, ids)
    return model.eval()


def test_members_start_apart_and_as_lora_starts(model, make_llama, ids):
    As = [p for k in range(K) for n, p in of(model, f"member{k}").items() if "lora_A" in n]
    assert len(As) == 4 * K
    assert all(not torch.equal(a, b) for i, a in enumerate(As) for b in As[:i] if a.shape == b.shape)
    base = score(make_llama(), Rows(ids)).detach().float()
    for scores in predict(Ensemble(K), model.eval(), ids):
        torch.testing.assert_close(scores[:3], base)
    torch.manual_seed(0)
    again = Ensemble(K).adapt(make_llama(), LORA)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def test_every_members_parameters_are_the_optimisers_and_stay_trainable(model, ids):
    method = Ensemble(K)
    everything = {n for n, _ in trainable(model)}
    assert everything == {n for n, _ in model.named_parameters() if "lora_" in n}
    assert len(everything) == 8 * K
    assert sum(len(group["params"]) for group in optimizer_of(method, model).param_groups) == 8 * K
    for _ in method.members(model):
        assert {n for n, _ in trainable(model)} == everything
    predict(method, model.eval(), ids)
    assert {n for n, _ in trainable(model)} == everything


def test_each_members_gradient_is_clipped_by_itself(model):
    method = Ensemble(K)
    parameters = [p for group in optimizer_of(method, model).param_groups for p in group["params"]]
    parts = method.clipped_together(model, parameters)
    assert [{id(p) for p in part} for part in parts] == [{id(p) for p in of(model, n).values()} for n in method.names]
    assert MLE().clipped_together(model, parameters) == [parameters]


def test_gradients_reach_the_active_member_only(model, ids):
    for k, _ in enumerate(Ensemble(K).members(model)):
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids).loss.backward()
        got = {n for n, p in model.named_parameters() if p.grad is not None}
        assert got == {n for n, p in trainable(model) if f".member{k}." in n}


def test_each_member_trains_as_it_would_alone(model, make_llama, ids):
    """The shared model and optimiser couple nothing: every member equals plain LoRA from the same start."""
    method = Ensemble(K)
    starts = [{n: p.detach().clone() for n, p in of(model, f"member{k}").items()} for k in range(K)]
    optimizer = optimizer_of(method, model)
    losses = [step(method, model, optimizer, ids) for _ in range(15)]
    assert all(last < 0.9 * first for first, last in zip(losses[0], losses[-1], strict=True))
    for k, start in enumerate(starts):
        alone = get_peft_model(make_llama(), LoraConfig(**LORA))
        with torch.no_grad():
            for n, p in of(alone, "default").items():
                p.copy_(start[n])
        optimizer = optimizer_of(MLE(), alone)
        for _ in range(15):
            step(MLE(), alone, optimizer, ids)
        for n, p in of(alone, "default").items():
            torch.testing.assert_close(of(model, f"member{k}")[n], p)


def test_prediction_has_one_pass_of_each_member(trained, ids):
    method = Ensemble(K)
    for n in (None, 1, 10):
        assert torch.equal(predict(method, trained, ids, n), predict(method, trained, ids))
    scores = predict(method, trained, ids)
    assert scores.shape == (K, 4, 4)
    assert trained.active_adapter == "member0"
    for k in range(K):
        trained.set_adapter(f"member{k}")
        torch.testing.assert_close(scores[k, :3], score(trained, Rows(ids)).detach().float())
    assert not torch.allclose(scores[0], scores[1], atol=1e-3)
    assert method.modes(10) == [K]
    assert not method.stochastic


def test_save_then_load_gives_the_same_predictions_and_trains_on(trained, make_llama, ids, tmp_path):
    method = Ensemble(K)
    method.save(trained, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == [f"member{k}" for k in range(K)]
    loaded = method.load(make_llama(), tmp_path).eval()
    assert loaded.active_adapter == "member0"
    assert {n for n, _ in trainable(loaded)} == {n for n, _ in trainable(trained)}
    assert torch.equal(predict(method, loaded, ids), predict(method, trained, ids))
    step(method, loaded, optimizer_of(method, loaded), ids)
    assert not torch.allclose(predict(method, loaded, ids)[K - 1], predict(method, trained, ids)[K - 1])


def test_an_incomplete_or_larger_ensemble_is_refused(trained, make_llama, tmp_path):
    Ensemble(K).save(trained, tmp_path / "whole")
    with pytest.raises(ValueError, match=r"also holds member2, but the method has members=2: set"):
        Ensemble(2).load(make_llama(), tmp_path / "whole")
    with pytest.raises(FileNotFoundError, match=r"lacks member3, member4 of an ensemble with members=5"):
        Ensemble(5).load(make_llama(), tmp_path / "whole")
    shallow = make_llama()
    shallow.model.layers = shallow.model.layers[:1]
    with pytest.raises(ValueError, match=r"member0 holds an adapter of another model: .*layers\.1\..* the file alone"):
        Ensemble(K).load(shallow, tmp_path / "whole")
    shutil.rmtree(tmp_path / "whole" / "member1")
    with pytest.raises(FileNotFoundError, match=r"lacks member1 of"):
        Ensemble(K).load(make_llama(), tmp_path / "whole")
    MLE().save(MLE().adapt(make_llama(), LORA), tmp_path / "plain")
    with pytest.raises(FileNotFoundError, match=r"lacks member0"):
        Ensemble(1).load(make_llama(), tmp_path / "plain")
    with pytest.raises(ValueError, match="members >= 1, got 0"):
        Ensemble(0)
    with pytest.raises(ValueError, match="matches no linear layer"):
        Ensemble(1).adapt(make_llama(), {**LORA, "target_modules": ["q_prj"]})


def test_a_start_that_changes_the_shared_base_is_refused(make_llama):
    with pytest.raises(ValueError, match=r"shares one base model, which peft.init_lora_weights=pissa changes"):
        Ensemble(2).adapt(make_llama(torch.float32), LORA | {"init_lora_weights": "pissa"})
    Ensemble(2).adapt(make_llama(), LORA | {"init_lora_weights": "gaussian"})
