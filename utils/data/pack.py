"""Pack encoded examples into the tensors of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from utils.data.batch import Batch
from utils.data.example import Example


@dataclass(frozen=True)
class Encoded:
    """Token ids of one example: the prompt; per choice all tokens, and how many of them are unscored."""

    prompt: list[int]
    choices: list[list[int]]
    unscored: list[int]

    @property
    def length(self) -> int:
        """Packed input length in tokens; the last token of a choice is not part of the input."""
        return len(self.prompt) + sum(len(choice) - 1 for choice in self.choices)

    @property
    def positions(self) -> int:
        """How many consecutive positions the longest prompt-and-choice sequence takes."""
        return len(self.prompt) + max(len(choice) for choice in self.choices) - 1


def pack(
    examples: Sequence[Example], encoded: list[Encoded], mean: bool, num_choices: int, pad: int, multiple: int = 1
) -> Batch:
    """Build the tensors of a packed batch (layout: see `Batch`); `mean` averages over a choice's tokens.

    The widths of the prompts, of the choices, and of a choice's scored tokens (if above 1) become multiples of
    `multiple`, so that batches come in few shapes.
    """
    n, c = len(encoded), num_choices
    start, total = widths(encoded, multiple)
    longest = max(len(ids) - u for e in encoded for ids, u in zip(e.choices, e.unscored, strict=True))
    longest = longest if longest == 1 else _up(longest, multiple)
    input_ids = torch.full((n, total), pad)
    position_ids = torch.zeros((n, total), dtype=torch.long)
    segment = torch.full((n, total), -1)
    source = torch.zeros((n, c, longest), dtype=torch.long)
    token = torch.zeros((n, c, longest), dtype=torch.long)
    weight = torch.zeros((n, c, longest))
    exists = torch.zeros((n, c), dtype=torch.bool)
    for i, e in enumerate(encoded):
        size = len(e.prompt)
        input_ids[i, start - size : start] = torch.tensor(e.prompt)
        position_ids[i, start - size : start] = torch.arange(size)
        segment[i, start - size : start] = 0
        column = start
        for j, (ids, skipped) in enumerate(zip(e.choices, e.unscored, strict=True)):
            end, scored = column + len(ids) - 1, len(ids) - skipped
            input_ids[i, column:end] = torch.tensor(ids[:-1], dtype=torch.long)
            position_ids[i, column:end] = torch.arange(size, size + len(ids) - 1)
            segment[i, column:end] = j + 1
            # kept position 0 is the prompt's last token, kept position k > 0 is column start + k - 1
            predictor = torch.cat([torch.zeros(1, dtype=torch.long), torch.arange(column, end) - start + 1])
            source[i, j, :scored] = predictor[skipped:]
            token[i, j, :scored] = torch.tensor(ids[skipped:])
            weight[i, j, :scored] = 1.0 / scored if mean else 1.0
            exists[i, j] = True
            column = end
    return Batch(
        ids=tuple(example.id for example in examples),
        input_ids=input_ids,
        segment=segment,
        position_ids=position_ids,
        choice_source=source,
        choice_token=token,
        choice_weight=weight,
        choice_exists=exists,
        answer=torch.tensor([example.answer for example in examples]),
        keep=total - start + 1,
    )


def widths(encoded: list[Encoded], multiple: int = 1) -> tuple[int, int]:
    """First column of the choice region, and number of columns, of a packed batch."""
    start = _up(max(len(e.prompt) for e in encoded), multiple)
    return start, start + _up(max(e.length - len(e.prompt) for e in encoded), multiple)


def _up(size: int, multiple: int) -> int:
    """The least multiple that is at least `size`."""
    return -(-size // multiple) * multiple
