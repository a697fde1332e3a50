"""Fixtures for one inducing factor."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bnn.inducing.posterior import FactorSpec
from bnn.layers import InducingFactor

R, WIDTH = 4, 12


@pytest.fixture(name="A")
def trained_factor(generator) -> Tensor:
    """A trained factor at LoRA's scale, (R, WIDTH)."""
    return torch.randn(R, WIDTH, generator=generator) / math.sqrt(WIDTH)


@pytest.fixture
def make_factor() -> Callable[..., InducingFactor]:
    def make(
        weight: Tensor | None, shape: tuple[int, int] = (R, WIDTH), m: tuple[int, int] = (5, 6), **settings
    ) -> InducingFactor:
        names = FactorSpec.__dataclass_fields__
        spec = FactorSpec(*shape, *m, **{k: v for k, v in settings.items() if k in names})
        rest = {
            "log_prior_sd": -1.3,
            "learn_prior_sd": True,
            "lambda_init": 0.1,
            "learn_lambda": True,
            "q_sd": 0.5,
            "d_init": 0.3,
            "d_init_zero": 0.3,
            "mean_gain": 1.0,
        } | {k: v for k, v in settings.items() if k not in names}
        return InducingFactor(spec, weight, **rest, generator=torch.Generator().manual_seed(0))

    return make
