"""The options that commands of many runs share."""

from pathlib import Path

import pytest

from benchmarks.options import alone_in, one_line_errors, parse, parser_of


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


@pytest.mark.parametrize("jobs", ["0", "-1"])
def test_no_run_at_a_time_is_refused(capsys, jobs):
    with pytest.raises(SystemExit):
        parse(parser_of(None, Path("out")), [f"--jobs={jobs}"])
    assert f"--jobs {jobs}: expected 1 or more" in capsys.readouterr().err


def test_a_folder_that_a_configuration_reads_otherwise_is_refused(tmp_path):
    with pytest.raises(ValueError, match="begins a reference"), alone_in(tmp_path / "a${b}"):
        pass
    assert not list(tmp_path.iterdir())
    with alone_in(tmp_path / "a$b{c}"):
        pass


def test_a_folder_is_one_commands_at_a_time(tmp_path):
    with alone_in(tmp_path / "out"):
        with (
            pytest.raises(RuntimeError, match=f"another command makes runs in {tmp_path}/out"),
            alone_in(tmp_path / "out"),
        ):
            pass
        with alone_in(tmp_path / "other"):
            pass
    with alone_in(tmp_path / "out"):
        pass


def test_processes_of_torchrun_make_no_runs_each(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="without torchrun"), alone_in(tmp_path / "out"):
        pass
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("times is\n0"), "error: times is 0"),
        (RuntimeError("no run"), "error: no run"),
        (FileExistsError(17, "File exists", "/x"), "error: /x: File exists: correct this path, or what names it"),
    ],
)
def test_errors_are_one_line(error, said):
    with pytest.raises(SystemExit, match=f"^{said}$"), one_line_errors():
        raise error


def test_an_interrupt_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop, one_line_errors("interrupted: go on"):
        raise KeyboardInterrupt
    assert stop.value.code == 130
    assert capsys.readouterr().err == "interrupted: go on\n"
