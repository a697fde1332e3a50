"""Timing and peak memory of repeated calls, and the record of a benchmark."""

import platform
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import peft
import torch
import transformers

FEWEST = 8
"""Repetitions that every call gets."""


class Measurement(NamedTuple):
    """Wall-clock time of one call, over many."""

    median_ms: float
    iqr_ms: float
    """Interquartile range."""
    repeats: int
    peak_bytes: int | None
    """Peak of the allocator during the calls; None where it does not count (CPU)."""


def measure(
    call: Callable[[], Any], device: torch.device, warmup: int, repeats: int, seconds: float = float("inf")
) -> Measurement:
    """Time ``call`` on ``device``, which is idle before and after each repetition.

    Slow calls are repeated ``FEWEST`` times at least, and then no more once ``seconds`` have passed.
    """
    on_gpu = device.type == "cuda"

    def synchronize() -> None:
        if on_gpu:
            torch.cuda.synchronize(device)

    for _ in range(warmup):
        call()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    times: list[float] = []
    for _ in range(repeats):
        if len(times) >= FEWEST and sum(times) > 1e3 * seconds:
            break
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else (times[0],) * 3
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else None
    return Measurement(statistics.median(times), high - low, len(times), peak)


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware and versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }
