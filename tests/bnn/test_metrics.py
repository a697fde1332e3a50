"""Metrics against torchmetrics, scikit-learn and values worked out by hand."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from bnn import metrics

S, N, C = 7, 403, 4


def random_logits(seed: int = 0, scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(S, N, C, generator=generator, dtype=torch.float64)
    return logits, torch.randint(C, (N,), generator=generator)


def with_probs(*rows: list[float]) -> torch.Tensor:
    """One sample of logits whose softmax has the given rows."""
    return torch.tensor(rows, dtype=torch.float64).log()[None]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_agrees_with_torchmetrics_and_sklearn(seed):
    logits, answer = random_logits(seed)
    probs = logits.softmax(-1).mean(0)
    calibration = MulticlassCalibrationError(num_classes=C, n_bins=15, norm="l1")
    micro = MulticlassAccuracy(num_classes=C, average="micro")
    got = metrics.evaluate_predictions(logits, answer)
    assert got["acc"] == pytest.approx(micro(probs, answer).item(), abs=1e-6)
    # torchmetrics accumulates in float32
    assert got["ece"] == pytest.approx(calibration(probs, answer).item(), abs=1e-5)
    assert got["nll"] == pytest.approx(log_loss(answer, probs, labels=range(C)), abs=1e-10)
    target = np.eye(C)[answer.numpy()]
    assert got["brier"] == pytest.approx(((probs.numpy() - target) ** 2).sum(1).mean(), abs=1e-10)
    assert got["n"] == N


def test_scalars_of_evaluate_predictions_are_the_single_functions():
    logits, answer = random_logits()
    got = metrics.evaluate_predictions(logits, answer)
    assert got["adaptive_ece"] == metrics.adaptive_ece(logits, answer)
    assert got["mutual_information"] == metrics.mutual_information(logits).mean().item()
    assert all(isinstance(value, float | int) for value in got.values())


def test_entropies_by_hand():
    logits = torch.cat([with_probs([1.0, 0.0], [0.5, 0.5]), with_probs([1e-300, 1.0], [0.5, 0.5])])
    logits = logits.clamp_min(-1e4)  # a probability that underflows to exactly 0, not an absent choice
    log2 = math.log(2)
    torch.testing.assert_close(metrics.predictive_entropy(logits), torch.tensor([log2, log2]).double())
    torch.testing.assert_close(metrics.expected_entropy(logits), torch.tensor([0.0, log2]).double())
    torch.testing.assert_close(metrics.mutual_information(logits), torch.tensor([log2, 0.0]).double())


def test_mutual_information_is_never_negative():
    logits, _ = random_logits(scale=1e-9)  # nearly equal samples: rounding would otherwise go below 0
    assert metrics.mutual_information(logits).min() >= 0
    assert metrics.mutual_information(random_logits()[0]).min() > 0.01


def test_one_sample_equals_identical_copies():
    logits, answer = random_logits()
    one = metrics.evaluate_predictions(logits[:1], answer)
    assert metrics.evaluate_predictions(logits[:1].expand(9, -1, -1), answer) == pytest.approx(one, abs=1e-12)
    assert one["mutual_information"] == 0


def test_scores_are_normalised_within_each_sample():
    logits, answer = random_logits()
    shift = torch.randn(S, N, 1, generator=torch.Generator().manual_seed(5))
    moved = metrics.evaluate_predictions(logits + 50 * shift, answer)
    assert moved == pytest.approx(metrics.evaluate_predictions(logits, answer), abs=1e-9)


def test_absent_choices_do_not_count():
    logits, _ = random_logits()
    answer = torch.randint(3, (N,), generator=torch.Generator().manual_seed(1))
    padded = logits.clone()
    padded[..., 3] = -math.inf
    expected = metrics.evaluate_predictions(logits[..., :3], answer)
    assert metrics.evaluate_predictions(padded, answer) == pytest.approx(expected, abs=1e-12)


def test_extreme_and_low_precision_scores_stay_finite():
    logits = torch.tensor([[[1e4, -1e4, 0.0]], [[1e4, -1e4, 0.0]]])
    got = metrics.evaluate_predictions(logits, torch.tensor([1]))
    assert got["nll"] == pytest.approx(2e4)
    assert all(math.isfinite(value) for value in got.values())
    half = metrics.evaluate_predictions(logits.bfloat16(), torch.tensor([0]))
    assert half["nll"] == 0
    assert half["ece"] == 0


def test_nll_of_what_is_certain_and_right_is_zero_without_a_sign():
    assert str(metrics.nll(torch.tensor([[[0.0, -1e4]]]), torch.tensor([0]))) == "0.0"


def test_one_example():
    got = metrics.evaluate_predictions(with_probs([0.7, 0.3]), torch.tensor([1]))
    assert got["acc"] == 0
    assert got["ece"] == pytest.approx(0.7)
    assert got["adaptive_ece"] == pytest.approx(0.7)
    assert got["brier"] == pytest.approx(2 * 0.49)


def test_bins_are_right_closed():
    confidence = torch.tensor([0.0, 0.2, 0.2 + 1e-12, 0.4, 1.0, 1.0 + 1e-16], dtype=torch.float64)
    edges = torch.arange(6, dtype=torch.float64) / 5
    bins = metrics.bin_by_confidence(confidence, torch.tensor([0, 1, 1, 0, 1, 1]), edges)
    assert bins.count.tolist() == [2, 2, 0, 0, 2]
    assert bins.accuracy.tolist() == [0.5, 0.5, 0.0, 0.0, 1.0]
    assert bins.confidence.tolist() == pytest.approx([0.1, 0.3, 0.0, 0.0, 1.0])
    assert bins.ece == pytest.approx((2 * 0.4 + 2 * 0.2 + 0) / 6)


@pytest.mark.parametrize("k", range(1, 16))
def test_every_equal_width_edge_belongs_to_the_bin_below_it(k):
    edges = metrics.reliability_bins(*random_logits()).edges
    bins = metrics.bin_by_confidence(torch.tensor([k / 15], dtype=torch.float64), torch.tensor([1]), edges)
    assert bins.count.nonzero().item() == k - 1


def test_reliability_bins_hold_every_example_and_give_the_ece():
    logits, answer = random_logits()
    bins = metrics.reliability_bins(logits, answer, n_bins=10)
    assert bins.count.sum() == N
    assert len(bins.edges) == 11
    by_hand = sum(n * abs(a - c) for n, a, c in zip(bins.count, bins.accuracy, bins.confidence, strict=True)) / N
    assert metrics.ece(logits, answer, n_bins=10) == pytest.approx(float(by_hand))


def test_adaptive_ece_bins_have_equal_mass_and_ignore_order():
    logits, answer = random_logits()
    got = metrics.adaptive_ece(logits, answer, n_bins=10)
    confidence, index = logits.softmax(-1).mean(0).max(1)
    correct = (index == answer).double()[confidence.argsort()]
    by_hand = [
        len(c) * abs(c.mean() - p.mean()) / N
        for c, p in zip(
            np.split(correct.numpy(), [math.ceil(k * N / 10) for k in range(1, 10)]),
            np.split(confidence.sort().values.numpy(), [math.ceil(k * N / 10) for k in range(1, 10)]),
            strict=True,
        )
    ]
    assert got == pytest.approx(sum(by_hand), abs=1e-12)
    tied = with_probs(*[[0.9, 0.1]] * 20)
    answer = torch.tensor([0] * 18 + [1] * 2)
    assert metrics.adaptive_ece(tied, answer) == pytest.approx(0.0, abs=1e-12)
    assert metrics.adaptive_ece(tied, answer.flip(0)) == pytest.approx(0.0, abs=1e-12)


def test_auroc_agrees_with_sklearn_also_with_ties():
    generator = torch.Generator().manual_seed(3)
    for inside, outside in (
        (torch.randn(70, generator=generator), torch.randn(50, generator=generator) + 0.5),
        (torch.randint(4, (70,), generator=generator), torch.randint(6, (50,), generator=generator)),
    ):
        labels = [0] * 70 + [1] * 50
        expected = roc_auc_score(labels, torch.cat([inside, outside]))
        assert metrics.auroc(inside, outside) == pytest.approx(expected, abs=1e-12)
    assert metrics.auroc(torch.zeros(3), torch.ones(2)) == 1
    assert metrics.auroc(torch.ones(3), torch.ones(2)) == 0.5


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_score_names_the_example(value):
    logits, answer = random_logits()
    logits[2, 37, 1] = value  # -inf in one sample only is an overflow, not an absent choice
    with pytest.raises(FloatingPointError, match=r"example 37 .*sample 2, choice 1"):
        metrics.evaluate_predictions(logits, answer)


def test_bad_inputs_are_named():
    logits, answer = random_logits()
    with pytest.raises(ValueError, match="expected \\(samples, examples, choices\\)"):
        metrics.accuracy(logits[0], answer)
    with pytest.raises(ValueError, match="expected \\(samples, examples, choices\\)"):
        metrics.accuracy(logits[:0], answer)
    with pytest.raises(ValueError, match="answer has shape"):
        metrics.nll(logits, answer[:-1])
    logits[:, 5, 3] = -math.inf
    answer[5] = 3
    with pytest.raises(ValueError, match="answer of example 5 is 3"):
        metrics.nll(logits, answer)
    answer[5] = 4
    with pytest.raises(ValueError, match="answer of example 5 is 4"):
        metrics.brier(logits, answer)
    answer[5] = 0
    for metric in (metrics.accuracy, metrics.ece, metrics.adaptive_ece, metrics.nll, metrics.brier):
        for wrong in (-1, 4):
            with pytest.raises(ValueError, match=f"answer of example 7 is {wrong}, which is none of its choices"):
                metric(logits, answer.index_fill(0, torch.tensor([7]), wrong))
    assert metrics.ece(logits, answer, n_bins=1) == pytest.approx(metrics.adaptive_ece(logits, answer, n_bins=1))
    with pytest.raises(ValueError, match="example 8 has no choice"):
        metrics.predictive_entropy(logits.index_fill(1, torch.tensor([8]), -math.inf))
    with pytest.raises(ValueError, match="n_bins is 0"):
        metrics.ece(logits, answer.clamp_max(2), n_bins=0)
    with pytest.raises(ValueError, match="scores_out"):
        metrics.auroc(torch.ones(3), torch.tensor([math.nan]))
