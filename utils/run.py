"""The run folder: what a run writes (metrics.jsonl, JSON and npz files) and the log lines it prints."""

import contextlib
import csv
import errno
import glob
import io
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO, TextIO, TypeVar

import numpy as np
import torch
from tqdm import tqdm

METRICS_FILE = "metrics.jsonl"
RELIABILITY_FILE = "reliability.json"
HEADLINE = ("nll", "acc", "ece", "brier")
PACKAGES = ("torch", "transformers", "peft", "hydra-core", "numpy")
ABANDONED_SECONDS = 3600.0
"""A temporary file to which nothing was written for so long is one that a kill has left."""
T = TypeVar("T")


class RunLogger:
    """Append records to `metrics.jsonl` and print them as lines that are stable for grep.

    A record holds `kind` ("train", "eval" or "final"), `step`, `epoch`, `split`, what applies of `lr` and
    `mc`, and every metric that was passed; a non-finite value is written as null.

    Args:
        run_dir: Folder of the run; made if absent.
        stream: Where lines are printed; standard output if None.
        resumed_step: None to append to what is there. Otherwise the step a run continues from: later records
            and final ones are dropped, since the run writes them again. Write the evaluation of a step
            before its checkpoint. -1 starts afresh.

    Raises:
        ValueError: If `metrics.jsonl` holds a damaged line other than a half-written last one.
    """

    def __init__(self, run_dir: str | Path, stream: TextIO | None = None, resumed_step: int | None = None):
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._stream = stream
        path = self.run_dir / METRICS_FILE
        kept = read_metrics(self.run_dir) if path.exists() and resumed_step != -1 else []
        if resumed_step is not None:
            kept = [record for record in kept if record["step"] <= resumed_step and record["kind"] != "final"]
        with open_atomic(path) as file:
            file.write("".join(json.dumps(record) + "\n" for record in kept).encode())
        self._file = path.open("a", encoding="utf-8")

    def train(
        self, *, epoch: int, step: int, lr: float, examples_per_second: float, metrics: Mapping[str, float]
    ) -> None:
        """Log training progress; `metrics` holds loss, nll, kl (nats) and beta, and any more to record."""
        m = metrics
        self._line(
            f"[TRAIN EP {epoch} | STEP {step}] LR: {lr:.6e} LOSS={m['loss']:.4f} | NLL={m['nll']:.4f} | "
            f"KL={m['kl']:.6g} | BETA={m['beta']:.4g} | {examples_per_second:.1f} ex/s"
        )
        rate = {"lr": lr, "examples_per_second": examples_per_second}
        self._record({"kind": "train", "step": step, "epoch": epoch, "split": "train", **rate, **m})

    def evaluation(
        self, *, epoch: int, step: int, lr: float, split: str, mc: int | str, metrics: Mapping[str, float]
    ) -> None:
        """Log an evaluation during training.

        Args:
            epoch: Epoch counted from 1.
            step: Optimiser steps so far.
            lr: Present learning rate.
            split: "validation", "test" or another such as "ood:arc_c".
            mc: Number of Monte-Carlo samples, or "mean" for the posterior mean.
            metrics: What `evaluate_predictions` of `bnn.metrics` returns; nll, acc, ece and brier are needed.
        """
        head = f"[EP {epoch} | STEP {step}] LR: {lr:.6e} "
        self._line(f"{head}{_headline(metrics)} (split={split}, MC={mc})")
        where = {"step": step, "epoch": epoch, "lr": lr, "split": split, "mc": mc}
        self._record({"kind": "eval", **where, **metrics})

    def final(self, *, epoch: int, step: int, split: str, mc: int | str, metrics: Mapping[str, float]) -> None:
        """Log an evaluation of the finished run; arguments as in `evaluation`."""
        self._line(f"[FINAL] {_headline(metrics)} (split={split}, MC={mc})")
        self._record({"kind": "final", "step": step, "epoch": epoch, "split": split, "mc": mc, **metrics})

    def reliability(self, bins: Mapping[str, Mapping[str, Any]]) -> None:
        """Write `reliability.json`.

        Args:
            bins: For each label ("MC=10", "mean") edges (n_bins + 1), confidence, accuracy and count (n_bins)
                and the scalar ece, as `vars(reliability_bins(...))` of `bnn.metrics` gives them.
        """
        write_json_atomic(self.run_dir / RELIABILITY_FILE, bins)

    def close(self) -> None:
        """Close `metrics.jsonl`."""
        self._file.close()

    def _line(self, line: str) -> None:
        stream = self._stream or sys.stdout
        tqdm.write(line, file=stream)  # keeps a progress bar on the same terminal whole
        stream.flush()

    def _record(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(to_json(record), allow_nan=False) + "\n")
        self._file.flush()


class NoLogger(RunLogger):
    """What processes other than the main one have for a logger: it writes nothing."""

    def __init__(self) -> None:
        pass

    def reliability(self, bins: Mapping[str, Mapping[str, Any]]) -> None:
        """See ``RunLogger.reliability``."""

    def close(self) -> None:
        """See ``RunLogger.close``."""

    def _line(self, line: str) -> None:
        pass

    def _record(self, record: Mapping[str, Any]) -> None:
        pass


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """Read the records of a run; a half-written last line is left out.

    Raises:
        FileNotFoundError: If the folder holds no `metrics.jsonl`.
        ValueError: If another line is no JSON object with `kind` and `step`.
    """
    path = Path(run_dir) / METRICS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{run_dir} is no run folder: it has no {METRICS_FILE}; name one that a run wrote")
    *lines, _half_written = path.read_bytes().split(b"\n")  # what follows the last newline is not whole
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not {"kind", "step"} <= record.keys():
            raise ValueError(f"{path} line {number} is no record of a run: {line[:60]!r}; delete that line")
        records.append(record)
    return records


def environment_record() -> dict[str, Any]:
    """What a run ran on: versions, platform, device, source revision (null without git), command line."""
    root = Path(__file__).resolve().parent.parent
    in_git = (root / ".git").exists() and shutil.which("git") is not None
    commit = _git(root, "rev-parse", "HEAD") if in_git else None
    status = _git(root, "status", "--porcelain") if in_git else None
    return {
        "python": platform.python_version(),
        **{name.removesuffix("-core"): _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "git_commit": commit,
        "git_dirty": None if status is None else bool(status),
        "command": sys.argv,
    }


@contextlib.contextmanager
def open_atomic(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file for writing that appears under its name only once it is whole.

    The bytes go to a temporary file in the same folder, are synced, and replace `path` in one step, so that
    a kill or an error at any moment leaves the previous file as it was. Of several writers at once, each has a
    temporary file of its own, and the last to end has written `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write text, whole or not at all."""
    with open_atomic(path) as file:
        file.write(text.encode())


def write_csv_atomic(path: str | Path, names: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a table with a head of ``names``; a row without one of them has an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text_atomic(path, text.getvalue())


def write_json_atomic(path: str | Path, value: Any) -> None:
    """Write plain data, tensors and numpy values as indented JSON; non-finite numbers become null."""
    write_text_atomic(path, json.dumps(to_json(value), indent=2, allow_nan=False) + "\n")


def write_npz_atomic(path: str | Path, **arrays: np.ndarray) -> None:
    """Write named arrays as npz, readable without pickle.

    Raises:
        TypeError: If an array holds Python objects.
    """
    for name, array in arrays.items():
        if array.dtype.hasobject:
            raise TypeError(f"array {name!r} for {path} holds Python objects: pass numbers or strings")
    with open_atomic(path) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def save_predictions(path: str | Path, logits: torch.Tensor, answer: torch.Tensor, ids: Sequence[str]) -> None:
    """Write the raw predictions of a split, from which every metric can be computed again.

    Args:
        path: The npz file: `logits`, `answer` and `ids`.
        logits: (S, N, C) choice scores; kept in float32 or float64, other types become float32.
        answer: (N,) right choices.
        ids: N names of the examples.

    Raises:
        ValueError: If the shapes disagree.
    """
    if logits.ndim != 3 or answer.shape != logits.shape[1:2] or len(ids) != logits.shape[1]:
        shapes = f"logits {tuple(logits.shape)}, answer {tuple(answer.shape)}, {len(ids)} ids"
        raise ValueError(f"predictions for {path} have {shapes}: expected (S, N, C), (N,) and N")
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    scores = logits.detach().to("cpu", dtype).numpy()
    write_npz_atomic(path, logits=scores, answer=answer.cpu().numpy(), ids=np.asarray(ids, dtype=np.str_))


def check_disk(path: str | Path, needed_bytes: int) -> None:
    """Raise OSError unless the file system of `path`, which need not exist yet, has `needed_bytes` free."""
    folder = next(p for p in (Path(path).absolute(), *Path(path).absolute().parents) if p.exists())
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        sizes = f"{needed_bytes / 2**20:.1f} MiB needed, {free / 2**20:.1f} MiB free"
        raise OSError(errno.ENOSPC, f"too little disk space ({sizes}): free some or choose another folder", str(path))


def progress(iterable: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    """Iterate with a progress bar, shown only where standard error is a terminal."""
    hidden = not sys.stderr.isatty()
    return tqdm(iterable, desc=description, total=total, disable=hidden, leave=False, dynamic_ncols=True)


def to_json(value: Any) -> Any:
    """Turn tensors and numpy values into plain numbers and lists, and non-finite numbers into None."""
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return to_json(value.tolist())
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _headline(metrics: Mapping[str, float]) -> str:
    return " | ".join(f"{name.upper()}={metrics[name]:.4f}" for name in HEADLINE)


def _remove_abandoned(path: Path) -> None:
    """Remove the temporary files of writers of `path` that were killed."""
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError):  # its writer has just ended, or it is another user's
            if time.time() - temporary.stat().st_mtime > ABANDONED_SECONDS:
                temporary.unlink()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(root: Path, *arguments: str) -> str | None:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
