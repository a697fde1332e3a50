"""BLoB (Wang et al., NeurIPS 2024, arXiv 2406.11675), and what methods with a random A share."""

import math
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bnn.lora import active_adapters, check_plain
from bnn.methods.base import Method, Schedule, check_targets, trainable
from bnn.methods.blob_layer import BLoBA, RandomA
from bnn.noise import draw_noise


class LiveDraws:
    """What ``sample`` yields: the KL of all layers.

    Args:
        layers: the random matrices.
        in_objective: whether ``kl()`` has a gradient.
    """

    def __init__(self, layers: list[RandomA], in_objective: bool) -> None:
        self.layers = layers
        self.in_objective = in_objective

    def kl(self) -> Tensor:
        """KL[q || p] summed over the layers, nats, a scalar."""
        device = self.layers[0].weight.device
        with torch.set_grad_enabled(self.in_objective and torch.is_grad_enabled()):
            return torch.stack([layer.kl().to(device) for layer in self.layers]).sum()


class RandomAMethod(Method):
    """LoRA whose A is random and whose B is not, trained on the negative log-likelihood of draws of A.

    As in BLoB's reference code the KL does not enter the gradient of the loss but has an optimiser of its own: after
    step t, gradient descent on the KL (not divided by N) with step size kl_lr * schedule factor * pi_t. With
    kl_lr = None the objective is the ELBO's instead, beta * KL / N with ``train.beta``; without, ``train.beta`` only
    enters the loss that is logged.

    Args:
        prior_sd: standard deviation of the prior.
        init_eps: initial spread, see the layer.
        kl_lr: step size of the KL's gradient descent; None: the KL is part of the objective.
        gamma: sets the number of steps over which the KL's weights grow, see ``kl_period``; None: pi = 1 /
            steps_per_epoch.

    Raises:
        ValueError: for a value that is not positive.
    """

    stochastic = True
    extra_file: str
    """File in the adapter's folder that holds what plain LoRA has no place for."""

    def __init__(self, prior_sd: float, init_eps: float, kl_lr: float | None, gamma: float | None) -> None:
        for name, value in (("prior_sd", prior_sd), ("init_eps", init_eps), ("kl_lr", kl_lr), ("gamma", gamma)):
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}: correct it, or null if it may be left out")
        self.prior_sd = prior_sd
        self.init_eps = init_eps
        self.kl_lr = kl_lr
        self.gamma = gamma
        self._schedule: Schedule | None = None

    def replace(self, layer: LoraLayer, name: str, saved: dict[str, Tensor] | None) -> RandomA:
        """The random matrix for the A of ``layer``'s adapter ``name``, from saved tensors if there are any."""
        raise NotImplementedError

    def adapt(self, model: nn.Module, lora: dict[str, Any]) -> PeftModel:
        """See ``Method.adapt``."""
        check_targets(model, lora["target_modules"])
        adapted = self.attach(model, LoraConfig(**lora))
        self._replace_all(adapted, None)
        return adapted

    def load(self, model: nn.Module, folder: str | Path) -> PeftModel:
        """See ``Method.load``; a plain LoRA folder becomes the mean, with the initial spread."""
        adapted = super().load(model, folder)
        extra = Path(folder) / self.extra_file
        self._replace_all(adapted, load_file(extra) if extra.exists() else None)
        return adapted

    def save(self, model: PeftModel, folder: str | Path) -> None:
        """Write the mean as a plain LoRA adapter, which PEFT alone can load, and the rest beside it."""
        state = model.state_dict()
        extra: dict[str, Tensor] = {}
        for path, layer in self._own(model):
            for name in [key for key in state if key.startswith(f"{path}.")]:
                del state[name]
            state[f"{path}.weight"] = layer.weight.detach().contiguous()
            saved = f"{path.removesuffix(self.adapter_name)}default"
            extra |= {f"{saved}.{n}": t.detach().cpu().contiguous() for n, t in layer.extra_tensors().items()}
        which = [self.adapter_name]
        model.save_pretrained(str(folder), selected_adapters=which, save_embedding_layers=False, state_dict=state)
        save_file(extra, self.inside(folder) / self.extra_file)

    def _own(self, model: nn.Module) -> list[tuple[str, RandomA]]:
        """The random matrices of the method's own adapter, with their paths."""
        return [own for own in random_layers(model) if own[0].endswith(f".{self.adapter_name}")]

    def _replace_all(self, model: PeftModel, saved: dict[str, Tensor] | None) -> None:
        adapter = model.active_adapter
        config = model.peft_config[adapter]
        if type(config) is not LoraConfig or config.use_dora:
            kind = "DoRA" if type(config) is LoraConfig else type(config).__name__
            raise ValueError(f"a random A needs a plain LoRA adapter, not {kind}: save one with method=mle")
        for path, layer in list(model.named_modules()):
            if not isinstance(layer, LoraLayer):
                continue
            check_plain(layer, adapter, path, "a random A")
            A = layer.lora_A[adapter]
            prefix = f"{path}.lora_A.default."
            own = None
            if saved is not None:
                own = {key.removeprefix(prefix): t.to(A.weight) for key, t in saved.items() if key.startswith(prefix)}
                if not own:
                    raise ValueError(f"{self.extra_file} has nothing for {prefix[:-1]}: it belongs to another adapter")
            random = self.replace(layer, adapter, own)
            random.train(A.training)
            layer.lora_A[adapter] = random.requires_grad_(A.weight.requires_grad)

    def parameter_groups(self, model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """The random A, whose prior is its only decay, and the rest (B) with ``weight_decay``."""
        random = {id(p) for _, layer in self._own(model) for p in layer.parameters()}
        parameters = [p for _, p in trainable(model)]
        return [
            {"params": [p for p in parameters if id(p) in random], "lr": lr, "weight_decay": 0.0},
            {"params": [p for p in parameters if id(p) not in random], "lr": lr, "weight_decay": weight_decay},
        ]

    @contextmanager
    def sample(self, model: nn.Module, n: int, generator: torch.Generator | None) -> Iterator[LiveDraws]:
        """See ``Method.sample``. Noise is drawn sample by sample for all layers, so the split of n does not matter.

        Raises:
            ValueError: for n < 1, without an active random layer, for a merged adapter, or inside another sample.
        """
        active = [layer.lora_A[name] for _, layer, name in active_adapters(model) if name in layer.lora_A]
        layers = [layer for layer in active if isinstance(layer, RandomA)]
        if n < 1 or not layers:
            raise ValueError(f"expected n >= 1 draws of at least one random layer, got n={n}, {len(layers)} layers")
        if any(getattr(module, "merged_adapters", None) for module in model.modules()):
            raise ValueError("the adapter is merged, so there is nothing to draw: call unmerge_adapter first")
        if any(layer.eps is not None for layer in layers):
            raise ValueError("draws are already live: leave the outer sample first")
        sizes = [layer.noise_shape.numel() for layer in layers]
        first = next(layers[0].parameters())
        noise = torch.stack([draw_noise(sum(sizes), first.device, generator, first.dtype) for _ in range(n)])
        before_forward = model.register_forward_pre_hook(partial(expect_rows, layers), with_kwargs=True)
        try:
            for layer, eps in zip(layers, noise.split(sizes, dim=1), strict=True):
                where = next(layer.parameters())
                layer.hold(eps.reshape(n, *layer.noise_shape).to(where), generator)
            yield LiveDraws(layers, in_objective=self.kl_lr is None)
        finally:
            before_forward.remove()
            for layer in layers:
                layer.hold(None)

    def start(self, model: nn.Module, schedule: Schedule) -> None:
        """Remember the schedule, of which ``pi`` is a function, and warn where training ends before the KL acts."""
        self._schedule = schedule
        if (
            self.kl_lr is not None
            and self.gamma is not None
            and 0 < schedule.total_steps < kl_period(schedule, self.gamma)
        ):
            warnings.warn(
                f"the KL's weights peak at step {kl_period(schedule, self.gamma)}, but training has "
                f"{schedule.total_steps}: the KL will hardly act; set method.factory.gamma=null for equal weights",
                stacklevel=2,
            )

    def after_step(self, model: nn.Module, step: int, rate: float) -> None:
        """The KL's own gradient step, see the class."""
        if self.kl_lr is None:
            return
        if self._schedule is None:
            raise ValueError("the weights of the KL depend on the schedule: call start before after_step")
        size = self.kl_lr * rate * kl_weight(step, self._schedule, self.gamma)
        for _, layer in self._own(model):
            layer.kl_step(size)


class BLoB(RandomAMethod):
    """Bayesian low-rank adaptation by backpropagation: A ~ N(M, G^4) entrywise, Flipout in training.

    Prediction averages over S draws of A, each one function for all examples. Signs of Flipout are drawn per row, as
    in Wen et al. (2018); the reference code draws them per token, and uses Flipout at prediction too.
    """

    extra_file = "blob.safetensors"

    def replace(self, layer: LoraLayer, name: str, saved: dict[str, Tensor] | None) -> BLoBA:
        """See ``RandomAMethod.replace``."""
        M = layer.lora_A[name].weight.detach()
        return BLoBA.start(M, self.init_eps, self.prior_sd) if saved is None else BLoBA(M, saved["G"], self.prior_sd)


def random_layers(model: nn.Module) -> list[tuple[str, RandomA]]:
    """The random matrices of a model with their paths, in the order of its modules."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, RandomA)]


def expect_rows(layers: list[RandomA], model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward pre-hook: tells the layers how many rows come, so that none draws within a compiled forward."""
    inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    for layer in layers if inputs else ():
        layer.expect(len(inputs[0]))


def kl_period(schedule: Schedule, gamma: float) -> int:
    """M = floor(100 N^(pi / gamma) / batch size) steps, the period of the reference code; at least 1.

    The batch size is taken as N / steps_per_epoch.
    """
    N = schedule.n_train
    try:
        return max(1, int(100 * N ** (math.pi / gamma) * schedule.steps_per_epoch / N))
    except OverflowError:  # gamma is tiny
        return sys.maxsize


def kl_weight(step: int, schedule: Schedule, gamma: float | None) -> float:
    """pi_i = 2^i / (2^(M+1) - 1), i = 1, ..., M, again and again: the KL's weight at ``step`` (from 0).

    The weights of a period sum to 1 within 2^-M. They grow, where those of Blundell et al. (ICML 2015, Section 3.4)
    shrink, and the period is not the epoch (``kl_period``). For gamma = None, 1 / steps_per_epoch.
    """
    if gamma is None:
        return 1 / schedule.steps_per_epoch
    M = kl_period(schedule, gamma)
    return 2.0 ** (step % M - M) / (1 - 2.0 ** -(M + 1))
