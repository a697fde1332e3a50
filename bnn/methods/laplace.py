"""Laplace-LoRA (Yang et al., *Bayesian Low-Rank Adaptation for Large Language Models*, ICLR 2024, arXiv 2308.13111)."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from bnn.lora import plain_layers
from bnn.methods.base import FitData, Schedule, Score
from bnn.methods.laplace_curvature import Kronecker, check_width, kfac, lora_matrices
from bnn.methods.laplace_predictive import draw, fit_precision, linearised
from bnn.methods.mle import MLE
from bnn.metrics import nll


class Laplace(MLE):
    """MLE's adapter, then N(theta_MAP, (H + p I)^-1) over its matrices, with H by KFAC on the training data.

    The factors are exact d x d matrices; the paper's low-rank form of the wide ones is not used.

    Args:
        layers: ``all`` LoRA matrices, or the ``last`` adapted layer's only.
        precision_by: what p, 1 / variance, maximises: the Laplace ``evidence`` of the training split, or the likelihood
            of the ``validation`` split. The evidence counts A's distance from 0, though A does not start there: it
            tends to leave too much variance.
        prior_precision: p before it is fitted.
        steps: of Adam on log p, by evidence.
        lr: their learning rate.
        precisions: values of p that are tried, by validation.
        max_dim: the widest factor allowed, a bound on memory.
        draws: S of every prediction, whatever is asked for elsewhere: Gaussian scores cost nothing to draw.

    Raises:
        ValueError: for another ``precision_by``, no precisions, draws below 1, or a value out of its range.
    """

    stochastic = True

    def __init__(
        self,
        layers: str,
        precision_by: str,
        prior_precision: float,
        steps: int,
        lr: float,
        precisions: Sequence[float],
        max_dim: int,
        draws: int,
    ) -> None:
        if draws < 1:
            raise ValueError(f"method=laplace needs draws >= 1, got {draws}")
        if precision_by not in ("evidence", "validation"):
            raise ValueError(f"precision_by={precision_by!r} is unknown: use evidence or validation")
        if not precisions or not all(0 < p < math.inf for p in precisions):
            raise ValueError(f"method=laplace needs finite precisions > 0 to try, got {list(precisions)}")
        for name, value in (("prior_precision", prior_precision), ("lr", lr)):
            if not 0 < value < math.inf:
                raise ValueError(f"method=laplace needs a finite {name} > 0, got {value}")
        if steps < 0:
            raise ValueError(f"method=laplace needs steps >= 0, got {steps}")
        self.layers = layers
        self.precision_by = precision_by
        self.fitted_to = ("train", "validation") if precision_by == "validation" else ("train",)
        self.prior_precision = prior_precision
        self.steps = steps
        self.lr = lr
        self.precisions = list(precisions)
        self.max_dim = max_dim
        self.draws = draws
        self.factors: dict[str, Kronecker] = {}
        self.precision = prior_precision

    def adapt(self, model: nn.Module, lora: dict[str, Any]) -> PeftModel:
        """See ``Method.adapt``; raises ValueError for what is too wide to be fitted, before anything is trained."""
        adapted = super().adapt(model, lora)
        self._check(adapted)
        return adapted

    def _check(self, adapted: PeftModel) -> None:
        """Raise ValueError for a variant of LoRA, whose derivatives are others, and for what is too wide."""
        plain_layers(adapted, "method=laplace")
        check_width(lora_matrices(adapted, self.layers), self.max_dim)

    def start(self, model: nn.Module, schedule: Schedule) -> None:
        """See ``Method.start``; a curvature that was loaded is forgotten where the adapter is about to change."""
        if schedule.total_steps:
            self.factors, self.precision = {}, self.prior_precision

    def fit(self, model: nn.Module, score: Score, data: FitData, generator: torch.Generator) -> dict[str, float]:
        """Curvature from the training split, and the prior precision; see ``Method.fit``.

        Raises:
            ValueError: in training mode, or without validation examples where p is fitted to them.
        """
        if model.training:
            raise ValueError("curvature in training mode would apply dropout: call model.eval() first")
        by_validation = self.precision_by == "validation"
        if by_validation and not data.validation:
            raise ValueError("there are no validation examples to fit p to: set method.factory.precision_by=evidence")
        matrices = lora_matrices(model, self.layers)
        self.factors = kfac(model, score, data.train, matrices, self.max_dim)
        if by_validation:
            self.precision = self._most_likely(model, score, data.validation, generator)
        else:
            self.precision = self._most_evident(model, score, data.train, matrices)
        return {"prior_precision": self.precision}

    def _most_likely(self, model: nn.Module, score: Score, batches: Sequence[Any], generator: torch.Generator) -> float:
        """The p under which the answers of ``batches`` have the lowest NLL."""
        mean, covariance = self._moments(model, score, batches, self.precisions)
        answer = torch.cat([b.answer for b in batches]).cpu()
        state, found = generator.get_state(), {}
        for p, own in zip(self.precisions, covariance, strict=True):
            generator.set_state(state)  # the same noise for all
            found[p] = nll(draw(mean, own, self.draws, generator), answer)
        return min(found, key=found.__getitem__)

    def _most_evident(
        self, model: nn.Module, score: Score, batches: Sequence[Any], matrices: dict[str, nn.Linear]
    ) -> float:
        """The p of the highest evidence."""
        with torch.no_grad():
            terms = [-cross_entropy(score(model, b).float(), b.answer, reduction="sum") for b in batches]
            square_norm = torch.stack([m.weight.float().square().sum() for m in matrices.values()]).sum()
        values = torch.cat([k.eigenvalues().flatten() for k in self.factors.values()])
        start, log_likelihood = self.prior_precision, torch.stack(terms).sum()
        return fit_precision(log_likelihood, square_norm, values, start=start, steps=self.steps, lr=self.lr)

    def _moments(
        self, model: nn.Module, score: Score, batches: Sequence[Any], precisions: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        """``linearised`` of all batches, on the CPU: (N, C) and (K, N, C, C)."""
        matrices = lora_matrices(model, self.layers)
        device = next(iter(matrices.values())).weight.device
        self.factors = {name: Kronecker(*(t.to(device) for t in factor)) for name, factor in self.factors.items()}
        parts = [linearised(model, score, b, matrices, self.factors, precisions) for b in batches]
        width = max(mean.shape[-1] for mean, _ in parts)
        gaps = [width - mean.shape[-1] for mean, _ in parts]
        mean = torch.cat([pad(m.cpu(), (0, g), value=-torch.inf) for (m, _), g in zip(parts, gaps, strict=True)])
        covariance = [pad(c.cpu(), (0, g, 0, g)) for (_, c), g in zip(parts, gaps, strict=True)]
        return mean, torch.cat(covariance, 1)

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
        """Draws of the linearised predictive; the MAP for n = None. See ``Method.predict``.

        Raises:
            ValueError: before ``fit``, in training mode, without batches, or for n < 1.
        """
        if n is None:
            return super().predict(
                model, score, batches, n=None, generator=generator, max_tokens_per_forward=max_tokens_per_forward
            )
        if n < 1 or not batches or model.training:
            raise ValueError(f"prediction needs n >= 1 (got {n}), batches (got {len(batches)}) and model.eval()")
        if not self.factors:
            raise ValueError("there is no curvature yet: call fit, or load an adapter saved after it")
        mean, (covariance,) = self._moments(model, score, batches, [self.precision])
        return draw(mean, covariance, n, generator)

    def modes(self, n: int) -> list[int | str]:
        """``draws`` and ``mean``, whatever n; ``mean`` alone before ``fit``."""
        return [self.draws, "mean"] if self.factors else ["mean"]

    def save(self, model: PeftModel, folder: str | Path) -> None:
        """Adapter, ``laplace.safetensors`` (eigendecompositions) and ``laplace.json`` (prior precision)."""
        super().save(model, folder)
        for name in ("laplace.json", "laplace.safetensors"):  # of an earlier adapter
            (Path(folder) / name).unlink(missing_ok=True)
        if self.factors:
            tensors = {
                f"{n}|{k}": t.cpu().contiguous() for n, f in self.factors.items() for k, t in f._asdict().items()
            }
            save_file(tensors, str(Path(folder) / "laplace.safetensors"))
            record = {"layers": self.layers, "precision": self.precision}
            (Path(folder) / "laplace.json").write_text(json.dumps(record) + "\n")

    def load(self, model: nn.Module, folder: str | Path) -> PeftModel:
        """An adapter with its curvature, or one of ``method=mle``, to be fitted.

        Raises:
            ValueError: where the curvature is of other layers, or a layer is too wide.
        """
        adapted = super().load(model, folder)
        self._check(adapted)
        self.factors, self.precision = {}, self.prior_precision
        path = Path(folder) / "laplace.json"
        if path.exists():
            record = json.loads(path.read_text())
            if record["layers"] != self.layers:
                raise ValueError(f"the saved curvature has layers={record['layers']}, not {self.layers}: set it so")
            tensors = load_file(str(Path(folder) / "laplace.safetensors"))
            for name in {key.split("|")[0] for key in tensors}:
                self.factors[name] = Kronecker(*(tensors[f"{name}|{field}"] for field in Kronecker._fields))
            self.precision = record["precision"]
        return adapted
