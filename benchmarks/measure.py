"""Timing and peak memory of repeated calls, and the record of a benchmark."""

import platform
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import peft
import torch
import transformers


class Measurement(NamedTuple):
    """Wall-clock time of one call, over many."""

    median_ms: float
    iqr_ms: float
    """Interquartile range."""
    repeats: int
    peak_bytes: int | None
    """Peak of the allocator during the calls; None where it does not count (CPU)."""


def measure(call: Callable[[], Any], device: torch.device, warmup: int, repeats: int) -> Measurement:
    """Time ``call``, the device idle before and after each repetition."""
    on_gpu = device.type == "cuda"
    synchronize = torch.cuda.synchronize if on_gpu else lambda: None
    for _ in range(warmup):
        call()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    low, _, high = statistics.quantiles(times, n=4) if repeats > 1 else (times[0],) * 3
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    return Measurement(statistics.median(times), high - low, repeats, peak)


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
