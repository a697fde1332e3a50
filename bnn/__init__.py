"""Bayesian low-rank adaptation with inducing-variable posteriors."""

# ruff: noqa: E402
import logging

# Where it is installed, bitsandbytes warns as soon as PEFT imports it of a kernel it can do without, and again at every
# matrix product in 8 bits.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

from bnn.adapter import SGPLoraConfig, SGPLoraModel, register
from bnn.bayesianize import bayesianize_
from bnn.noise import Antithetic
from bnn.sampler import LiveSample, Sampler, active_factors, sample

register()

__all__ = [
    "Antithetic",
    "LiveSample",
    "SGPLoraConfig",
    "SGPLoraModel",
    "Sampler",
    "active_factors",
    "bayesianize_",
    "sample",
]
