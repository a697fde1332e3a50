"""Rules for honest splits: what serves as validation and test, disjointness, seeded subsets."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from utils.data.example import DataError, Question


@dataclass(frozen=True)
class RawSplit:
    """A split as its source gave it, and where that was."""

    questions: list[Question]
    origin: str


@dataclass(frozen=True)
class Splits:
    """Train, validation and test questions with a note for each."""

    train: list[Question]
    validation: list[Question]
    test: list[Question]
    notes: list[str]


def labelled(split: RawSplit | None) -> RawSplit | None:
    """The split, or None where it is absent or all its labels are hidden.

    Raises:
        DataError: If only some labels are hidden.
    """
    if split is None or not split.questions:
        return None
    hidden = [question.id for question in split.questions if question.answer is None]
    if len(hidden) == len(split.questions):
        return None
    if hidden:
        raise DataError(
            f"{split.origin}: {len(hidden)} of {len(split.questions)} rows have no answer (first: {hidden[0]}); "
            "label all of them or none"
        )
    return split


def resolve(
    sources: Mapping[str, RawSplit | None], validation_fraction: float, seed: int, phrases: str | None = None
) -> Splits:
    """Decide what serves as train, validation and test.

    A split with hidden labels counts as absent. Where test is absent, validation serves as test; where
    validation is then absent, it is carved from train.

    Args:
        sources: The source's `train`, `validation` and `test`, None where absent.
        validation_fraction: Share of train that becomes validation where there is none, in (0, 1).
        seed: Seed of the carve.
        phrases: Field of which training rows may hold a part of another row's, which a carve then keeps together.

    Raises:
        DataError: If nothing can serve as test, a training split has no labels, or is too small to carve from.
    """
    train, validation, test = (labelled(sources.get(name)) for name in ("train", "validation", "test"))
    notes = []
    if train is None and (named := sources.get("train")) is not None:
        raise DataError(
            f"{named.origin}: none of {len(named.questions)} rows has an answer, so there is nothing to train on; "
            "name no training split (null) to evaluate only"
        )
    if test is None:
        if validation is None:
            raise DataError(
                "neither a labelled test split nor a labelled validation split: name one, in dset.splits or, of your "
                "own files, dset.test_file"
            )
        test, validation = validation, None
        notes.append(f"test: {test.origin} ({len(test.questions)}; the labelled validation split, test has no labels)")
    else:
        notes.append(f"test: {test.origin} ({len(test.questions)})")
    train_questions = train.questions if train else []
    if validation is not None:
        validation_questions = validation.questions
        notes.append(f"validation: {validation.origin} ({len(validation_questions)})")
    else:
        grouped = with_whole_sentences(train_questions, phrases) if phrases else train_questions
        train_questions, validation_questions = carve(grouped, validation_fraction, seed)
        notes.append(f"validation: {len(validation_questions)} carved from train with seed {seed}")
    notes.append(f"train: {train.origin if train else 'none'} ({len(train_questions)})")
    return Splits(train_questions, validation_questions, test.questions, notes)


def carve(questions: Sequence[Question], fraction: float, seed: int) -> tuple[list[Question], list[Question]]:
    """Split into (rest, carved): a seeded random share, at least one question, both in the original order.

    A group goes as a whole, so the share may be larger by what the last one has too many: on WinoGrande, whose training
    sentences are twins with opposite answers, learning one of them by heart would get the other wrong in validation.
    """
    if not 0.0 < fraction < 1.0:
        raise DataError(f"dset.validation_fraction is {fraction}; it must be between 0 and 1, exclusive")
    if not questions:
        return [], []
    source = sources_of(questions)
    made_from: dict[int, list[int]] = {}
    for i, own in enumerate(source):
        made_from.setdefault(own, []).append(i)
    count, chosen = max(1, round(fraction * len(questions))), set[int]()
    for i in np.random.default_rng([seed, 1]).permutation(len(questions)).tolist():
        if len(chosen) >= count:
            break
        chosen.update(made_from[source[i]])
    if len(chosen) == len(questions):
        remedy = "lower it, or add a file" if len(made_from) > 1 else "name a file for one (dset.validation_file)"
        raise DataError(
            f"train has {len(questions)} questions from {len(made_from)} sources, of which a validation split with "
            f"dset.validation_fraction={fraction} would take all: {remedy}"
        )
    rest = [question for i, question in enumerate(questions) if i not in chosen]
    return rest, [question for i, question in enumerate(questions) if i in chosen]


def sources_of(questions: Sequence[Question]) -> list[int]:
    """For every question a number that it shares with those that it has a group in common with, if through others."""
    root, first = list(range(len(questions))), dict[str, int]()

    def find(i: int) -> int:
        while root[i] != i:
            root[i] = root[root[i]]
            i = root[i]
        return i

    for i, question in enumerate(questions):
        for group in question.groups:
            root[find(i)] = find(first.setdefault(group, i))
    return [find(i) for i in range(len(questions))]


def with_whole_sentences(questions: Sequence[Question], field: str) -> list[Question]:
    """Give every question whose text is part of longer ones, word for word, the longest of them for a group."""
    words = [tuple(question.fields[field].split()) for question in questions]
    whole: dict[tuple[str, ...], tuple[str, ...] | None] = dict.fromkeys(words)
    for longest in sorted(whole, key=len, reverse=True):
        if whole[longest] is None:  # else its parts are those of a longer one too
            for start, end in itertools.combinations(range(len(longest) + 1), 2):
                part = longest[start:end]
                if part in whole and whole[part] is None:
                    whole[part] = longest
    of = (" ".join(whole[own] or own) for own in words)
    return [replace(question, groups=(*question.groups, own)) for question, own in zip(questions, of, strict=True)]


def subset(questions: list[Question], size: int | None, seed: int, key: str, at_most: bool = False) -> list[Question]:
    """A seeded random subset in the original order; all questions where `size` is None, or `at_most` and too large.

    Raises:
        DataError: If `size` is not in 1..len(questions); the message names the setting `key`.
    """
    if size is None or (at_most and size > len(questions)):
        return questions
    if not 1 <= size <= len(questions):
        raise DataError(f"{key} is {size}, but {len(questions)} questions are available; use null for all")
    chosen = np.random.default_rng([seed, 2]).permutation(len(questions))[:size]
    return [questions[i] for i in sorted(chosen)]


def without(questions: list[Question], *others: Sequence[Question]) -> list[Question]:
    """The questions whose text and set of options appear in none of the other splits."""
    seen = {_content(question) for other in others for question in other}
    return [question for question in questions if _content(question) not in seen]


def _content(question: Question) -> tuple[object, ...]:
    return tuple(sorted(question.fields.items())), frozenset(question.options), question.suffix
