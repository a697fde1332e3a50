"""Bayesian low-rank adaptation with inducing-variable posteriors."""

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
