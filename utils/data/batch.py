"""Packed batches of examples, and the scores of their choices given the model's logits."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

AT_ONCE = 2**25
"""Logits that become float32 together (128 MiB), if a row has no more."""


@dataclass
class Batch:
    """N examples, each packed as `[padding][prompt] | [choice 1][choice 2]...[padding]`.

    Every prompt ends in the same column, so all tokens to be scored are predicted from the last K = `keep`
    positions. A choice sees the prompt and itself, never another choice, and its positions go on from the
    prompt. The last token of a choice predicts nothing and is left out of the input, so a single-token
    choice adds no input at all.

    Args:
        ids: Example identifiers, N of them.
        input_ids: (N, T) token ids.
        segment: (N, T) what a token belongs to: -1 padding, 0 the prompt, 1 to C the choices.
        position_ids: (N, T) positions, 0 at the first token of the prompt.
        choice_source: (N, C, L) index into the K kept positions whose logits predict the token.
        choice_token: (N, C, L) the tokens to score.
        choice_weight: (N, C, L) weight of each token's log-probability; 0 where nothing is scored.
        choice_exists: (N, C) False where an example has fewer than C choices.
        answer: (N,) index of the right choice.
        keep: K, how many trailing positions need logits.
    """

    ids: tuple[str, ...]
    input_ids: Tensor
    segment: Tensor
    position_ids: Tensor
    choice_source: Tensor
    choice_token: Tensor
    choice_weight: Tensor
    choice_exists: Tensor
    answer: Tensor
    keep: int

    def _tensors(self) -> dict[str, Tensor]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with every tensor on `device`."""
        moved = {name: t.to(device, non_blocking=True) for name, t in self._tensors().items()}
        return Batch(ids=self.ids, keep=self.keep, **moved)

    def rows(self, index: list[int]) -> "Batch":
        """The examples with these indices, padded as they are."""
        return Batch(
            ids=tuple(self.ids[i] for i in index),
            keep=self.keep,
            **{name: t[index] for name, t in self._tensors().items()},
        )

    def tile(self, n: int) -> "Batch":
        """n copies below one another, (n*N) rows: copy i is rows i*N to (i+1)*N - 1."""
        tiled = {name: t.repeat(n, *([1] * (t.dim() - 1))) for name, t in self._tensors().items()}
        return Batch(ids=self.ids * n, keep=self.keep, **tiled)

    def model_inputs(self) -> dict[str, Any]:
        """Keyword arguments for the causal language model's forward, which then gives (N, K, V) logits."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": packed_mask(self.segment),
            "position_ids": self.position_ids,
            "logits_to_keep": self.keep,
            "use_cache": False,
        }


def packed_mask(segment: Tensor) -> Tensor:
    """(N, 1, T, T) bool mask of (N, T) segments (see `Batch`), True where the query (row) sees the key (column).

    A token sees earlier tokens of the prompt and of its own segment. Everything sees itself, so that no row
    is fully masked (an all-masked row gives NaN in some attention kernels). Made when it is used: of all batches
    of a data set it would take far more memory than what it is made from.
    """
    length = segment.shape[1]
    query, key = segment[:, :, None], segment[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool, device=segment.device).tril()
    visible = causal & (query >= 0) & ((key == 0) | (key == query))
    return (visible | torch.eye(length, dtype=torch.bool, device=segment.device)).unsqueeze(1)


class Moved(Sequence[Batch]):
    """Batches on the CPU, each moved to ``device`` whenever it is asked for; nothing here keeps it there."""

    def __init__(self, batches: Sequence[Batch], device: torch.device | str) -> None:
        self._batches = batches
        self._device = device

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> Batch:  # type: ignore[override]  # no slices
        return self._batches[index].to(self._device)


def choice_scores(logits: Tensor, batch: Batch) -> Tensor:
    """Score of every choice: sum over its tokens of weight * log p(token | what comes before).

    Of the size of the logits nothing is formed but their gradient, in their own type.

    Args:
        logits: (N, K, V) logits at the kept positions, of any floating type.
        batch: The batch they belong to.

    Returns:
        (N, C) float32 scores in nats; -inf for a choice that does not exist.

    Raises:
        ValueError: If the logits do not have the batch's N rows and K positions.
    """
    expected = (batch.input_ids.shape[0], batch.keep)
    if logits.dim() != 3 or tuple(logits.shape[:2]) != expected:
        raise ValueError(f"logits have shape {tuple(logits.shape)}, expected (N, K, V) = {(*expected, 'V')}")
    log_prob = TokenLogProbs.apply(logits, batch.choice_source, batch.choice_token)
    scores = (batch.choice_weight * log_prob).sum(dim=-1)
    return scores.masked_fill(~batch.choice_exists, float("-inf"))


class TokenLogProbs(torch.autograd.Function):
    """log p(token | source) in float32, a few rows at a time: autograd would keep the logits in float32, and twice.

    With g the gradient with respect to log p, that with respect to the logits of a position k is
    sum_i g_i (onehot(token_i) - softmax(logits_k)) over the tokens i predicted from there; formed in float32 and
    rounded once. No second derivative.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, source: Tensor, token: Tensor) -> Tensor:
        """(N, C, L) of logits (N, K, V) and indices (N, C, L) into K and V."""
        parts = [torch.logsumexp(part.float(), dim=-1) for part in logits.split(_rows_at_once(logits))]
        log_normaliser = torch.cat(parts)  # (N, K)
        ctx.save_for_backward(logits, log_normaliser, source, token)
        row = _rows(logits)
        return logits[row, source, token].float() - log_normaliser[row, source]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Sums by ``index_put_``, which adds in a fixed order on a GPU too."""
        logits = ctx.saved_tensors[0]
        found = torch.empty_like(logits)
        parts = (t.split(_rows_at_once(logits)) for t in (*ctx.saved_tensors, gradient, found))
        for own, log_normaliser, source, token, g, out in zip(*parts, strict=True):
            row = _rows(own)
            weight = torch.zeros_like(log_normaliser).index_put_((row, source), g, accumulate=True)
            wanted = (own.float() - log_normaliser[..., None]).exp_().mul_(-weight[..., None])
            out.copy_(wanted.index_put_((row, source, token), g, accumulate=True))
            del wanted  # or it is there beside the next
        return found, None, None


def _rows(t: Tensor) -> Tensor:
    return torch.arange(len(t), device=t.device)[:, None, None]


def _rows_at_once(logits: Tensor) -> int:
    return max(1, AT_ONCE // logits[0].numel())
