"""An ensemble of BLoB's posteriors: their mixture (Wilson & Izmailov, NeurIPS 2020)."""

from bnn.methods.blob import BLoB
from bnn.methods.ensemble import Ensemble


class BLoBEnsemble(Ensemble):
    """K Gaussians over A, each with a B of its own."""

    member = BLoB
