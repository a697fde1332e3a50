"""Laplace-LoRA against autograd and dense linear algebra."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from bnn.methods.base import FitData, Schedule
from bnn.methods.laplace import Laplace
from bnn.methods.laplace_curvature import Kronecker, check_width, kfac, lora_matrices
from bnn.methods.laplace_predictive import draw, fit_precision, linearised, log_evidence
from bnn.methods.mle import MLE
from bnn.metrics import nll

LORA = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
CLOSE = {"rtol": 1e-3, "atol": 1e-5}  # the code under test works in float32


def score(model, batch):
    """Last token's logits of three choices; the third is absent where the first token is even."""
    scores = model(input_ids=batch.input_ids).logits[:, -1, :3]
    absent = torch.zeros_like(scores, dtype=torch.bool)
    absent[:, 2] = batch.input_ids[:, 0] % 2 == 0
    return scores.masked_fill(absent, -torch.inf)


def batch_of(ids):
    return SimpleNamespace(input_ids=ids, answer=torch.zeros(len(ids), dtype=torch.long))


def method(layers="all", max_dim=64, **others) -> Laplace:
    settings = {"precision_by": "evidence", "prior_precision": 1.0, "steps": 50, "lr": 0.1, "draws": 20}
    return Laplace(layers, max_dim=max_dim, **settings | {"precisions": [0.1, 1.0, 10.0]} | others)


@pytest.fixture
def model(make_llama):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapted = method().adapt(make_llama(), LORA)
    noise = torch.Generator().manual_seed(0)
    for m in lora_matrices(adapted, "all").values():
        m.weight.data += 0.3 * torch.randn(m.weight.shape, generator=noise, dtype=torch.float64)
    return adapted.eval()


def fitted(model, ids, layers="all") -> Laplace:
    laplace = method(layers)
    laplace.fit(model, score, FitData([batch_of(ids)], [], len(ids), 10**6), torch.Generator())
    return laplace


def predict(laplace, model, batches, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return laplace.predict(model, score, batches, n=n, generator=generator, max_tokens_per_forward=10**6)


def jacobian(model, ids, weight):
    """Rows d score_c / d vec(weight) of one example by autograd, 0 for absent choices: (C, P)."""
    scores = score(model, batch_of(ids))[0]
    grads = [
        torch.autograd.grad(s, weight, retain_graph=True)[0].flatten() for s in scores.masked_fill(scores.isinf(), 0)
    ]
    return torch.stack(grads)


def dense(k: Kronecker):
    """The block over vec(W), W's rows one below the other: G (x) A."""
    A = k.a_vectors * k.a_values @ k.a_vectors.T
    G = k.g_vectors * k.g_values @ k.g_vectors.T
    return torch.kron(G, A).double()


def test_kfac_is_the_ggn_of_one_token(model, ids):
    one = ids[:1, :1]
    matrices = lora_matrices(model, "all")
    factors = kfac(model, score, [batch_of(one)], matrices, 64)
    p = score(model, batch_of(one))[0].softmax(-1).detach()
    assert len(matrices) == 8
    seen = 0.0
    for name, m in matrices.items():
        J = jacobian(model, one, m.weight)
        expected = J.T @ (p.diag() - p[:, None] * p) @ J
        torch.testing.assert_close(dense(factors[name]), expected, **CLOSE)
        seen = max(seen, expected.abs().max().item())
    assert seen > 1e-3  # v_proj; q_proj has no gradient with one token


def test_kfac_factors_are_the_token_covariances(model, ids):
    """Several tokens and examples: G keeps each token's own gradient, so compare with explicit sums."""
    name, m = next((n, m) for n, m in lora_matrices(model, "all").items() if "1.self_attn.v_proj.lora_B" in n)
    k = kfac(model, score, [batch_of(ids[:2]), batch_of(ids[2:])], {name: m}, 64)[name]
    A, G = torch.zeros(3, 3).double(), torch.zeros(8, 8).double()
    for row in ids:
        kept = {}
        hook = m.register_forward_hook(lambda _, x, y, kept=kept: kept.update(a=x[0].detach()[0], y=y))
        scores = score(model, batch_of(row[None]))[0]
        hook.remove()
        p = scores.softmax(-1).detach()
        root = torch.linalg.eigh(p.diag() - p[:, None] * p)
        for value, vector in zip(root.eigenvalues.clamp_min(0), root.eigenvectors.T, strict=True):
            direction = (vector * value.sqrt()).masked_fill(scores.isinf(), 0)
            (g,) = torch.autograd.grad(
                (scores.masked_fill(scores.isinf(), 0) * direction).sum(), kept["y"], retain_graph=True
            )
            G += g[0].T @ g[0]
        A += kept["a"].T @ kept["a"]
    torch.testing.assert_close(dense(k), torch.kron(G, A / ids.numel()), **CLOSE)


def test_kfac_is_that_of_curvlinops_where_every_token_counts(model, ids):
    """Its factors average over all tokens, so the last layer's q, which only the last token reaches, is left out."""
    kfac_module = pytest.importorskip(
        "curvlinops.kfac", reason="pip install curvlinops-for-pytorch (needs torchvision)"
    )

    class Scores(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner(input_ids=x).logits[:, -1, :2]

    wrapped = Scores()
    operator = kfac_module.KFACLinearOperator(
        wrapped,
        torch.nn.CrossEntropyLoss(reduction="sum"),
        [p for p in wrapped.parameters() if p.requires_grad],
        [(ids, torch.zeros(len(ids), dtype=torch.long))],
        fisher_type=kfac_module.FisherType.TYPE2,
        check_deterministic=False,
    )
    operator.compute_kronecker_factors()
    own = kfac(model, lambda m, b: score(m, b)[:, :2], [batch_of(ids)], lora_matrices(model, "all"), 64)
    compared = {name: k for name, k in own.items() if "layers.1.self_attn.q_proj" not in name}
    assert len(compared) == 6
    for name, k in compared.items():
        A, G = operator._input_covariances[f"inner.{name}"], operator._gradient_covariances[f"inner.{name}"]
        torch.testing.assert_close(dense(k), torch.kron(G, A), rtol=1e-4, atol=1e-6 * float(G.norm() * A.norm()))


@pytest.mark.parametrize("layers", ["all", "last"])
def test_covariance_of_scores_is_dense_linear_algebra(layers, model, ids):
    laplace = fitted(model, ids, layers)
    matrices = lora_matrices(model, layers)
    assert len(matrices) == {"all": 8, "last": 4}[layers]
    mean, (other, covariance) = linearised(model, score, batch_of(ids), matrices, laplace.factors, [7.0, 0.7])
    assert (other[:, 0, 0] < covariance[:, 0, 0]).all(), "a larger precision gives less variance"
    for row in range(len(ids)):
        expected = torch.zeros(3, 3).double()
        for name, m in matrices.items():
            H = dense(laplace.factors[name])
            J = jacobian(model, ids[row : row + 1], m.weight)
            expected += J @ torch.linalg.solve(H + 0.7 * torch.eye(len(H)), J.T)
        torch.testing.assert_close(covariance[row].double(), expected, **CLOSE)
    torch.testing.assert_close(mean, score(model, batch_of(ids)).detach().float())


def test_evidence_is_the_dense_log_determinant(generator):
    root = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    H, p = root @ root.T, torch.tensor(0.3).double()
    got = log_evidence(torch.tensor(-2.0), torch.tensor(1.5), torch.linalg.eigvalsh(H), p.log())
    expected = -2.0 - 0.5 * p * 1.5 - 0.5 * (torch.logdet(H + p * torch.eye(5)) - 5 * p.log())
    torch.testing.assert_close(got, expected)


def test_precision_is_at_the_maximum_of_the_evidence():
    """No curvature in P - 3 directions and much in 3: the maximum solves p |theta|^2 = sum h / (h + p)."""
    values = torch.tensor([0.0, 0.0, 5.0, 50.0, 500.0])
    p = fit_precision(torch.tensor(-1.0), torch.tensor(4.0), values, start=10.0, steps=500, lr=0.05)
    assert p * 4.0 == pytest.approx((values / (values + p)).sum().item(), rel=1e-3)


def test_draws_have_the_moments(generator):
    """40,000 draws: the standard error of a covariance entry is about 2 * 2 / 200 = 0.02; tolerance 4 of them."""
    covariance = torch.tensor([[[2.0, 0.6, 0.0], [0.6, 1.0, 0.0], [0.0, 0.0, 0.0]]])
    draws = draw(torch.tensor([[1.0, -1.0, -torch.inf]]), covariance, 40_000, generator)[:, 0]
    assert draws[:, 2].isneginf().all()
    torch.testing.assert_close(draws[:, :2].mean(0), torch.tensor([1.0, -1.0]), rtol=0, atol=0.04)
    torch.testing.assert_close(draws[:, :2].T.cov(), covariance[0, :2, :2], rtol=0, atol=0.08)


def test_draws_without_a_generator_follow_the_global_one():
    mean, covariance = torch.zeros(2, 3), torch.eye(3).expand(2, 3, 3)
    torch.manual_seed(0)
    first = draw(mean, covariance, 4, None)
    assert not torch.equal(draw(mean, covariance, 4, None), first)
    torch.manual_seed(0)
    assert torch.equal(draw(mean, covariance, 4, None), first)


def test_predictions_do_not_depend_on_the_batches_and_keep_absent_choices(model, ids):
    laplace = fitted(model, ids)
    whole = predict(laplace, model, [batch_of(ids)], 6)
    split = predict(laplace, model, [batch_of(ids[:1]), batch_of(ids[1:])], 6)
    assert whole.shape == (6, 3, 3)
    assert torch.equal(whole.isneginf(), score(model, batch_of(ids)).isneginf().expand(6, -1, -1))
    finite = whole.isfinite()
    torch.testing.assert_close(whole[finite], split[finite], rtol=1e-3, atol=1e-3)
    assert whole[:, :, 0].std(0).min() > 1e-3
    assert torch.equal(predict(laplace, model, [batch_of(ids)], None)[0], score(model, batch_of(ids)).detach().float())


def test_a_curvature_is_forgotten_where_the_adapter_is_about_to_change(model, ids, tmp_path):
    laplace = fitted(model, ids)
    laplace.save(model, tmp_path)
    laplace.start(model, Schedule(0, 1, 3))
    assert laplace.factors
    laplace.start(model, Schedule(1, 1, 3))
    assert not laplace.factors
    assert laplace.precision == laplace.prior_precision
    laplace.save(model, tmp_path)
    assert not list(tmp_path.glob("laplace.*")), "that of an earlier adapter"


def test_what_is_too_wide_to_be_fitted_is_refused_before_training(make_llama, model, tmp_path):
    method().save(model, tmp_path)
    narrow = method(max_dim=8)
    for begin in (lambda: narrow.adapt(make_llama(), LORA), lambda: narrow.load(make_llama(), tmp_path)):
        with pytest.raises(ValueError, match=r"raise method\.factory\.max_dim=8, or leave \w+_proj out of"):
            begin()


def test_predictions_have_their_own_number_of_draws_once_there_is_a_curvature(model, ids):
    assert fitted(model, ids).modes(5) == [20, "mean"]
    assert method().modes(5) == ["mean"]
    with pytest.raises(ValueError, match="draws >= 1, got 0"):
        method(draws=0)


@pytest.mark.parametrize("right", [True, False])
def test_precision_by_validation_has_the_lowest_nll_there(right, model, ids):
    """Validation answers that the adapter is sure of want no variance, wrong ones want much."""
    best = score(model, batch_of(ids)).argmax(-1)
    validation = SimpleNamespace(input_ids=ids, answer=best if right else (best + 1) % 2)
    laplace = method(precision_by="validation", draws=400, precisions=[0.1, 1e5])
    for m in lora_matrices(model, "all").values():
        m.weight.data *= 3
    found = laplace.fit(model, score, FitData([batch_of(ids)], [validation], 3, 10**6), torch.Generator())
    assert found == {"prior_precision": laplace.precision}
    by_hand = {}
    for p in laplace.precisions:
        laplace.precision = p
        by_hand[p] = nll(predict(laplace, model, [validation], 400), validation.answer)
    assert abs(by_hand[0.1] - by_hand[1e5]) > 0.01, "the precision matters here"
    assert found["prior_precision"] == min(by_hand, key=by_hand.get)


def test_precisions_are_compared_by_the_same_noise(model, ids, monkeypatch):
    states = []

    def recorded(mean, covariance, draws, generator):
        states.append(generator.get_state())
        return draw(mean, covariance, draws, generator)

    monkeypatch.setattr("bnn.methods.laplace.draw", recorded)
    laplace, data = method(precision_by="validation"), FitData([batch_of(ids)], [batch_of(ids)], 3, 10**6)
    laplace.fit(model, score, data, torch.Generator())
    assert laplace.fitted_to == ("train", "validation")
    assert method().fitted_to == ("train",)
    assert len(states) == len(laplace.precisions) == 3
    assert all(torch.equal(state, states[0]) for state in states)


def test_what_is_refused(model, ids):
    with pytest.raises(ValueError, match="'guess' is unknown: use evidence or validation"):
        method(precision_by="guess")
    with pytest.raises(ValueError, match=r"precisions > 0 to try, got \[\]"):
        method(precisions=[])
    with pytest.raises(ValueError, match="no validation examples to fit p to"):
        method(precision_by="validation").fit(model, score, FitData([batch_of(ids)], [], 3, 10**6), torch.Generator())


def test_saved_and_loaded_predicts_the_same(model, ids, make_llama, tmp_path):
    laplace = fitted(model, ids)
    laplace.save(model, tmp_path)
    other = method()
    loaded = other.load(make_llama(), tmp_path).eval()
    assert other.precision == laplace.precision != 1.0
    # PEFT reloads the adapter as float32
    expected, got = predict(laplace, model, [batch_of(ids)], 4), predict(other, loaded, [batch_of(ids)], 4)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="layers=all, not last"):
        method("last").load(make_llama(), tmp_path)


def test_a_curvature_loads_before_its_model_has_weights(model, ids, make_llama, tmp_path):
    """As in the processes that are handed sharded weights later."""
    fitted(model, ids).save(model, tmp_path)
    other = method()
    other.load(make_llama().to("meta"), tmp_path)
    assert {t.device.type for factor in other.factors.values() for t in factor} == {"cpu"}


def test_a_variant_of_lora_is_refused(make_llama, tmp_path):
    """DoRA's norm is detached, so that what autograd gives is not the derivative of the scores."""
    with pytest.raises(ValueError, match="method=laplace needs plain LoRA, but target"):
        method().adapt(make_llama(), LORA | {"use_dora": True})
    MLE().save(MLE().adapt(make_llama(), LORA | {"use_dora": True}), tmp_path)
    with pytest.raises(ValueError, match="method=laplace needs plain LoRA, but target"):
        method().load(make_llama(), tmp_path)


def test_mistakes_are_named(model, ids):
    with pytest.raises(ValueError, match="no curvature yet"):
        predict(method(), model, [batch_of(ids)], 2)
    laplace = fitted(model, ids)
    for batches, n in (([batch_of(ids)], 0), ([], 2)):
        with pytest.raises(ValueError, match=rf"needs n >= 1 \(got {n}\), batches \(got {len(batches)}\)"):
            predict(laplace, model, batches, n)
    with pytest.raises(ValueError, match=r"and model\.eval\(\)"):
        predict(laplace, model.train(), [batch_of(ids)], 2)
    model.eval()
    with pytest.raises(ValueError, match=r"16 x 16 takes .*max_dim=8"):
        kfac(model, score, [batch_of(ids)], lora_matrices(model, "all"), 8)
    with pytest.raises(ValueError, match=r"32768 x 32768 takes 4\.00 GiB a matrix: .* leave q_proj out of"):
        check_width({"0.q_proj.lora_A.default": nn.Linear(32768, 8, device="meta")}, 8192)
    with pytest.raises(ValueError, match=r"sees \(3, \d+, \d+\), not \(2, tokens, d_in\): leave it out of LoRA"):
        kfac(model, lambda *args: score(*args)[:2], [batch_of(ids)], lora_matrices(model, "all"), 64)
    with pytest.raises(ValueError, match="layers='some'"):
        lora_matrices(model, "some")


def test_a_matrix_that_is_used_twice_in_a_pass_is_refused(model, ids):
    """What is captured is one use, and the derivative is the sum over both."""
    matrices = lora_matrices(model, "all")

    def twice(model, batch):
        return score(model, batch) + score(model, batch)

    with pytest.raises(ValueError, match="is used more than once in a pass"):
        kfac(model, twice, [batch_of(ids)], matrices, max_dim=64)


def test_the_last_layer_is_the_last_of_the_model_and_not_the_highest_number():
    towers = nn.ModuleDict(
        {
            name: nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 4), "down": nn.Linear(4, 4)}) for _ in range(depth))
            for name, depth in (("vision", 4), ("text", 2))
        }
    )
    adapted = get_peft_model(towers, LoraConfig(r=2, target_modules=["up", "down"]))
    last = {name.partition(".lora_")[0] for name in lora_matrices(adapted, "last")}
    assert last == {"base_model.model.text.1.up", "base_model.model.text.1.down"}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"prior_precision": 0.0}, "a finite prior_precision > 0, got 0.0"),
        ({"precisions": [1.0, float("inf")]}, "finite precisions > 0"),
        ({"precisions": [0.0, 1.0]}, "finite precisions > 0"),
        ({"lr": 0.0}, "a finite lr > 0"),
        ({"steps": -1}, "steps >= 0, got -1"),
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        method(**setting)
