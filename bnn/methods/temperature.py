"""Temperature scaling (Guo et al., ICML 2017)."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from bnn.methods.base import FitData, Schedule, Score
from bnn.methods.mle import MLE

FILE = "temperature.json"
HALVINGS = 60
"""Of the interval of log T: to the precision of float64."""


class Temperature(MLE):
    """p(y | x) = softmax(scores / T), T > 0 minimising the NLL of the validation split (Guo et al., 2017, Eq. 9).

    Training is maximum likelihood's; T = 1 until ``fit`` has run. T changes no prediction's argmax.

    Args:
        maximum: T is sought in [1 / maximum, maximum]; greater than 1.

    Raises:
        ValueError: for a maximum of 1 or less.
    """

    fits = True

    def __init__(self, maximum: float) -> None:
        if not maximum > 1:
            raise ValueError(
                f"method=temperature needs maximum > 1, got {maximum}: T is sought in [1/maximum, maximum]"
            )
        self.maximum = maximum
        self.T = 1.0

    def start(self, model: nn.Module, schedule: Schedule) -> None:
        """See ``Method.start``; a T that was loaded is forgotten where the adapter is about to change."""
        if schedule.total_steps:
            self.T = 1.0

    def fit(self, model: nn.Module, score: Score, data: FitData, generator: torch.Generator) -> dict[str, float]:
        """Find T on the validation split.

        Returns:
            ``temperature``.

        Raises:
            ValueError: without validation examples.
        """
        if not data.validation:
            raise ValueError("method=temperature needs validation examples to fit T: the validation split is empty")
        tokens = data.max_tokens_per_forward
        (scores,) = super().predict(
            model, score, data.validation, n=None, generator=None, max_tokens_per_forward=tokens
        )
        answer = torch.cat([batch.answer for batch in data.validation]).cpu()
        self.T = fit_temperature(scores, answer, self.maximum)
        return {"temperature": self.T}

    def predict(self, *args: Any, **kwargs: Any) -> Tensor:
        """Scores / T (1, N, C), whatever n. See ``Method.predict``."""
        return super().predict(*args, **kwargs) / self.T

    def save(self, model: PeftModel, folder: str | Path) -> None:
        """See ``Method.save``."""
        super().save(model, folder)
        (Path(folder) / FILE).write_text(json.dumps({"temperature": self.T}) + "\n")

    def load(self, model: nn.Module, folder: str | Path) -> PeftModel:
        """See ``Method.load``; T = 1 for an adapter saved by ``method=mle``."""
        path = Path(folder) / FILE
        self.T = float(json.loads(path.read_text())["temperature"]) if path.exists() else 1.0
        return super().load(model, folder)


def fit_temperature(scores: Tensor, answer: Tensor, maximum: float) -> float:
    """The T in [1 / maximum, maximum] that minimises the mean of -log softmax(scores / T)[answer].

    The NLL is convex in 1/T with derivative mean_n(E_softmax(scores_n / T)[scores_n] - scores_n[answer_n]), so the
    sign of the derivative halves the interval of log T until nothing is left of it.

    Args:
        scores: unnormalised log-scores (N, C); -inf for a choice that an example does not have.
        answer: indices of the right choices, (N,).
        maximum: bound on T and 1/T.
    """
    scores = scores.double()
    finite = scores.nan_to_num(neginf=0.0)  # an absent choice has probability 0, and 0 * -inf is no number
    right = scores.gather(1, answer[:, None]).mean()
    low, high = -math.log(maximum), math.log(maximum)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        expected = ((scores / math.exp(middle)).softmax(dim=1) * finite).sum(dim=1).mean()
        if expected > right:  # the NLL falls with 1/T falling: T is too low
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2)
