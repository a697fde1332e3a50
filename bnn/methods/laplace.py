"""Laplace-LoRA (Yang et al., *Bayesian Low-Rank Adaptation for Large Language Models*, ICLR 2024, arXiv 2308.13111)."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from bnn.methods.base import FitData, Score
from bnn.methods.laplace_curvature import Kronecker, kfac, lora_matrices
from bnn.methods.laplace_predictive import draw, fit_precision, linearised
from bnn.methods.mle import MLE


class Laplace(MLE):
    """MLE's adapter, then N(theta_MAP, (H + p I)^-1) over its matrices, with H by KFAC on the training data.

    The factors are exact d x d matrices; the paper's low-rank form of the wide ones is not used.

    Args:
        layers: ``all`` LoRA matrices, or the ``last`` adapted layer's only.
        prior_precision: p before it is fitted, 1 / variance.
        steps: of Adam on log p, maximising the Laplace evidence.
        lr: their learning rate.
        max_dim: the widest factor allowed, a bound on memory.
        draws: S of every prediction, whatever is asked for elsewhere: Gaussian scores cost nothing to draw.
    """

    stochastic = True
    fits = True

    def __init__(self, layers: str, prior_precision: float, steps: int, lr: float, max_dim: int, draws: int) -> None:
        if draws < 1:
            raise ValueError(f"method=laplace needs draws >= 1, got {draws}")
        self.layers = layers
        self.prior_precision = prior_precision
        self.steps = steps
        self.lr = lr
        self.max_dim = max_dim
        self.draws = draws
        self.factors: dict[str, Kronecker] = {}
        self.precision = prior_precision

    def fit(self, model: nn.Module, score: Score, data: FitData, generator: torch.Generator) -> dict[str, float]:
        """Curvature and prior precision from the training split; see ``Method.fit``.

        Raises:
            ValueError: in training mode.
        """
        if model.training:
            raise ValueError("curvature in training mode would apply dropout: call model.eval() first")
        matrices = lora_matrices(model, self.layers)
        self.factors = kfac(model, score, data.train, matrices, self.max_dim)
        with torch.no_grad():
            terms = [-cross_entropy(score(model, b).float(), b.answer, reduction="sum") for b in data.train]
            square_norm = torch.stack([m.weight.float().square().sum() for m in matrices.values()]).sum()
        log_likelihood = torch.stack(terms).sum()
        values = torch.cat([k.eigenvalues().flatten() for k in self.factors.values()])
        self.precision = fit_precision(
            log_likelihood, square_norm, values, start=self.prior_precision, steps=self.steps, lr=self.lr
        )
        return {"prior_precision": self.precision}

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
        matrices = lora_matrices(model, self.layers)
        parts = [linearised(model, score, b, matrices, self.factors, self.precision) for b in batches]
        width = max(mean.shape[-1] for mean, _ in parts)
        gaps = [width - mean.shape[-1] for mean, _ in parts]
        mean = torch.cat([pad(m.cpu(), (0, g), value=-torch.inf) for (m, _), g in zip(parts, gaps, strict=True)])
        covariance = torch.cat([pad(c.cpu(), (0, g, 0, g)) for (_, c), g in zip(parts, gaps, strict=True)])
        return draw(mean, covariance, n, generator)

    def modes(self, n: int) -> list[int | str]:
        """``draws`` and ``mean``, whatever n."""
        return [self.draws, "mean"]

    def save(self, model: PeftModel, folder: str | Path) -> None:
        """Adapter, ``laplace.safetensors`` (eigendecompositions) and ``laplace.json`` (prior precision)."""
        super().save(model, folder)
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
            ValueError: where the curvature is of other layers.
        """
        adapted = super().load(model, folder)
        self.factors, self.precision = {}, self.prior_precision
        path = Path(folder) / "laplace.json"
        if path.exists():
            record = json.loads(path.read_text())
            if record["layers"] != self.layers:
                raise ValueError(f"the saved curvature has layers={record['layers']}, not {self.layers}: set it so")
            device = next(adapted.parameters()).device
            tensors = load_file(str(Path(folder) / "laplace.safetensors"), device=str(device))
            for name in {key.split("|")[0] for key in tensors}:
                self.factors[name] = Kronecker(*(tensors[f"{name}|{field}"] for field in Kronecker._fields))
            self.precision = record["precision"]
        return adapted
