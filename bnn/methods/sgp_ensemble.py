"""An ensemble of SGP-LoRA posteriors: their mixture (Wilson & Izmailov, NeurIPS 2020)."""

from bnn.methods.ensemble import Ensemble
from bnn.methods.sgp import SGP


class SGPEnsemble(Ensemble):
    """K posteriors over A and B, each with Z, D, lambda and sigma_p of its own."""

    member = SGP
