"""A packed batch of examples, and the scores of its choices given the model's logits."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

AT_ONCE = 2**25
"""Logits that become float32 together where no gradient is wanted (128 MiB)."""


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
        attention_mask: (N, 1, T, T) bool, True where the query (row) sees the key (column).
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
    attention_mask: Tensor
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
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
            "logits_to_keep": self.keep,
            "use_cache": False,
        }


def choice_scores(logits: Tensor, batch: Batch) -> Tensor:
    """Score of every choice: sum over its tokens of weight * log p(token | what comes before).

    Only log-normalisers and the gathered logits are formed, in float32; no (N, K, V) log-softmax.

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
    row = torch.arange(logits.shape[0], device=logits.device)[:, None, None]
    log_normaliser = log_normalisers(logits)
    token_logit = logits[row, batch.choice_source, batch.choice_token].float()  # (N, C, L)
    log_prob = token_logit - log_normaliser[row, batch.choice_source]
    scores = (batch.choice_weight * log_prob).sum(dim=-1)
    return scores.masked_fill(~batch.choice_exists, float("-inf"))


def log_normalisers(logits: Tensor) -> Tensor:
    """log sum_v exp(logits), (N, K) float32, of (N, K, V) logits of any floating type.

    Where no gradient is wanted, a few rows at a time become float32, so that no second copy of the logits is made.
    """
    if logits.requires_grad:
        return torch.logsumexp(logits.float(), dim=-1)
    rows = max(1, AT_ONCE // logits[0].numel())
    return torch.cat([torch.logsumexp(part.float(), dim=-1) for part in logits.split(rows)])
