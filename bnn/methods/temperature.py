"""Temperature scaling (Guo et al., ICML 2017)."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from bnn.methods.base import FitData, Method, Schedule, Score
from bnn.methods.mle import MLE
from bnn.metrics import check_scores

FILE = "temperature.json"
HALVINGS = 60
"""Of the interval of log T: to the precision of float64."""


class Scaled(Method):
    """What divides the scores of the method it is mixed into: p(y | x) = 1/S sum_s softmax(scores_s / T).

    T > 0 minimises the NLL of the validation split (Guo et al., 2017, Eq. 9, there for S = 1) and is 1 until ``fit``
    has run. Training is the other method's.

    Args:
        maximum: T is sought in [1 / maximum, maximum]; greater than 1.
        draws: S of the predictions that T is fitted to; None for one pass.
        of: arguments of the other method.

    Raises:
        ValueError: for a maximum of 1 or less, or none, or for draws that are no number from 1 on.
    """

    fitted_to = ("validation",)

    def __init__(self, maximum: float, draws: int | None = None, **of: Any) -> None:
        if not 1 < maximum < math.inf:
            raise ValueError(
                f"method.factory.maximum={maximum} must be greater than 1, and finite: T is sought between it and its "
                "reciprocal"
            )
        if draws is not None and (type(draws) is not int or draws < 1):
            raise ValueError(f"method.factory.draws={draws} must be a whole number, at least 1: leave it at eval.n_mc")
        super().__init__(**of)
        self.maximum = maximum
        self.draws = draws
        self.T = 1.0

    def start(self, model: nn.Module, schedule: Schedule) -> None:
        """See ``Method.start``; a T that was loaded is forgotten where the adapter is about to change."""
        super().start(model, schedule)
        if schedule.total_steps:
            self.T = 1.0

    def fit(self, model: nn.Module, score: Score, data: FitData, generator: torch.Generator) -> dict[str, float]:
        """Find T on the validation split.

        Returns:
            ``temperature``; ``at_bound``, 1 where it is one of the interval's ends, beyond which the NLL falls further.

        Raises:
            ValueError: without validation examples.
        """
        if not data.validation:
            raise ValueError("a temperature is fitted to validation examples, and the validation split is empty")
        scores = super().predict(
            model,
            score,
            data.validation,
            n=self.draws,
            generator=generator,
            max_tokens_per_forward=data.max_tokens_per_forward,
        )
        answer = torch.cat([batch.answer for batch in data.validation]).cpu()
        self.T = fit_temperature(scores, answer, self.maximum)
        at_bound = math.isclose(abs(math.log(self.T)), math.log(self.maximum), rel_tol=1e-6)
        return {"temperature": self.T, "at_bound": float(at_bound)}

    def predict(self, *args: Any, **kwargs: Any) -> Tensor:
        """Scores / T (S, N, C). See ``Method.predict``."""
        return super().predict(*args, **kwargs) / self.T

    def save(self, model: PeftModel, folder: str | Path) -> None:
        """See ``Method.save``."""
        super().save(model, folder)
        (Path(folder) / FILE).write_text(json.dumps({"temperature": self.T}) + "\n")

    def load(self, model: nn.Module, folder: str | Path) -> PeftModel:
        """See ``Method.load``; T = 1 for an adapter saved by the method alone."""
        path = Path(folder) / FILE
        self.T = float(json.loads(path.read_text())["temperature"]) if path.exists() else 1.0
        return super().load(model, folder)


class Temperature(Scaled, MLE):
    """LoRA by maximum likelihood, its scores divided by T, which changes no prediction's argmax.

    Args:
        maximum: see ``Scaled``.
    """

    def __init__(self, maximum: float) -> None:
        super().__init__(maximum)


def fit_temperature(scores: Tensor, answer: Tensor, maximum: float) -> float:
    """The T in [1 / maximum, maximum] that minimises the mean of -log(1/S sum_s softmax(scores_s / T)[answer]).

    Its derivative by 1/T is the mean over n of sum_s w_sn (E_softmax(scores_sn / T)[scores_sn] - scores_sn[answer_n]),
    where w_sn is the share of draw s in the probability of the answer (differentiate the log of the sum). The sign of
    the derivative halves the interval of log T until nothing is left of it. For S = 1 the NLL is convex in 1/T, so
    this is its minimum; for more it is one of its minima.

    Args:
        scores: unnormalised log-scores (S, N, C); -inf for a choice that an example does not have.
        answer: indices of the right choices, (N,).
        maximum: bound on T and 1/T.

    Raises:
        FloatingPointError: for a score that is NaN or +inf, naming the example.
    """
    check_scores(scores)  # else a NaN would look like a temperature that is too high
    scores = scores.double()
    finite = scores.nan_to_num(neginf=0.0)  # an absent choice has probability 0, and 0 * -inf is no number
    index = answer.expand(len(scores), -1)[..., None]
    right = scores.gather(2, index)[..., 0]
    low, high = -math.log(maximum), math.log(maximum)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        log_probs = (scores / math.exp(middle)).log_softmax(dim=2)
        share = log_probs.gather(2, index)[..., 0].softmax(dim=0)
        expected = (log_probs.exp() * finite).sum(dim=2)
        if (share * (expected - right)).sum(dim=0).mean() > 0:  # the NLL falls with 1/T falling: T is too low
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2)
