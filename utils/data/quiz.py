"""Quiz: a small multiple-choice task generated from facts, the same on every machine.

Every prompt occurs once, so no question can be in two splits; train, validation and test ask about different
words and numbers. The categories are rule-like (spelling, grammar, order, arithmetic, kinds of things), so a
model that learns the rules answers questions it has not seen. One category of world knowledge is held out.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from utils.data.example import Question
from utils.data.quiz_facts import CAPITALS, KINDS, NOUNS, OPPOSITE_TOPICS, OPPOSITES, VERBS

OPTIONS = 4
_QUIZ_SEED = 20260  # the quiz is one fixed data set; the run's seed chooses subsets only
_SHARES = {"train": 4 / 7, "validation": 1 / 7}  # of the facts of a category; the rest is test


@dataclass(frozen=True)
class Item:
    """A question before its options are shuffled; items of one `fact` go to the same split."""

    fact: str
    prompt: str
    answer: str
    wrong: tuple[str, ...]


Maker = Callable[[np.random.Generator], Iterator[Item]]


def _pick(rng: np.random.Generator, pool: Sequence[str], count: int = OPTIONS - 1) -> tuple[str, ...]:
    """`count` different entries of a pool without duplicates."""
    return tuple(pool[i] for i in rng.permutation(len(pool))[:count])


def _vocabulary() -> list[str]:
    words = {word for members in KINDS.values() for word in members} | {noun for noun, _ in NOUNS}
    return sorted(words)


def _kind(rng: np.random.Generator) -> Iterator[Item]:
    owners: dict[str, set[str]] = {}
    for kind, members in KINDS.items():
        for member in members:
            owners.setdefault(member, set()).add(kind)
    # kinds that may be right as well, hence no wrong options: a bird is an animal, gold and salmon are colors
    also: dict[str, set[str]] = {kind: {"animal"} for kind in ("bird", "fish", "insect")}
    also["animal"] = {"bird", "fish", "insect"}
    for kind in ("fruit", "vegetable", "fish", "metal"):
        also.setdefault(kind, set()).add("color")
    for word, kinds in owners.items():
        if len(kinds) == 1:
            kind = next(iter(kinds))
            others = [other for other in KINDS if other != kind and other not in also.get(kind, set())]
            yield Item(word, f"Kind of {word}:", kind, _pick(rng, others))


def _first_letter(rng: np.random.Generator) -> Iterator[Item]:
    for word in _vocabulary():
        letters = sorted(set("abcdefghijklmnoprstw") - {word[0]})
        yield Item(word, f"First letter of {word}:", word[0], _pick(rng, letters))


def _alphabet(rng: np.random.Generator) -> Iterator[Item]:
    words = _vocabulary()
    for place, word in enumerate(words):
        if 10 <= place < len(words) - 10:
            yield Item(
                word, f"In a dictionary before {word}:", _pick(rng, words[:place], 1)[0], _pick(rng, words[place + 1 :])
            )


def _larger(rng: np.random.Generator) -> Iterator[Item]:
    for number in range(15, 90):
        smaller = [str(n) for n in range(10, number)]
        larger = [str(n) for n in range(number + 1, 100)]
        yield Item(str(number), f"Larger than {number}:", _pick(rng, larger, 1)[0], _pick(rng, smaller))
        yield Item(str(number), f"Smaller than {number}:", _pick(rng, smaller, 1)[0], _pick(rng, larger))


def _sequence(rng: np.random.Generator) -> Iterator[Item]:
    for step in (2, 3, 4, 5, 10):
        for start in range(1, 41):
            last = start + 2 * step
            near = [str(last + d) for d in (1, 2, 3, 4, 5, 6, 8, 10, 12) if d != step]
            shown = f"{start}, {start + step}, {last},"
            yield Item(shown, shown, str(last + step), _pick(rng, near))


def _past(rng: np.random.Generator) -> Iterator[Item]:
    for verb, past in VERBS:
        stem = verb.removesuffix("e")
        forms = [f"{stem}ed", f"{stem}ing", f"{verb}s", verb, f"{stem}en"]
        yield Item(verb, f"Yesterday of {verb}:", past, _pick(rng, [f for f in forms if f != past]))


def _plural(rng: np.random.Generator) -> Iterator[Item]:
    for noun, plural in NOUNS:
        forms = [f"{noun}s", f"{noun}es", f"{noun}en", noun, f"{noun[:-1]}ies", f"{noun[:-1]}ves"]
        yield Item(noun, f"Two or more {noun}:", plural, _pick(rng, [f for f in forms if f != plural]))


def _opposite(rng: np.random.Generator) -> Iterator[Item]:
    for left, right in OPPOSITES:
        close = {left, right}.union(*(topic for topic in OPPOSITE_TOPICS if topic & {left, right}))
        others = sorted({word for pair in OPPOSITES for word in pair} - close)
        yield Item(left, f"Reverse of {left}:", right, _pick(rng, others))
        yield Item(left, f"Reverse of {right}:", left, _pick(rng, others))


def _capital(rng: np.random.Generator) -> Iterator[Item]:
    cities = [city.replace("_", " ") for _, city in CAPITALS]
    for (place, _), city in zip(CAPITALS, cities, strict=True):
        others = [other for other in cities if other != city]
        yield Item(place, f"Capital of {place.replace('_', ' ')}:", city, _pick(rng, others))


CATEGORIES: dict[str, Maker] = {
    "kind": _kind,
    "first_letter": _first_letter,
    "alphabet": _alphabet,
    "larger": _larger,
    "sequence": _sequence,
    "past": _past,
    "plural": _plural,
    "opposite": _opposite,
}
OOD_CATEGORIES: dict[str, Maker] = {"capital": _capital}
_LARGEST_CATEGORY = 230  # items used of a category, so that none dominates


def quiz_questions() -> dict[str, list[Question]]:
    """The quiz: `train`, `validation`, `test`, and `ood` with the held-out category.

    Returns:
        Questions with 4 options; the right one is at every place equally often within a category and split.
    """
    splits: dict[str, list[Question]] = {"train": [], "validation": [], "test": [], "ood": []}
    for index, (category, make) in enumerate({**CATEGORIES, **OOD_CATEGORIES}.items()):
        rng = np.random.default_rng([_QUIZ_SEED, index])
        items = list(make(rng))
        if category in OOD_CATEGORIES:
            splits["ood"] += _place(items, category, rng)
            continue
        for split, chosen in _divide(items, rng).items():
            splits[split] += _place(chosen, category, rng)
    return splits


def _divide(items: list[Item], rng: np.random.Generator) -> dict[str, list[Item]]:
    """Shuffle the facts and deal them out to the splits; all items of a fact go together."""
    by_fact: dict[str, list[Item]] = {}
    for item in items:
        by_fact.setdefault(item.fact, []).append(item)
    groups = [by_fact[fact] for fact in sorted(by_fact)]
    groups = [groups[i] for i in rng.permutation(len(groups))]
    groups = groups[: _LARGEST_CATEGORY // max(map(len, groups))]
    first = round(_SHARES["train"] * len(groups))
    second = first + round(_SHARES["validation"] * len(groups))
    parts = {"train": groups[:first], "validation": groups[first:second], "test": groups[second:]}
    return {split: [item for group in part for item in group] for split, part in parts.items()}


def _place(items: list[Item], category: str, rng: np.random.Generator) -> list[Question]:
    """Put the right answers at places 0, 1, 2, 3, 0, 1, ... of a shuffled order of the items."""
    questions: list[Question] = []
    for count, i in enumerate(rng.permutation(len(items))):
        item, answer = items[i], count % OPTIONS
        options = (*item.wrong[:answer], item.answer, *item.wrong[answer:])
        name = f"{category}-{item.prompt}"
        questions.append(Question(name, {"question": item.prompt}, options, answer))
    return questions
