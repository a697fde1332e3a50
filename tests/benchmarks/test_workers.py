"""Chains of runs, and what becomes of those that fail: most on no processes and with no training."""

import itertools
import json
import os
import pickle
from concurrent.futures import Executor, Future

import pytest
import torch
from tiny_runs import Serial, finish

from benchmarks import workers
from benchmarks.workers import (
    BrokenOffError,
    Job,
    LostDeviceError,
    Slots,
    carry_out,
    has_ended,
    is_finished,
    run_chains,
)
from pipeline.processes import processes
from utils.llm.errors import TooLittleMemoryError
from utils.run import read_metrics


@pytest.fixture
def made(monkeypatch) -> list[str]:
    """Names of the jobs in the order in which they were made, by a function that only writes their last file."""
    order: list[str] = []

    def work(job: Job) -> str | None:
        order.append(job.folder.name)
        if "fails" in job.folder.name:
            return "error: it fails"
        finish(job.folder)
        return None

    monkeypatch.setattr(workers, "work", work)
    return order


def test_a_stage_starts_once_the_one_before_has_ended_and_priorities_hold(tmp_path, made, capsys):
    def job(name: str) -> Job:
        return Job(tmp_path / name, (), True)

    finish(job("a0").folder)

    def first():
        yield 0, [job("a0"), job("a1"), job("a1")]
        assert made == ["a1"]
        yield 1, [job("a2")]

    def second():
        yield 0, [job("b_fails")]
        yield 0, []
        yield 0, [job("b2")]

    assert run_chains(Serial(), [first(), second()], slots=1)
    assert made == ["a1", "b_fails", "b2", "a2"]
    assert "it fails" in capsys.readouterr().out


def fail_with(error: Exception, monkeypatch) -> None:
    """Make every run end with this error."""

    def execute(job: Job) -> None:
        raise error

    monkeypatch.setattr(workers, "execute", execute)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("too little"),
        torch.AcceleratorError("CUDA error: out of memory"),
        TooLittleMemoryError("too little"),
    ],
)
def test_too_little_memory_is_not_taken_for_a_failure_of_the_run(tmp_path, monkeypatch, error):
    fail_with(error, monkeypatch)
    with pytest.raises(TooLittleMemoryError, match=r"too little|out of memory"):
        workers.work(Job(tmp_path, (), True))


@pytest.mark.parametrize("error", [FloatingPointError("nan"), torch.linalg.LinAlgError("not positive-definite")])
def test_what_diverges_is_a_result_of_its_settings(tmp_path, monkeypatch, error):
    fail_with(error, monkeypatch)
    assert workers.work(Job(tmp_path, (), True)) == f"error: {error}"


def test_what_diverged_is_not_made_again_and_has_no_results(tmp_path, monkeypatch, capsys):
    fail_with(FloatingPointError("loss nan"), monkeypatch)
    job = Job(tmp_path / "a", ("opt.lr=1",), True)
    assert not has_ended(job)
    for _ in range(2):
        assert run_chains(Serial(), [iter([(0, [job])])], slots=1)
    assert capsys.readouterr().out.count("loss nan") == 1
    assert has_ended(job)
    assert not is_finished(job)
    workers.write_json_atomic(job.folder / workers.SETTINGS, ["opt.lr=2"])
    with pytest.raises(ValueError, match=r"other settings \(opt.lr=1 opt.lr=2\)"):
        is_finished(job)


@pytest.mark.parametrize("test", [False, True])
def test_scores_that_are_not_finite_are_a_divergence(tmp_path, overrides, test):
    said = overrides("method=sgp", "opt.lr=30", "train.max_steps=1", "eval.every=none")
    assert "score of example 0 is nan" in str(workers.work(Job(tmp_path / "run", tuple(said), test)))


def test_a_run_on_test_is_finished_once_its_folder_holds_the_evaluation(tmp_path):
    job = Job(tmp_path / "a", (), True)
    finish(job.folder)
    assert is_finished(job)
    for kind, split in (("train", "train"), ("final", "validation"), ("eval", "test")):
        (job.folder / "metrics.jsonl").write_text(json.dumps({"kind": kind, "split": split, "step": 1}) + "\n")
        assert not is_finished(job)
    (job.folder / "metrics.jsonl").unlink()
    assert not is_finished(job)


@pytest.mark.parametrize("error", [OSError("No space left on device"), RuntimeError("refused"), KeyError("gone")])
def test_other_failures_are_none(tmp_path, monkeypatch, error):
    fail_with(error, monkeypatch)
    with pytest.raises(RuntimeError, match=r"No space left|refused|gone") as failed:
        workers.work(Job(tmp_path, (), True))
    assert not isinstance(failed.value, TooLittleMemoryError)


@pytest.fixture
def gpu(monkeypatch) -> list[bool]:
    """A GPU; whether it answers, from now on and after each run in turn."""
    answers: list[bool] = []

    def use() -> None:
        if not answers.pop(0):
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(workers, "_use_device", use)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(workers, "PAUSE", 0.0)
    return answers


def test_a_gpu_that_answers_no_more_is_told_from_failures(tmp_path, monkeypatch, gpu):
    fail_with(torch.AcceleratorError("CUDA error: unspecified launch failure\nSearch for it"), monkeypatch)
    gpu += [True, False]
    with pytest.raises(LostDeviceError, match="CUDA error: unspecified launch failure") as failed:
        workers.work(Job(tmp_path, (), True))
    assert failed.value.worker == os.getpid()
    assert pickle.loads(pickle.dumps(failed.value)).worker == os.getpid(), "it comes from another process"
    gpu += [True, True]
    with pytest.raises(BrokenOffError, match="unspecified launch failure"):
        workers.work(Job(tmp_path, (), True))


def test_an_error_of_the_gpu_is_told_by_its_cause_too(tmp_path, monkeypatch, gpu):
    for cause, kind in ((torch.AcceleratorError("busy"), BrokenOffError), (TypeError("no"), RuntimeError)):
        error = RuntimeError("a training step cannot be recorded")
        error.__cause__ = cause
        fail_with(error, monkeypatch)
        gpu += [True, True]
        with pytest.raises(RuntimeError, match="cannot be recorded") as failed:
            workers.work(Job(tmp_path, (), True))
        assert type(failed.value) is kind


def test_a_gpu_that_others_have_filled_is_not_lost(tmp_path, monkeypatch, gpu):
    def use() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(workers, "_use_device", use)
    monkeypatch.setattr(workers, "execute", lambda job: None)
    assert workers.work(Job(tmp_path, (), True)) is None


def test_a_run_that_the_gpu_broke_off_is_made_once_more(tmp_path, monkeypatch, capsys):
    tries: list[str] = []

    def work(job: Job) -> None:
        tries.append(job.folder.name)
        if job.folder.name == "b" or len(tries) == 1:
            raise BrokenOffError("CUDA error: busy")
        finish(job.folder)

    monkeypatch.setattr(workers, "work", work)
    assert run_chains(Serial(), [iter([(0, jobs(tmp_path, "a"))])], slots=1)
    assert tries == ["a", "a"]
    assert f"{tmp_path / 'a'} CUDA error: busy; once more, later" in capsys.readouterr().out
    assert not run_chains(Serial(), [iter([(0, jobs(tmp_path, "b", "c"))])], slots=1)
    assert tries == ["a", "a", "b", "c", "b"], "after the others"


def test_a_worker_that_is_lost_does_not_count_as_a_run_broken_off(tmp_path, monkeypatch):
    errors = [LostDeviceError("gone", 0), BrokenOffError("busy")]

    def work(job: Job) -> None:
        if errors:
            raise errors.pop(0)
        finish(job.folder)

    monkeypatch.setattr(workers, "work", work)
    assert run_chains(Serial(), [iter([(0, jobs(tmp_path, "a"))])], slots=2)


def test_a_worker_without_its_gpu_begins_no_run(tmp_path, monkeypatch, gpu):
    monkeypatch.setattr(workers, "execute", lambda job: pytest.fail("it began"))
    gpu += [False]
    with pytest.raises(LostDeviceError, match="it answers no more"):
        workers.work(Job(tmp_path, (), True))


class Losing(Executor):
    """Two workers, 0 and 1, that take runs in turn; some lose a worker, whose later runs all fail."""

    def __init__(self, *fatal: str) -> None:
        self.fatal, self.lost, self.turn = fatal, set[int](), itertools.cycle((0, 1))

    def submit(self, function, /, job, **_):
        future: Future = Future()
        worker = next(self.turn)
        if job.folder.name in self.fatal:
            self.lost.add(worker)
        if worker in self.lost:
            future.set_exception(LostDeviceError("CUDA error: gone", worker))
        else:
            finish(job.folder)
            future.set_result(None)
        return future


def test_runs_of_a_lost_worker_are_made_by_the_others(tmp_path, capsys):
    pool = Losing()
    pool.lost.add(1)
    chains = [iter([(0, jobs(tmp_path, "a1", "a2")), (0, jobs(tmp_path, "a3"))])]
    assert run_chains(pool, chains, slots=2)
    assert {path.name for path in tmp_path.iterdir()} == {"a1", "a2", "a3"}
    assert "a2 CUDA error: gone; the GPU still answers 1 of 2 workers" in capsys.readouterr().out


def test_a_run_that_costs_two_workers_has_failed_and_without_workers_the_work_ends(tmp_path, capsys):
    assert not run_chains(Losing("a1"), [iter([(0, jobs(tmp_path, "a1", "a2"))])], slots=2)
    out = capsys.readouterr().out
    assert "a1 CUDA error: gone; the GPU still answers 1 of 2 workers" in out
    assert "waiting] " + str(tmp_path / "a1") + " CUDA error: gone" in out
    assert not run_chains(Losing("b1"), [iter([(0, jobs(tmp_path, "b1"))])], slots=1), "not for ever with no worker"


class Together(Executor):
    """Ends all that was submitted at once: the first ``most`` runs well, the others for want of memory."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.sizes: list[int] = []
        self.open: list[tuple[Future, Job]] = []

    def submit(self, function, /, *arguments, **keywords):
        future: Future = Future()
        self.open.append((future, arguments[0]))
        return future

    def end(self) -> None:
        self.sizes.append(len(self.open))
        for i, (future, job) in enumerate(self.open):
            if i >= self.most:
                future.set_exception(TooLittleMemoryError("too little"))
            else:
                finish(job.folder)
                future.set_result(None)
        self.open = []


def run_together(pool: Together, monkeypatch, chains: list, slots: int) -> bool:
    """``run_chains`` in a pool whose runs end together, whenever they are waited for."""
    wait = workers.wait

    def ended(futures, **keywords):
        pool.end()
        return wait(futures, **keywords)

    monkeypatch.setattr(workers, "wait", ended)
    return run_chains(pool, chains, slots)


def jobs(folder, *names: str) -> list[Job]:
    return [Job(folder / name, (), True) for name in names]


def test_fewer_runs_go_at_a_time_once_memory_was_too_little(tmp_path, monkeypatch, capsys):
    pool = Together(most=2)
    chains = [iter([(0, jobs(tmp_path, *(f"a{i}" for i in range(1, 8)))), (1, jobs(tmp_path, "a8"))])]
    assert run_together(pool, monkeypatch, chains, slots=4)
    assert len(list(tmp_path.iterdir())) == 8, "every run was made in the end, the second stage after the first"
    assert pool.sizes == [4, 3, 2, 1, 1]
    assert "a3 too little; again later, 3 runs at a time\n" in capsys.readouterr().out


def test_more_runs_go_at_a_time_once_memory_is_enough_again(tmp_path, monkeypatch):
    """A large task comes first; runs of the small ones after it that fit are followed by one more at a time."""
    pool = Together(most=1)
    small = jobs(tmp_path, *(f"b{i}" for i in range(40)))
    chains = [iter([(0, jobs(tmp_path, "a1", "a2", "a3", "a4")), (1, small)])]
    end = pool.end

    def ended() -> None:
        pool.most = 1 if pool.open[0][1].folder.name.startswith("a") else 8
        end()

    monkeypatch.setattr(pool, "end", ended)
    assert run_together(pool, monkeypatch, chains, slots=4)
    assert pool.sizes[:4] == [4, 3, 2, 1]
    assert pool.sizes[4:-1] == sorted(pool.sizes[4:-1]), "one more after the other, and none is taken back"
    assert pool.sizes.count(4) > 3, "at last as many as there are workers"
    assert max(pool.sizes) == 4


def fitting(slots: Slots, runs: int) -> int:
    """How many may go after so many runs found enough memory, each beside as many as may go."""
    for _ in range(runs):
        slots.fit(slots.now)
    return slots.now


def test_one_more_goes_after_enough_that_fit():
    slots = Slots(8)
    slots.shrink(8)
    slots.shrink(6)
    slots.shrink(8)
    assert slots.now == 5
    assert fitting(slots, 3) == 5
    slots.fit(4)
    assert slots.now == 5, "beside fewer than may go, it says nothing"
    assert fitting(slots, 1) == 6
    assert fitting(slots, 3) == 6
    assert fitting(slots, 5) == 8
    assert fitting(slots, 20) == 8, "there are no more workers"
    slots.lose()
    assert slots.now == slots.most == 7
    slots.shrink(2)
    assert fitting(slots, 99) == 7


def test_a_try_that_was_one_too_many_is_repeated_ever_later():
    slots, needed = Slots(8), []
    slots.shrink(5)
    for _ in range(6):
        runs = 0
        while slots.now == 4:
            slots.fit(4)
            runs += 1
        needed.append(runs)
        slots.shrink(5)
        slots.shrink(5)  # as of a run that began beside it
    assert needed == [4, 8, 16, 32, 32, 32]
    assert fitting(slots, 32) == 5
    assert fitting(slots, 32) == 6, "the first that is not too many is followed as soon as at first"
    assert fitting(slots, 4) == 7


def test_a_chain_stops_at_a_run_that_found_too_little_memory_alone(tmp_path, monkeypatch, capsys):
    """What it chooses next must not be chosen without that run; the other chains go on."""

    class Small(Together):
        def end(self) -> None:
            self.most = 0 if self.open[0][1].folder.name == "a1" else 1
            super().end()

    chains = [iter([(0, jobs(tmp_path, f"{name}1")), (0, jobs(tmp_path, f"{name}2"))]) for name in "ab"]
    assert not run_together(Small(1), monkeypatch, chains, slots=1)
    out = capsys.readouterr().out
    assert "a1 too little" in out
    assert "a2" not in out
    assert "b2 done" in out


def test_a_folder_with_other_settings_is_refused(tmp_path):
    job = Job(tmp_path, ("opt.lr=1",), False)
    assert not workers.is_finished(job)
    workers.write_json_atomic(tmp_path / workers.SETTINGS, ["opt.lr=1"])
    workers.write_json_atomic(tmp_path / workers.TUNED, {})
    assert workers.is_finished(job)
    workers.write_json_atomic(tmp_path / workers.SETTINGS, ["seed=0", "opt.lr=3", "opt.lr=1"])
    assert workers.is_finished(Job(tmp_path, ("opt.lr=1", "seed=0"), False)), "neither order nor repetition counts"
    workers.write_json_atomic(tmp_path / workers.SETTINGS, ["opt.lr=1"])
    with pytest.raises(ValueError, match=r"other settings \(opt.lr=1 opt.lr=2\): use another folder"):
        workers.is_finished(Job(tmp_path, ("++opt.lr=2",), False))
    for name, read in ((workers.TUNED, workers.tuned), (workers.SETTINGS, workers.is_finished)):
        (tmp_path / name).write_text('{"acc": ')
        with pytest.raises(ValueError, match=rf"{tmp_path}/{name} is damaged .*: remove its folder"):
            read(job)


def test_a_folder_may_be_moved_with_its_data_and_weights(tmp_path):
    keys = ("paths.data_dir", "train.init_adapter", "llm.gguf_dir")
    workers.write_json_atomic(tmp_path / workers.SETTINGS, [f"{key}=/a" for key in keys])
    workers.write_json_atomic(tmp_path / workers.TUNED, {})
    assert workers.is_finished(Job(tmp_path, tuple(f"{key}=/b" for key in keys), False))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the worker would find its GPU")
def test_workers_that_find_no_room_end_the_work_before_any_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # of a machine that has none
    with processes(1) as pool:
        assert not run_chains(pool, [iter([(0, [Job(tmp_path / "x", (), True)])])], slots=1)
    assert "found no room on its GPU: use fewer jobs" in capsys.readouterr().out
    assert not (tmp_path / "x").exists()


def die(job: Job) -> None:
    os.abort()


def test_a_worker_that_dies_ends_the_work_with_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(workers, "work", die)
    with processes(1) as pool:
        assert not run_chains(pool, [iter([(0, [Job(tmp_path / "x", (), True)])])], slots=1)
    assert "a worker process died" in capsys.readouterr().out


def test_a_tuning_run_is_judged_by_the_adapter_it_keeps_and_what_is_fitted(tmp_path, overrides):
    large = ("opt.lr=0.3", "opt.schedule=constant", "eval.keep=best", "eval.every=1")
    common = [o for o in overrides(*large) if not o.startswith("paths.output_dir")]
    found = {}
    for method in ("mle", "temperature"):
        job = Job(tmp_path / method, (*common, f"method={method}"), False)
        workers.execute(job)
        found[method] = workers.tuned(job)["nll"]
    evaluations = [r for r in read_metrics(tmp_path / "mle") if r["kind"] == "eval"]
    assert evaluations[-1]["nll"] > found["mle"] == pytest.approx(min(r["nll"] for r in evaluations))
    assert found["temperature"] < found["mle"]


def test_no_run_starts_after_the_time_is_up(tmp_path, made):
    jobs = [Job(tmp_path / "x", (), True)]
    assert not run_chains(Serial(), [iter([(0, jobs)])], slots=1, seconds=0)
    assert made == []


def test_no_run_starts_beside_others_once_the_time_is_up(tmp_path, monkeypatch, made):
    clock, work = [0.0], workers.work

    def slow(job: Job) -> str | None:
        clock[0] += 10
        return work(job)

    monkeypatch.setattr(workers, "work", slow)
    monkeypatch.setattr(workers.time, "monotonic", lambda: clock[0])
    assert not run_chains(Serial(), [iter([(0, jobs(tmp_path, "a", "b"))])], slots=2, seconds=5)
    assert made == ["a"]


def test_what_is_not_complete_is_told(tmp_path, capsys):
    carry_out([], 1, 0)
    assert capsys.readouterr().out == ""
    carry_out([iter([(0, jobs(tmp_path, "a"))])], 1, 0)
    assert capsys.readouterr().out == "not complete: the same command goes on\n"


def test_runs_that_diverge_say_nothing_of_the_memory(tmp_path, monkeypatch):
    """They may have ended before they needed it."""
    pool = Together(most=1)
    chains = [iter([(0, jobs(tmp_path, "a", "b")), (0, jobs(tmp_path, *(f"c{i}" for i in range(9))))])]
    end = pool.end

    def ended() -> None:
        if pool.open[0][1].folder.name.startswith("c"):
            pool.sizes.append(len(pool.open))
            for future, _ in pool.open:
                future.set_result("error: it diverged")
            pool.open = []
        else:
            end()

    monkeypatch.setattr(pool, "end", ended)
    assert run_together(pool, monkeypatch, chains, slots=2)
    assert pool.sizes == [2, 1, *[1] * 9]


ODD = "a=b, c(d)[e]'f'"


def test_a_run_is_made_anew_in_a_folder_of_any_name(tmp_path, overrides):
    """Also where one before it broke off; and it is judged by the method's own prediction, not by its mean."""
    job = Job(tmp_path / ODD, tuple(overrides("method=sgp", "train.max_steps=1", "eval.every=none")), False)
    for _ in range(2):
        workers.execute(job)
        assert is_finished(job)
        assert workers.tuned(job)["mutual_information"] > 0, "of one prediction it is 0"
