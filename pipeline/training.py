"""The training loop: each optimiser step is a function of (seed, step, process), so a resumed run goes on alike."""

import logging
import math
import time
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from bnn.methods.base import trainable
from bnn.objective import Loss, beta_at, learning_rate_at, negative_elbo
from pipeline.compilation import CompiledLayers
from pipeline.evaluation import evaluate_during
from pipeline.graphs import StepGraphs
from pipeline.run import Run, score
from utils.checkpoint import save_checkpoint
from utils.data.batch import Batch
from utils.data.example import Example
from utils.data.order import nth_batch
from utils.run import progress
from utils.seeding import stream_seed
from utils.settings import fingerprint

logger = logging.getLogger("train")


def train(run: Run) -> int:
    """Maximise the ELBO; returns the number of optimiser steps made in all."""
    cfg, model, optimizer = run.cfg, run.model, run.optimizer
    per_step, steps_per_epoch, total = run.per_step, run.steps_per_epoch, run.schedule.total_steps
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    step = restore(run, run.resumed) if run.resumed else 0
    graphs = step_graphs(run)
    layers = CompiledLayers(model) if cfg.train.compile and total else None
    counts = [sum(p.numel() for _, p in trainable(model)), sum(p.numel() for p in model.parameters())]
    logger.info("training %s of %s parameters for %d steps", f"{counts[0]:,}", f"{counts[1]:,}", total)
    if step == 0 < total and cfg.eval.every != "none":
        evaluate_during(run, 0, 0, 0.0)

    model.train()  # all of it: a base model is loaded for evaluation, its adapter is not
    started, seen = time.perf_counter(), 0  # without the time of evaluations and checkpoints
    for step in progress(range(step, total), "training", total - step):  # noqa: B020
        epoch = step // steps_per_epoch
        rate = learning_rate_at(step, total, round(cfg.opt.warmup * total), cfg.opt.schedule)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate
        beta = beta_at(step + 1, cfg.train.beta, round(cfg.train.beta_warmup * total))
        examples = nth_batch(run.data.train, per_step, cfg.seed, epoch, step % steps_per_epoch)
        torch.manual_seed(stream_seed(cfg.seed, "dropout", step, run.world.rank))
        run.generator.manual_seed(stream_seed(cfg.seed, "posterior", step, run.world.rank))
        loss = accumulate(run, examples, beta, graphs, layers)
        update(run, step, rate, loss, examples)
        seen += len(examples)

        done = step + 1
        lr = optimizer.param_groups[0]["lr"]
        if done % cfg.train.log_every == 0 or done == total:
            values = {name: float(value) for name, value in loss._asdict().items()}
            values |= {"beta": beta, "skipped": run.skipped}
            speed = seen / (time.perf_counter() - started)
            run.log.train(epoch=epoch + 1, step=done, lr=lr, examples_per_second=speed, metrics=values)
        every = steps_per_epoch if cfg.eval.every == "epoch" else cfg.eval.every
        evaluated = every != "none" and (done % every == 0 or done == total)
        paused = time.perf_counter()
        if evaluated:
            evaluate_during(run, epoch + 1, done, lr)
            model.train()
        interrupted = run.world.any(run.interrupted)
        if evaluated or done % cfg.train.checkpoint_every == 0 or done == total or interrupted:
            save(run, done)
        started += time.perf_counter() - paused
        if interrupted:
            raise KeyboardInterrupt(f"stopped after step {done}")
    return total


def step_graphs(run: Run) -> StepGraphs | None:
    """CUDA graphs of training steps where ``train.graph_padding`` asks for them; None on a CPU."""
    multiple = run.cfg.train.graph_padding
    if multiple is None or run.device.type != "cuda" or not run.data.train:
        return None
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    most = max(len(example.choices) for example in run.data.train)
    return StepGraphs(parameters, run.generator, run.device, most, multiple)


def accumulate(
    run: Run,
    examples: list[Example],
    beta: float,
    graphs: StepGraphs | None = None,
    layers: CompiledLayers | None = None,
) -> Loss:
    """Backward over this process's micro-batches of a step, each under draws of its own; returns the step's mean loss.

    A micro-batch has ``train.n_mc`` copies, and each copy's rows are shared out among ``train.draws_per_batch`` draws,
    or the largest divisor of their number that divides the rows.
    The weights of all micro-batches sum to 1, so the KL counts once. The members of an ensemble share nothing: each has
    its own gradient, and the loss returned is the mean of theirs.
    """

    def backward(batch: Batch, weight: float | Tensor, beta: float | Tensor) -> Loss:
        draws = n_mc * math.gcd(run.cfg.train.draws_per_batch, len(batch.answer) // n_mc)
        with layers or nullcontext(), run.method.sample(run.model, draws, run.generator) as live:
            loss = negative_elbo(score(run.model, batch), batch.answer, live.kl(), len(run.data.train), beta)
            (weight * loss.loss).backward()
        share = torch.full((), weight, device=run.device) if isinstance(weight, float) else weight
        return Loss(*(share * value.detach() for value in loss))

    n_mc, padding = run.cfg.train.n_mc, graphs.padding if graphs else {}
    parts, members = [], 1
    for micro, weight in run.world.micro_batches(examples, run.cfg.train.batch_size):
        batch = run.encoder.collate(micro, **padding).tile(n_mc)
        for member, _ in enumerate(run.method.members(run.model)):
            members = member + 1
            if graphs:
                parts.append(graphs(backward, batch, weight, beta, variant=member))
            else:
                parts.append(backward(batch.to(run.device), weight, beta))
    sums = [torch.stack(values).sum() / members for values in zip(*parts, strict=True)]
    run.world.sum_(sums)
    return Loss(*sums)


def update(run: Run, step: int, rate: float, loss: Loss, examples: list[Example]) -> None:
    """Sum the gradients over processes, clip, and make the optimiser's step if they are finite."""
    cfg = run.cfg.train
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    run.world.sum_(p.grad for p in parameters if p.grad is not None)
    if cfg.max_grad_norm is None:
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    else:
        parts = run.method.clipped_together(run.model, parameters)
        norm = torch.stack([nn.utils.clip_grad_norm_(own, cfg.max_grad_norm) for own in parts]).norm()
    if torch.isfinite(loss.loss + norm):
        run.optimizer.step()
        run.method.after_step(run.model, step, rate)
    else:
        ids = ", ".join(example.id for example in examples)
        what = f"loss {float(loss.loss)}, gradient norm {float(norm)} at step {step + 1}, examples {ids}"
        if cfg.on_nonfinite == "error":
            raise FloatingPointError(f"{what}: lower opt.lr, set dtype=float32, or train.on_nonfinite=skip")
        run.skipped += 1
        logger.warning("skipped: %s", what)
    run.optimizer.zero_grad(set_to_none=True)


def save(run: Run, step: int) -> None:
    """Write the resumable checkpoint; it does not depend on the number of processes."""
    if not run.world.main:
        return
    state = {
        "parameters": dict(trainable(run.model)),
        "optimizer": run.optimizer.state_dict(),
        "step": step,
        "skipped": run.skipped,
        "best": run.best,
        "method": run.method.state(run.model),
        "fingerprint": fingerprint(run.cfg),
        "data": run.data.digest,
        "base": run.base,
    }
    save_checkpoint(run.folder, state)


def restore(run: Run, state: dict[str, Any]) -> int:
    """Continue from a checkpoint; returns its step."""
    with torch.no_grad():
        for name, parameter in trainable(run.model):
            parameter.copy_(state["parameters"][name])
    run.optimizer.load_state_dict(state["optimizer"])
    run.method.load_state(run.model, state["method"])
    run.best, run.skipped = state["best"], state["skipped"]
    logger.info("resumed at step %d", state["step"])
    return int(state["step"])
