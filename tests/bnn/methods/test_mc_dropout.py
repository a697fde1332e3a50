"""Monte-Carlo dropout: where masks come from, how they are distributed, and what they leave alone."""

import pytest
import torch
from bnn_cases import Rows, score, seeded
from peft.tuners.lora import LoraLayer
from torch import nn

from bnn.methods.base import trainable
from bnn.methods.mc_dropout import MCDropout
from bnn.methods.mle import MLE

LORA = {
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj"],
    "task_type": "CAUSAL_LM",
}


@pytest.fixture
def model(make_llama):
    """Tiny Llama with an adapter off its start, evaluation mode."""
    torch.manual_seed(0)
    adapted = MCDropout(0.3).adapt(make_llama(), LORA)
    with torch.no_grad():
        for _, p in trainable(adapted):
            p.add_(0.3 * torch.randn(p.shape, generator=seeded(5)))
    return adapted.eval()


def layer_of(model) -> LoraLayer:
    return next(m for m in model.modules() if isinstance(m, LoraLayer))


@torch.no_grad()
def draw(model, ids, seed, method=None, n=1):
    with (method or MCDropout(0.3)).sample(model, n, seeded(seed)):
        return model(input_ids=ids).logits


def test_draws_follow_the_generator_and_nothing_else(model, ids):
    first = draw(model, ids, 0)
    torch.manual_seed(99)
    assert torch.equal(draw(model, ids, 0), first)
    assert not torch.allclose(draw(model, ids, 1), first)
    generator = seeded(0)
    with MCDropout(0.3).sample(model, 1, generator), MCDropout(0.3).sample(model, 1, generator), torch.no_grad():
        assert not torch.allclose(model(input_ids=ids).logits, first)  # the second draw of one generator


def test_the_global_generator_is_put_back(model, ids):
    before = torch.get_rng_state()
    draw(model, ids, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_generator_the_global_one_is_used_and_resumable(model, ids):
    state = torch.get_rng_state()
    with MCDropout(0.3).sample(model, 1, None), torch.no_grad():
        first = model(input_ids=ids).logits
    assert not torch.equal(torch.get_rng_state(), state)
    torch.set_rng_state(state)
    with MCDropout(0.3).sample(model, 1, None), torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, first)


@pytest.mark.parametrize("training", [True, False])
def test_only_the_adapters_dropout_changes_mode_and_is_restored(model, training):
    model.train(training)
    modes = {name: m.training for name, m in model.named_modules()}
    dropouts = [name for name, m in model.named_modules() if isinstance(m, nn.Dropout) and "lora_dropout" in name]
    assert len(dropouts) == 4
    generator = seeded()
    untouched = generator.get_state()
    context = MCDropout(0.3).sample(model, 1, generator)
    context.__enter__()
    inside = {name: m.training for name, m in model.named_modules()}
    assert torch.equal(generator.get_state(), untouched) is training, "training draws from the global generators"
    assert not context.__exit__(KeyError, KeyError(), None)  # also when the body fails
    assert inside == modes | dict.fromkeys(dropouts, True)
    assert {name: m.training for name, m in model.named_modules()} == modes


@torch.no_grad()
def test_a_layer_drops_adapter_inputs_with_probability_p_and_rescales(model):
    """200,000 inputs: the standard error of the frequency is 0.001, the tolerance 5 of them."""
    p = 0.3
    layer = layer_of(model)
    seen = []
    handle = layer.lora_A["default"].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = torch.ones(12_500, 16, dtype=torch.float64)
    with MCDropout(p).sample(model, 1, seeded()):
        y = layer(x)
    handle.remove()
    (masked,) = seen
    assert masked.unique().tolist() == pytest.approx([0.0, 1 / (1 - p)])
    assert float((masked == 0).double().mean()) == pytest.approx(p, abs=0.005)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(y, layer.base_layer(x) + 2.0 * (masked.to(A) @ A.T @ B.T))


def test_rows_of_a_tiled_batch_have_their_own_masks(model, ids):
    rows = draw(model, ids.repeat(4, 1), 0, n=4).unflatten(0, (4, -1))
    for i in range(4):
        for j in range(i):
            assert not torch.allclose(rows[i], rows[j])


def test_prediction_has_many_passes_and_a_mean_without_dropout(model, ids):
    method, batches = MCDropout(0.3), [Rows(ids), Rows(ids[:2])]
    settings = {"max_tokens_per_forward": 50}
    scores = method.predict(model, score, batches, n=5, generator=seeded(), **settings)
    assert scores.shape == (5, 5, 4)
    assert scores.std(dim=0).min() > 0
    assert torch.equal(scores, method.predict(model, score, batches, n=5, generator=seeded(), **settings))
    mean = method.predict(model, score, batches, n=None, generator=None, **settings)
    plain = MLE().predict(model, score, batches, n=3, generator=None, **settings)
    assert mean.shape == (1, 5, 4)
    assert torch.equal(mean, plain)
    assert method.modes(7) == [7, "mean"]


def test_training_with_masks_lowers_the_loss_without_them(make_llama, ids):
    torch.manual_seed(0)
    method = MCDropout(0.1)
    model = method.adapt(make_llama(), LORA).train()
    optimizer = torch.optim.AdamW(method.parameter_groups(model, lr=0.02, weight_decay=0.0))
    generator = seeded()
    before = model.eval()(input_ids=ids, labels=ids).loss.item()
    for _ in range(15):
        model.train()
        optimizer.zero_grad()
        with method.sample(model, 1, generator) as live:
            (model(input_ids=ids, labels=ids).loss + live.kl()).backward()
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
        optimizer.step()
    assert model.eval()(input_ids=ids, labels=ids).loss.item() < 0.9 * before


def test_save_then_load_gives_the_same_draws_also_from_a_plain_adapter(model, make_llama, ids, tmp_path):
    method = MCDropout(0.3)
    method.save(model, tmp_path / "own")
    loaded = method.load(make_llama(), tmp_path / "own").eval()
    assert torch.equal(draw(loaded, ids, 3), draw(model, ids, 3))
    MLE().save(MLE().adapt(make_llama(), LORA), tmp_path / "plain")
    started = MCDropout(0.2).load(make_llama(), tmp_path / "plain")
    assert {d.p for m in started.modules() if isinstance(m, LoraLayer) for d in m.lora_dropout.values()} == {0.2}
    assert started.peft_config["default"].lora_dropout == 0.2
    assert sum(1 for _ in trainable(started)) == 8


@pytest.mark.parametrize("p", [0.0, 1.0, -0.1])
def test_no_dropout_is_refused(p):
    with pytest.raises(ValueError, match=rf"0 < dropout < 1, got {p}"):
        MCDropout(p)


def test_a_second_dropout_and_an_adapter_without_are_refused(make_llama):
    with pytest.raises(ValueError, match=r"dropout=0.1: leave peft.lora_dropout=0.05 at 0"):
        MCDropout(0.1).adapt(make_llama(), {**LORA, "lora_dropout": 0.05})
    plain = MLE().adapt(make_llama(), LORA)
    with pytest.raises(ValueError, match="no dropout to draw"), MCDropout(0.1).sample(plain, 1, None):
        pass


def test_targets_without_dropout_are_refused(make_llama, tmp_path):
    """PEFT's DoRA applies none outside training, and an embedding has none: every draw would be the mean."""
    with pytest.raises(ValueError, match=r"method=mc_dropout needs plain LoRA, but target .* is a Dora"):
        MCDropout(0.3).adapt(make_llama(), LORA | {"use_dora": True})
    with pytest.raises(ValueError, match=r"method=mc_dropout adapts linear layers, but target .*embed_tokens"):
        MCDropout(0.3).adapt(make_llama(), LORA | {"target_modules": ["q_proj", "embed_tokens"]})
    MLE().save(MLE().adapt(make_llama(), LORA | {"use_dora": True}), tmp_path)
    with pytest.raises(ValueError, match="method=mc_dropout needs plain LoRA"):
        MCDropout(0.3).load(make_llama(), tmp_path)
