"""Maximum a posteriori (MAP): LoRA with a Gaussian prior, that is with weight decay."""

import re
from typing import Any

import torch
from torch import nn

from bnn.methods.base import trainable
from bnn.methods.mle import MLE

MATRIX = re.compile(r"\.lora_(?:embedding_)?[AB]\.(?!.*\.bias$)")
"""In the name of A or B, not of a bias of theirs, nor of DoRA's magnitude, which starts at the base model's norms."""


class MAP(MLE):
    """The most probable LoRA adapter under N(0, sigma_p^2) on every entry of A and B.

    -log p(theta) / N adds theta / (N sigma_p^2) to the gradient of the mean negative log-likelihood (Bishop, 2006,
    Eq. 3.55). It is applied decoupled from AdamW's moments (Loshchilov & Hutter, ICLR 2019, Algorithm 2): every step
    multiplies theta by 1 - lr * weight_decay, so the correspondence weight_decay = 1 / (N sigma_p^2) is exact for
    gradient descent and nominal for AdamW, whose gradient part is rescaled and this part is not.

    Args:
        weight_decay: the decay, relative to the learning rate; takes the place of ``opt.weight_decay``.

    Raises:
        ValueError: for a decay that is not positive.
    """

    def __init__(self, weight_decay: float) -> None:
        if weight_decay <= 0:
            raise ValueError(f"method=map needs weight_decay > 0, got {weight_decay}: use method=mle for no prior")
        self.weight_decay = weight_decay

    def parameter_groups(self, model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """A and B at ``lr`` with the method's own decay, what else PEFT trains (biases, whole modules) without any.

        Raises:
            ValueError: for an optimiser's weight decay, which would be a second prior, and for a decay that is lost in
                rounding: 1 - lr * weight_decay = 1 in float32.
        """
        if weight_decay:
            raise ValueError(
                f"method=map has its own weight_decay={self.weight_decay}: opt.weight_decay={weight_decay} would be "
                "a second prior, set it to 0"
            )
        if lr * self.weight_decay < torch.finfo(torch.float32).eps:
            raise ValueError(
                f"method=map: weight_decay={self.weight_decay} times opt.lr={lr} is lost in float32's rounding, which "
                "would be method=mle: raise weight_decay"
            )
        A_B = [p for name, p in trainable(model) if MATRIX.search(name)]
        others = [p for name, p in trainable(model) if not MATRIX.search(name)]
        groups = [
            {"params": A_B, "lr": lr, "weight_decay": self.weight_decay},
            {"params": others, "lr": lr, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]
