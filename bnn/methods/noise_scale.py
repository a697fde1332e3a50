"""The noise of a trained posterior multiplied by a factor fitted to validation data."""

import math
from typing import Any

import torch
from torch import nn

from bnn.methods.base import FitData, Method, Score
from bnn.metrics import nll


class NoiseScaled(Method):
    """What multiplies the standard deviations of the method it is mixed into by kappa, and leaves the mean as it is.

    The noise that lets the mean learn best need not be the noise that predicts best; ``fit`` seeks the latter, after
    training. kappa is the power of ``step`` with the lowest NLL of the averaged predictions on the validation split,
    found by going from 1 the way in which the NLL falls, up to where it rises again. Every candidate sees the same
    draws, so that they are compared on equal terms. The standard deviations are the adapter's own: saved and loaded it
    is one of the other method, with more or less noise. Training is the other method's.

    Args:
        maximum: kappa is sought in [1 / maximum, maximum].
        step: ratio of neighbouring candidates, in (1, maximum].
        draws: S of the predictions that kappa is fitted to.
        of: arguments of the other method.

    Raises:
        ValueError: for values out of these ranges.
    """

    fitted_to = ("validation",)

    def __init__(self, maximum: float, step: float, draws: int, **of: Any) -> None:
        if not 1 < step <= maximum < math.inf:
            raise ValueError(
                f"method.factory.step={step} must be greater than 1, and at most method.factory.maximum={maximum}, "
                "which must be finite"
            )
        super().__init__(**of)
        self.maximum = maximum
        self.step = step
        self.draws = draws

    def scale_noise(self, model: nn.Module, factor: float) -> None:
        """Multiply the standard deviations of the posterior by ``factor``, in place."""
        raise NotImplementedError

    def fit(self, model: nn.Module, score: Score, data: FitData, generator: torch.Generator) -> dict[str, float]:
        """Find kappa on the validation split, and multiply by it.

        Returns:
            ``kappa``; ``at_bound``, 1 where the next candidate, at which the NLL might be lower still, is out of the
            interval; ``nll_before`` and ``nll``, those of the validation split with kappa = 1 and with kappa, nats.

        Raises:
            ValueError: without validation examples.
        """
        if not data.validation:
            raise ValueError("kappa is fitted to validation data, but the validation split is empty")
        answer = torch.cat([batch.answer for batch in data.validation]).cpu()
        state = generator.get_state()

        def found() -> float:
            generator.set_state(state)
            how: dict[str, Any] = {"generator": generator, "max_tokens_per_forward": data.max_tokens_per_forward}
            return nll(self.predict(model, score, data.validation, n=self.draws, **how), answer)

        before = lowest = found()
        steps, most = 0, math.floor(math.log(self.maximum) / math.log(self.step) + 1e-9)
        for way in (1, -1):
            while abs(steps + way) <= most:
                self.scale_noise(model, self.step**way)
                try:
                    now = found()
                except FloatingPointError:  # too much noise to compute with
                    now = math.inf
                if now >= lowest:
                    self.scale_noise(model, self.step**-way)
                    break
                steps, lowest = steps + way, now
            if steps:
                break
        return {
            "kappa": self.step**steps,
            "at_bound": float(abs(steps) == most),
            "nll_before": before,
            "nll": lowest,
        }
