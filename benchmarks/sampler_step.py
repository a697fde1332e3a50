"""The sampler's part of a training step: the call that is timed, and its share of a whole step."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from hydra.utils import instantiate
from torch import nn
from torch.nn import functional as F

from benchmarks.measure import measure
from benchmarks.options import untrained
from bnn import LiveSample, active_factors
from bnn.methods.base import Method
from pipeline.run import CONFIGS
from utils.llm import load_model
from utils.settings import compose, model_settings, plain

BATCH, TOKENS = 8, 40
Draw = Callable[[], AbstractContextManager[LiveSample]]


def training(model: nn.Module, draw: Draw, n: int, parameters: Sequence[nn.Parameter]) -> Callable[[], None]:
    """A draw, its KL, and backward from ones in the place of the model's gradient."""
    factors = active_factors(model)
    shapes = [(f.spec.d_out, f.spec.d_in) if n == 1 else (n, f.spec.d_out, f.spec.d_in) for f in factors]
    one = {f.compute_dtype: torch.ones((), dtype=f.compute_dtype, device=f.W_unit.device) for f in factors}
    gradients = [one[f.compute_dtype].expand(shape) for f, shape in zip(factors, shapes, strict=True)]

    def call() -> None:
        with draw() as live:
            torch.autograd.backward([*(f.weight for f in factors), live.kl()], [*gradients, None])
        for parameter in parameters:
            parameter.grad = None

    return call


def step_share(llm_name: str, device: torch.device, warmup: int, repeats: int) -> dict[str, Any]:
    """The sampler's time, that of a training step of an llm with default settings, and their ratio.

    A step is forward, objective at the last position of ``BATCH`` rows of ``TOKENS`` tokens, backward and AdamW; the
    weights are random.
    """
    cfg = compose(CONFIGS, untrained(llm_name))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    base: Any = load_model(dtype=dtype, device=device, quantization=None, **model_settings(cfg))
    method: Method = instantiate(cfg.method.factory, _convert_="all")
    model: Any = method.adapt(base, plain(cfg.peft))
    groups = method.parameter_groups(model, cfg.opt.lr, cfg.opt.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=tuple(cfg.opt.betas), eps=cfg.opt.eps, fused=device.type == "cuda")
    generator = torch.Generator(device).manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (BATCH, TOKENS), device=device, generator=generator)
    model.train()

    def draw() -> Any:
        return method.sample(model, 1, generator)

    def step() -> None:
        with draw() as live:
            logits = model(input_ids=ids, logits_to_keep=1, use_cache=False).logits[:, -1].float()
            (F.cross_entropy(logits, ids[:, 0]) + live.kl().to(device) / 1000).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    alone = training(model, draw, 1, [p for group in groups for p in group["params"]])
    sampler = measure(alone, device, warmup, repeats)
    whole = measure(step, device, warmup, repeats)
    return {
        "llm": llm_name,
        "batch": BATCH,
        "tokens": TOKENS,
        "factors": len(active_factors(model)),
        "sampler_ms": sampler.median_ms,
        "step_ms": whole.median_ms,
        "share": sampler.median_ms / whole.median_ms,
        "sampler": sampler._asdict(),
        "step": whole._asdict(),
    }
