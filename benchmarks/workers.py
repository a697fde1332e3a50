"""Chains of runs, many at once, in which the results of one stage decide on the next."""

import contextlib
import gc
import heapq
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch

import train_script
from bnn.metrics import evaluate_predictions
from pipeline.evaluation import fit, keep_best, logits_of
from pipeline.processes import DEAD_WORKER, processes
from pipeline.run import CONFIGS, prepare
from pipeline.training import train
from utils.llm.errors import TooLittleMemoryError, lacks_memory
from utils.run import METRICS_FILE, RELIABILITY_FILE, read_metrics, write_json_atomic, write_text_atomic
from utils.settings import compose, key_of, one_line, quoted, value_of

TUNED = "tuned.json"
DIVERGED = (FloatingPointError, torch.linalg.LinAlgError)
"""Errors that a run's settings are the cause of."""
DIVERGED_FILE = "diverged.txt"
"""How a run diverged, in its folder; without it the run would be made again."""
SETTINGS = "overrides.json"
"""What a run was made with, beside it."""
MOVED = ("paths.", "train.init_adapter", "llm.gguf_dir")
"""Keys that differ once a comparison's folder, its data or the file of weights has been moved."""
PAUSE = 5.0
"""Seconds that a worker without a GPU waits before it hands a run back."""
FITTED = 4
"""Runs that must find enough memory, beside as many as may go, before one more may."""
PATIENCE = 8
"""So many times more of them at most, where one more has been too many before."""


class Job(NamedTuple):
    """One run."""

    folder: Path
    overrides: tuple[str, ...]
    test: bool
    """Whether to go on to the evaluation on test data."""


Chain = Iterator[tuple[int, Sequence[Job]]]
"""Stages of runs, each with its priority (low first); a stage is asked for once the one before has ended."""


def is_finished(job: Job) -> bool:
    """Whether the run has come to the results that it was made for; errors as of ``has_ended``."""
    return has_ended(job) and not (job.folder / DIVERGED_FILE).exists()


def has_ended(job: Job) -> bool:
    """Whether the run has finished or diverged, which its settings would do again.

    Raises:
        ValueError: if the folder's run was made with other settings.
    """
    made = job.folder / SETTINGS
    has_results = _is_tested(job.folder) if job.test else (job.folder / TUNED).exists()
    if not (has_results or (job.folder / DIVERGED_FILE).exists()):
        return False
    if made.exists():
        differing = by_key(_read(made)).items() ^ by_key(job.overrides).items()
        other = " ".join(f"{key}={value}" for key, value in sorted(differing) if not key.startswith(MOVED))
        if other:
            raise ValueError(f"{job.folder} holds a run with other settings ({other}): use another folder")
    return True


def _is_tested(folder: Path) -> bool:
    """Whether a run's last file is there, and the evaluation on test that it belongs to."""
    if not all((folder / name).exists() for name in (RELIABILITY_FILE, METRICS_FILE)):
        return False
    return any(record["kind"] == "final" and record["split"] == "test" for record in read_metrics(folder))


def startable(jobs: Sequence[Job]) -> list[Job]:
    """Without those that start from the adapter of a run that has none: it diverged."""
    starts = {job: [value_of(o) for o in job.overrides if key_of(o) == "train.init_adapter"] for job in jobs}
    return [job for job, start in starts.items() if all(Path(folder).is_dir() for folder in start)]


def by_key(overrides: Sequence[str]) -> dict[str, str]:
    """The last value of every key, whatever Hydra's prefix or package."""
    return {key_of(override): override.partition("=")[2] for override in overrides}


def tuned(job: Job) -> dict[str, float]:
    """Metrics on validation data of a finished run that is not for test; ValueError if the file is damaged."""
    return _read(job.folder / TUNED)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): remove its folder, and the run is made again") from error


def execute(job: Job) -> None:
    """Run one job in this process."""
    cfg = compose(CONFIGS, [*job.overrides, quoted("paths.output_dir", job.folder), "overwrite=true"])
    write_json_atomic(job.folder / SETTINGS, list(job.overrides))
    if job.test:
        train_script.execute(cfg)
        return
    run = prepare(cfg)
    step = train(run)
    keep_best(run)
    fit(run)
    mode = run.method.modes(cfg.eval.n_mc)[0]
    logits, answer = logits_of(run, run.data.validation, mode, "tuning")
    write_json_atomic(job.folder / TUNED, {"step": step, **evaluate_predictions(logits, answer)})


class LostDeviceError(RuntimeError):
    """The GPU of a worker answers no more, whatever the run.

    Args:
        message: what went wrong.
        worker: the process.
    """

    def __init__(self, message: str, worker: int) -> None:
        super().__init__(message, worker)
        self.message, self.worker = message, worker

    def __str__(self) -> str:
        return self.message


class BrokenOffError(RuntimeError):
    """An error of the GPU ended a run; it answers again, and nothing says that the run is the cause."""


def work(job: Job) -> str | None:
    """``execute``; returns how the run diverged, if it did, which its folder keeps: its settings lead there.

    Raises:
        TooLittleMemoryError: if there was too little memory, which says nothing about the settings.
        LostDeviceError: after a pause, so that workers whose GPU answers take the next runs before this one does.
        BrokenOffError: if the GPU failed for this run alone.
        RuntimeError: for what else went wrong, which says as little.
    """
    _check_device("it answers no more")
    try:
        execute(job)
    except DIVERGED as error:
        how = one_line(error, CONFIGS)
        write_text_atomic(job.folder / DIVERGED_FILE, f"{how}\n")
        return how
    except Exception as error:
        kind = TooLittleMemoryError if lacks_memory(error) else BrokenOffError if _is_of_gpu(error) else RuntimeError
        is_known = kind is TooLittleMemoryError or isinstance(error, train_script.USER_ERRORS)
        failure = one_line(error, CONFIGS) if is_known else f"{type(error).__name__}: {error}"
    else:
        return None
    finally:
        gc.collect()
        if torch.cuda.is_available():
            with contextlib.suppress(RuntimeError):
                torch.cuda.empty_cache()
    _check_device(failure)
    raise kind(failure)  # without its cause, which need not survive the way to another process


def _is_of_gpu(error: BaseException) -> bool:
    """Whether an error, or what it was raised from, was reported by CUDA itself; why is not told apart."""
    return isinstance(error, torch.AcceleratorError) or (error.__cause__ is not None and _is_of_gpu(error.__cause__))


def _check_device(failure: str) -> None:
    """Raise LostDeviceError where a GPU does nothing more for this process: some CUDA errors end all its work there."""
    if torch.cuda.is_available():
        try:
            _use_device()
        except RuntimeError as error:
            if lacks_memory(error):
                return
            time.sleep(PAUSE)
            raise LostDeviceError(failure.partition("\n")[0], os.getpid()) from None


def _use_device() -> None:
    torch.cuda.synchronize()
    torch.rand((), device="cuda")  # a recording that the GPU broke off can leave nothing to draw from


class Slots:
    """How many runs go at a time: fewer than went when one found too little memory, more again once they find enough.

    Later runs may need less, so one more is tried after ``FITTED`` that found enough, after twice as many if the last
    try was one too many, and so on up to ``PATIENCE`` times ``FITTED``; once it is not, after ``FITTED`` again.

    Args:
        most: workers.
    """

    def __init__(self, most: int) -> None:
        self.most = self.now = most
        self._fitted, self._needed, self._tries_more = 0, FITTED, False

    def lose(self) -> None:
        """A worker is gone."""
        self.most -= 1
        self.now = min(self.now, self.most)

    def shrink(self, among: int) -> None:
        """A run found too little memory when so many went."""
        if self._tries_more:
            self._needed = min(2 * self._needed, PATIENCE * FITTED)
        self.now = min(self.now, among - 1)
        self._fitted, self._tries_more = 0, False

    def fit(self, among: int) -> None:
        """A run found enough memory when so many went, which says nothing of more than these."""
        self._fitted += among >= self.now
        if self._fitted < self._needed or self.now == self.most:
            return
        if self._tries_more:
            self._needed = FITTED
        self.now += 1
        self._fitted, self._tries_more = 0, True


def carry_out(chains: Sequence[Chain], jobs: int, seconds: float) -> None:
    """``run_chains`` in ``jobs`` processes; says so where not all chains have come to their end."""
    with processes(jobs) as pool:
        if not run_chains(pool, chains, jobs, seconds):
            print("not complete: the same command goes on", flush=True)


def run_chains(pool: Executor, chains: Sequence[Chain], slots: int, seconds: float = float("inf")) -> bool:
    """Go through all chains, ``slots`` runs at a time; runs that have ended are skipped, those that diverge reported.

    A run that found too little memory beside others is made again later, with fewer at a time (``Slots``). One that
    failed for that reason alone, or for another that is not its settings', stops its chain: what follows must not hang
    on a choice without it. A worker whose GPU answers no more hands its run back, and one run fewer goes at most; a run
    that is there when a second worker is lost has failed, and without workers the work ends. A run that an error of
    the GPU ended is made once more, after its stage's others.

    Args:
        pool: where runs are made.
        chains: in order of importance among stages of equal priority.
        slots: runs at a time.
        seconds: no run starts later than this.

    Returns:
        Whether all chains came to their end.

    Raises:
        ValueError: if a folder holds a run with other settings than the job's.
    """
    end, order, done = time.monotonic() + seconds, itertools.count(), itertools.count(1)
    waiting: list[tuple[int, int, int, Job]] = []
    left = [0] * len(chains)
    complete = True
    running: dict[Future[str | None], tuple[int, int, int, Job]] = {}
    room, lost, cost, broken_off = Slots(slots), set[int](), Counter[Path](), set[Path]()

    def advance(index: int) -> None:
        while not left[index]:
            stage = next(chains[index], None)
            if stage is None:
                return
            priority, jobs = stage
            for job in {job.folder: job for job in jobs if not has_ended(job)}.values():
                heapq.heappush(waiting, (priority, index, next(order), job))
                left[index] += 1

    for index in range(len(chains)):
        advance(index)
    while running or (waiting and room.now and time.monotonic() < end):
        while waiting and len(running) < room.now and time.monotonic() < end:
            turn = heapq.heappop(waiting)
            running[pool.submit(work, turn[-1])] = turn
        among = len(running)
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            turn = running.pop(future)
            priority, index, _, job = turn
            error = future.exception()
            if isinstance(error, BrokenExecutor):
                print(f"{job.folder}: {DEAD_WORKER}: use fewer jobs", flush=True)
                return False
            again = ""
            if isinstance(error, TooLittleMemoryError) and among > 1:
                room.shrink(among)
                again = f"again later, {room.now} runs at a time"
            elif isinstance(error, LostDeviceError):
                if error.worker not in lost:
                    lost.add(error.worker)
                    cost[job.folder] += 1
                    room.lose()
                if cost[job.folder] < 2:
                    again = f"the GPU still answers {room.most} of {slots} workers"
            elif isinstance(error, BrokenOffError) and job.folder not in broken_off:
                broken_off.add(job.folder)
                turn = (priority, index, next(order), job)
                again = "once more, later"
            if again:
                heapq.heappush(waiting, turn)
                print(f"{job.folder} {error}; {again}", flush=True)
                continue
            result = error or future.result() or "done"
            print(f"[{next(done)}, {len(waiting)} waiting] {job.folder} {result}", flush=True)
            if error:
                complete = False
                continue
            if future.result() is None:  # it did not diverge
                room.fit(among)
            left[index] -= 1
            if not left[index]:
                advance(index)
    return complete and not waiting
