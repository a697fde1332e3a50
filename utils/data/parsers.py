"""One parser per row schema: from a row of the source to a `Question`."""

import string
from collections.abc import Callable, Mapping
from typing import Any

from utils.data.example import DataError, Question, near_matches

Row = Mapping[str, Any]
Parser = Callable[[Row, str], Question]  # (row, id to use where the row has none)

_PARSERS: dict[str, Parser] = {}


def register(name: str) -> Callable[[Parser], Parser]:
    """Register a parser under a schema name."""

    def add(parser: Parser) -> Parser:
        _PARSERS[name] = parser
        return parser

    return add


def get_parser(schema: str) -> Parser:
    """The parser of a schema.

    Raises:
        DataError: If the schema is unknown; the message names near matches.
    """
    if schema not in _PARSERS:
        raise DataError(f"unknown dset.schema {schema!r}; {near_matches(schema, _PARSERS)}")
    return _PARSERS[schema]


def _text(row: Row, key: str) -> str:
    if key not in row:
        raise DataError(f"key {key!r} is missing; the row has {', '.join(map(str, row)) or 'no keys'}")
    if not isinstance(row[key], str):
        raise DataError(f"key {key!r} is {row[key]!r}, expected text")
    return row[key].strip()


def _lettered(row: Row, question_key: str, identifier: str) -> Question:
    """Rows with choices {label: [...], text: [...]} and answerKey; a label is a letter or a digit."""
    choices, key = row["choices"], str(row.get("answerKey") or "").strip()
    labels, texts = list(choices["label"]), [text.strip() for text in choices["text"]]
    if len(labels) != len(texts):
        raise DataError(f"{len(labels)} choice labels for {len(texts)} choice texts")
    if key and key not in labels:
        raise DataError(f"answerKey {key!r} is none of the choice labels {labels}")
    return Question(
        id=str(row.get("id") or identifier),
        fields={"question": _text(row, question_key)},
        options=tuple(texts),
        answer=labels.index(key) if key else None,
    )


@register("arc")
def arc(row: Row, identifier: str) -> Question:
    """allenai/ai2_arc: 3 to 5 choices, answerKey a letter or 1-5."""
    return _lettered(row, "question", identifier)


@register("csqa")
def csqa(row: Row, identifier: str) -> Question:
    """tau/commonsense_qa: 5 choices, answerKey empty in the test split."""
    return _lettered(row, "question", identifier)


@register("obqa")
def obqa(row: Row, identifier: str) -> Question:
    """allenai/openbookqa: 4 choices."""
    return _lettered(row, "question_stem", identifier)


@register("winogrande")
def winogrande(row: Row, identifier: str) -> Question:
    """allenai/winogrande: a sentence with a blank `_` and two options; answer "1", "2" or "" (hidden).

    Choice scoring reads the sentence with each option in place and scores what follows the blank. A sentence's twin,
    which differs in a word and has the other answer, has the same options, so these are the group.
    """
    sentence, answer = _text(row, "sentence"), str(row.get("answer") or "").strip()
    options = (_text(row, "option1"), _text(row, "option2"))
    before, blank, after = sentence.partition("_")
    if not blank:
        raise DataError(f"the sentence {sentence!r} has no blank '_'")
    if answer not in ("", "1", "2"):
        raise DataError(f"answer {answer!r} is none of '1', '2', ''")
    return Question(
        id=identifier,
        fields={"question": sentence, "before": before.rstrip()},
        options=options,
        answer=int(answer) - 1 if answer else None,
        suffix=after.rstrip(),
        lead=" " if before.endswith(" ") else "",
        groups=(" / ".join(sorted(option.lower() for option in options)),),
    )


@register("boolq")
def boolq(row: Row, identifier: str) -> Question:
    """google/boolq: passage (the group), question, boolean answer; the classes are no (0) and yes (1)."""
    answer = row.get("answer")
    if answer is not None and not isinstance(answer, bool):
        raise DataError(f"answer {answer!r} is neither true nor false")
    fields = {"question": _text(row, "question"), "passage": _text(row, "passage")}
    return Question(identifier, fields, (), None if answer is None else int(answer), groups=(fields["passage"],))


@register("mmlu")
def mmlu(row: Row, identifier: str) -> Question:
    """cais/mmlu: 4 choices, answer an index."""
    options, answer = tuple(choice.strip() for choice in row["choices"]), row.get("answer")
    if answer is not None and answer not in range(-1, len(options)):
        raise DataError(f"answer {answer!r} is not in 0..{len(options) - 1}")
    return Question(
        id=identifier,
        fields={"question": _text(row, "question")},
        options=options,
        answer=None if answer in (None, -1) else int(answer),
    )


def _glue(*keys: str, groups: tuple[str, ...] = ()) -> Parser:
    """Rows of nyu-mll/glue: text fields and a class index `label`, -1 where hidden; `groups`: fields that are groups.

    Rows that share a premise or a question tend to differ in label, in WNLI as WinoGrande's twins do.
    """

    def parse(row: Row, identifier: str) -> Question:
        label = row.get("label")
        if label is not None and (isinstance(label, bool) or not isinstance(label, int)):
            raise DataError(f"label {label!r} is not a class index")
        fields = {key: _text(row, key) for key in keys}
        answer = None if label in (None, -1) else label
        return Question(identifier, fields, (), answer, groups=tuple(fields[key] for key in groups))

    return parse


for _name, _keys, _groups in (
    ("sst2", ("sentence",), ()),
    ("cola", ("sentence",), ()),
    ("mrpc", ("sentence1", "sentence2"), ()),
    ("rte", ("sentence1", "sentence2"), ("sentence1",)),
    ("wnli", ("sentence1", "sentence2"), ("sentence1",)),
    ("qnli", ("question", "sentence"), ("question",)),
    ("qqp", ("question1", "question2"), ("question1", "question2")),
    ("mnli", ("premise", "hypothesis"), ("premise",)),
):
    register(_name)(_glue(*_keys, groups=_groups))


@register("jsonl")
def jsonl(row: Row, identifier: str) -> Question:
    """A user's file: question, choices (list of texts), answer (text of a choice, letter or index from 0).

    `id` and `group` (of rows that a carve must not separate) are optional. A row without an answer is one whose label
    is hidden.
    """
    if "choices" not in row:
        raise DataError(f"no key choices, only {', '.join(sorted(row)) or 'none'}: rename the one that holds them")
    choices = row["choices"]
    if not isinstance(choices, list) or not choices or not all(isinstance(c, str) and c.strip() for c in choices):
        raise DataError(f"choices {choices!r} is not a list of texts with something in each")
    options = tuple(choice.strip() for choice in choices)
    if len(set(options)) < len(options):
        raise DataError(f"two choices of {list(options)} are the same")
    group = row.get("group")
    return Question(
        id=str(identifier if row.get("id") is None else row["id"]),
        fields={"question": _text(row, "question")},
        options=options,
        answer=_answer(row.get("answer"), options),
        groups=() if group in (None, "") or group != group else (str(group),),  # NaN is what pandas writes
    )


def _answer(answer: Any, options: tuple[str, ...]) -> int | None:
    """Index of a user's answer: an exact choice text wins over a letter; an integer is an index from 0."""
    letters = string.ascii_uppercase[: len(options)]
    if answer is None or answer == "":
        return None
    if isinstance(answer, float) and answer.is_integer():  # as pandas writes integers of a column with gaps
        answer = int(answer)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(options):
        return answer
    if isinstance(answer, str):
        text = answer.strip()
        if text in options:
            return options.index(text)
        if len(text) == 1 and text.upper() in letters:
            return letters.index(text.upper())
    raise DataError(
        f"answer {answer!r} is neither a choice text, nor a letter {letters[0]}-{letters[-1]}, "
        f"nor an index 0-{len(options) - 1}"
    )
