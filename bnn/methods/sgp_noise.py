"""SGP-LoRA with its conditional noise scaled to validation data."""

import math
from typing import Any

import torch
from torch import nn

from bnn.methods.noise_scale import NoiseScaled
from bnn.methods.sgp import SGP
from bnn.sampler import active_factors


class SGPNoise(NoiseScaled, SGP):
    """SGP-LoRA whose sigma_p, of all factors, is multiplied by kappa after training.

    sigma_p scales the conditional noise lambda sigma_p alone: the mean and the spread of q(V) are in units of W, which
    are constant (``bnn.inducing.posterior.unit_of``).

    Args:
        posterior: see ``SGP``.
        of: see ``NoiseScaled`` and ``SGP``.

    Raises:
        ValueError: for a posterior without conditional noise.
    """

    def __init__(self, *, posterior: dict[str, Any], **of: Any) -> None:
        if not posterior.get("conditional_noise", True):
            raise ValueError("method=sgp_noise scales the conditional noise: set inducing.conditional_noise=true")
        super().__init__(posterior=posterior, **of)

    @torch.no_grad()
    def scale_noise(self, model: nn.Module, factor: float) -> None:
        """See ``NoiseScaled.scale_noise``."""
        for own in active_factors(model):
            own.own_tensors()["raw_prior_sd"].add_(math.log(factor))
