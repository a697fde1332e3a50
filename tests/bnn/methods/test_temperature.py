"""Temperature scaling against scipy's minimiser, and what it leaves alone."""

import json
import math

import pytest
import torch
from bnn_cases import Rows, score, seeded
from scipy.optimize import minimize_scalar
from torch.nn import functional as F

from bnn.methods.base import FitData, Schedule, trainable
from bnn.methods.mle import MLE
from bnn.methods.sgp import SGP
from bnn.methods.sgp_temperature import SGPTemperature
from bnn.methods.temperature import Temperature, fit_temperature
from bnn.metrics import nll

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def predict(method, model, batches, n=None):
    return method.predict(model, score, batches, n=n, generator=None, max_tokens_per_forward=100)


def data_of(model) -> FitData:
    """Validation batches of unequal sizes whose every fourth answer is not the model's; training data is a trap."""
    ids = torch.randint(61, (40, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        answer = score(model, Rows(ids, ids[:, 0])).argmax(dim=1)
    answer[::4] = (answer[::4] + 1) % 4
    return FitData([None], [Rows(ids[:25], answer[:25]), Rows(ids[25:], answer[25:])], 40, 100)


@pytest.fixture
def model(make_llama):
    torch.manual_seed(0)
    return Temperature(100.0).adapt(make_llama(), LORA).eval()


@pytest.mark.parametrize("scale", [0.1, 1.0, 8.0])
def test_the_minimiser_agrees_with_scipy(scale):
    noise = torch.Generator().manual_seed(0)
    scores = scale * torch.randn(200, 5, generator=noise, dtype=torch.float64)
    answer = torch.multinomial((scores / scale).softmax(dim=1), 1, generator=noise)[:, 0]
    scores[:100, 4] = torch.where(answer[:100] == 4, scores[:100, 4], -torch.inf)  # absent choices
    oracle = minimize_scalar(
        lambda log_T: F.cross_entropy(scores / math.exp(log_T), answer).item(),
        bounds=(math.log(0.01), math.log(100)),
        method="bounded",
        options={"xatol": 1e-9},
    )
    # a minimum found by its value is known to sqrt(eps) only
    assert math.log(fit_temperature(scores[None], answer, 100.0)) == pytest.approx(oracle.x, abs=1e-6)


@pytest.mark.parametrize("scale", [0.5, 2.0, 8.0])
def test_the_minimiser_of_averaged_probabilities_agrees_with_scipy(scale):
    noise = torch.Generator().manual_seed(1)
    common = torch.randn(200, 5, generator=noise, dtype=torch.float64)
    answer = torch.multinomial(common.softmax(dim=1), 1, generator=noise)[:, 0]
    scores = scale * (common + torch.randn(6, 200, 5, generator=noise, dtype=torch.float64))
    scores[:, :100, 4] = torch.where(answer[:100] == 4, scores[:, :100, 4], -torch.inf)
    oracle = minimize_scalar(
        lambda log_T: nll(scores / math.exp(log_T), answer),
        bounds=(math.log(0.01), math.log(100)),
        method="bounded",
        options={"xatol": 1e-9},
    )
    assert math.log(fit_temperature(scores, answer, 100.0)) == pytest.approx(oracle.x, abs=1e-6)


@pytest.mark.parametrize(("answer", "bound"), [([0, 1], 1 / 7), ([1, 0], 7.0)])
def test_separable_data_end_at_a_bound(answer, bound):
    assert fit_temperature(torch.eye(2)[None], torch.tensor(answer), 7.0) == pytest.approx(bound)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_ends_the_fit(value):
    scores = torch.randn(2, 6, 3, generator=seeded())
    scores[1, 4, 0] = value
    with pytest.raises(FloatingPointError, match="example 4"):
        fit_temperature(scores, torch.zeros(6, dtype=torch.long), 100.0)


def test_fit_minimises_the_validation_nll_and_predictions_are_divided(model):
    method, data = Temperature(100.0), data_of(model)
    answer = torch.cat([batch.answer for batch in data.validation])
    before = predict(method, model, data.validation)
    assert torch.equal(before, predict(MLE(), model, data.validation))  # T = 1
    found = method.fit(model, score, data, torch.Generator())
    assert method.fitted_to == ("validation",)
    assert found == {"temperature": method.T, "at_bound": 0}
    assert abs(math.log(method.T)) > 0.1
    after = predict(method, model, data.validation, n=6)
    assert after.shape == (1, 40, 4)
    torch.testing.assert_close(after, before / method.T)
    best = nll(after, answer)
    assert best < nll(before, answer)
    for factor in (0.99, 1.01):
        assert nll(before / (method.T * factor), answer) > best
    assert method.fit(model, score, data, torch.Generator()) == found  # not the temperature of scaled scores
    narrow = Temperature(1.01)
    assert narrow.fit(model, score, data, torch.Generator())["at_bound"] == 1
    wide = Temperature(math.exp(1.2 * abs(math.log(method.T))))
    assert wide.fit(model, score, data, torch.Generator()) == {"temperature": pytest.approx(method.T), "at_bound": 0}
    assert method.modes(6) == ["mean"]


def test_save_then_load_gives_the_same_predictions_also_from_a_plain_adapter(model, make_llama, tmp_path):
    method, data = Temperature(100.0), data_of(model)
    method.fit(model, score, data, torch.Generator())
    method.save(model, tmp_path / "own")
    assert json.loads((tmp_path / "own" / "temperature.json").read_text()) == {"temperature": method.T}
    other = Temperature(100.0)
    loaded = other.load(make_llama(), tmp_path / "own").eval()
    assert torch.equal(predict(other, loaded, data.validation), predict(method, model, data.validation))
    MLE().save(model, tmp_path / "plain")
    loaded = other.load(make_llama(), tmp_path / "plain").eval()
    assert other.T == 1.0
    assert torch.equal(predict(other, loaded, data.validation), predict(MLE(), model, data.validation))


def test_training_on_forgets_a_loaded_temperature():
    method = Temperature(100.0)
    method.T = 2.0
    method.start(torch.nn.Identity(), Schedule(0, 1, 1))
    assert method.T == 2.0
    method.start(torch.nn.Identity(), Schedule(1, 1, 1))
    assert method.T == 1.0


def test_it_trains_as_maximum_likelihood(model, ids):
    method = Temperature(100.0)
    optimizer = torch.optim.AdamW(method.parameter_groups(model, lr=0.02, weight_decay=0.0))
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        with method.sample(model, 1, None) as live:
            loss = model(input_ids=ids, labels=ids).loss + live.kl()
            loss.backward()
        assert {n for n, p in model.named_parameters() if p.grad is not None} == {n for n, _ in trainable(model)}
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_refusals(model):
    with pytest.raises(ValueError, match=r"maximum=1.0 must be greater than 1"):
        Temperature(1.0)
    own = {"scale_lr_factor": 5.0, "flow_lr_factor": 0.02, "antithetic": True, "cuda_graph": False, "posterior": {}}
    for draws in (0, 1.5, True):
        with pytest.raises(ValueError, match=rf"draws={draws} must be a whole number, at least 1"):
            SGPTemperature(2.0, draws, **own)
    assert SGPTemperature(2.0, 1, **own).draws == 1
    with pytest.raises(ValueError, match=r"maximum=inf must be greater than 1, and finite"):
        Temperature(float("inf"))
    with pytest.raises(ValueError, match="validation split is empty"):
        Temperature(2.0).fit(model, score, FitData([], [], 0, 1), torch.Generator())


def test_sgp_scaled_is_fitted_to_its_averaged_predictions(make_llama, tmp_path):
    own = {"scale_lr_factor": 5.0, "flow_lr_factor": 0.02, "antithetic": True, "cuda_graph": False}
    posterior = {"inducing_rows": 4, "inducing_cols": 4}
    plain, method = SGP(**own, posterior=posterior), SGPTemperature(100.0, 8, **own, posterior=posterior)
    torch.manual_seed(0)
    model = method.adapt(make_llama(), LORA).eval()
    data = data_of(model)
    answer = torch.cat([batch.answer for batch in data.validation])

    def scores_of(how, seed, adapted=model):
        generator = torch.Generator().manual_seed(seed)
        return how.predict(adapted, score, data.validation, n=8, generator=generator, max_tokens_per_forward=1000)

    before = scores_of(plain, 3)
    assert torch.equal(scores_of(method, 3), before)  # T = 1
    assert method.fit(model, score, data, torch.Generator().manual_seed(3))["temperature"] == method.T
    assert abs(math.log(method.T)) > 0.1
    torch.testing.assert_close(scores_of(method, 3), before / method.T)
    for factor in (0.99, 1.01):
        assert nll(before / (method.T * factor), answer) > nll(before / method.T, answer)
    assert method.modes(8) == plain.modes(8)
    method.save(model, tmp_path / "own")
    other = SGPTemperature(100.0, 8, **own, posterior=posterior)
    assert torch.equal(scores_of(other, 4, other.load(make_llama(), tmp_path / "own").eval()), scores_of(method, 4))
