"""The evidence lower bound as it is minimised (Lin et al., 2026; Eq. 31 is the KL's conditional term)."""

import math
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F


class Loss(NamedTuple):
    """One micro-batch's objective and its parts, scalars with gradient."""

    loss: Tensor
    """nll + beta * kl / N, nats per example."""
    nll: Tensor
    """Mean of -log p(y_n | x_n, W) over the rows, nats."""
    kl: Tensor
    """KL[q || p], nats (whole model, not scaled)."""


def negative_elbo(scores: Tensor, answer: Tensor, kl: Tensor, n_train: int, beta: float | Tensor) -> Loss:
    """-ELBO / N for one micro-batch: mean_n -log p(y_n | x_n, W) + beta * KL[q || p] / N.

    Args:
        scores: unnormalised log-scores of the choices, (rows, C); -inf for a choice that an example does not have.
        answer: index of the right choice, (rows,).
        kl: KL[q || p], nats, a scalar.
        n_train: N, the number of training examples (examples, not batches).
        beta: weight of the KL; 1 is the ELBO. A tensor, which a CUDA graph can read anew, is not checked.

    Raises:
        ValueError: for n_train < 1 or beta < 0.
    """
    if n_train < 1 or (not isinstance(beta, Tensor) and beta < 0):
        raise ValueError(f"expected n_train >= 1 and beta >= 0, got n_train={n_train}, beta={beta}")
    nll = F.cross_entropy(scores, answer)
    return Loss(nll + beta / n_train * kl, nll, kl)


def beta_at(step: int, beta: float, warmup_steps: int) -> float:
    """beta_t: rises linearly from 0 to ``beta`` over ``warmup_steps`` optimiser steps; constant if 0."""
    return beta if warmup_steps <= 0 else beta * min(1.0, step / warmup_steps)


def learning_rate_at(step: int, total_steps: int, warmup_steps: int, schedule: str) -> float:
    """Factor on the learning rate: linear warm-up, then ``linear`` or ``cosine`` decay to 0, or ``constant``.

    Raises:
        ValueError: for an unknown schedule.
    """
    if schedule not in ("linear", "cosine", "constant"):
        raise ValueError(f"unknown schedule {schedule!r}: choose linear, cosine or constant")
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "constant":
        return 1.0
    return max(0.0, 1.0 - progress) if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
