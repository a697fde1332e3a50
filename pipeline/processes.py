"""Worker processes for many runs at once, spread over the GPUs."""

import logging
import os
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from typing import Any

import torch

DEAD_WORKER = "a worker process died, perhaps for want of memory, or found no room on its GPU"
"""What a broken executor means."""


def processes(n: int) -> ProcessPoolExecutor:
    """``n`` worker processes, each with one GPU in turn if there are any, and its share of the processor.

    Where one cannot begin, the executor is broken: what is submitted raises BrokenProcessPool.
    """
    context = get_context("spawn")
    return ProcessPoolExecutor(n, context, _begin, (context.Value("i", 0), torch.cuda.device_count(), n))


def _begin(counter: Any, gpus: int, n: int) -> None:
    """Prepare a worker. It is silent: its lines are in its run folders. It ends with the process that made it."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with counter.get_lock():
        index, counter.value = counter.value, counter.value + 1
    if gpus:
        torch.cuda.set_device(index % gpus)  # what device=auto means here
        torch.zeros((), device="cuda")  # a GPU that takes no more processes says so now, not in every run
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // n))
    logging.disable(logging.INFO)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # for as long as the worker lives
    if not sys.stderr.isatty():
        import transformers

        transformers.utils.logging.disable_progress_bar()


def _end_with_parent() -> None:
    """A process that is killed cannot end its workers."""
    if parent := parent_process():
        parent.join()
        os._exit(1)
