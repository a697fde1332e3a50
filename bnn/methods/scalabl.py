"""ScalaBL (Samplawski et al., UAI 2025, arXiv 2506.21408): inference over r scales per layer."""

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from bnn.methods.blob import RandomAMethod
from bnn.methods.scalabl_layer import SubspaceA


class ScalaBL(RandomAMethod):
    """Delta W = (alpha/r) B diag(s) Vh with s ~ N(mu, sigma^2), prior N(0, prior_sd^2) on every s.

    B, Vh, mu and sigma are all learned; the KL of s is trained as BLoB trains its own, as the authors do. Their
    public code minimises KL[p || q]; this is KL[q || p], the ELBO's. One s per layer is drawn for each pass over a
    batch, as there.
    """

    extra_file = "scalabl.safetensors"

    def replace(self, layer: LoraLayer, name: str, saved: dict[str, Tensor] | None) -> SubspaceA:
        """See ``RandomAMethod.replace``; from plain LoRA, B takes in the left singular vectors of A."""
        if saved is not None:
            return SubspaceA(saved["raw_mu"], saved["raw_sd"], saved["Vh"], self.prior_sd)
        random, U = SubspaceA.start(layer.lora_A[name].weight.detach(), self.init_eps, self.prior_sd)
        with torch.no_grad():
            B = layer.lora_B[name].weight
            B.copy_(B @ U)
        return random
