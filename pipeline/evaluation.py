"""Predictions of a run, during training and at its end; every process predicts its rows of every batch."""

import logging
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from bnn.methods import Method
from bnn.methods.base import FitData, trainable
from bnn.metrics import auroc, evaluate_predictions, mutual_information, predictive_entropy, reliability_bins
from pipeline.run import Run, score
from utils.data.batch import Moved
from utils.data.example import Example
from utils.data.order import length_sorted
from utils.llm.digest import record_base
from utils.plots import plot_curves, plot_reliability
from utils.run import save_predictions
from utils.seeding import make_generator

logger = logging.getLogger("train")


def eval_batches(run: Run, examples: Sequence[Example], shared: bool) -> tuple[list[int], Moved]:
    """Batches by length, on the device while they are used, and the index of the example in each of their rows.

    ``shared``: only this process's rows (``World.rows``), the padding of the whole batch.
    """
    order, packed = [], []
    lengths = [run.encoder.length(example) for example in examples]
    for indices, chosen in length_sorted(examples, lengths, run.cfg.eval.batch_size):
        batch = run.encoder.collate(chosen)
        if shared and run.world.size > 1:
            rows = run.world.rows(len(chosen))
            indices, batch = indices[rows], batch.rows(rows)
        order.extend(indices.tolist())
        packed.append(batch)
    return order, Moved(packed, run.device)


def logits_of(run: Run, examples: Sequence[Example], mc: int | str, stream: str) -> tuple[Tensor, Tensor]:
    """Scores (S, N, C) in the order of ``examples``, and the answers (N,).

    ``mc`` is a number of samples, ``mean`` for one pass with the posterior mean, or ``zero_shot`` for the base model.
    """
    run.model.eval()
    order, packed = eval_batches(run, examples, shared=True)
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
    parts = run.world.gather((order, scores))
    width = max(scores.shape[-1] for _, scores in parts)
    logits = torch.full((len(scores), len(examples), width), -torch.inf)
    for indices, scores in parts:
        logits[:, indices, : scores.shape[-1]] = scores
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


def keep_best(run: Run) -> None:
    """Go back to the parameters with the lowest NLL if ``eval.keep=best``."""
    if run.cfg.eval.keep == "best" and run.best:
        logger.info("keeping the parameters of step %d (lowest NLL on %s)", run.best["step"], run.cfg.eval.split)
        with torch.no_grad():
            for name, parameter in trainable(run.model):
                parameter.copy_(run.best["parameters"][name])


def fit(run: Run) -> None:
    """What the method determines after training, from training and validation data, alike in every process."""
    if not run.method.fitted_to:
        return
    run.model.eval()
    train, validation = (eval_batches(run, part, shared=False)[1] for part in (run.data.train, run.data.validation))
    data = FitData(train, validation, run.schedule.n_train, run.cfg.eval.max_tokens_per_forward)
    found = run.method.fit(run.model, score, data, make_generator(run.cfg.seed, "fit", device=run.device))
    logger.info("fitted: %s", ", ".join(f"{name}={value:.6g}" for name, value in found.items()))


def save_adapter(run: Run) -> None:
    """Save the adapter, and which base weights it belongs to."""
    if run.world.main:
        run.method.save(run.model, run.folder / "adapter")
        record_base(run.folder / "adapter", run.base)


def finish(run: Run, step: int) -> None:
    """Final evaluation on test and the out-of-distribution sets; adapter, predictions and figures."""
    cfg = run.cfg
    keep_best(run)
    if run.method.fitted_to:  # what training has cost outlasts a fit that fails
        save_adapter(run)
    fit(run)
    save_adapter(run)
    epoch = -(-step // max(1, run.steps_per_epoch))
    bins = {}
    zero_shot: list[int | str] = ["zero_shot"] if cfg.eval.zero_shot else []
    for mc in [*zero_shot, *run.method.modes(cfg.eval.n_mc)]:
        if cfg.eval.save_validation and run.data.validation:
            report(run, epoch, step, "validation", mc, *logits_of(run, run.data.validation, mc, "validation"), {})
        inside, answer = logits_of(run, run.data.test, mc, "test")
        report(run, epoch, step, "test", mc, inside, answer, {})
        if mc != "zero_shot":
            bins["mean" if mc == "mean" else f"MC={mc}"] = vars(reliability_bins(inside, answer))
        for name, examples in run.data.ood.items():
            outside, answer = logits_of(run, examples, mc, f"ood:{name}")
            report(run, epoch, step, f"ood:{name}", mc, outside, answer, detection(inside, outside))
    run.log.reliability(bins)
    run.log.close()
    if run.world.main and cfg.eval.figures:
        if step:  # else nothing was trained: no curves
            plot_curves(run.folder)
        plot_reliability(run.folder)
    run.claim = None  # another process may go on with the folder
    logger.info("run folder: %s", run.folder)


def report(
    run: Run, epoch: int, step: int, split: str, mc: int | str, logits: Tensor, answer: Tensor, more: dict[str, float]
) -> None:
    """A [FINAL] line and the scores behind it; ``more`` is only recorded."""
    metrics = evaluate_predictions(logits, answer) | more
    run.log.final(epoch=epoch, step=step, split=split, mc=mc, metrics=metrics)
    if run.world.main:
        sets = {"validation": run.data.validation, "test": run.data.test}
        sets |= {f"ood:{name}": examples for name, examples in run.data.ood.items()}
        name = f"predictions_{split.replace(':', '_')}_mc{mc}.npz"
        save_predictions(run.folder / name, logits, answer, [example.id for example in sets[split]])


def detection(inside: Tensor, outside: Tensor) -> dict[str, float]:
    """AUROC of telling out-of-distribution examples by total and by epistemic uncertainty; scores (S, N, C) each."""
    found = {"auroc_entropy": auroc(predictive_entropy(inside), predictive_entropy(outside))}
    if len(inside) > 1:  # one sample has no mutual information
        found["auroc_mutual_information"] = auroc(mutual_information(inside), mutual_information(outside))
    return found
