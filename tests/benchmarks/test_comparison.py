"""The comparison's search, its selections, and the whole of it on a random model."""

import itertools
import json
import os
import pickle
from concurrent.futures import Executor, Future
from pathlib import Path

import pytest
import torch

from benchmarks import comparison, workers
from benchmarks.comparison import RATES, Comparison, Setting, beyond, chosen, finalists
from benchmarks.workers import BrokenOffError, Job, LostDeviceError, Slots, run_chains
from pipeline.processes import processes
from pipeline.run import CONFIGS
from utils.llm.errors import TooLittleMemoryError
from utils.run import read_metrics
from utils.settings import compose


def found(**by_rate: tuple[float, float]) -> dict[Setting, dict[str, float]]:
    """{"r1em3": (nll, acc)} as metrics by setting."""
    return {
        Setting(float(name[1:].replace("m", "-").replace("_", "."))): {"nll": nll, "acc": acc}
        for name, (nll, acc) in by_rate.items()
    }


def test_the_search_goes_on_beyond_the_best_at_an_end():
    inside = found(r2em4=(0.5, 0.8), r6em4=(0.4, 0.9), r1_8em3=(0.6, 0.7))
    assert beyond(inside) == []
    assert beyond({}) == []
    below = found(r2em4=(0.3, 0.8), r6em4=(0.4, 0.9), r1_8em3=(0.6, 0.7))
    assert beyond(below) == [Setting(6.67e-5)]
    both = found(r2em4=(0.3, 0.8), r6em4=(0.4, 0.9), r1_8em3=(0.6, 0.95))
    assert beyond(both) == [Setting(6.67e-5), Setting(5.4e-3)]


def test_selections_and_their_ties():
    some = found(r1em3=(0.4, 0.9), r2em3=(0.3, 0.8), r4em3=(0.5, 0.9))
    assert chosen(some) == {"nll": Setting(2e-3), "acc": Setting(1e-3)}, "of equal accuracy the lower NLL"
    assert chosen({}) == {}


def test_finalists_are_the_best_by_either_rule(monkeypatch):
    some = found(r1em3=(0.4, 0.9), r2em3=(0.3, 0.8), r4em3=(0.5, 0.95), r8em3=(0.6, 0.7))
    assert finalists(some) == [Setting(2e-3), Setting(1e-3), Setting(4e-3)]
    monkeypatch.setattr(comparison, "FINALISTS", 1)
    assert finalists(some) == [Setting(2e-3), Setting(4e-3)]
    assert finalists({}) == []


def finish(job: Job) -> None:
    """Leave what a run on test leaves last."""
    job.folder.mkdir(parents=True)
    (job.folder / "reliability.json").touch()


class Serial(Executor):
    """This process alone."""

    def submit(self, function, /, *arguments, **keywords):
        future: Future = Future()
        try:
            future.set_result(function(*arguments, **keywords))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.fixture
def made(monkeypatch) -> list[str]:
    """Names of the jobs in the order in which they were made, by a function that only writes their last file."""
    order: list[str] = []

    def work(job: Job) -> str | None:
        order.append(job.folder.name)
        if "fails" in job.folder.name:
            return "error: it fails"
        finish(job)
        return None

    monkeypatch.setattr(workers, "work", work)
    return order


def test_a_stage_starts_once_the_one_before_has_ended_and_priorities_hold(tmp_path, made, capsys):
    def job(name: str) -> Job:
        return Job(tmp_path / name, (), True)

    job("a0").folder.mkdir()
    (job("a0").folder / "reliability.json").touch()

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
        finish(job)

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
        finish(job)

    monkeypatch.setattr(workers, "work", work)
    assert run_chains(Serial(), [iter([(0, jobs(tmp_path, "a"))])], slots=2)


def test_a_worker_without_its_gpu_begins_no_run(tmp_path, monkeypatch, gpu):
    monkeypatch.setattr(workers, "execute", lambda job: pytest.fail("it began"))
    gpu += [False]
    with pytest.raises(LostDeviceError, match="it answers no more"):
        workers.work(Job(tmp_path, (), True))


def test_what_has_no_adapter_to_start_from_is_left_out(tmp_path):
    made = Comparison(tmp_path)
    jobs = made.jobs_after("mle", "sst2_100", Setting(1e-3))
    (made.final_folder("sst2_100", "mle", Setting(1e-3), 1) / "adapter").mkdir(parents=True)
    left = workers.startable(jobs)
    assert {job.folder.parts[-3:] for job in jobs} > {job.folder.parts[-3:] for job in left}
    assert {job.folder.name for job in left if "/ensemble/" not in str(job.folder)} == {"seed1"}
    assert sum("/ensemble/" in str(job.folder) for job in left) == 3


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
            finish(job)
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
                finish(job)
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
    chains = [iter([(0, jobs(tmp_path, "a1", "a2", "a3", "a4", "a5")), (1, jobs(tmp_path, "a6"))])]
    assert run_together(pool, monkeypatch, chains, slots=4)
    assert len(list(tmp_path.iterdir())) == 6, "every run was made in the end, the second stage after the first"
    assert pool.sizes == [4, 3, 1, 1]
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


def test_a_folder_may_be_moved_with_its_data(tmp_path):
    workers.write_json_atomic(tmp_path / workers.SETTINGS, ["paths.data_dir=/a", "train.init_adapter=/a/adapter"])
    workers.write_json_atomic(tmp_path / workers.TUNED, {})
    assert workers.is_finished(Job(tmp_path, ("train.init_adapter=/b/adapter", "paths.data_dir=/b"), False))


@pytest.mark.parametrize("override", ["opt.lr=1", "++opt.lr=1", "+seed=3", "method@_global_=sgp"])
def test_what_differs_from_run_to_run_cannot_be_set_for_all(tmp_path, override):
    with pytest.raises(ValueError, match="differs from run to run here"):
        Comparison(tmp_path, [override]).check()


def test_so_many_times_the_epochs_in_the_search_and_on_test(tmp_path):
    made = Comparison(tmp_path, ["dtype=float32"], times=4)
    first, after = made.test_stages("sst2_100", "mle", Setting(1e-3))
    jobs = [made.tuning_job("sst2_100", "sgp", Setting(1e-3), 100), made.zero_shot_job("sst2_100"), *first, *after]
    for job in jobs:
        said = workers.by_key(job.overrides)
        assert said["train.epochs"] == ("0" if "train.init_adapter" in said else "60")
        assert said["dtype"] == "float32"
    assert {job.folder.parts[-3] for job in after} >= {"ensemble", "temperature", "laplace"}


@pytest.mark.parametrize(
    ("times", "common", "said"),
    [
        (0, [], "times is 0: take a whole number from 1 on"),
        (1.5, [], "times is 1.5: take a whole number"),
        (None, [], "times is None: take a whole number"),
        (2, ["train.epochs=5"], "train.epochs is what times multiplies: leave one of them out"),
    ],
)
def test_a_length_that_cannot_be(tmp_path, times, common, said):
    with pytest.raises(ValueError, match=said):
        Comparison(tmp_path, common, times).check()


def test_the_command_passes_the_length_on(tmp_path):
    with pytest.raises(SystemExit, match="error: times is 0"):
        comparison.main(["--times", "0", "--out", str(tmp_path)])


def test_a_rate_is_not_tried_again_for_its_rounding():
    tried = [Setting(1.67e-5), Setting(5e-5)]
    assert comparison.untried([Setting(5.01e-5), Setting(1.5e-4)], tried) == [Setting(1.5e-4)]


def test_what_the_user_says_comes_last(tmp_path):
    made = Comparison(tmp_path, ["method.factory.precision_by=evidence"])
    jobs = [job for job in made.jobs_after("mle", "sst2_100", Setting(1e-3)) if "method=laplace" in job.overrides]
    assert len(jobs) == 3
    for job in jobs:
        assert workers.by_key(job.overrides)["method.factory.precision_by"] == "evidence"


def test_what_starts_from_an_adapter_trains_no_further_whatever_the_user_says(tmp_path):
    for job in Comparison(tmp_path, ["train.epochs=3", "eval.keep=best"]).jobs_after("mle", "sst2_100", Setting(1e-3)):
        said = workers.by_key(job.overrides)
        started = "train.init_adapter" in said
        assert (said["train.epochs"], said["eval.keep"]) == (("0", "last") if started else ("3", "best"))


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


def test_the_choice_is_by_the_mean_over_the_seeds(tmp_path):
    """The first seed alone would choose the other setting."""
    made = Comparison(tmp_path)
    of = {
        Setting(rate): nll
        for rate, nll in zip(RATES["blob"], ((0.1, 0.9, 0.9), (0.2, 0.3, 0.3), (5,), (6,)), strict=True)
    }
    for setting, values in of.items():
        for seed, value in zip(comparison.TUNING_SEEDS, values, strict=False):
            job = made.tuning_job("sst2_500", "blob", setting, seed)
            workers.write_json_atomic(job.folder / workers.TUNED, {"nll": value, "acc": 0.5, "ece": 0.1})
    *_, (_, first), (_, after) = list(made.chain("sst2_500", "blob", ("nll",)))
    assert {job.folder.parent.name for job in first} == {f"{RATES['blob'][1]:g}"}
    assert not after


def test_the_declared_search_whole(tmp_path):
    """Lower rates have the lower NLL, higher ones the accuracy: the search goes both ways, and its stages are these."""
    made, task, rates = Comparison(tmp_path), "sst2_500", RATES["blob"]

    def tune(job: Job) -> None:
        rate, _, own = job.folder.parent.name.partition("_")
        seed = int(job.folder.name.removeprefix("seed"))
        nll = float(rate) + (0.01 if own else 0)
        if own == "eps_0.15":  # the best by the first seed, not by the mean
            nll += -0.05 if seed == 100 else 0.1
        acc = float(rate) + (0.001 if own == "equal_kl" else 0)
        workers.write_json_atomic(job.folder / workers.TUNED, {"nll": nll, "acc": acc, "ece": 0.1})

    stages = []
    for jobs in made.search(task, "blob", []):
        stages.append({f"{job.folder.parent.name}/{job.folder.name}" for job in jobs})
        for job in jobs:
            tune(job)
    lowest, highest = f"{rates[0] / 9:.3g}", f"{rates[-1] * 9:g}"
    assert stages == [
        {f"{rate:g}/seed100" for rate in rates},
        {f"{rates[0] / 3:.3g}/seed100", f"{rates[-1] * 3:g}/seed100"},
        {f"{lowest}/seed100", f"{highest}/seed100"},
        {f"{rate}_{own}/seed100" for rate in (lowest, highest) for own in ("eps_0.15", "equal_kl")},
        {
            f"{setting}/seed{seed}"
            for setting in (f"{lowest}_eps_0.15", f"{highest}_eps_0.15", f"{highest}_equal_kl", lowest)
            for seed in (101, 102)
        },
    ]

    for setting in made.found(task, "blob", made.settings(task, "blob"), (100, 101, 102)):
        for seed in comparison.SEEDS:
            finish(made.final_job(task, "blob", setting, seed))
    unfinished = made.zero_shot_job(task).folder
    unfinished.mkdir(parents=True)
    made.write_lists([task])
    folders = (tmp_path / "by_nll.txt").read_text().split()
    assert str(unfinished) not in folders
    assert [Path(folder).parent.name for folder in folders if "/blob/" in folder] == [lowest] * 3


def test_what_follows_a_method_has_its_setting_and_what_is_its_own(tmp_path):
    jobs = Comparison(tmp_path).jobs_after("mle", "sst2_100", Setting(1e-3, "dropout_0.1"))
    by_method = {job.folder.parts[-3]: job.overrides for job in jobs}
    assert by_method.keys() == {"ensemble", "temperature", "laplace", "laplace_last", "tfb"}
    for method, said in by_method.items():
        assert "peft.lora_dropout=0.1" in said
        assert ("method.factory.precision_by=validation" in said) == method.startswith("laplace")
        assert ("train.epochs=0" in said) == (method != "ensemble")


def test_an_unknown_rule_is_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown rule ece; there are nll, acc"):
        Comparison(tmp_path).run(["sst2_500"], 1, rules=["acc", "ece"])


def test_rules_come_in_order_and_others_are_left_out(tmp_path, monkeypatch):
    """Runs on test by the first rule go before further searches, those by the second after."""
    found = {Setting(1e-3): {"nll": 0.2, "acc": 0.8, "ece": 0.1}, Setting(2e-3): {"nll": 0.3, "acc": 0.9, "ece": 0.1}}
    monkeypatch.setattr(Comparison, "search", lambda *_: iter([]))
    monkeypatch.setattr(Comparison, "found", lambda *_: found)

    stages = list(Comparison(tmp_path).chain("sst2_500", "blob", ("acc", "nll")))
    made = [(priority, {job.folder.parent.name for job in stage}) for priority, stage in stages if stage]
    assert made == [(0, {"0.002"}), (1, {"0.001"})]
    alone = [stage for _, stage in Comparison(tmp_path).chain("sst2_500", "blob", ("nll",)) if stage]
    assert {job.folder.parent.name for stage in alone for job in stage} == {"0.001"}
    monkeypatch.setattr(Comparison, "found", lambda *_: {})
    assert not list(Comparison(tmp_path).chain("sst2_500", "blob")), "nothing was found"


def test_no_run_starts_after_the_time_is_up(tmp_path, made):
    jobs = [Job(tmp_path / "x", (), True)]
    assert not run_chains(Serial(), [iter([(0, jobs)])], slots=1, seconds=0)
    assert made == []


def test_the_whole_comparison_and_its_repetition(tmp_path, overrides, monkeypatch, capsys):
    monkeypatch.setattr(comparison, "RATES", {"mle": (1e-3, 1e-2), "sgp": (1e-3, 1e-2), "map": (1e-3, 1e-2)})
    monkeypatch.setattr(comparison, "OWN", {m: {"dropout": ("peft.lora_dropout=0.1",)} for m in comparison.RATES})
    monkeypatch.setattr(comparison, "POST_HOC", {"mle": ("temperature",), "sgp": ("sgp_temperature",)})
    monkeypatch.setattr(comparison, "SEEDS", (0, 1))
    monkeypatch.setattr(comparison, "EXTENSIONS", 1)
    monkeypatch.setattr(comparison, "TUNING_SEEDS", (100, 101))
    tiny = [o for o in overrides() if not o.startswith(("paths.output_dir", "opt.lr", "eval.n_mc", "train.batch"))]
    monkeypatch.setattr(comparison, "TASKS", {"tiny": tuple(tiny)})
    real = Comparison.overrides

    def faulty(self, task, method, *arguments, **keywords):
        wrong = ("+method.factory.no_such_key=1",) if method == "map" else ()
        return (*real(self, task, method, *arguments, **keywords), *wrong)

    monkeypatch.setattr(Comparison, "overrides", faulty)
    made = Comparison(tmp_path / "out", ["eval.n_mc=2", "train.batch_size=4"])

    def compare() -> str:
        assert not run_chains(Serial(), [made.chain("tiny", method) for method in comparison.RATES], slots=2)
        made.write_lists(["tiny"])
        return capsys.readouterr().out

    assert "no_such_key" in compare(), "a failing run is reported, the others go on"
    tuning = json.loads((made.out / "tuning.json").read_text())["tiny"]
    assert tuning.keys() == {"mle", "sgp", "map"}
    assert all(not runs for runs in tuning["map"].values())
    for rule, best in (("nll", lambda v: (v["nll"], -v["acc"])), ("acc", lambda v: (-v["acc"], v["nll"]))):
        settings = {}
        for m in ("mle", "sgp"):
            assert {"0.001", "0.01"} <= tuning[m].keys()
            full = {s: list(runs.values()) for s, runs in tuning[m].items() if runs.keys() == {"100", "101"}}
            assert 2 <= len(full) < len(tuning[m]), "finalists alone have all seeds"
            means = {s: {k: (a[k] + b[k]) / 2 for k in ("nll", "acc")} for s, (a, b) in full.items()}
            settings[m] = min(means, key=lambda s: best(means[s]))
        folders = (made.out / f"by_{rule}.txt").read_text().split()
        assert len(folders) == 1 + 2 * 5
        others = (("ensemble", "mle"), ("temperature", "mle"), ("sgp_temperature", "sgp"))
        for method, setting in (("mle", "mle"), ("sgp", "sgp"), *others):
            for seed in (0, 1):
                assert str(made.out / "final" / "tiny" / method / settings[setting] / f"seed{seed}") in folders
        for folder in folders:
            assert '"split": "test"' in (comparison.Path(folder) / "metrics.jsonl").read_text()
    assert any("_dropout" in setting for setting in tuning["sgp"])
    assert not any('"split": "test"' in p.read_text() for p in made.out.glob("tune/**/metrics.jsonl"))
    for method, first in (("temperature", "mle"), ("sgp_temperature", "sgp")):
        config = next(p for p in (made.out / "final" / "tiny" / method).rglob("config.yaml"))
        assert f"/final/tiny/{first}/" in config.read_text()
    environments = [p.stat().st_mtime_ns for p in sorted(made.out.rglob("metrics.jsonl"))]

    assert "done" not in compare()
    assert [p.stat().st_mtime_ns for p in sorted(made.out.glob("final/**/metrics.jsonl"))] == [
        t for t, p in zip(environments, sorted(made.out.rglob("metrics.jsonl")), strict=True) if "final" in str(p)
    ]


def test_grids_name_tasks():
    for grid in comparison.GRIDS.values():
        assert len(set(grid)) == len(grid)
        assert set(grid) <= comparison.TASKS.keys()


@pytest.mark.parametrize("name", list(comparison.TASKS))
def test_every_task_composes(name, tmp_path):
    overrides = Comparison(tmp_path).overrides(name, "sgp", 0, Setting(1e-3))
    assert compose(CONFIGS, [*overrides, "paths.output_dir=x"]).train.epochs >= 1


@pytest.mark.parametrize("method", RATES)
def test_every_own_setting_composes_and_changes_something(method, tmp_path):
    made = Comparison(tmp_path)
    settings = [Setting(1e-3), *(Setting(1e-3, own) for own in comparison.OWN[method])]
    default, *others = (
        compose(CONFIGS, [*made.overrides("sst2_500", method, 0, s), "paths.output_dir=x"]) for s in settings
    )
    assert len(others) == 2
    assert all(default != other for other in others)


@pytest.mark.parametrize("override", ["seed=3", "method=sgp", "opt.lr=1", "dset=cola"])
def test_what_is_compared_cannot_be_overridden(override, tmp_path):
    with pytest.raises(ValueError, match=f"{override.split('=')[0]} differs from run to run here: leave it out"):
        Comparison(tmp_path, ["dtype=float32", override]).run(["sst2_100"], 1)


def test_a_folder_with_other_settings_is_refused_before_any_run(tmp_path, monkeypatch):
    """Also where the runs are of a task that is not asked for, which the lists would hold."""
    old = Comparison(tmp_path, ["dtype=float32"]).tuning_job("sst2_100", "mle", Setting(RATES["mle"][0]), 100)
    workers.write_json_atomic(old.folder / workers.SETTINGS, list(old.overrides))
    workers.write_json_atomic(old.folder / workers.TUNED, {"nll": 1.0, "acc": 0.5})
    monkeypatch.setattr(comparison, "processes", None)
    with pytest.raises(ValueError, match="dtype=bfloat16 dtype=float32"):
        Comparison(tmp_path, ["dtype=bfloat16"]).run(["cola_500"], 1)


@pytest.mark.parametrize(
    "command",
    [
        "--tasks sst2_500 arc_e --jobs 3 dtype=bfloat16 device=cpu",
        "dtype=bfloat16 device=cpu --tasks sst2_500 arc_e --jobs 3",
        "dtype=bfloat16 --tasks sst2_500 arc_e --jobs 3 device=cpu",
    ],
)
def test_overrides_stand_before_among_or_after_the_options(command, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(Comparison, "run", lambda self, *arguments: asked.append((list(self.common), *arguments)))
    comparison.main([*command.split(), "--out", str(tmp_path)])
    assert asked == [(["dtype=bfloat16", "device=cpu"], ["sst2_500", "arc_e"], 3, float("inf"), ["nll", "acc"])]
