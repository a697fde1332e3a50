"""Predictions of finished runs: what the report computes from raw per-sample scores, and its significance tests."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from scipy.stats import t as student_t
from scipy.stats import ttest_1samp, ttest_ind

ALPHA = 0.05
"""Level of the tests."""
N_BINS = 15
"""Equal-width confidence bins of the ECE."""
RESAMPLES = 200
"""Bootstrap resamples of the examples behind the standard error of an ECE difference."""
TIE = 1e-12
"""Mean differences up to this are rounding."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """The predictive distribution of one run on one split.

    Attributes:
        ids: (N,) names of the examples.
        answer: (N,) right choices.
        log_probs: (N, C) log of the mean over samples of the softmax, nats; -inf for absent choices.
    """

    ids: np.ndarray
    answer: np.ndarray
    log_probs: np.ndarray


def running_log_probs(logits: np.ndarray) -> np.ndarray:
    """Log predictive distribution of the first s samples, log 1/s sum_{i<=s} softmax(logits_i), for every s.

    Args:
        logits: (S, N, C) choice scores, -inf for absent choices.

    Returns:
        (S, N, C) float64; the last is the prediction of all samples.
    """
    sums = np.logaddexp.accumulate(log_softmax(logits.astype(np.float64), axis=-1), axis=0)
    return sums - np.log(np.arange(1, len(logits) + 1))[:, None, None]


def fit_temperature(prediction: Prediction) -> float:
    """The T in [1/100, 100] for which ``scaled(prediction, T)`` has the lowest NLL (Guo et al., ICML 2017)."""

    def nll(log_T: float) -> float:
        losses = example_losses(scaled(prediction, float(np.exp(log_T))).log_probs, prediction.answer)
        return float(losses["nll"].mean())

    bound = np.log(100.0)
    return float(np.exp(minimize_scalar(nll, bounds=(-bound, bound), method="bounded", options={"xatol": 1e-6}).x))


def scaled(prediction: Prediction, T: float) -> Prediction:
    """The prediction with probabilities p^(1/T), normalised."""
    return Prediction(prediction.ids, prediction.answer, log_softmax(prediction.log_probs / T, axis=-1))


def example_losses(log_probs: np.ndarray, answer: np.ndarray) -> dict[str, np.ndarray]:
    """Per example, (N,): acc (1 if the top choice is right), nll (nats), brier (summed over choices)."""
    rows = np.arange(len(answer))
    target = np.zeros_like(log_probs)
    target[rows, answer] = 1.0
    return {
        "acc": (log_probs.argmax(axis=1) == answer).astype(np.float64),
        "nll": -log_probs[rows, answer],
        "brier": np.square(np.exp(log_probs) - target).sum(axis=1),
    }


def score(prediction: Prediction, metric: str) -> float:
    """acc, nll (nats), ece or brier of one prediction."""
    if metric == "ece":
        return ece(*_parts(prediction))
    return float(example_losses(*_parts(prediction))[metric].mean())


def bin_gaps(log_probs: np.ndarray, answer: np.ndarray, n_bins: int = N_BINS) -> np.ndarray:
    """(N, n_bins): right-or-wrong minus confidence of each example in the column of its bin, 0 elsewhere."""
    confidence = np.exp(log_probs.max(axis=1))
    upper = np.arange(1, n_bins + 1) / n_bins
    index = np.minimum(np.searchsorted(upper, confidence), n_bins - 1)
    gaps = np.zeros((len(answer), n_bins))
    gaps[np.arange(len(answer)), index] = (log_probs.argmax(axis=1) == answer) - confidence
    return gaps


def ece(log_probs: np.ndarray, answer: np.ndarray, n_bins: int = N_BINS) -> float:
    """Top-label expected calibration error, sum_k |sum of the gaps in bin k| / N, bins right-closed on [0, 1]."""
    return float(np.abs(bin_gaps(log_probs, answer, n_bins).sum(axis=0)).sum() / len(answer))


def reliability(predictions: Sequence[Prediction], n_bins: int = N_BINS) -> dict[str, np.ndarray]:
    """Bins of the pooled examples of several seeds: edges (n_bins + 1), confidence, accuracy, count (n_bins)."""
    confidence = np.concatenate([np.exp(p.log_probs.max(axis=1)) for p in predictions])
    correct = np.concatenate([p.log_probs.argmax(axis=1) == p.answer for p in predictions])
    edges = np.arange(n_bins + 1) / n_bins
    index = np.minimum(np.searchsorted(edges[1:], confidence), n_bins - 1)
    count = np.bincount(index, minlength=n_bins)
    means = [np.bincount(index, values, n_bins) / np.maximum(count, 1) for values in (confidence, correct)]
    return {"edges": edges, "confidence": means[0], "accuracy": means[1], "count": count}


def same_examples(predictions: Sequence[Prediction]) -> bool:
    """Whether all are of the same examples: the answers count too, since rows without a name are only numbered."""
    return all(
        np.array_equal(p.ids, predictions[0].ids) and np.array_equal(p.answer, predictions[0].answer)
        for p in predictions
    )


def digest(prediction: Prediction) -> str:
    """The same for predictions of the same examples: eight hexadecimal digits."""
    told = zip(prediction.ids.tolist(), prediction.answer.tolist(), strict=True)
    return hashlib.sha256(repr([*told]).encode()).hexdigest()[:8]


def pairable(first: Mapping[int, Prediction], second: Mapping[int, Prediction]) -> bool:
    """Whether two methods have predictions for the same seeds, all of them on the same two or more examples."""
    if not first or first.keys() != second.keys():
        return False
    everything = [*first.values(), *second.values()]
    return len(everything[0].ids) > 1 and same_examples(everything)


def pairable_by_seed(first: Mapping[int, Prediction], second: Mapping[int, Prediction]) -> bool:
    """Whether two methods have predictions for the same seeds, those of each seed on the same examples."""
    same_seeds = bool(first) and first.keys() == second.keys()
    return same_seeds and all(same_examples([first[seed], second[seed]]) for seed in first)


def paired_p(first: Mapping[int, Prediction], second: Mapping[int, Prediction], metric: str) -> float:
    """Two-sided p value of the difference of a metric, paired over seeds and examples.

    The squared standard error of the mean difference is that over examples (of the differences averaged over
    seeds; for the ECE, which is no mean over examples, by bootstrap of the examples) plus, with two seeds or more,
    that over seeds (of the differences averaged over examples): a t-test with Satterthwaite's degrees of freedom.
    The examples' term holds part of the seeds' noise too, so the test errs towards "not significant".

    Args:
        first: For each seed a prediction, which `pairable` has accepted together with `second`.
        second: The same of the other method.
        metric: acc, nll, ece or brier.
    """
    seeds = sorted(first)
    n = len(first[seeds[0]].ids)
    if metric == "ece":
        noise = np.random.default_rng(0)  # one fixed draw: the report repeats bit for bit
        weights = noise.multinomial(n, np.full(n, 1 / n), size=RESAMPLES).astype(np.float64)
        differences = np.array([_ece_resampled(first[s], weights) - _ece_resampled(second[s], weights) for s in seeds])
        of_seeds = np.array([ece(*_parts(first[s])) - ece(*_parts(second[s])) for s in seeds])
        of_examples = float(differences.mean(axis=0).var(ddof=1))
    else:
        losses = [[example_losses(*_parts(p[s]))[metric] for s in seeds] for p in (first, second)]
        differences = np.array(losses[0]) - np.array(losses[1])
        of_seeds = differences.mean(axis=1)
        of_examples = float(differences.mean(axis=0).var(ddof=1)) / n
    terms = [(of_examples, n - 1)]
    if len(seeds) > 1:
        terms.append((float(of_seeds.var(ddof=1)) / len(seeds), len(seeds) - 1))
    variance = sum(term for term, _ in terms)
    mean = float(of_seeds.mean())
    if not np.isfinite(mean) or abs(mean) <= TIE:
        return 1.0
    if variance == 0.0:
        return 0.0
    freedom = 1 / sum((term / variance) ** 2 / df for term, df in terms)
    return float(2 * student_t.sf(abs(mean) / np.sqrt(variance), freedom))


def by_seed_p(first: Mapping[int, Prediction], second: Mapping[int, Prediction], metric: str) -> float:
    """Two-sided p value of a t-test of the differences of a metric, paired over seeds alone; 1 for one seed.

    Where every seed draws examples of its own, the spread over seeds holds the noise of the examples too.

    Args:
        first: For each seed a prediction, which `pairable_by_seed` has accepted together with `second`.
        second: The same of the other method.
        metric: acc, nll, ece or brier.
    """
    differences = [score(first[seed], metric) - score(second[seed], metric) for seed in first]
    return constant_p(differences, 0.0) if np.isfinite(differences).all() else 1.0


def welch_p(first: Sequence[float], second: Sequence[float]) -> float:
    """Two-sided p value of Welch's t-test over seeds; 1 where a spread is unknown (one seed) or both are 0."""
    if min(len(first), len(second)) < 2 or np.ptp(first) == np.ptp(second) == 0.0:
        return 1.0
    return float(ttest_ind(first, second, equal_var=False).pvalue)


def constant_p(values: Sequence[float], constant: float) -> float:
    """Two-sided p value of a t-test over seeds against a number that no seed changes; 1 for one seed or no spread."""
    if len(values) < 2 or np.ptp(values) == 0.0:
        return 1.0
    return float(ttest_1samp(values, constant).pvalue)


def _parts(prediction: Prediction) -> tuple[np.ndarray, np.ndarray]:
    return prediction.log_probs, prediction.answer


def _ece_resampled(prediction: Prediction, weights: np.ndarray) -> np.ndarray:
    """ECE under each row of example weights (resamples, N)."""
    return np.abs(weights @ bin_gaps(*_parts(prediction))).sum(axis=1) / len(prediction.answer)
