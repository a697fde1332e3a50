"""SGP-LoRA, its draws' scores divided by a temperature (Guo et al., ICML 2017)."""

from bnn.methods.sgp import SGP
from bnn.methods.temperature import Scaled


class SGPTemperature(Scaled, SGP):
    """The averaged predictions of SGP-LoRA with the T that is best for them on validation data.

    The posterior mean's predictions are divided by the same T, which is not fitted to them.
    """
