"""The options that commands of many runs share."""

from pathlib import Path

import pytest

from benchmarks.options import parse, parser_of


def test_an_override_may_stand_anywhere():
    parser = parser_of(None, Path("out"))
    parser.add_argument("tuning")
    parser.add_argument("--tasks", nargs="+", choices=["a", "b"])
    words = ["x=1", "tuning.json", "--tasks", "a", "b", "llm.name=y", "--jobs=3", "--out", "here"]
    assert vars(parse(parser, words)) == {
        **{"tuning": "tuning.json", "tasks": ["a", "b"], "jobs": 3, "out": Path("here"), "seconds": float("inf")},
        "overrides": ["x=1", "llm.name=y"],
    }


def test_a_word_that_is_no_override_is_named(capsys):
    with pytest.raises(SystemExit):
        parse(parser_of(None, Path("out")), ["jobs", "3"])
    assert "jobs is neither an option nor KEY=VALUE" in capsys.readouterr().err
