import pytest

from utils.data.example import Choice, DataError
from utils.data.parsers import get_parser
from utils.data.prompts import render

ABC = {"label": ["A", "B", "C"], "text": ["x", "y", "z"]}
# schema, row, expected answer, expected options
ROWS = [
    ("arc", {"id": "q", "question": "Q?", "choices": ABC, "answerKey": "C"}, 2, ("x", "y", "z")),
    (
        "arc",
        {"id": "q", "question": "Q?", "choices": {"label": list("12345"), "text": list("vwxyz")}, "answerKey": "4"},
        3,
        tuple("vwxyz"),
    ),
    ("obqa", {"id": "q", "question_stem": "Q", "choices": ABC, "answerKey": "A"}, 0, ("x", "y", "z")),
    ("csqa", {"id": "q", "question": "Q", "choices": ABC, "answerKey": ""}, None, ("x", "y", "z")),
    ("winogrande", {"sentence": "a _ b.", "option1": "x", "option2": "y", "answer": "2"}, 1, ("x", "y")),
    ("winogrande", {"sentence": "a _ b.", "option1": "x", "option2": "y", "answer": ""}, None, ("x", "y")),
    ("boolq", {"question": "q", "passage": "p", "answer": True}, 1, ()),
    ("mmlu", {"question": "q", "subject": "s", "choices": ["x", "y"], "answer": 1}, 1, ("x", "y")),
    ("sst2", {"sentence": "s", "label": 0, "idx": 3}, 0, ()),
    ("cola", {"sentence": "s", "label": -1, "idx": 3}, None, ()),
    ("mrpc", {"sentence1": "s", "sentence2": "t", "label": 1}, 1, ()),
    ("rte", {"sentence1": "s", "sentence2": "t", "label": 0}, 0, ()),
    ("wnli", {"sentence1": "s", "sentence2": "t", "label": 1}, 1, ()),
    ("qnli", {"question": "s", "sentence": "t", "label": 1}, 1, ()),
    ("qqp", {"question1": "s", "question2": "t", "label": 0}, 0, ()),
    ("mnli", {"premise": "s", "hypothesis": "t", "label": 2}, 2, ()),
    ("jsonl", {"question": "q", "choices": ["x", "y"], "answer": 1}, 1, ("x", "y")),
    ("jsonl", {"question": "q", "choices": ["x", "y"], "answer": 1.0}, 1, ("x", "y")),
    ("jsonl", {"question": "q", "choices": ["x", "y"], "answer": "b"}, 1, ("x", "y")),
    ("jsonl", {"question": "q", "choices": ["B", "A"], "answer": "A"}, 1, ("B", "A")),
    ("jsonl", {"question": "q", "choices": ["x", "y"]}, None, ("x", "y")),
]


@pytest.mark.parametrize(("schema", "row", "answer", "options"), ROWS)
def test_rows_of_every_schema(schema, row, answer, options):
    question = get_parser(schema)(row, "test-5")
    assert (question.answer, question.options) == (answer, options)
    assert question.id == row.get("id", "test-5")


@pytest.mark.parametrize(
    ("schema", "row", "groups"),
    [
        ("winogrande", {"sentence": "a _ b.", "option1": "the Y", "option2": "x", "answer": "2"}, ("the y / x",)),
        ("winogrande", {"sentence": "c _ b.", "option1": "X", "option2": "the y", "answer": "2"}, ("the y / x",)),
        ("boolq", {"question": "q", "passage": "p", "answer": True}, ("p",)),
        ("wnli", {"sentence1": "s", "sentence2": "t", "label": 1}, ("s",)),
        ("qnli", {"question": "q", "sentence": "t", "label": 1}, ("q",)),
        ("qqp", {"question1": "q", "question2": "t", "label": 1}, ("q", "t")),
        ("mnli", {"premise": "s", "hypothesis": "t", "label": 2}, ("s",)),
        ("sst2", {"sentence": "s", "label": 0}, ()),
        ("jsonl", {"question": "q", "choices": ["x", "y"], "answer": 1, "group": 7}, ("7",)),
        ("jsonl", {"question": "q", "choices": ["x", "y"], "answer": 1}, ()),
    ],
)
def test_rows_made_from_one_source_have_groups(schema, row, groups):
    assert get_parser(schema)(row, "i").groups == groups


BAD = [
    ("arc", {"question": "Q?", "choices": ABC, "answerKey": "E"}, "answerKey 'E'"),
    ("winogrande", {"sentence": "no gap", "option1": "x", "option2": "y", "answer": "1"}, "no blank"),
    ("winogrande", {"sentence": "a _", "option1": "x", "option2": "y", "answer": "3"}, "answer '3'"),
    ("boolq", {"question": "q", "passage": "p", "answer": "yes"}, "neither true nor false"),
    ("sst2", {"text": "s", "label": 0}, "'sentence' is missing"),
    ("sst2", {"sentence": "s", "label": "0"}, "class index"),
    ("mmlu", {"question": "q", "choices": ["x", "y"], "answer": 2}, "answer 2"),
    ("jsonl", {"question": "q", "choices": "xy", "answer": 0}, "not a list"),
    ("jsonl", {"question": "q", "choices": ["x", "x"], "answer": 0}, "the same"),
    ("jsonl", {"question": "q", "choices": ["x", "y"], "answer": 2}, "answer 2"),
    ("jsonl", {"question": "q", "choices": ["x", "y"], "answer": 0.5}, "answer 0.5"),
    ("jsonl", {"question": "q", "choices": ["x", ""], "answer": 0}, "with something in each"),
    ("jsonl", {"question": "q", "choices": ["x", "y"], "answer": "C"}, "answer 'C'"),
    ("jsonl", {"question": "q", "choices": ["x", "y"], "answer": True}, "answer True"),
]


@pytest.mark.parametrize(("schema", "row", "message"), BAD)
def test_malformed_rows(schema, row, message):
    with pytest.raises(DataError, match=message):
        get_parser(schema)(row, "i")


def test_unknown_schema_names_near_matches():
    with pytest.raises(DataError, match="did you mean winogrande"):
        get_parser("winogrand")


def test_label_scoring_lists_options_and_scores_letters():
    question = get_parser("arc")({"question": "Q?", "choices": ABC, "answerKey": "B"}, "i")
    example = render(question, "label", "{question}\n{choices}\nAnswer:", list("ABCDE"))
    assert example.prompt == "Q?\nA. x\nB. y\nC. z\nAnswer:"
    assert example.choices == (Choice(" A"), Choice(" B"), Choice(" C"))
    assert render(question, "choice_sum", "{question}", []).choices == (Choice(" x"), Choice(" y"), Choice(" z"))


@pytest.mark.parametrize(
    ("sentence", "prompt", "context", "text"),
    [
        ("Ian ran because _ hated it.", "Ian ran because", " Ian", " hated it."),
        ("It was _'s hat.", "It was", " Ian", "'s hat."),
        ('He said "_ left".', 'He said "', "Ian", ' left".'),
        ("They met _", "They met", "", " Ian"),
        ("_ left.", "", "Ian", " left."),
    ],
)
def test_winogrande_choice_scoring_scores_what_follows_the_blank(sentence, prompt, context, text):
    row = {"sentence": sentence, "option1": "Ian", "option2": "Bob", "answer": "1"}
    example = render(get_parser("winogrande")(row, "i"), "choice_sum", "{before}", [])
    assert (example.prompt, example.choices[0]) == (prompt, Choice(text, context))


def test_classes_are_scored_by_their_label_words():
    question = get_parser("sst2")({"sentence": "fun {really}", "label": 1}, "i")
    for scoring in ("label", "choice_mean"):
        example = render(question, scoring, "Review: {sentence}:", ["bad", "good"])
        assert example.prompt == "Review: fun {really}:"
        assert (example.choices, example.answer) == ((Choice(" bad"), Choice(" good")), 1)


def test_wrong_template_and_too_few_labels():
    question = get_parser("arc")({"question": "Q?", "choices": ABC, "answerKey": "B"}, "i")
    with pytest.raises(DataError, match=r"'passage'; it may name choices, question"):
        render(question, "label", "{passage}", list("ABC"))
    with pytest.raises(DataError, match=r"3 choices but only 2 dset.labels"):
        render(question, "label", "{question}", list("AB"))
