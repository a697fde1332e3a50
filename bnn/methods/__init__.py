"""Methods of adapting a language model and predicting with it."""

from bnn.methods.base import Method
from bnn.methods.mle import MLE
from bnn.methods.sgp import SGP

__all__ = ["MLE", "SGP", "Method"]
