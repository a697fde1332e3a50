"""Marginal likelihood and linearised predictive of a Kronecker-factored Laplace posterior."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bnn.methods.laplace_curvature import Kronecker, output_gradients, unit_directions


def log_evidence(log_likelihood: Tensor, square_norm: Tensor, eigenvalues: Tensor, log_precision: Tensor) -> Tensor:
    """Laplace's log p(D), nats (MacKay, 1992; Immer et al., ICML 2021).

    log p(D | theta) - p/2 |theta|^2 - 1/2 (log det(H + p I) - P log p), for the prior N(0, I / p).

    Args:
        log_likelihood: at the mode, summed over the training examples, nats.
        square_norm: |theta|^2.
        eigenvalues: of H, (P,).
        log_precision: log p.
    """
    p = log_precision.exp()
    return log_likelihood - 0.5 * p * square_norm - 0.5 * (torch.log1p(eigenvalues / p)).sum()


def fit_precision(
    log_likelihood: Tensor, square_norm: Tensor, eigenvalues: Tensor, *, start: float, steps: int, lr: float
) -> float:
    """Prior precision that maximises ``log_evidence``, by ``steps`` of Adam on log p from ``start``."""
    log_precision = torch.tensor(start, device=eigenvalues.device).log().requires_grad_()
    optimizer = torch.optim.Adam([log_precision], lr=lr)
    with torch.enable_grad():
        for _ in range(steps):
            optimizer.zero_grad()
            (-log_evidence(log_likelihood, square_norm, eigenvalues, log_precision)).backward()
            optimizer.step()
    return log_precision.exp().item()


def linearised(
    model: nn.Module,
    score: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    matrices: dict[str, nn.Linear],
    factors: dict[str, Kronecker],
    precisions: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Mean (rows, C) and, for K precisions p, covariance J (H + p I)^-1 J^T (K, rows, C, C) of the scores.

    Absent choices have covariance 0.
    """
    scores, inputs, passes = output_gradients(model, score, batch, matrices, unit_directions)
    rotated = {name: x @ factors[name].a_vectors for name, x in inputs.items()}
    rows: dict[str, list[Tensor]] = {name: [] for name in inputs}
    for grads in passes:
        for name, g in grads.items():
            rows[name].append(torch.einsum("nto,nti->noi", g @ factors[name].g_vectors, rotated[name]))
    covariance = scores.new_zeros(len(precisions), *scores.shape, scores.shape[-1])
    for name, row in rows.items():
        jacobian, values = torch.stack(row, 1), factors[name].eigenvalues()
        for k, p in enumerate(precisions):
            root = jacobian * (values + p).rsqrt()
            covariance[k] += torch.einsum("ncoi,ndoi->ncd", root, root)
    return scores, covariance


def draw(mean: Tensor, covariance: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
    """n draws of N(mean, covariance), (n, N, C) float32, from means (N, C) and covariances (N, C, C) on the CPU.

    Drawn for all examples at once in float64, so that the split into batches does not matter.
    """
    values, vectors = torch.linalg.eigh(covariance.double())
    root = vectors * values.clamp_min(0).sqrt()[:, None]
    device = generator.device if generator is not None else mean.device
    noise = torch.randn(n, *mean.shape, generator=generator, dtype=torch.float64, device=device).to(mean.device)
    return (mean.double() + torch.einsum("nck,snk->snc", root, noise)).float()
