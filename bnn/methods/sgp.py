"""SGP-LoRA: inducing-variable posteriors over both LoRA factors (Lin et al., 2026)."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from bnn.adapter import SGPLoraConfig, SGPLoraType
from bnn.inducing.posterior import FLOW_PREFIX
from bnn.methods.base import Method, check_targets, trainable
from bnn.noise import Antithetic
from bnn.sampler import LiveSample, Sampler, sample

SCALES = ("raw_sd", "raw_row", "raw_col", "raw_tril", "raw_lambda", "raw_prior_sd", "raw_D_r", "raw_D_c")
"""Parameters on a log-like scale: spreads, lambda, sigma_p, D."""


class SGP(Method):
    """Trains and predicts with samples of the SGP-LoRA posterior.

    Args:
        scale_lr_factor: learning rate of the scale parameters relative to that of Z and the location of q(U). They
            live on a log-like scale and have far to go in the few hundred steps of a fine-tuning run.
        flow_lr_factor: that of the flow's networks. Each of their outputs adds up a layer's width of weights, which
            Adam moves alike, so 1 / width keeps the flow as slow as what it transforms (Yang et al., *Tensor Programs
            V*, 2022, Table 3).
        antithetic: predict, and train with an even number of draws, with mirrored pairs of them (``bnn.Antithetic``).
        cuda_graph: on a GPU, make the draws of training by CUDA graphs.
        posterior: arguments of ``SGPLoraConfig`` beyond LoRA's own.

    Raises:
        ValueError: for a posterior that no factor can have, before a model is there, or a factor that is not above 0.
    """

    stochastic = True
    peft_type = SGPLoraType.SGP_LORA.value

    def __init__(
        self,
        scale_lr_factor: float,
        flow_lr_factor: float,
        antithetic: bool,
        cuda_graph: bool,
        posterior: dict[str, Any],
    ) -> None:
        for name, factor in (("scale_lr_factor", scale_lr_factor), ("flow_lr_factor", flow_lr_factor)):
            if not 0 < factor < float("inf"):
                raise ValueError(f"method=sgp needs a finite {name} > 0, got {factor}")
        self.scale_lr_factor = scale_lr_factor
        self.flow_lr_factor = flow_lr_factor
        self.antithetic = antithetic
        self.cuda_graph = cuda_graph
        self.posterior = posterior
        check_posterior(posterior)
        self._trained: tuple[nn.Module, Sampler] | None = None

    def adapt(self, model: nn.Module, lora: dict[str, Any]) -> PeftModel:
        """See ``Method.adapt``."""
        check_targets(model, lora["target_modules"])
        return self.attach(model, SGPLoraConfig(**lora, **self.posterior))

    def sample(self, model: nn.Module, n: int, generator: Any) -> AbstractContextManager[LiveSample]:
        """See ``bnn.sample``; with ``antithetic`` the second half of an even number of draws mirrors the first."""
        if self.antithetic and n % 2 == 0 and not isinstance(generator, Antithetic):
            generator = Antithetic(generator, ahead=n // 2)
        if self._trained is not None and self._trained[0] is model:
            return self._trained[1].draw(n, generator)
        return sample(model, n, generator)

    def predict(self, *args: Any, generator: torch.Generator | None, **kwargs: Any) -> Tensor:
        """See ``Method.predict``."""
        source: Any = Antithetic(generator) if self.antithetic else generator
        return super().predict(*args, generator=source, **kwargs)

    def parameter_groups(self, model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Z and q's location at ``lr``, scales and the flow at their factor times it. The prior is the only decay.

        What else is trainable (PEFT's ``bias``, ``modules_to_save``) has no prior and goes with ``lr``.
        The parameters are stacked over factors of equal structure, and the model's own become views into them.

        Raises:
            ValueError: for a weight decay, which would be a second prior on parameters that have one.
        """
        if weight_decay:
            raise ValueError(f"method=sgp has a prior: weight_decay={weight_decay} would be a second one, set it to 0")
        sampler = Sampler(model, own=True, cuda_graph=self.cuda_graph)
        self._trained = (model, sampler)
        rates = {"others": lr, "scales": lr * self.scale_lr_factor, "flow": lr * self.flow_lr_factor}
        groups: dict[str, list[nn.Parameter]] = {kind: [] for kind in rates}
        for name, parameter in sampler.parameters():
            kind = "scales" if name in SCALES else "flow" if name.startswith(FLOW_PREFIX) else "others"
            groups[kind].append(parameter)
        own = {id(p) for factor in sampler.factors for p in factor.parameters()}
        groups["others"] += [p for _, p in trainable(model) if id(p) not in own]
        return [{"params": own, "lr": rates[kind], "weight_decay": 0.0} for kind, own in groups.items() if own]


def check_posterior(posterior: dict[str, Any]) -> None:
    """Make a small A and B with these arguments: a wrong value is found here rather than in a large model.

    Raises:
        ValueError: for an unknown argument or a wrong value.
    """
    try:
        config = SGPLoraConfig(**posterior)
        for sd, zero_start in ((config.prior_sd, False), (config.prior_sd_b, True)):
            config.make_factor(torch.ones(2, 2), sd, zero_start, torch.Generator())
    except ArithmeticError:
        raise ValueError("with these values of inducing a posterior is not finite: stay nearer the defaults") from None
    except TypeError as error:
        raise ValueError(f"a key of inducing does not fit: {error}") from error
