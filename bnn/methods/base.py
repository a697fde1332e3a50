"""What a method of adapting and predicting offers to the training script: one file and one YAML per method.

``Method`` is plain LoRA's behaviour (a deterministic adapter, one forward pass per prediction); a method overrides
what differs. The training script calls the hooks in this order::

    adapt (or load)  ->  start  ->  per optimiser step: for _ in members: sample, backward; then after_step
    ->  fit  ->  predict, save

Nothing here reads configuration objects, seeds, or knows about data sets: randomness and data are arguments.
"""

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import Tensor, nn

from bnn.predictive import predict

Score = Callable[[nn.Module, Any], Tensor]
"""(model, batch) -> unnormalised log-scores of the choices, (rows, C)."""


class Sample(Protocol):
    """Draws that are live while a context is open."""

    def kl(self) -> Tensor:
        """KL term of the objective, nats, a scalar."""
        ...


class PointEstimate:
    """What the ``sample`` of a deterministic method yields: nothing is drawn and there is no KL."""

    def kl(self) -> Tensor:
        """Zero nats."""
        return torch.zeros(())


class Schedule(NamedTuple):
    """The extent of training, known before it starts."""

    total_steps: int
    """Optimiser steps."""
    steps_per_epoch: int
    n_train: int
    """N, training examples."""


class FitData(NamedTuple):
    """What a method may look at after training: never test data."""

    train: Sequence[Any]
    """Batches of the training split (with ``answer``), on the model's device."""
    validation: Sequence[Any]
    """Batches of the validation split."""
    n_train: int
    """N, training examples."""
    max_tokens_per_forward: int
    """Bound on rows * tokens of a forward pass."""


class Method:
    """One deterministic adapter; the base of every method."""

    stochastic = False
    """Whether prediction needs samples; if not, one deterministic pass is the prediction."""
    trains = True
    """Whether there is anything to train by gradient steps."""
    fitted_to: tuple[str, ...] = ()
    """Splits that ``fit`` reads after training: none where it has nothing to do."""
    peft_type = "LORA"
    """PEFT's name for the adapters that ``load`` takes."""
    adapter_name = "default"
    """PEFT's name for the method's adapter; each member of an ensemble has its own."""

    def adapt(self, model: nn.Module, lora: dict[str, Any]) -> PeftModel:
        """Add the method's adapter; ``lora`` holds LoraConfig's arguments (r, lora_alpha, target_modules, ...)."""
        raise NotImplementedError

    def load(self, model: nn.Module, folder: str | Path) -> PeftModel:
        """Put the adapter saved in ``folder`` on the base model, trainable.

        A method whose trained adapter is plain LoRA accepts one saved by ``method=mle`` as its starting point.

        Raises:
            ValueError: if the folder holds an adapter of another type.
        """
        name = self.adapter_name
        if isinstance(model, PeftModel):
            check_kind(PeftConfig.from_pretrained(str(folder)), self.peft_type, folder)
            model.load_adapter(str(folder), name, is_trainable=True)
            model.set_adapter(name)
        else:
            model = PeftModel.from_pretrained(model, str(folder), name, is_trainable=True)  # type: ignore[arg-type]
        return of_type(model, self.peft_type, folder, name)

    def save(self, model: PeftModel, folder: str | Path) -> None:
        """Write adapter and whatever ``fit`` found to ``folder`` (see ``inside``), for ``load``."""
        model.save_pretrained(str(folder), selected_adapters=[self.adapter_name], save_embedding_layers=False)

    def inside(self, folder: str | Path) -> Path:
        """Where in the folder of ``save`` PEFT puts the adapter."""
        return Path(folder) / ("" if self.adapter_name == "default" else self.adapter_name)

    def attach(self, model: nn.Module, config: PeftConfig) -> PeftModel:
        """The model with a new adapter, active; beside others where it has some."""
        if not isinstance(model, PeftModel):
            return get_peft_model(model, config, adapter_name=self.adapter_name)  # type: ignore[arg-type, return-value]
        model.add_adapter(self.adapter_name, config)
        model.set_adapter(self.adapter_name)
        return model

    def parameter_groups(self, model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Optimiser groups with their learning rates and weight decays."""
        return [{"params": [p for _, p in trainable(model)], "lr": lr, "weight_decay": weight_decay}]

    def clipped_together(self, model: nn.Module, parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
        """The optimiser's parameters in parts, each with a gradient norm of its own to be clipped."""
        return [parameters]

    def start(self, model: nn.Module, schedule: Schedule) -> None:
        """Called once before the first step of training, also when a run is resumed."""

    def members(self, model: nn.Module) -> Iterator[None]:
        """Activate in turn what is trained on every micro-batch: once for all methods but an ensemble."""
        yield

    def sample(self, model: nn.Module, n: int, generator: torch.Generator | None) -> AbstractContextManager[Sample]:
        """Context in which a batch of n*B rows uses draw i for rows i*B to (i+1)*B; backward belongs inside."""
        return nullcontext(PointEstimate())

    def after_step(self, model: nn.Module, step: int, rate: float) -> None:
        """Called after the optimiser's step number ``step`` (from 0), whose schedule factor was ``rate``; the
        gradients of that step are still there.
        """

    def state(self, model: nn.Module) -> dict[str, Any]:
        """What a resumed run needs beyond parameters and optimiser: tensors and plain values."""
        return {}

    def load_state(self, model: nn.Module, state: dict[str, Any]) -> None:
        """Take back what ``state`` gave; called after ``start``."""

    def fit(self, model: nn.Module, score: Score, data: FitData, generator: torch.Generator) -> dict[str, float]:
        """What is determined after training (temperature, curvature, noise scale); returns what the log should say."""
        return {}

    def predict(
        self,
        model: nn.Module,
        score: Score,
        batches: Sequence[Any],
        *,
        n: int | None,
        generator: torch.Generator | None,
        max_tokens_per_forward: int,
    ) -> Tensor:
        """Scores (S, N, C) of every example under S = n draws, or under the mean for n = None (S = 1).

        See ``bnn.predictive.predict``. A deterministic method makes one pass whatever n.
        """
        return predict(
            model,
            score,
            batches,
            n=n if self.stochastic else None,
            sample=self.sample,
            generator=generator,
            max_tokens_per_forward=max_tokens_per_forward,
        )

    def modes(self, n: int) -> list[int | str]:
        """The predictions that there are: S, or ``mean`` for one pass; the first is the method's own, once fitted."""
        return [n, "mean"] if self.stochastic else ["mean"]


def of_type(loaded: PeftModel, peft_type: str, folder: str | Path, adapter_name: str = "default") -> PeftModel:
    """The model; raises ValueError where what was loaded is no adapter of this type, or of a model of other layers."""
    check_kind(loaded.peft_config[adapter_name], peft_type, folder)
    check_layers(loaded, folder, adapter_name)
    return loaded


def check_kind(config: PeftConfig, peft_type: str, folder: str | Path) -> None:
    """Raise ValueError where an adapter is of another type than the method takes, by PEFT's names for them."""
    kind = str(config.peft_type.value)  # type: ignore[union-attr]
    if kind != peft_type:
        remedy = "bnn.bayesianize_ makes one of LoRA" if (kind, peft_type) == ("LORA", "SGP_LORA") else "choose another"
        raise ValueError(f"{folder} holds an adapter of type {kind}, and this method takes {peft_type}: {remedy}")


def check_layers(loaded: PeftModel, folder: str | Path, adapter_name: str) -> None:
    """Raise ValueError where the file of an adapter that was loaded is one of a model of other layers."""
    if (file := Path(folder) / SAFETENSORS_WEIGHTS_NAME).is_file():
        with safe_open(str(file), "pt") as tensors:
            saved = {name for name in tensors.keys() if ".lora_" in name}  # noqa: SIM118  # no mapping
        state = get_peft_model_state_dict(loaded, adapter_name=adapter_name, save_embedding_layers=False)
        own = {name for name in state if ".lora_" in name}
        if differing := sorted(saved ^ own):
            where = "the file" if differing[0] in saved else "the model"
            raise ValueError(f"{folder} holds an adapter of another model: {differing[0]} is in {where} alone")


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Named parameters with gradient."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def check_targets(model: nn.Module, targets: list[str] | str) -> None:
    """Refuse target modules that match nothing, before PEFT silently leaves them out; a text is for PEFT to read.

    Raises:
        ValueError: naming the target, near matches and what the model has.
    """
    if isinstance(targets, str):
        return
    weights = {name: getattr(m, "weight", None) for name, m in model.named_modules()}
    linear = {name for name, weight in weights.items() if isinstance(weight, Tensor) and weight.dim() == 2}
    suffixes = sorted({name.rsplit(".", 1)[-1] for name in linear})
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            near = difflib.get_close_matches(target, suffixes)
            hint = f"did you mean {', '.join(near)}?" if near else f"the model has {', '.join(suffixes)}"
            raise ValueError(f"target module {target!r} matches no linear layer of the model: {hint}")
