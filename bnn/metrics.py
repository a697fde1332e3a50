"""Accuracy, calibration and uncertainty measures of Monte-Carlo predictions.

Every function on predictions takes the same input: `logits`, a tensor (S, N, C) of unnormalised choice
scores of S posterior samples, N examples and at most C choices, with -inf where an example has no such
choice (the same places in all samples), and `answer`, an integer tensor (N,) with the right choice. The
computation is in float64. Logarithms are natural, so entropies and the NLL are in nats.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ReliabilityBins:
    """Confidence bins of a top-label reliability diagram; empty bins hold zeros.

    Attributes:
        edges: (n_bins + 1,) bin borders in [0, 1]; bin k is (edges[k], edges[k+1]], the first also holds 0.
        confidence: (n_bins,) mean confidence of the examples in a bin.
        accuracy: (n_bins,) fraction of them that is right.
        count: (n_bins,) number of examples in a bin, int64.
        ece: expected calibration error, sum_k (count_k / N) |accuracy_k - confidence_k|.
    """

    edges: Tensor
    confidence: Tensor
    accuracy: Tensor
    count: Tensor
    ece: float


def predictive_log_probs(logits: Tensor) -> Tensor:
    """Log of the predictive distribution, log p(c | x_n) = log 1/S sum_s softmax(logits_sn)_c.

    Args:
        logits: (S, N, C) choice scores, -inf for absent choices.

    Returns:
        (N, C) float64, -inf for absent choices.

    Raises:
        ValueError: On another shape or an empty axis.
        FloatingPointError: On a score that is NaN, +inf or -inf in some samples only; the message names the
            example.
    """
    return torch.logsumexp(_sample_log_probs(logits), dim=0) - math.log(logits.shape[0])


def accuracy(logits: Tensor, answer: Tensor) -> float:
    """Fraction of examples, in [0, 1], whose most probable choice is the answer."""
    return _top_label(logits, answer)[1].mean().item()


def nll(logits: Tensor, answer: Tensor) -> float:
    """Mean over all examples of -log p(answer | x), in nats."""
    log_probs = predictive_log_probs(logits)
    _check_answer(log_probs, answer)
    return -log_probs.gather(1, answer[:, None]).mean().item() + 0.0  # no -0.0


def brier(logits: Tensor, answer: Tensor) -> float:
    """Mean over examples of the squared error summed over classes, in [0, 2]."""
    log_probs = predictive_log_probs(logits)
    _check_answer(log_probs, answer)
    target = torch.nn.functional.one_hot(answer, log_probs.shape[1])
    return (log_probs.exp() - target).square().sum(dim=1).mean().item()


def ece(logits: Tensor, answer: Tensor, n_bins: int = 15) -> float:
    """Top-label expected calibration error with equal-width, right-closed bins on [0, 1]."""
    return reliability_bins(logits, answer, n_bins).ece


def reliability_bins(logits: Tensor, answer: Tensor, n_bins: int = 15) -> ReliabilityBins:
    """Bin examples by the confidence of their most probable choice, in bins of equal width.

    Args:
        logits: (S, N, C) choice scores.
        answer: (N,) right choices.
        n_bins: Number of bins on [0, 1].

    Raises:
        ValueError: If `n_bins` is below 1, or on bad shapes or answers.
        FloatingPointError: On non-finite scores.
    """
    confidence, correct = _top_label(logits, answer)
    return bin_by_confidence(confidence, correct, _equal_width_edges(n_bins, confidence))


def adaptive_ece(logits: Tensor, answer: Tensor, n_bins: int = 15) -> float:
    """Top-label expected calibration error with bins of equal mass (Nguyen and O'Connor, 2015).

    Bin k ends at the confidence of rank ceil(k N / n_bins). Equal confidences share a bin, so the value
    does not depend on the order of the examples.
    """
    confidence, correct = _top_label(logits, answer)
    widths = _equal_width_edges(n_bins, confidence)  # rejects n_bins < 1
    ranks = [math.ceil(k * len(confidence) / n_bins) for k in range(1, n_bins + 1)]
    ends = confidence.sort().values[[rank - 1 for rank in ranks]]
    return bin_by_confidence(confidence, correct, torch.cat([widths[:1], ends])).ece


def bin_by_confidence(confidence: Tensor, correct: Tensor, edges: Tensor) -> ReliabilityBins:
    """Sort examples into right-closed bins (edges[k], edges[k+1]] and average within each.

    Args:
        confidence: (N,) confidences in [0, 1].
        correct: (N,) 1 where the top choice is right, else 0.
        edges: (n_bins + 1,) non-decreasing borders; what lies on or below the first border joins the first
            bin, what rounding puts above the last joins the last.

    Returns:
        The bins, with the tensors in float64.
    """
    confidence, correct = confidence.double(), correct.double()
    n_bins = len(edges) - 1
    index = torch.searchsorted(edges[1:].contiguous(), confidence).clamp_max(n_bins - 1)
    count = torch.bincount(index, minlength=n_bins)
    filled = count.clamp_min(1)
    mean_confidence = torch.zeros_like(edges[1:]).index_add_(0, index, confidence) / filled
    mean_accuracy = torch.zeros_like(edges[1:]).index_add_(0, index, correct) / filled
    error = (count * (mean_accuracy - mean_confidence).abs()).sum().item() / len(confidence)
    return ReliabilityBins(edges, mean_confidence, mean_accuracy, count, error)


def predictive_entropy(logits: Tensor) -> Tensor:
    """Entropy of the predictive distribution per example, H[mean_s p_s]: total uncertainty, (N,) in nats."""
    return torch.special.entr(predictive_log_probs(logits).exp()).sum(dim=-1)


def expected_entropy(logits: Tensor) -> Tensor:
    """Mean entropy of the samples per example, mean_s H[p_s]: aleatoric uncertainty, (N,) in nats."""
    return torch.special.entr(_sample_log_probs(logits).exp()).sum(dim=-1).mean(dim=0)


def mutual_information(logits: Tensor) -> Tensor:
    """Mutual information of answer and parameters per example (BALD, Houlsby et al., 2011), (N,) in nats.

    H[mean_s p_s] - mean_s H[p_s] >= 0 by Jensen's inequality; what rounding leaves below 0 is set to 0.
    """
    return (predictive_entropy(logits) - expected_entropy(logits)).clamp_min(0.0)


def auroc(scores_in: Tensor, scores_out: Tensor) -> float:
    """Area under the ROC curve of telling out-of-distribution examples by their higher score.

    P(score_out > score_in) + P(score_out = score_in) / 2 over all pairs, from ranks.

    Args:
        scores_in: (N,) scores, such as entropies, of in-distribution examples.
        scores_out: (M,) scores of out-of-distribution examples.

    Raises:
        ValueError: If either is empty, not a vector, or holds a NaN.
    """
    for name, scores in (("scores_in", scores_in), ("scores_out", scores_out)):
        if scores.ndim != 1 or len(scores) == 0 or scores.isnan().any():
            raise ValueError(f"{name} has shape {tuple(scores.shape)}: expected a non-empty vector without NaN")
    ordered, queries = scores_in.double().sort().values, scores_out.double()
    below = torch.searchsorted(ordered, queries)
    not_above = torch.searchsorted(ordered, queries, right=True)
    return (below + not_above).double().mean().item() / (2 * len(ordered))


def evaluate_predictions(logits: Tensor, answer: Tensor) -> dict[str, float]:
    """All scalar measures of one evaluation.

    Args:
        logits: (S, N, C) choice scores.
        answer: (N,) right choices.

    Returns:
        acc, nll, ece, adaptive_ece, brier, the means over examples of predictive_entropy, expected_entropy
        and mutual_information, and the number of examples n.

    Raises:
        ValueError: On bad shapes, or answers that are no choice of their example.
        FloatingPointError: On non-finite scores.
    """
    return {
        "acc": accuracy(logits, answer),
        "nll": nll(logits, answer),
        "ece": ece(logits, answer),
        "adaptive_ece": adaptive_ece(logits, answer),
        "brier": brier(logits, answer),
        "predictive_entropy": predictive_entropy(logits).mean().item(),
        "expected_entropy": expected_entropy(logits).mean().item(),
        "mutual_information": mutual_information(logits).mean().item(),
        "n": logits.shape[1],
    }


def check_scores(logits: Tensor) -> None:
    """Refuse scores (S, N, C) that ``predictive_log_probs`` refuses, with its errors."""
    if logits.ndim != 3 or 0 in logits.shape:
        raise ValueError(f"logits have shape {tuple(logits.shape)}: expected (samples, examples, choices), none 0")
    absent = logits == -math.inf
    bad = ~logits.isfinite() & ~(absent & absent.all(dim=0))
    if bad.any():
        sample, example, choice = bad.nonzero()[0].tolist()
        value = logits[sample, example, choice].item()
        raise FloatingPointError(
            f"score of example {example} is {value} (sample {sample}, choice {choice}): scores must be "
            "finite, or -inf in every sample where the choice is absent"
        )
    empty = absent.all(dim=2).any(dim=0)
    if empty.any():
        raise ValueError(f"example {int(empty.nonzero()[0])} has no choice: all its scores are -inf")


def _sample_log_probs(logits: Tensor) -> Tensor:
    """Normalise the scores of each sample over the choices: (S, N, C) float64; raises on bad scores."""
    check_scores(logits)
    return torch.log_softmax(logits.double(), dim=-1)


def _check_answer(log_probs: Tensor, answer: Tensor) -> None:
    """Raise ValueError unless each answer is one of its example's choices."""
    n, choices = log_probs.shape
    if answer.shape != (n,) or answer.dtype != torch.int64:
        raise ValueError(f"answer has shape {tuple(answer.shape)}, {answer.dtype}: expected ({n},) of torch.int64")
    wrong = (answer < 0) | (answer >= choices)
    wrong = wrong | (log_probs.gather(1, answer.clamp(0, choices - 1)[:, None])[:, 0] == -math.inf)
    if wrong.any():
        example = int(wrong.nonzero()[0])
        raise ValueError(f"answer of example {example} is {int(answer[example])}, which is none of its choices")


def _top_label(logits: Tensor, answer: Tensor) -> tuple[Tensor, Tensor]:
    """Confidence of the most probable choice and whether it is right, both (N,) float64."""
    log_probs = predictive_log_probs(logits)
    _check_answer(log_probs, answer)
    top = log_probs.max(dim=1)
    return top.values.exp(), (top.indices == answer).double()


def _equal_width_edges(n_bins: int, like: Tensor) -> Tensor:
    """Borders 0, 1/n_bins, ..., 1 as float64 on the device of `like`."""
    if n_bins < 1:
        raise ValueError(f"n_bins is {n_bins}: expected at least 1")
    return torch.arange(n_bins + 1, dtype=torch.float64, device=like.device) / n_bins
