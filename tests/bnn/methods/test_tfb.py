"""TFB: the law of its noise, the search for its scale, and where no noise may be."""

import pytest
import torch
from bnn_cases import Rows, score, seeded
from peft.tuners.lora import LoraLayer

from bnn.methods.base import FitData, Schedule, trainable
from bnn.methods.mle import MLE
from bnn.methods.tfb import TFB, noise_frame, noisy, spread
from bnn.metrics import nll

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
FLOOR = 1e-6


def tfb(sigma_q: float | None = None, **changes) -> TFB:
    settings = {
        "eps": 0.003,
        "pseudo_labels": True,
        "anchor_examples": None,
        "sigma_max": 2.0,
        "search_steps": 8,
        "search_samples": 4,
        "d_floor": FLOOR,
    }
    method = TFB(**settings | changes)
    method.sigma_q = sigma_q
    return method


def predict(method, model, batches, n=None, seed=0, tokens=10_000):
    return method.predict(model, score, batches, n=n, generator=seeded(seed), max_tokens_per_forward=tokens)


@pytest.fixture
def model(make_llama):
    """Tiny Llama with an adapter off its start, evaluation mode."""
    torch.manual_seed(0)
    adapted = tfb().adapt(make_llama(), LORA)
    with torch.no_grad():
        for _, p in trainable(adapted):
            p.add_(0.3 * torch.randn(p.shape, generator=seeded(5), dtype=p.dtype))
    return adapted.eval()


@pytest.fixture
def batches():
    ids = torch.randint(61, (10, 7), generator=seeded(1))
    answer = torch.randint(4, (10,), generator=seeded(2))
    return [Rows(ids[:4], answer[:4]), Rows(ids[4:7], answer[4:7]), Rows(ids[7:], answer[7:])]


def layer_of(model) -> LoraLayer:
    return next(m for m in model.modules() if isinstance(m, LoraLayer))


def test_frame_is_that_of_the_paper_but_free_of_the_svds_signs():
    B = torch.randn(9, 4, generator=seeded(), dtype=torch.float64)
    U, d, _ = torch.linalg.svd(B, full_matrices=False)
    frame, shrink = noise_frame(B, 0.5), torch.diag(d / (d + 0.5))
    torch.testing.assert_close(frame @ frame.T, U @ shrink @ shrink @ U.T)  # the covariance of a column of F E
    # no orthonormal change of the rank's basis may matter to the draws: F of B Q is F of B, times Q
    Q = torch.linalg.qr(torch.randn(4, 4, generator=seeded(3), dtype=torch.float64)).Q
    torch.testing.assert_close(noise_frame(B @ Q, 0.5), frame @ Q)


@pytest.mark.parametrize("zero", ["all", "one"])
def test_directions_without_singular_value_get_bounded_noise(zero):
    B = torch.randn(9, 4, generator=seeded(), dtype=torch.float64)
    B = torch.zeros_like(B) if zero == "all" else torch.cat([B[:, :3], B[:, :1]], dim=1)
    gains = torch.linalg.svdvals(noise_frame(B, FLOOR))
    expected = torch.tensor([0.0 if zero == "all" else 1.0] * 3 + [0.0], dtype=torch.float64)
    torch.testing.assert_close(gains, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_noise_on_the_update_has_the_papers_law(model):
    """Against A'_ij ~ N(mean, (sigma_q / d_i)^2): mean and covariance of a column of Delta W over 20,000 draws.

    A covariance's standard error is at most sqrt(2 / 20,000) = 1 % of the largest variance, the tolerance 5 of them.
    """
    sigma_q, n = 0.2, 20_000
    layer, scaling = layer_of(model), 2.0
    A, B = (side["default"].weight for side in (layer.lora_A, layer.lora_B))
    U, d, Vh = torch.linalg.svd(B, full_matrices=False)
    x = torch.zeros(1, 16, dtype=torch.float64)
    x[0, 3] = 1.0
    with noisy(model, sigma_q, FLOOR, n, seeded()):
        columns = layer(x.repeat(n, 1)) - layer.base_layer(x)
    B_new, omega = U * d, sigma_q / d
    expected = scaling**2 * B_new @ torch.diag(omega**2) @ B_new.T
    torch.testing.assert_close(columns.T.cov(), expected, atol=0.05 * float(expected.diagonal().max()), rtol=0)
    mean = scaling * (B_new @ (Vh @ A))[:, 3]
    torch.testing.assert_close(columns.mean(dim=0), mean, atol=5 * scaling * sigma_q / n**0.5, rtol=0)


@torch.no_grad()
def test_entries_of_a_draw_are_independent_between_columns_layers_and_draws(model):
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    x = torch.eye(16, dtype=torch.float64).repeat(2, 1, 1)
    with noisy(model, 1.0, FLOOR, 2, seeded()):
        noise = [layer(x) for layer in layers]
    plain = [layer(x) for layer in layers]
    flat = torch.stack([(a - b)[i, :, :8].flatten() for a, b in zip(noise, plain, strict=True) for i in range(2)])
    # 128 entries, several of a column correlated: an independent pair stays far below 0.6
    assert (flat.corrcoef() - torch.eye(len(flat))).abs().max() < 0.6


def test_draws_are_the_same_functions_however_they_are_split(model, batches):
    method = tfb(0.3)
    whole = predict(method, model, batches, n=5)
    assert whole.shape == (5, 10, 4)
    assert whole.std(dim=0).min() > 0
    for tokens in (1, 60):  # one draw per forward; two
        torch.testing.assert_close(predict(method, model, batches, n=5, tokens=tokens), whole)
    torch.testing.assert_close(predict(method, model, batches[1:], n=5), whole[:, 4:])
    assert not torch.allclose(predict(method, model, batches, n=5, seed=1), whole)
    assert torch.equal(predict(method, model, batches), predict(MLE(), model, batches))
    assert method.modes(5) == [5, "mean"]
    assert tfb().modes(5) == ["mean"]


def test_no_noise_before_fit_in_training_or_afterwards(model, ids):
    plain = model(input_ids=ids).logits
    with tfb().sample(model, 3, seeded()):
        assert torch.equal(model(input_ids=ids).logits, plain)
    with tfb(0.3).sample(model.train(), 1, seeded()) as live:
        assert torch.equal(model(input_ids=ids).logits, plain)
    assert live.kl() == 0
    with pytest.raises(ValueError, match="batch of 3 rows is not 2 draws"), tfb(0.3).sample(model.eval(), 2, seeded()):
        model(input_ids=ids)
    assert torch.equal(model(input_ids=ids).logits, plain)
    with tfb(0.3).sample(model, 1, seeded()):
        assert not torch.allclose(model(input_ids=ids).logits, plain)
        with model.disable_adapter():
            without = model(input_ids=ids).logits
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, without)
    assert predict(tfb(), model, [Rows(ids, ids[:, 0])], n=5).shape == (1, 3, 4)


@pytest.mark.parametrize("pseudo_labels", [True, False])
def test_fit_finds_the_largest_acceptable_scale(model, batches, pseudo_labels):
    if not pseudo_labels:  # labels that the adapter gets right, all but one: noise cannot help
        best = predict(tfb(), model, batches)[0].argmax(dim=-1).split([len(b.answer) for b in batches])
        batches = [Rows(b.input_ids, answer.clone()) for b, answer in zip(batches, best, strict=True)]
        batches[0].answer[0] = (batches[0].answer[0] + 1) % 4
    method = tfb(pseudo_labels=pseudo_labels, eps=0.05)
    found = method.fit(model, score, FitData(batches, [None], 10, 10_000), seeded(7))
    assert found["sigma_q"] == method.sigma_q
    assert 0 < method.sigma_q < 2.0
    assert found["at_maximum"] == 0
    mean = predict(method, model, batches)
    answer = mean[0].argmax(dim=-1) if pseudo_labels else torch.cat([b.answer for b in batches])
    limit = 1.05 * nll(mean, answer)
    assert found["nll_mean"] == pytest.approx(nll(mean, answer))

    def nll_at(sigma_q: float) -> float:
        return nll(predict(tfb(sigma_q), model, batches, n=4, seed=7), answer)

    assert nll_at(method.sigma_q) == pytest.approx(found["nll"])
    assert found["nll"] <= limit < nll_at(method.sigma_q + 2.0 / 2**8)  # the next finer step is too much


def test_the_search_is_bounded(model, batches):
    data = FitData(batches, [], 10, 10_000)
    found = tfb(sigma_max=1e-4).fit(model, score, data, seeded())
    assert (found["sigma_q"], found["at_maximum"]) == (1e-4, 1.0)
    method = tfb(eps=0.0, sigma_max=1e6, search_steps=1)
    assert method.fit(model, score, data, seeded())["sigma_q"] == method.sigma_q == 0.0
    torch.testing.assert_close(predict(method, model, batches, n=2)[1:], predict(method, model, batches))


def test_anchor_batches_are_spread_over_the_split(batches):
    assert spread(batches, None) == spread(batches, 10) == spread(batches, 99) == batches
    assert spread(batches, 2) == [batches[1]]  # 3 examples, from the middle
    assert spread(batches, 4) == [batches[0], batches[2]]


def test_save_then_load_gives_the_same_draws_also_from_a_plain_adapter(model, make_llama, batches, tmp_path):
    method, other = tfb(0.3), tfb()
    method.save(model, tmp_path / "own")
    loaded = other.load(make_llama(), tmp_path / "own").eval()
    assert torch.equal(predict(other, loaded, batches, n=3), predict(method, model, batches, n=3))
    other.start(loaded, Schedule(0, 1, 1))
    assert other.sigma_q == 0.3
    other.start(loaded, Schedule(5, 1, 1))
    assert other.sigma_q is None
    MLE().save(model, tmp_path / "plain")
    loaded = method.load(make_llama(), tmp_path / "plain").eval()
    assert method.sigma_q is None
    assert torch.equal(predict(method, loaded, batches, n=3), predict(MLE(), model, batches))


def test_it_trains_as_maximum_likelihood(model, ids):
    method = tfb()
    optimizer = torch.optim.AdamW(method.parameter_groups(model.train(), lr=0.02, weight_decay=0.0))
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        with method.sample(model, 1, seeded()) as live:
            loss = model(input_ids=ids, labels=ids).loss + live.kl()
            loss.backward()
        assert {n for n, p in model.named_parameters() if p.grad is not None} == {n for n, _ in trainable(model)}
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_refusals(model, make_llama):
    for key, value in {"sigma_max": 0.0, "search_steps": 0, "d_floor": 0.0}.items():
        with pytest.raises(ValueError, match=rf"{key} > 0, got {value}"):
            tfb(**{key: value})
    for value in (0, 2.5, "abc"):
        with pytest.raises(ValueError, match=f"anchor_examples={value} must be a whole number, at least 1"):
            tfb(anchor_examples=value)
    with pytest.raises(ValueError, match="eps >= 0, got -1"):
        tfb(eps=-1)
    model.merge_adapter()
    with pytest.raises(ValueError, match="is merged"), tfb(0.3).sample(model, 1, seeded()):
        pass
    for change, what in (({"target_modules": ["embed_tokens"]}, "linear layers"), ({"use_dora": True}, "plain LoRA")):
        with pytest.raises(ValueError, match=what):
            tfb().adapt(make_llama(), LORA | change)
        odd = MLE().adapt(make_llama(), LORA | change).eval()
        with pytest.raises(ValueError, match=what), tfb(0.3).sample(odd, 1, seeded()):
            pass
