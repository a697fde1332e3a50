"""A run folder belongs to one process at a time: from the first check until the run has finished or its process ended.

A lock of a file opened a second time in this process is to the first as one of another process.
"""

import pytest
from tiny_runs import exit_message

import train_script
from pipeline import claim as claims
from pipeline.claim import LOCK, claim
from pipeline.evaluation import finish
from pipeline.run import CONFIGS, prepare
from utils.locks import try_lock
from utils.settings import compose


@pytest.mark.parametrize("extra", [(), ("resume=true",), ("overwrite=true",)])
def test_a_folder_in_which_another_process_makes_a_run_is_refused(tmp_path, command, extra):
    folder = tmp_path / "run"
    folder.mkdir()
    with try_lock(folder / LOCK):
        message = exit_message(train_script, command(*extra))
    remedy = "wait until it has ended, or choose another paths.output_dir"
    assert message == f"error: another process makes a run in {folder}: {remedy}"
    assert not (folder / "metrics.jsonl").exists()


def test_a_run_holds_its_folder_until_it_has_finished(tmp_path, command):
    run = prepare(compose(CONFIGS, command("train.epochs=0")))
    assert try_lock(tmp_path / "run" / LOCK) is None
    finish(run, 0)
    with try_lock(tmp_path / "run" / LOCK):
        pass


def test_runs_of_one_process_follow_each_other_in_a_folder(tmp_path, command):
    given_up = prepare(compose(CONFIGS, command()))
    again = prepare(compose(CONFIGS, command("overwrite=true")))
    given_up.claim = None
    assert try_lock(tmp_path / "run" / LOCK) is None
    again.claim = None
    with try_lock(tmp_path / "run" / LOCK):
        pass


@pytest.mark.parametrize("number", claims.NO_LOCKS)
def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, caplog, number):
    def fail(_: object) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr(claims, "try_lock", fail)
    assert claim(tmp_path) is None
    assert f"{tmp_path} lies where files cannot be locked" in caplog.text


def test_a_folder_that_cannot_be_written_is_no_such_file_system(tmp_path):
    (tmp_path / LOCK).mkdir()
    with pytest.raises(IsADirectoryError):
        claim(tmp_path)
