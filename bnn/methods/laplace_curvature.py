"""Kronecker-factored curvature of LoRA matrices (Yang et al., ICLR 2024; Martens and Grosse, ICML 2015).

Written with module hooks: the predictive needs per-example gradients in the Kronecker eigenbasis, so inputs and output
gradients of every LoRA matrix are captured anyway, for any ``score`` and any batch type. The factors are those of
curvlinops (a test compares them where it is installed) except that tokens which reach no score, padding above all, do
not enter averages.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Kronecker(NamedTuple):
    """Eigendecomposition of A (x) G, the curvature of one matrix W of shape (d_out, d_in)."""

    a_values: Tensor
    """(d_in,), of the input covariance (mean over tokens)."""
    a_vectors: Tensor
    g_values: Tensor
    """(d_out,), of the output-gradient covariance (sum over tokens and examples)."""
    g_vectors: Tensor

    def eigenvalues(self) -> Tensor:
        """Eigenvalues of the block, (d_out, d_in)."""
        return self.g_values[:, None] * self.a_values


def lora_matrices(model: nn.Module, layers: str) -> dict[str, nn.Linear]:
    """LoRA matrices by name: ``all``, or those of the ``last`` adapted layer (the output head, if it is adapted).

    Raises:
        ValueError: for another ``layers``, or where there is none.
    """
    if layers not in ("all", "last"):
        raise ValueError(f"layers={layers!r} is unknown: use all or last")
    found = {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and re.search(r"\.lora_[AB]\.", name) and m.weight.requires_grad
    }
    if not found:
        raise ValueError("the model has no trainable LoRA matrices: adapt it with method=laplace or mle first")
    if layers == "last":
        last = _block(list(found)[-1])
        found = {name: m for name, m in found.items() if _block(name) == last}
    return found


def _block(name: str) -> str:
    """Of a matrix's name, that of the numbered block of the model it is in, or of its layer if it is in none."""
    numbered = re.match(r".*?\.\d+(?=\.)", name)
    return numbered.group() if numbered else name.partition(".lora_")[0]


def output_gradients(
    model: nn.Module,
    score: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    matrices: dict[str, nn.Linear],
    directions: Callable[[Tensor], Tensor],
) -> tuple[Tensor, dict[str, Tensor], Iterator[dict[str, Tensor]]]:
    """Scores (rows, C), the input of every matrix (rows, T, d_in), and per direction its output gradients.

    Args:
        model: in evaluation mode; rows must not influence each other.
        score: (model, batch) -> (rows, C), -inf for absent choices.
        batch: what ``score`` takes.
        matrices: of ``lora_matrices``.
        directions: scores (rows, C) -> (K, rows, C); one backward pass each, of sum(direction * scores).

    Raises:
        ValueError: where a matrix does not see (rows, T, d_in), as in a mixture of experts, or sees more than one.
    """
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if name in inputs:
                raise ValueError(f"{name} is used more than once in a pass, which its curvature is not: leave it out")
            inputs[name], outputs[name] = args[0].detach().float(), output

        return hook

    handles = [m.register_forward_hook(keep(name)) for name, m in matrices.items()]
    try:
        with torch.enable_grad():
            scores = score(model, batch).float()
    finally:
        for handle in handles:
            handle.remove()
    for name, x in inputs.items():
        if x.dim() != 3 or len(x) != len(scores):
            raise ValueError(f"{name} sees {tuple(x.shape)}, not ({len(scores)}, tokens, d_in): leave it out of LoRA")
    finite = scores.isfinite()
    ways = directions(scores.detach())

    def passes() -> Iterator[dict[str, Tensor]]:
        for k, way in enumerate(ways):
            value = (scores.masked_fill(~finite, 0.0) * way.masked_fill(~finite, 0.0)).sum()
            grads = torch.autograd.grad(value, list(outputs.values()), retain_graph=k + 1 < len(ways))
            yield {name: g.detach().float() for name, g in zip(outputs, grads, strict=True)}

    return scores.detach(), inputs, passes()


def ggn_directions(scores: Tensor) -> Tensor:
    """s_c = sqrt(p_c) (e_c - p), whose outer products sum to diag(p) - p p^T. (rows, C) -> (C, rows, C)."""
    p = scores.softmax(-1)
    return (p.sqrt()[:, :, None] * (torch.eye(p.shape[-1], device=p.device) - p[:, None])).transpose(0, 1)


def unit_directions(scores: Tensor) -> Tensor:
    """e_c, whose gradients are the rows of the Jacobian. (rows, C) -> (C, rows, C)."""
    eye = torch.eye(scores.shape[-1], device=scores.device)
    return eye[:, None].expand(-1, len(scores), -1)


def check_width(matrices: dict[str, nn.Linear], max_dim: int) -> None:
    """Raise ValueError where a factor would be wider than ``max_dim``."""
    name, widest = max(((name, max(m.weight.shape)) for name, m in matrices.items()), key=lambda item: item[1])
    if widest > max_dim:
        gib = widest**2 * 4 / 2**30
        raise ValueError(
            f"a factor of {widest} x {widest} takes {gib:.2f} GiB a matrix: raise method.factory.max_dim={max_dim}, or "
            f"leave {name.split('.lora_')[0].rpartition('.')[-1]} out of peft.target_modules"
        )


def kfac(
    model: nn.Module,
    score: Callable[[nn.Module, Any], Tensor],
    batches: Sequence[Any],
    matrices: dict[str, nn.Linear],
    max_dim: int,
) -> dict[str, Kronecker]:
    """KFAC-expand (Eschenhagen et al., NeurIPS 2023) of the GGN of the summed cross-entropy over the choices.

    H ~= (1/M sum_t a_t a_t^T) (x) (sum_{t,c} g_tc g_tc^T) over the M tokens whose gradient is not 0 (padding and
    tokens that reach no score drop out). Exact for one such token; otherwise a_t and g_t are taken as uncorrelated
    and the products across tokens of an example are dropped.

    Raises:
        ValueError: where a factor would be wider than ``max_dim``.
    """
    check_width(matrices, max_dim)
    A = {n: m.weight.new_zeros(m.in_features, m.in_features, dtype=torch.float32) for n, m in matrices.items()}
    G = {n: m.weight.new_zeros(m.out_features, m.out_features, dtype=torch.float32) for n, m in matrices.items()}
    count = dict.fromkeys(matrices, 0)
    for batch in batches:
        _, inputs, passes = output_gradients(model, score, batch, matrices, ggn_directions)
        reached = {name: torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device) for name, x in inputs.items()}
        for grads in passes:
            for name, g in grads.items():
                G[name] += torch.einsum("nto,ntp->op", g, g)
                reached[name] |= (g != 0).any(-1)
        for name, x in inputs.items():
            a = x[reached[name]]
            A[name] += a.T @ a
            count[name] += len(a)
    result = {}
    for name in matrices:
        a_values, a_vectors = torch.linalg.eigh(A[name] / max(count[name], 1))
        g_values, g_vectors = torch.linalg.eigh(G[name])
        result[name] = Kronecker(a_values.clamp_min(0), a_vectors, g_values.clamp_min(0), g_vectors)
    return result
