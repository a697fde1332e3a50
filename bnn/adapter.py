"""SGP-LoRA as a PEFT method: configuration, tuner, registration.

``SGPLoraModel`` lets PEFT build its LoRA layers, then puts an ``InducingFactor`` in the place of every ``lora_A`` and
``lora_B``. Saving is structural: the factor's tensors are stored as ``...lora_A.<name>``, so PEFT's own save and load
work. A process must ``import bnn`` before it loads such an adapter: PEFT knows the method by this registration.
"""

import copy
import math
import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from peft import LoraConfig, LoraModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from bnn.inducing.posterior import FactorSpec, log_of_scaled_prior_sd
from bnn.layers import InducingFactor, can_compute
from bnn.lora import check_plain, not_linear
from bnn.merging import rounding_reported

METHOD = "SGP-LoRA"
"""The method's name in messages."""


class SGPLoraType(StrEnum):
    """PEFT's own ``PeftType`` is a closed enum; its mappings only need a string with a ``value``."""

    SGP_LORA = "SGP_LORA"


@dataclass
class SGPLoraConfig(LoraConfig):
    """LoRA's configuration plus that of the posterior. Both factors of every target become random matrices."""

    inducing_rows: int = field(default=9, metadata={"help": "m_r, rows of U"})
    inducing_cols: int = field(default=9, metadata={"help": "m_c, columns of U"})
    family: str = field(default="diagonal", metadata={"help": "q(U): diagonal, matrix_normal, full or ensemble"})
    members: int = field(default=1, metadata={"help": "point masses of an ensemble"})
    flow_depth: int = field(default=0, metadata={"help": "layers of the masked autoregressive flow on U; 0: none"})
    flow_hidden: int = field(default=64, metadata={"help": "hidden width of the flow's networks"})
    whitened: bool = field(default=True, metadata={"help": "q describes V (prior N(0, I)); False: U itself"})
    conditional_noise: bool = field(default=True, metadata={"help": "False: W is its conditional mean (no lambda)"})
    prior_sd: float = field(default=0.7, metadata={"help": "prior standard deviation of A, before prior_scaling"})
    prior_sd_b: float = field(default=1.4, metadata={"help": "that of B"})
    prior_scaling: str = field(default="width", metadata={"help": "width: / sqrt(max(d_out, d_in)); fan_in; none"})
    learn_prior_sd: bool = field(default=True, metadata={"help": "learn sigma_p per factor (type-II ML)"})
    lambda_init: float = field(default=0.7, metadata={"help": "initial lambda, in (0, lambda_max)"})
    lambda_max: float = field(default=1.0, metadata={"help": "smooth upper bound of lambda"})
    learn_lambda: bool = field(default=True, metadata={"help": "learn lambda per factor"})
    q_sd: float = field(default=0.5, metadata={"help": "initial sd of q(V), the prior's is 1; unwhitened of q(U)"})
    d_init: float = field(default=0.3, metadata={"help": "initial D, relative to rows of Z of norm 1"})
    d_init_zero: float = field(default=0.3, metadata={"help": "initial D_r of B, whose Z_r starts at 0"})
    mean_gain: float = field(default=4.0, metadata={"help": "speed of B's mean at first, relative to LoRA's B"})
    jitter: float = field(default=1e-6, metadata={"help": "added to the diagonal of K_r, K_c, relative to its mean"})
    init_seed: int = field(default=0, metadata={"help": "seed of the rows of Z that the initial mean leaves free"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SGPLoraType.SGP_LORA
        unsupported = {
            "use_dora": self.use_dora,
            "lora_bias": self.lora_bias,
            "target_parameters": self.target_parameters,
            "layer_replication": self.layer_replication,
            "init_lora_weights": self.init_lora_weights if isinstance(self.init_lora_weights, str) else None,
        }
        for name in ("prior_sd", "prior_sd_b", "mean_gain", "q_sd", "d_init", "d_init_zero", "lambda_max"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: expected a finite number above 0")
        if not 0 <= self.jitter < math.inf:
            raise ValueError(f"jitter={self.jitter}: expected a finite number, at least 0")
        if not 0 < self.lambda_init < self.lambda_max:
            raise ValueError(f"lambda_init must lie in (0, lambda_max={self.lambda_max}), got {self.lambda_init}")
        for name, value in unsupported.items():
            if value:
                raise ValueError(f"SGP-LoRA does not support {name}={value!r}: remove it from the configuration")

    def factor_spec(self, d_out: int, d_in: int) -> FactorSpec:
        """Structure of a factor of shape (d_out, d_in)."""
        return FactorSpec(
            d_out=d_out,
            d_in=d_in,
            m_r=self.inducing_rows,
            m_c=self.inducing_cols,
            family=str(self.family),
            members=self.members,
            flow_depth=self.flow_depth,
            flow_hidden=self.flow_hidden,
            whitened=self.whitened,
            lambda_max=self.lambda_max,
            conditional_noise=self.conditional_noise,
            jitter=self.jitter,
        )

    def make_factor(
        self, weight: Tensor, prior_sd: float, zero_start: bool, generator: torch.Generator
    ) -> InducingFactor:
        """An ``InducingFactor`` that stands for ``weight`` (d_out, d_in), or starts at mean 0."""
        d_out, d_in = weight.shape
        return InducingFactor(
            self.factor_spec(d_out, d_in),
            None if zero_start else weight,
            log_prior_sd=log_of_scaled_prior_sd(prior_sd, self.prior_scaling, d_out, d_in),
            learn_prior_sd=self.learn_prior_sd,
            lambda_init=self.lambda_init,
            learn_lambda=self.learn_lambda and self.conditional_noise,
            q_sd=self.q_sd,
            d_init=self.d_init,
            d_init_zero=self.d_init_zero,
            mean_gain=self.mean_gain,
            generator=generator,
        )


class SGPLoraModel(LoraModel):
    """PEFT tuner of SGP-LoRA: a ``LoraModel`` whose factors are ``InducingFactor`` modules."""

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """PEFT looks for the name at the end of a key alone; a flow's tensors lie deeper."""
        without = re.sub(rf"(\.lora_[AB])\.{re.escape(adapter_name)}(?=\.)", r"\1", key)
        return without if without != key else super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Files saved before have the adapter's name in the keys of a flow."""
        state_dict = {re.sub(r"(\.lora_[AB])\.[^.]+\.flow\.", r"\1.flow.", key): t for key, t in state_dict.items()}
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

    def _load_from_state_dict(self, state_dict: dict[str, Any], *arguments: Any) -> None:
        """Refuse what PEFT would load with a warning: adapters saved while sigma_p scaled the mean too."""
        if any(".lora_" in name and name.endswith(".unit") for name in state_dict):
            raise ValueError(
                "the adapter was saved with an earlier parametrisation (prior_sd scaled its mean too): train it again"
            )
        super()._load_from_state_dict(state_dict, *arguments)

    def _create_and_replace(
        self,
        lora_config: SGPLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        base = target.get_base_layer() if isinstance(target, LoraLayer) else target
        if isinstance(base, nn.Embedding | nn.MultiheadAttention | nn.modules.conv._ConvNd):
            raise not_linear(base, current_key, METHOD)
        untie(self.model, base)
        super()._create_and_replace(lora_config, adapter_name, target, target_name, parent, current_key, **kwargs)
        layer = parent.get_submodule(target_name)
        check_plain(layer, adapter_name, current_key, METHOD)
        replace_factors(layer, adapter_name, lora_config, self.model, keep_b=lora_config.init_lora_weights is False)

    def _refuse_live_sample(self, what: str) -> None:
        if any(isinstance(m, InducingFactor) and m.has_sample for m in self.modules()):
            raise ValueError(f"posterior samples are live: leave bnn.sample before {what}")

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("adapter_names") is not None:
            self._refuse_live_sample("a mixed batch (adapter_names), whose rows cannot be told from draws")
        return super()._enable_peft_forward_hooks(*args, **kwargs)

    def inject_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Not in ``bnn.sample``: the first layers would have an adapter that the others then refuse."""
        self._refuse_live_sample("adding an adapter")
        super().inject_adapter(*args, **kwargs)

    def delete_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Not in ``bnn.sample``, whose draws may be of the adapter."""
        self._refuse_live_sample("deleting an adapter")
        super().delete_adapter(*args, **kwargs)

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Not in ``bnn.sample``, whose draws are of the adapters that were active."""
        self._refuse_live_sample("making another adapter active")
        super().set_adapter(*args, **kwargs)

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Merge the posterior mean; quantised layers round it and a warning says how much. Not in ``bnn.sample``.

        Raises:
            ValueError: while samples are live.
        """
        self._refuse_live_sample("merging, which merges the mean")
        with rounding_reported(self.model):
            super().merge_adapter(*args, **kwargs)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        self._refuse_live_sample("merging, which merges the mean")
        with rounding_reported(self.model):
            return super()._unload_and_optionally_merge(*args, **kwargs)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Not defined for posteriors."""
        raise NotImplementedError("add_weighted_adapter combines weights, not posteriors: use it with plain LoRA")


def untie(model: Any, layer: Any) -> None:
    """Give a layer whose weight others have too one of its own: merging would change theirs.

    So have those others each, but one: a model that is saved merged no longer calls any of them tied. It then has a
    configuration of its own that says so; other models may have been made from the one it had.
    """
    weight = layer._parameters.get("weight")
    others = [m for m in model.modules() if m is not layer and m._parameters.get("weight") is weight]
    if weight is None or not others:
        return
    for module in (layer, *others[1:]):
        copied = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
        module._parameters["weight"] = copied  # registered it would be on meta under low_cpu_mem_usage
    if hasattr(getattr(model, "config", None), "get_text_config"):
        copies: dict[int, Any] = {}
        config = copy.deepcopy(model.config, copies)
        for module in model.modules():
            if (own := id(module.__dict__.get("config"))) in copies:
                module.config = copies[own]
        for part in (config, config.get_text_config()):
            part.tie_word_embeddings = False


def replace_factors(
    layer: LoraLayer, adapter_name: str, config: SGPLoraConfig, model: nn.Module, keep_b: bool = False
) -> None:
    """Put inducing factors in the place of ``layer``'s A and B.

    Args:
        layer: a LoRA layer of PEFT with plain A and B for ``adapter_name``.
        adapter_name: which of its adapters.
        config: the posterior's configuration.
        model: the base model, which says what it computes in where the base weight, being quantised, does not.
        keep_b: start B at the posterior mean B instead of LoRA's zero start.
    """
    dtype = _compute_dtype(layer.get_base_layer(), model)
    generator = torch.Generator().manual_seed(config.init_seed)
    for side, prior_sd, zero_start in (
        (layer.lora_A, config.prior_sd, False),
        (layer.lora_B, config.prior_sd_b, not keep_b),
    ):
        old = side[adapter_name].weight
        on_meta = old.device.type == "meta"
        weight = torch.ones(old.shape, device="cpu") if on_meta else old
        factor = config.make_factor(weight, prior_sd, zero_start, generator)
        factor.compute_dtype = dtype
        factor.requires_grad_(old.requires_grad)
        side[adapter_name] = factor.to(old.device)


def _compute_dtype(base: nn.Module, model: nn.Module) -> torch.dtype:
    """What a layer computes in: its weight's dtype, or the one that the model or it names; float32 if none does."""
    weight: Any = getattr(base, "weight", None)  # some quantised layers have none
    named = (getattr(weight, "dtype", None), getattr(model, "dtype", None), getattr(base, "compute_dtype", None))
    return next((t for t in named if isinstance(t, torch.dtype) and can_compute(t)), torch.float32)


def register() -> None:
    """Make the method known to PEFT; idempotent."""
    name = SGPLoraType.SGP_LORA
    PEFT_TYPE_TO_CONFIG_MAPPING[name] = SGPLoraConfig
    PEFT_TYPE_TO_TUNER_MAPPING[name] = SGPLoraModel
    PEFT_TYPE_TO_PREFIX_MAPPING[name] = LoraModel.prefix
