"""Log lines, metrics.jsonl across crashes and resumption, atomic writes, seeds."""

import io
import json
import math
import os
import re
import sys
import time

import numpy as np
import pytest
import torch

from utils import run
from utils.run import RunLogger, read_metrics
from utils.seeding import make_generator, seed_all

METRICS = {"nll": 0.43211, "acc": 0.8123, "ece": 0.0312, "brier": 0.23449, "mutual_information": 0.01, "n": 872}
PROGRESS = {"loss": 0.69314, "nll": 0.5, "kl": 15000000.0, "beta": 1.0}


def log_run(logger: RunLogger, steps: range) -> None:
    for step in steps:
        logger.train(epoch=1, step=step, lr=1e-4, examples_per_second=12.34, metrics=PROGRESS)
        if step % 2 == 0:
            logger.evaluation(epoch=1, step=step, lr=1e-4, split="validation", mc=10, metrics=METRICS)


def test_lines_have_the_documented_format(tmp_path):
    stream = io.StringIO()
    logger = RunLogger(tmp_path, stream)
    logger.train(epoch=1, step=20, lr=1e-4, examples_per_second=12.34, metrics=PROGRESS)
    logger.evaluation(epoch=3, step=420, lr=1e-4, split="validation", mc=10, metrics=METRICS)
    logger.evaluation(epoch=3, step=420, lr=0.0, split="ood:arc_c", mc="mean", metrics=METRICS | {"ece": math.nan})
    logger.final(epoch=3, step=420, split="test", mc=10, metrics=METRICS)
    assert stream.getvalue().splitlines() == [
        "[TRAIN EP 1 | STEP 20] LR: 1.000000e-04 LOSS=0.6931 | NLL=0.5000 | KL=1.5e+07 | BETA=1 | 12.3 ex/s",
        "[EP 3 | STEP 420] LR: 1.000000e-04 NLL=0.4321 | ACC=0.8123 | ECE=0.0312 | BRIER=0.2345 "
        "(split=validation, MC=10)",
        "[EP 3 | STEP 420] LR: 0.000000e+00 NLL=0.4321 | ACC=0.8123 | ECE=nan | BRIER=0.2345 "
        "(split=ood:arc_c, MC=mean)",
        "[FINAL] NLL=0.4321 | ACC=0.8123 | ECE=0.0312 | BRIER=0.2345 (split=test, MC=10)",
    ]
    train, validation, ood, final = read_metrics(tmp_path)  # while the run is still open
    assert train["kl"] == 15000000.0
    assert validation == {
        "kind": "eval",
        "step": 420,
        "epoch": 3,
        "lr": 1e-4,
        "split": "validation",
        "mc": 10,
        **METRICS,
    }
    assert ood["ece"] is None
    assert (ood["mc"], final["kind"], final["n"]) == ("mean", "final", 872)
    logger.close()


def test_prints_to_standard_output_by_default(tmp_path, capsys):
    RunLogger(tmp_path).final(epoch=1, step=1, split="test", mc=1, metrics=METRICS)
    captured = capsys.readouterr()
    assert re.fullmatch(r"\[FINAL\] NLL=.*\n", captured.out)
    assert captured.err == ""


def test_resuming_doubles_nothing(tmp_path):
    logger = RunLogger(tmp_path, io.StringIO())
    log_run(logger, range(1, 7))
    logger.final(epoch=1, step=6, split="test", mc=10, metrics=METRICS)
    logger.close()
    whole = read_metrics(tmp_path)

    resumed = RunLogger(tmp_path, io.StringIO(), resumed_step=4)
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 2, 3, 4, 4]
    log_run(resumed, range(5, 7))
    resumed.final(epoch=1, step=6, split="test", mc=10, metrics=METRICS)
    assert read_metrics(tmp_path) == whole

    RunLogger(tmp_path, io.StringIO(), resumed_step=6).close()  # finished, evaluated again
    assert read_metrics(tmp_path) == whole[:-1]
    RunLogger(tmp_path, io.StringIO(), resumed_step=-1).close()
    assert read_metrics(tmp_path) == []


def test_half_written_last_line_is_dropped_and_never_glued_to_the_next(tmp_path):
    logger = RunLogger(tmp_path, io.StringIO())
    log_run(logger, range(1, 2))
    logger.close()
    with (tmp_path / run.METRICS_FILE).open("a") as file:
        file.write('{"kind": "train", "ste')
    assert len(read_metrics(tmp_path)) == 1
    log_run(RunLogger(tmp_path, io.StringIO()), range(3, 4))
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 3]


@pytest.mark.parametrize("line", ['{"kind": "tr', "[1]", '{"foreign": 1}'])
def test_damaged_line_elsewhere_is_named(tmp_path, line):
    (tmp_path / run.METRICS_FILE).write_text('{"kind": "train", "step": 1}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 2 "):
        RunLogger(tmp_path)


def test_reading_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no run folder"):
        read_metrics(tmp_path)


def test_reliability_file(tmp_path):
    logger = RunLogger(tmp_path, io.StringIO())
    bins = {"edges": torch.tensor([0.0, 1.0]), "count": torch.tensor([3]), "ece": 0.25}
    logger.reliability({"MC=10": bins})
    written = json.loads((tmp_path / "reliability.json").read_text())
    assert written == {"MC=10": {"edges": [0.0, 1.0], "count": [3], "ece": 0.25}}


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_failed_write_leaves_the_previous_file(tmp_path, monkeypatch, failing):
    path = tmp_path / "new" / "record.json"
    run.write_json_atomic(path, {"a": 1})

    def fail(*_: object) -> None:
        raise OSError("power cut")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="power cut"):
        run.write_json_atomic(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["record.json"]


def test_each_of_two_writers_has_its_own_file_and_the_last_to_end_stays(tmp_path):
    path = tmp_path / "record.json"
    with run.open_atomic(path) as first:
        first.write(b"long first")
        with run.open_atomic(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"long first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_has_the_permissions_of_any_other(tmp_path):
    (tmp_path / "plain").touch()
    run.write_text_atomic(tmp_path / "atomic", "")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_what_killed_writers_left_is_removed_in_time(tmp_path):
    path, old = tmp_path / "[1].json", time.time() - 2 * run.ABANDONED_SECONDS
    names = (".[1].json.0.tmp", ".[1].json.1.tmp", ".1.json.0.tmp", ".[1].json")
    for name in names:
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (old, old))
    (tmp_path / names[1]).touch()  # is being written
    run.write_text_atomic(path, "")
    assert {p.name for p in tmp_path.iterdir()} == {*names[1:], path.name}


def test_json_takes_tensors_and_numpy_and_turns_non_finite_into_null(tmp_path):
    path = tmp_path / "x.json"
    run.write_json_atomic(path, {"a": np.float32(0.5), "b": (torch.tensor(math.inf), np.arange(2)), 3: None, "d": True})
    assert json.loads(path.read_text()) == {"a": 0.5, "b": [None, [0, 1]], "3": None, "d": True}


@pytest.mark.parametrize(("given", "kept"), [("float32", "f4"), ("float64", "f8"), ("bfloat16", "f4")])
def test_predictions_round_trip(tmp_path, given, kept):
    logits = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0)).to(getattr(torch, given))
    logits[:, 1, 3] = -math.inf
    run.save_predictions(tmp_path / "test.npz", logits, torch.arange(5) % 4, [f"q{i}" for i in range(5)])
    with np.load(tmp_path / "test.npz") as stored:
        assert stored["logits"].dtype == np.dtype(kept)
        assert np.array_equal(stored["logits"], logits.double().numpy())
        assert stored["answer"].tolist() == [0, 1, 2, 3, 0]
        assert stored["ids"].tolist() == ["q0", "q1", "q2", "q3", "q4"]


def test_predictions_with_disagreeing_shapes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="4 ids"):
        run.save_predictions(tmp_path / "test.npz", torch.zeros(3, 5, 4), torch.zeros(5), list("abcd"))
    with pytest.raises(TypeError, match=r"'names' .* Python objects"):
        run.write_npz_atomic(tmp_path / "x.npz", names=np.array([None]))
    assert list(tmp_path.iterdir()) == []


def test_environment_record(tmp_path, monkeypatch):
    record = run.environment_record()
    assert record["torch"] == torch.__version__
    assert set(record) >= {"python", "transformers", "peft", "hydra", "numpy", "platform", "device"}
    assert record["command"] == sys.argv
    json.dumps(record)
    monkeypatch.setenv("PATH", str(tmp_path))  # a machine without git
    record = run.environment_record()
    assert (record["git_commit"], record["git_dirty"]) == (None, None)


def test_disk_check(tmp_path):
    run.check_disk(tmp_path / "not" / "there", 1)
    with pytest.raises(OSError, match=r"too little disk space .* MiB free"):
        run.check_disk(tmp_path / "not" / "there", 2**62)


def test_progress_is_silent_without_a_terminal(capsys):
    assert list(run.progress(range(3), "steps")) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_streams_are_reproducible_and_differ():
    streams = [(0, "train", 3), (0, "train", 4), (1, "train", 3), (0, "train", "3"), (0, "train"), (0, "train3")]
    draws = [torch.rand(4, generator=make_generator(*stream)) for stream in streams]
    again = torch.rand(4, generator=make_generator(0, "train", 3))
    assert torch.equal(draws[0], again)
    assert len({tuple(draw.tolist()) for draw in draws}) == len(streams)


def test_seed_all():
    import random

    def draw() -> list[float]:
        return [random.random(), np.random.rand(), torch.rand(()).item()]

    seed_all(5)
    first = draw()
    assert draw() != first
    seed_all(5)
    assert draw() == first
    with pytest.raises(ValueError, match="seed is -1"):
        seed_all(-1)
