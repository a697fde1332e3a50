"""Noise scaled after training: what is scaled, that the mean is not, and where the search ends."""

from dataclasses import replace

import pytest
import torch

from bnn.inducing import posterior
from bnn.methods.base import FitData
from bnn.methods.blob import BLoB, random_layers
from bnn.methods.blob_noise import BLoBNoise
from bnn.methods.noise_scale import NoiseScaled
from bnn.methods.sgp import SGP
from bnn.methods.sgp_noise import SGPNoise
from bnn.metrics import nll
from bnn.noise import Noise
from bnn.sampler import active_factors

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
OF_SGP = {"scale_lr_factor": 5.0, "flow_lr_factor": 0.02, "antithetic": True, "cuda_graph": False}
OF_SGP["posterior"] = {"inducing_rows": 4, "inducing_cols": 4}  # type: ignore[assignment]
OF_BLOB = {"prior_sd": 0.2, "init_eps": 0.3, "kl_lr": None, "gamma": None}


class Rows:
    def __init__(self, ids, answer):
        self.ids, self.answer = ids, answer
        self.input_ids = ids

    def tile(self, n):
        return Rows(self.ids.repeat(n, 1), self.answer.repeat(n))


def score(model, batch):
    return model(input_ids=batch.ids).logits[:, -1, :4]


def sgp(maximum=10.0, step=1.2, draws=6, **posterior):
    return SGPNoise(maximum=maximum, step=step, draws=draws, **OF_SGP | {"posterior": OF_SGP["posterior"] | posterior})


def blob(maximum=10.0, step=1.2, draws=6):
    return BLoBNoise(maximum=maximum, step=step, draws=draws, **OF_BLOB)


def adapted(method, make_llama):
    """A model whose noise moves its predictions."""
    torch.manual_seed(0)
    model = method.adapt(make_llama(), LORA).eval()
    for name, p in model.named_parameters():
        if name.endswith(("lora_B.default.weight", "lora_B.default.Z_r")):
            torch.nn.init.normal_(p)
    return model


def data_of(method, model) -> FitData:
    """Validation batches of unequal sizes with the answers of draws of the model: some noise is right for them."""
    ids = torch.randint(61, (40, 7), generator=torch.Generator().manual_seed(1))
    answer = scores_of(method, model, [Rows(ids, ids[:, 0])], seed=7, n=1)[0].argmax(dim=1)
    return FitData([None], [Rows(ids[:25], answer[:25]), Rows(ids[25:], answer[25:])], 40, 1000)


def scores_of(method, model, batches, seed=3, n=6):
    generator = torch.Generator().manual_seed(seed)
    return method.predict(model, score, batches, n=n, generator=generator, max_tokens_per_forward=1000)


def spread(method, model, n=400):
    """Standard deviation over draws of the first random A of the model, and its mean."""
    with torch.no_grad(), method.sample(model, n, torch.Generator().manual_seed(0)):
        if isinstance(method, SGP):
            W = active_factors(model)[0].weight
        else:
            layer = random_layers(model)[0][1]
            W = torch.stack([layer.weight + layer.G.square() * eps for eps in layer.eps])
    return W.std(0), W.mean(0)


@pytest.mark.parametrize("make", [sgp, blob])
def test_the_noise_is_scaled_and_the_mean_is_not(make, make_llama):
    method = make()
    model = adapted(method, make_llama)
    data = data_of(method, model)
    before, mean = spread(method, model), scores_of(method, model, data.validation, n=None)
    method.scale_noise(model, 3.0)
    after = spread(method, model)
    torch.testing.assert_close(scores_of(method, model, data.validation, n=None), mean)
    ratio = after[0] / before[0]
    if make is blob:
        torch.testing.assert_close(ratio, torch.full_like(ratio, 3.0))
        return
    factor = active_factors(model)[0]
    conditional = before[0].square() - _of_q(factor)
    torch.testing.assert_close(after[0].square(), _of_q(factor) + 9 * conditional, rtol=0.25, atol=1e-3)
    assert ratio.min() > 2


def _of_q(factor):
    """Variance that q(V) alone gives W, by draws of a factor without conditional noise."""
    spec = replace(factor.spec, conditional_noise=False)
    eps = torch.randn(4000, 1, spec.m_r, spec.m_c, generator=torch.Generator().manual_seed(1))
    tensors = {name: t[None] for name, t in factor.own_tensors().items()}
    with torch.no_grad():
        return posterior.sample(spec, tensors, Noise(eps), None).W[:, 0].var(0)


@pytest.mark.parametrize("make", [sgp, blob])
def test_fit_ends_where_the_neighbours_are_worse(make, make_llama, tmp_path):
    method, plain = make(), SGP(**OF_SGP) if make is sgp else BLoB(**OF_BLOB)
    model = adapted(method, make_llama)
    data = data_of(method, model)
    method.scale_noise(model, 0.3)
    answer = torch.cat([batch.answer for batch in data.validation])
    assert torch.equal(scores_of(method, model, data.validation), scores_of(plain, model, data.validation))
    before = nll(scores_of(method, model, data.validation), answer)
    found = method.fit(model, score, data, torch.Generator().manual_seed(3))
    after = nll(scores_of(method, model, data.validation), answer)
    assert method.fitted_to == ("validation",)
    assert (found["nll_before"], found["nll"]) == (before, pytest.approx(after, rel=1e-5))
    assert after < before
    assert found["kappa"] > 1.2
    assert found["at_bound"] == 0
    method.save(model, tmp_path)
    other = plain.load(make_llama(), tmp_path).eval()  # an adapter of the other method
    torch.testing.assert_close(scores_of(plain, other, data.validation), scores_of(method, model, data.validation))
    for factor in (1.2, 1 / 1.2):
        method.scale_noise(model, factor)
        assert nll(scores_of(method, model, data.validation), answer) >= after
        method.scale_noise(model, 1 / factor)


class Given(NoiseScaled):
    """Whose NLL on two choices is a given function of kappa."""

    stochastic = True

    def __init__(self, of, **how):
        super().__init__(**how)
        self.of, self.kappa, self.tried = of, 1.0, []

    def scale_noise(self, model, factor):
        self.kappa *= factor

    def predict(self, model, score, batches, *, n, generator, max_tokens_per_forward):
        self.tried.append(self.kappa)
        wanted = torch.tensor(self.of(self.kappa), dtype=torch.float64)
        p = (-wanted).exp()
        return torch.stack([p, 1 - p]).log().expand(n, 1, 2)


@pytest.mark.parametrize(
    ("best", "kappa", "bound", "evaluations"),
    [(1.0, 1.0, 0, 3), (4.2, 4.0, 0, 4), (0.26, 0.25, 0, 5), (100.0, 8.0, 1, 4), (0.01, 0.125, 1, 5)],
)
def test_the_search_walks_downhill_and_stays_within_its_bounds(best, kappa, bound, evaluations):
    method = Given(lambda k: 0.1 + abs(torch.tensor(k / best).log().item()), maximum=8.0, step=2.0, draws=3)
    found = method.fit(
        None, None, FitData([], [Rows(torch.zeros(1, 1), torch.zeros(1).long())], 1, 1), torch.Generator()
    )
    assert (found["kappa"], found["at_bound"]) == (pytest.approx(kappa), bound)
    assert method.kappa == pytest.approx(kappa)
    assert len(method.tried) == evaluations


def test_a_candidate_without_a_number_is_not_taken():
    method = Given(lambda k: float("nan") if k > 1 else 1.1 - k, maximum=8.0, step=2.0, draws=3)
    found = method.fit(
        None, None, FitData([], [Rows(torch.zeros(1, 1), torch.zeros(1).long())], 1, 1), torch.Generator()
    )
    assert found["kappa"] == 1


def test_refusals():
    for maximum, step in ((1.0, 1.2), (10.0, 1.0), (float("inf"), 2.0)):
        with pytest.raises(ValueError, match=rf"step={step} must be greater than 1, and at most .*maximum={maximum}"):
            sgp(maximum, step)
    with pytest.raises(ValueError, match=r"scales the conditional noise: set inducing.conditional_noise=true"):
        sgp(conditional_noise=False)
    with pytest.raises(ValueError, match="validation split is empty"):
        sgp().fit(None, score, FitData([], [], 0, 1), torch.Generator())
