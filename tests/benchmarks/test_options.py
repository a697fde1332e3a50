"""The options that commands of many runs share."""

from pathlib import Path

import pytest

from benchmarks.options import parse, parser_of


def test_an_override_may_stand_anywhere():
    parser = parser_of(None, Path("out"))
    parser.add_argument("tuning")
    parser.add_argument("--tasks", nargs="+", choices=["a", "b"])
    words = ["x=1", "runs/lr=1/tuning.json", "--tasks", "a", "b", "llm.name=y", "~z", "++method@_global_=q", "--jobs=3"]
    assert vars(parse(parser, [*words, "--out", "out/lr=1"])) == {
        **{"tuning": words[1], "tasks": ["a", "b"], "jobs": 3, "out": Path("out/lr=1"), "seconds": float("inf")},
        "overrides": ["x=1", "llm.name=y", "~z", "++method@_global_=q"],
    }


def test_a_word_that_is_no_override_is_named(capsys):
    parser = parser_of(None, Path("out"))
    parser.add_argument("tuning")
    with pytest.raises(SystemExit):
        parse(parser, ["tuning.json", "--jobs", "2", "train"])
    assert "train is neither an option nor KEY=VALUE" in capsys.readouterr().err
