"""Training-free Bayesianization of a trained LoRA (TFB; Shi et al., NeurIPS 2025, arXiv 2412.05723)."""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from bnn.lora import plain_layers
from bnn.methods.base import FitData, PointEstimate, Schedule, Score
from bnn.methods.mle import MLE
from bnn.metrics import nll

FILE = "tfb.json"


class TFB(MLE):
    """Isotropic Gaussian noise on the update of a LoRA trained by maximum likelihood.

    With B = U diag(d) V^T and A' = V^T A, row i of A' gets the standard deviation Omega_i = sigma_q / (d_i + d_floor)
    (Shi et al., 2025, with the floor of their code), so B A = U diag(d) A' gets the noise
    sigma_q U diag(d / (d + d_floor)) E, E ~ N(0, I) of shape (r, d_in): standard deviation sigma_q along every
    direction of U whose d_i is well above the floor, less below it, none for B = 0. ``fit`` bisects for the largest
    sigma_q whose Monte-Carlo predictive NLL on anchor examples, from the training split, is at most 1 + eps times the
    adapter's own. The mean of the posterior is the adapter.

    Training is maximum likelihood's, and so is prediction until ``fit`` has run (one pass, whatever n).

    Args:
        eps: accepted relative rise of the NLL, >= 0.
        pseudo_labels: take the adapter's own predictions for labels.
        anchor_examples: number of training examples to use (rounded up to whole batches); None for all.
        sigma_max: upper end of the search, standard deviation of an entry of B A before alpha/r.
        search_steps: number of bisections; sigma_q is found to sigma_max / 2^search_steps.
        search_samples: draws per evaluation of the NLL.
        d_floor: > 0, added to the singular values of B.

    Raises:
        ValueError: for a value out of its range.
    """

    stochastic = True
    fitted_to = ("train",)

    def __init__(
        self,
        eps: float,
        pseudo_labels: bool,
        anchor_examples: int | None,
        sigma_max: float,
        search_steps: int,
        search_samples: int,
        d_floor: float,
    ) -> None:
        positive = {
            "sigma_max": sigma_max,
            "search_steps": search_steps,
            "search_samples": search_samples,
            "d_floor": d_floor,
        }
        for name, value in positive.items():
            if value <= 0:
                raise ValueError(f"method=tfb needs {name} > 0, got {value}")
        if anchor_examples is not None and (type(anchor_examples) is not int or anchor_examples < 1):
            raise ValueError(
                f"method.factory.anchor_examples={anchor_examples} must be a whole number, at least 1, or null for all"
            )
        if eps < 0:
            raise ValueError(f"method=tfb needs eps >= 0, got {eps}")
        self.eps = eps
        self.pseudo_labels = pseudo_labels
        self.anchor_examples = anchor_examples
        self.sigma_max = sigma_max
        self.search_steps = search_steps
        self.search_samples = search_samples
        self.d_floor = d_floor
        self.sigma_q: float | None = None

    def adapt(self, model: nn.Module, lora: dict[str, Any]) -> PeftModel:
        """See ``Method.adapt``; raises ValueError for what could not be fitted, before anything is trained."""
        adapted = super().adapt(model, lora)
        plain_layers(adapted, "method=tfb")
        return adapted

    def start(self, model: nn.Module, schedule: Schedule) -> None:
        """See ``Method.start``; a sigma_q that was loaded is forgotten where the adapter is about to change."""
        if schedule.total_steps:
            self.sigma_q = None

    @contextmanager
    def sample(self, model: nn.Module, n: int, generator: torch.Generator | None) -> Iterator[PointEstimate]:
        """See ``Method.sample``: no noise in training mode, nor before ``fit``."""
        with ExitStack() as stack:
            if self.sigma_q is not None and not model.training:
                stack.enter_context(noisy(model, self.sigma_q, self.d_floor, n, generator))
            yield PointEstimate()

    def fit(self, model: nn.Module, score: Score, data: FitData, generator: torch.Generator) -> dict[str, float]:
        """Find sigma_q; every candidate sees the same noise E, so that they are compared on equal terms.

        Returns:
            ``sigma_q``; ``at_maximum``, 1 where sigma_max itself is acceptable; ``nll_mean`` and ``nll``, those of
            the anchor examples under the adapter and under sigma_q, nats.
        """
        anchor = spread(data.train, self.anchor_examples)
        state = generator.get_state()

        def scores_at(sigma_q: float | None) -> Tensor:
            self.sigma_q = sigma_q
            generator.set_state(state)
            n, tokens = self.search_samples, data.max_tokens_per_forward
            return self.predict(model, score, anchor, n=n, generator=generator, max_tokens_per_forward=tokens)

        mean = scores_at(None)
        answer = mean[0].argmax(dim=-1) if self.pseudo_labels else torch.cat([b.answer for b in anchor]).cpu()
        nll_mean = nll(mean, answer)
        allowed = (1 + self.eps) * nll_mean
        low, high, reached = 0.0, self.sigma_max, nll_mean
        candidate = self.sigma_max
        for _ in range(self.search_steps + 1):
            found = nll(scores_at(candidate), answer)
            if found <= allowed:
                low, reached = candidate, found
            else:
                high = candidate
            if low == high:
                break
            candidate = (low + high) / 2
        self.sigma_q = low
        return {"sigma_q": low, "at_maximum": float(low == self.sigma_max), "nll_mean": nll_mean, "nll": reached}

    def predict(self, *args: Any, n: int | None, **kwargs: Any) -> Tensor:
        """See ``Method.predict``; one pass of the mean before ``fit``."""
        return super().predict(*args, n=n if self.sigma_q is not None else None, **kwargs)

    def modes(self, n: int) -> list[int | str]:
        """See ``Method.modes``; ``mean`` alone before ``fit``."""
        return ["mean"] if self.sigma_q is None else super().modes(n)

    def save(self, model: PeftModel, folder: str | Path) -> None:
        """See ``Method.save``: the adapter and sigma_q, from which the posterior follows."""
        super().save(model, folder)
        (Path(folder) / FILE).write_text(json.dumps({"sigma_q": self.sigma_q}) + "\n")

    def load(self, model: nn.Module, folder: str | Path) -> PeftModel:
        """See ``Method.load``; sigma_q is to be fitted for an adapter saved by ``method=mle``."""
        path = Path(folder) / FILE
        self.sigma_q = json.loads(path.read_text())["sigma_q"] if path.exists() else None
        loaded = super().load(model, folder)
        plain_layers(loaded, "method=tfb")
        return loaded


def spread(batches: Sequence[Any], examples: int | None) -> list[Any]:
    """About evenly spaced batches with at least ``examples`` examples, where there are so many; all for None.

    Batches come sorted by length, so the first ones would not represent the split.
    """
    total = sum(len(batch.answer) for batch in batches)
    if examples is None or examples >= total:
        return list(batches)
    for count in range(1, len(batches)):
        chosen = [batches[(2 * i + 1) * len(batches) // (2 * count)] for i in range(count)]
        if sum(len(batch.answer) for batch in chosen) >= examples:
            return chosen
    return list(batches)


def noise_frame(B: Tensor, d_floor: float) -> Tensor:
    """U diag(d / (d + d_floor)) V^T for B = U diag(d) V^T, (d_out, r).

    It stands for U diag(d / (d + d_floor)), to which E ~ N(0, I) makes it equal in distribution (V^T E ~ E), but does
    not depend on the signs and rotations that an SVD leaves open.
    """
    U, d, Vh = torch.linalg.svd(B.to(torch.promote_types(B.dtype, torch.float32)), full_matrices=False)
    return (U * (d / (d + d_floor))) @ Vh


@contextmanager
def noisy(
    model: nn.Module, sigma_q: float, d_floor: float, n: int, generator: torch.Generator | None
) -> Iterator[None]:
    """Add n draws of (alpha/r) sigma_q F E x to the output of every LoRA layer, F its ``noise_frame``.

    Rows i*B to (i+1)*B of a batch of n*B rows use draw i. Noise is drawn sample by sample, so results do not depend
    on how samples are split over forwards.

    Args:
        model: with LoRA on linear layers, not merged.
        sigma_q: standard deviation of the noise along each direction of F, before alpha/r.
        d_floor: see ``TFB``.
        n: number of draws, at least 1.
        generator: source of randomness; the global one of the device if None.

    Raises:
        ValueError: for a layer that is no plain LoRA on a linear layer, or is merged; for rows that n does not divide.
    """
    layers = plain_layers(model, "method=tfb")
    with torch.no_grad():
        frames = [
            sigma_q * layer.scaling[name] * noise_frame(layer.lora_B[name].weight, d_floor) for layer, name in layers
        ]
        shapes = [layer.lora_A[name].weight.shape for layer, name in layers]
        draws = [[_normal(s, F, generator) for s, F in zip(shapes, frames, strict=True)] for _ in range(n)]
    with ExitStack() as stack:
        for (layer, _), F, E in zip(layers, frames, zip(*draws, strict=True), strict=True):
            stack.callback(layer.register_forward_hook(_adder(F, torch.stack(E))).remove)
        yield


def _normal(shape: torch.Size, like: Tensor, generator: torch.Generator | None) -> Tensor:
    source = like.device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=source, dtype=like.dtype).to(like.device)


def _adder(F: Tensor, E: Tensor) -> Any:
    """Forward hook that adds F E_i x to the rows of draw i; F (d_out, r), E (n, r, d_in)."""
    n = len(E)

    def add(layer: LoraLayer, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        if layer.disable_adapters:
            return output
        if len(x) % n:
            raise ValueError(f"a batch of {len(x)} rows is not {n} draws of equally many rows: tile it {n} times")
        rows = x.to(E.dtype).reshape(n, -1, x.shape[-1])
        noise = torch.bmm(rows, E.mT) @ F.mT
        return output + noise.view_as(output).to(output.dtype)

    return add
