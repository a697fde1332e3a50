"""Bayesian low-rank adaptation with inducing-variable posteriors."""

from bnn.adapter import SGPLoraConfig, SGPLoraModel, register
from bnn.bayesianize import bayesianize_
from bnn.sampler import LiveSample, active_factors, sample

register()

__all__ = ["LiveSample", "SGPLoraConfig", "SGPLoraModel", "active_factors", "bayesianize_", "sample"]
