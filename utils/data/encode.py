"""Encoder: from examples to token ids, with every check that can be made before a model is run."""

import itertools
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from utils.data.batch import Batch
from utils.data.example import DataError, Example, TaskData, near_matches
from utils.data.pack import Encoded, pack, widths

logger = logging.getLogger(__name__)

SCORINGS = ("label", "choice_sum", "choice_mean")


class Encoder:
    """Encodes examples for one tokenizer and one kind of scoring.

    Args:
        tokenizer: A Hugging Face tokenizer.
        scoring: `label` (every choice is a single token), `choice_sum` or `choice_mean` (log-likelihood of
            the choice's text, summed or averaged over its tokens).
        max_length: Limit on the packed length of an example, in tokens.
        too_long: `error` or `drop`: what `check` does with longer examples.

    Raises:
        DataError: If `scoring`, `max_length` or `too_long` is not valid.
    """

    def __init__(self, tokenizer: Any, scoring: str, max_length: int, too_long: str = "error") -> None:
        if scoring not in SCORINGS:
            raise DataError(f"unknown scoring {scoring!r}; {near_matches(scoring, SCORINGS)}")
        if too_long not in ("error", "drop"):
            raise DataError(f"too_long is {too_long!r}; it must be error or drop")
        if max_length < 1:
            raise DataError(f"max_length is {max_length}; it must be at least 1 token")
        self.tokenizer = tokenizer
        self.scoring = scoring
        self.max_length = max_length
        self.too_long = too_long
        self._cache: dict[Example, Encoded] = {}
        bos = tokenizer.bos_token_id
        first = tokenizer("a")["input_ids"][:1]
        self._bos = [bos] if bos is not None and first == [bos] else []
        special = (tokenizer.pad_token_id, tokenizer.eos_token_id, bos)
        self._pad = next((token for token in special if token is not None), 0)

    def encode(self, example: Example) -> Encoded:
        """Token ids of one example, cached.

        A choice is what encoding prompt + context + text adds to encoding the prompt, so leading blanks come out right
        with every tokenizer; where a token reaches over that seam, what comes after the tokens that all begin with.
        Scored is what the text adds to prompt + context. Where a token reaches over that seam, every choice of the
        example is scored whole: whole texts are compared, in the tokenizer's own tokens.
        """
        if example not in self._cache:
            self._cache[example] = self._encode(example)
        return self._cache[example]

    def _encode(self, example: Example) -> Encoded:
        stems = [example.prompt + choice.context for choice in example.choices]
        texts = [stem + choice.text for stem, choice in zip(stems, example.choices, strict=True)]
        prompt, *rest = self._ids([example.prompt, *stems, *texts])
        n = len(example.choices)
        stem_ids, whole = rest[:n], rest[n:]
        for choice, stem, ids in zip(example.choices, stem_ids, whole, strict=True):
            if ids in ([], stem):
                raise DataError(f"example {example.id!r}: choice {choice.text!r} has no tokens")
        splits = all(ids[: len(stem)] == stem for stem, ids in zip(stem_ids, whole, strict=True))
        shared = min(_alike(prompt, ids) for ids in whole)
        choices = [ids[shared:] for ids in whole]
        unscored = [len(stem) - shared if splits else 0 for stem in stem_ids]
        prompt = prompt[:shared]
        has_bos = bool(self._bos) and prompt[:1] == self._bos
        prompt = prompt if has_bos else self._bos + prompt
        return Encoded(prompt or [self._pad], choices, unscored)  # an empty prompt needs one token to predict from

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]

    def length(self, example: Example) -> int:
        """Packed length of one example in tokens."""
        return self.encode(example).length

    def widths(self, examples: Sequence[Example], multiple: int = 1) -> tuple[int, int]:
        """Tokens of a row of the batch that ``collate`` packs, and positions of it whose logits are formed."""
        start, total = widths([self.encode(example) for example in examples], multiple)
        return total, total - start + 1

    def check(self, examples: Sequence[Example], position_limit: int | None = None) -> list[Example]:
        """Check examples before any model work.

        Args:
            examples: The examples of one split.
            position_limit: Positions the model can take (see `model_limits.position_limit`); None for any.

        Returns:
            The examples to use: all of them, or with `too_long="drop"` those which fit (the number dropped
            is logged as a warning).

        Raises:
            DataError: On a label that is not one token, labels that share a token, or an example longer than
                a limit (with `too_long="error"`).
        """
        kept = []
        for example in examples:
            encoded = self.encode(example)
            if self.scoring == "label":
                self._check_labels(example, encoded)
            reason = self._too_long(encoded, position_limit)
            if reason is None:
                kept.append(example)
            elif self.too_long == "error":
                raise DataError(f"example {example.id!r} is too long: {reason}, or set dset.too_long=drop")
        if len(kept) < len(examples):
            logger.warning("dropped %d of %d examples as too long", len(examples) - len(kept), len(examples))
        return kept

    def _too_long(self, encoded: Encoded, position_limit: int | None) -> str | None:
        if encoded.length > self.max_length:
            return f"{encoded.length} tokens, limit {self.max_length}; raise dset.max_length"
        if position_limit is not None and encoded.positions > position_limit:
            return (
                f"{encoded.positions} positions, but the model's attention window or position table has "
                f"{position_limit}; use another model"
            )
        return None

    def _check_labels(self, example: Example, encoded: Encoded) -> None:
        owner: dict[int, str] = {}
        for choice, tokens in zip(example.choices, encoded.choices, strict=True):
            if len(tokens) != 1:
                raise DataError(
                    f"example {example.id!r}: label {choice.context + choice.text!r} is {len(tokens)} tokens for "
                    "this tokenizer, label scoring needs 1; change dset.labels or set dset.scoring=choice_sum"
                )
            if tokens[0] in owner:
                raise DataError(
                    f"example {example.id!r}: labels {owner[tokens[0]]!r} and {choice.text!r} are the same token "
                    f"{tokens[0]}; make dset.labels distinct"
                )
            owner[tokens[0]] = choice.text

    def collate(self, examples: Sequence[Example], num_choices: int | None = None, multiple: int = 1) -> Batch:
        """Pack examples into one batch.

        Args:
            examples: N examples, at least one.
            num_choices: C, padded with choices that do not exist; None for the largest number in the batch.
            multiple: Pad widths to multiples of it (see `pack`).

        Raises:
            ValueError: If there is no example, or one has more than `num_choices` choices.
        """
        if not examples:
            raise ValueError("cannot collate an empty list of examples")
        encoded = [self.encode(example) for example in examples]
        most = max(len(e.choices) for e in encoded)
        if num_choices is not None and most > num_choices:
            raise ValueError(f"an example has {most} choices, more than num_choices={num_choices}")
        return pack(examples, encoded, self.scoring == "choice_mean", num_choices or most, self._pad, multiple)


def _alike(start: list[int], whole: list[int]) -> int:
    """How many tokens both begin with, all but the last of ``whole`` at most."""
    pairs = zip(start, whole[:-1], strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def checked(data: TaskData, encoder: Encoder, limit: int | None) -> TaskData:
    """The task without what ``Encoder.check`` drops.

    Raises:
        DataError: where nothing is left of a split.
    """
    ood = {f"ood {name}": examples for name, examples in data.ood.items()}
    before = {"train": data.train, "validation": data.validation, "test": data.test} | ood
    train, validation, test, *others = after = [encoder.check(split, limit) for split in before.values()]
    for (name, split), left in zip(before.items(), after, strict=True):
        if split and not left:
            raise DataError(
                f"all {len(split)} examples of {name} are longer than {limit or encoder.max_length} tokens: raise "
                "dset.max_length, or take a model that reads more"
            )
    return replace(data, train=train, validation=validation, test=test, ood=dict(zip(data.ood, others, strict=True)))
