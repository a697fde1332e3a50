"""The data types every part of the data code shares: questions, examples, a task's splits."""

import difflib
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property


class DataError(ValueError):
    """A data set, one of its rows or a data setting cannot be used; the message is one clear line."""


def near_matches(name: object, known: Iterable[str]) -> str:
    """Suffix for an "unknown name" message: the near matches if any, then every known name."""
    names = sorted(known)
    close = difflib.get_close_matches(str(name), names, n=3)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return f"{hint}Known: {', '.join(names)}"


@dataclass(frozen=True)
class Question:
    """One parsed row, before a prompt template is applied.

    Args:
        id: Identifier used in messages and in saved predictions.
        fields: Values a prompt template may name, such as `question` or `passage`.
        options: Texts of the options; empty where the options are the classes named by `dset.labels`.
        answer: Index of the right option, or None where the source hides it.
        suffix: Text that follows the option (the rest of a cloze sentence). Where it is not empty, choice
            scoring scores the suffix given the option instead of the option.
        lead: What joins an option to the text before it: a blank, or nothing.
        groups: What rows made from one source share. Rows that have one in common, if only through other rows, never
            stand on both sides of a carve.
    """

    id: str
    fields: dict[str, str]
    options: tuple[str, ...]
    answer: int | None
    suffix: str = ""
    lead: str = " "
    groups: tuple[str, ...] = ()


@dataclass(frozen=True)
class Choice:
    """One choice: `text` is scored; `context` (may be "") stands between prompt and text, unscored."""

    text: str
    context: str = ""


@dataclass(frozen=True)
class Example:
    """A prompt with its choices, ready to be encoded.

    Raises:
        DataError: If there are fewer than two choices, one has no text, or `answer` is not one of them.
    """

    id: str
    prompt: str
    choices: tuple[Choice, ...]
    answer: int

    def __post_init__(self) -> None:
        if len(self.choices) < 2:
            raise DataError(f"example {self.id!r}: choices: {len(self.choices)}; at least 2 are needed")
        if not 0 <= self.answer < len(self.choices):
            raise DataError(f"example {self.id!r}: answer {self.answer} is not in 0..{len(self.choices) - 1}")
        if not all(choice.text.strip() for choice in self.choices):
            raise DataError(f"example {self.id!r}: a choice has no text to score")


@dataclass(frozen=True)
class TaskData:
    """The splits of one task; `notes` says where each came from, for the log."""

    name: str
    train: list[Example]
    validation: list[Example]
    test: list[Example]
    ood: dict[str, list[Example]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what is trained on and chosen by, as prompts and choices."""
        return hashlib.sha256(repr((self.train, self.validation)).encode()).hexdigest()
