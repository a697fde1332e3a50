"""BLoB with its noise scaled to validation data, as ``method=sgp_noise`` scales SGP-LoRA's."""

import math

import torch
from torch import nn

from bnn.methods.blob import BLoB
from bnn.methods.blob_layer import BLoBA
from bnn.methods.noise_scale import NoiseScaled


class BLoBNoise(NoiseScaled, BLoB):
    """BLoB whose standard deviations Omega = G^2, of all layers, are multiplied by kappa after training."""

    @torch.no_grad()
    def scale_noise(self, model: nn.Module, factor: float) -> None:
        """See ``NoiseScaled.scale_noise``."""
        for layer in model.modules():
            if isinstance(layer, BLoBA):
                layer.G.mul_(math.sqrt(factor))
