"""BLoB and ScalaBL as methods: training, prediction, saving."""

import copy
import math

import pytest
import torch
from bnn_cases import Rows, score, seeded
from peft import LoraConfig, PeftModel
from torch import Tensor

from bnn.methods.base import Schedule, trainable
from bnn.methods.blob import BLoB, kl_period, kl_weight, random_layers
from bnn.methods.mle import MLE
from bnn.methods.scalabl import ScalaBL
from tests.conftest import perturb

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
SCHEDULE = Schedule(total_steps=200, steps_per_epoch=10, n_train=80)
METHODS = [BLoB, ScalaBL]


def make(cls, kl_lr=0.01, gamma=8.0):
    return cls(prior_sd=0.2, init_eps=0.05, kl_lr=kl_lr, gamma=gamma)


def adapted(method, llama, scale: float = 0.1):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = method.adapt(llama, LORA).eval()
    perturb(model, scale)
    return model


@torch.no_grad()
def logits(model, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits


def predict(method, model, ids, n, tokens=1000):
    batches = [Rows(ids), Rows(ids[:2])]
    return method.predict(model, score, batches, n=n, generator=seeded(), max_tokens_per_forward=tokens)


@pytest.mark.parametrize("cls", METHODS)
def test_the_adapter_starts_at_the_base_model_and_learns(cls, make_llama, ids):
    method = make(cls, gamma=None)
    base = logits(make_llama(), ids)
    model = adapted(method, make_llama(), scale=0.0)
    torch.testing.assert_close(logits(model, ids), base)
    method.start(model, SCHEDULE)
    optimizer = torch.optim.AdamW(method.parameter_groups(model, lr=0.02, weight_decay=0.0), foreach=False)
    before, generator = model(input_ids=ids, labels=ids).loss.item(), seeded()
    model.train()
    for step in range(15):
        optimizer.zero_grad()
        with method.sample(model, 1, generator) as live:
            (model(input_ids=ids, labels=ids).loss + live.kl()).backward()
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
        optimizer.step()
        method.after_step(model, step, 1.0)
    assert model.eval()(input_ids=ids, labels=ids).loss.item() < 0.9 * before


@pytest.mark.parametrize("cls", METHODS)
@pytest.mark.parametrize("kl_lr", [0.01, None])
def test_the_kl_is_in_the_objective_or_in_its_own_step(cls, kl_lr, make_llama):
    method = make(cls, kl_lr)
    model = adapted(method, make_llama())
    method.start(model, SCHEDULE)
    before = {name: p.detach().clone() for name, p in trainable(model)}
    with method.sample(model, 1, seeded()) as live:
        kl = live.kl()
    assert kl.requires_grad == (kl_lr is None)
    assert kl.item() == pytest.approx(sum(layer.kl().item() for _, layer in random_layers(model)))
    assert kl_weight(10, SCHEDULE, 1e-9) == 0, "the period is too long for a number"
    period = kl_period(SCHEDULE, 8.0)
    method.after_step(model, period - 1, 0.5)
    moved = {name.rsplit(".", 1)[-1] for name, p in trainable(model) if not torch.equal(p, before[name])}
    assert moved == (set() if kl_lr is None else {"M", "G"} if cls is BLoB else {"raw_mu", "raw_sd"})
    if kl_lr is not None and cls is BLoB:  # step size: kl_lr * schedule factor * pi
        name = next(n for n in before if n.endswith(".M"))
        shrink = 1 - 0.01 * 0.5 * kl_weight(period - 1, SCHEDULE, 8.0) / 0.2**2
        torch.testing.assert_close(dict(trainable(model))[name].detach(), shrink * before[name])


def test_the_weights_of_the_kl_double_over_a_period_and_sum_to_one():
    """Blundell-style weights of the reference code: 640 examples in batches of 4 have M = 316."""
    schedule = Schedule(5000, 160, 640)
    assert kl_period(schedule, 8.0) == int(100 * 640 ** (math.pi / 8) / 4) == 316
    for period_of in (schedule, SCHEDULE):
        M = kl_period(period_of, 8.0)
        weights = [kl_weight(step, period_of, 8.0) for step in range(2 * M)]
        assert weights[:M] == weights[M:] == pytest.approx([2**i / (2 ** (M + 1) - 1) for i in range(1, M + 1)])
        assert sum(weights[:M]) == pytest.approx(1)
    assert kl_weight(3, SCHEDULE, None) == 0.1


@pytest.mark.parametrize("cls", METHODS)
def test_prediction_does_not_depend_on_the_split_of_draws(cls, make_llama, ids):
    method = make(cls)
    model = adapted(method, make_llama())
    together, alone = predict(method, model, ids, 5), predict(method, model, ids, 5, tokens=1)
    assert together.shape == (5, 5, 4)
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-7)
    assert together.std(dim=0).min() > 0
    torch.testing.assert_close(together[:, :2], together[:, 3:])  # one function per draw, for all batches
    mean = predict(method, model, ids, None)
    assert torch.equal(mean, predict(MLE(), model, ids, 3))
    assert method.modes(5) == [5, "mean"]


@pytest.mark.parametrize("cls", METHODS)
def test_save_then_load_gives_the_same_draws_and_plain_peft_the_mean(cls, make_llama, ids, tmp_path):
    method = make(cls)
    model = adapted(method, make_llama())
    method.save(model, tmp_path)
    loaded = method.load(make_llama(), tmp_path).eval()
    assert {n for n, _ in trainable(loaded)} == {n for n, _ in trainable(model)}
    assert torch.equal(predict(method, loaded, ids, 3), predict(method, model, ids, 3))
    plain = PeftModel.from_pretrained(make_llama(), str(tmp_path)).eval()
    torch.testing.assert_close(logits(plain, ids), logits(model, ids))


@pytest.mark.parametrize("cls", METHODS)
def test_a_plain_adapter_becomes_the_mean(cls, make_llama, ids, tmp_path):
    plain = MLE().adapt(make_llama(), LORA).eval()
    perturb(plain, 0.3)
    MLE().save(plain, tmp_path)
    loaded = make(cls).load(make_llama(), tmp_path).eval()
    torch.testing.assert_close(logits(loaded, ids), logits(plain, ids))
    with make(cls).sample(loaded, 1, seeded()):
        assert not torch.allclose(logits(loaded, ids), logits(plain, ids))


@pytest.mark.parametrize("cls", METHODS)
def test_groups_hold_every_parameter_once_and_decay_only_b(cls, make_llama):
    method = make(cls)
    model = adapted(method, make_llama())
    random, others = method.parameter_groups(model, lr=0.01, weight_decay=0.1)
    names = {id(p): name for name, p in trainable(model)}
    assert sorted(names) == sorted(id(p) for group in (random, others) for p in group["params"])
    assert all("lora_A" in names[id(p)] for p in random["params"])
    assert all("lora_B" in names[id(p)] for p in others["params"])
    assert (random["lr"], random["weight_decay"], others["lr"], others["weight_decay"]) == (0.01, 0.0, 0.01, 0.1)


def test_what_cannot_work_is_refused(make_llama, ids, tmp_path):
    method = make(BLoB)
    with pytest.raises(ValueError, match="prior_sd must be positive, got 0"):
        BLoB(prior_sd=0, init_eps=0.05, kl_lr=None, gamma=None)
    with pytest.raises(ValueError, match="not DoRA"):
        method.adapt(make_llama(), {**LORA, "use_dora": True})
    with pytest.raises(ValueError, match="is a ALoraLinearVariant: remove its setting"):
        method.adapt(make_llama(), {**LORA, "alora_invocation_tokens": [1]})
    with pytest.raises(ValueError, match=r"adapts linear layers, but target '.*embed_tokens' is Embedding"):
        method.adapt(make_llama(), {**LORA, "target_modules": ["embed_tokens"]})
    model = adapted(method, make_llama())
    with pytest.raises(ValueError, match="call start before"):
        method.after_step(model, 0, 1.0)
    with pytest.warns(UserWarning, match=r"peak at step 69, but training has 3"):
        method.start(model, Schedule(3, 10, 80))
    with method.sample(model, 1, None), pytest.raises(ValueError, match="already live"), method.sample(model, 1, None):
        pass
    model.add_adapter("plain", LoraConfig(**LORA))
    model.set_adapter("plain")
    with pytest.raises(ValueError, match="at least one random layer"), method.sample(model, 1, None):
        pass
    model.set_adapter("default")
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"), method.sample(model, 1, None):
        pass


@pytest.mark.parametrize("cls", METHODS)
def test_a_copy_made_while_draws_are_live_has_none(cls, make_llama, ids):
    method = make(cls)
    model = adapted(method, make_llama())
    with torch.no_grad():
        mean = model(input_ids=ids).logits
        with method.sample(model, 1, seeded()):
            twin = copy.deepcopy(model)
        assert torch.equal(twin(input_ids=ids).logits, mean)
        with method.sample(twin, 1, seeded()):
            assert not torch.equal(twin(input_ids=ids).logits, mean)
