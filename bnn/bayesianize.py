"""From a trained LoRA adapter to SGP-LoRA, starting at the trained A and B."""

import copy
from dataclasses import fields
from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer

from bnn.adapter import METHOD, SGPLoraConfig, SGPLoraModel, replace_factors, untie
from bnn.lora import KEEPING_BASE, check_plain, has_adapter


def bayesianize_(
    model: PeftModel, config: SGPLoraConfig | None = None, adapter_name: str | None = None, **posterior: Any
) -> PeftModel:
    """Turn one LoRA adapter of ``model`` into an SGP-LoRA posterior whose mean is the trained A and B.

    The means reproduce A and B to rounding where min(m_r, m_c) is at least their rank; where it is smaller they are
    the best approximations of that rank, and a warning says how far off. The adapter is replaced in place; the base
    model's modules are shared with the returned model.

    Args:
        model: a PEFT model with plain LoRA layers.
        config: the posterior; its LoRA fields are overwritten by those of the adapter. Default values if None.
        adapter_name: which adapter; the active one if None. It must be the model's only one.
        **posterior: fields of ``SGPLoraConfig`` to set, instead of ``config``.

    Returns:
        A ``PeftModel`` that saves, loads and samples as one made by get_peft_model(model, SGPLoraConfig(...)).

    Raises:
        ValueError: before anything is replaced, if the model has other adapters, is not a plain LoRA model on linear
            layers, is merged, or both ways to configure are used, or a field that is not the posterior's.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(f"{type(model).__name__} is no PeftModel: give it a LoRA adapter with get_peft_model first")
    name = adapter_name or model.active_adapter
    if list(model.peft_config) != [name]:
        raise ValueError(
            f"bayesianize_ replaces the only adapter of a model, but this one has {sorted(model.peft_config)} and "
            f"{name!r} was asked for: delete the others first"
        )
    lora = model.peft_config[name]
    if type(lora) is not LoraConfig:
        raise ValueError(f"adapter {name!r} is {type(lora).__name__}, not plain LoRA: bayesianize_ needs LoraConfig")
    if config is not None and posterior:
        raise ValueError(f"pass either config or the fields {sorted(posterior)}, not both")
    own = {f.name for f in fields(SGPLoraConfig)} - {f.name for f in fields(LoraConfig)}
    if unknown := sorted(posterior.keys() - own):
        raise ValueError(f"{unknown[0]} is no field of the posterior: choose among {', '.join(sorted(own))}")
    chosen = posterior if config is None else {field: getattr(config, field) for field in own}
    inherited = {f.name: copy.deepcopy(getattr(lora, f.name)) for f in fields(LoraConfig) if f.init}
    inherited.pop("peft_type", None)
    if lora.init_lora_weights in KEEPING_BASE:
        inherited["init_lora_weights"] = True  # how A and B started is past; others started with a changed base
    new_config = SGPLoraConfig(**inherited, **chosen)
    base = model.base_model.model
    layers = {path: m for path, m in base.named_modules() if isinstance(m, LoraLayer) and has_adapter(m, name)}
    for path, layer in layers.items():
        check_plain(layer, name, path, METHOD)
        weights = [side[name].weight for side in (layer.lora_A, layer.lora_B)]
        if not all(weight.is_meta or weight.isfinite().all() for weight in weights):
            raise ValueError(f"the LoRA weights of {path} are not all finite: train the adapter again")
    for layer in layers.values():
        untie(base, layer.get_base_layer())
        replace_factors(layer, name, new_config, base, keep_b=True)
    model.base_model.__class__ = SGPLoraModel
    model.base_model.peft_config[name] = new_config
    model.peft_config[name] = new_config
    model.peft_type = new_config.peft_type
    return model
