"""Worker processes for many runs at once, spread over the GPUs."""

import logging
import os
import sys
import threading
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import active_children, get_context, parent_process
from typing import Any

import torch
from tqdm import tqdm

DEAD_WORKER = "a worker process died, perhaps for want of memory, or found no room on its GPU"
"""What a broken executor means."""


class Workers(ProcessPoolExecutor):
    """Its processes end at once where Ctrl-C ends the block that they work for."""

    def __exit__(self, kind: Any, *error: Any) -> bool | None:
        if kind is KeyboardInterrupt:
            for worker in active_children():
                worker.kill()
        return super().__exit__(kind, *error)


def processes(n: int) -> Workers:
    """``n`` worker processes, each with one GPU in turn if there are any, and its share of the processor.

    Where one cannot begin, the executor is broken: what is submitted raises BrokenProcessPool.
    """
    context = get_context("spawn")
    return Workers(n, context, _begin, (context.Value("i", 0), torch.cuda.device_count(), n))


def _begin(counter: Any, gpus: int, n: int) -> None:
    """Prepare a worker. It is silent: its lines are in its run folders. It ends with the process that made it."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.setpgrp()  # Ctrl-C is for the process that made it
    with counter.get_lock():
        index, counter.value = counter.value, counter.value + 1
    if gpus:
        torch.cuda.set_device(index % gpus)  # what device=auto means here
        torch.zeros((), device="cuda")  # a GPU that takes no more processes says so now, not in every run
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // n))
    logging.disable(logging.INFO)
    warnings.simplefilter("ignore")
    tqdm.set_lock(threading.RLock())  # one between processes would outlast a worker that is killed, with a warning
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # for as long as the worker lives
    if not sys.stderr.isatty():
        import transformers

        transformers.utils.logging.disable_progress_bar()


def _end_with_parent() -> None:
    """A process that is killed cannot end its workers."""
    if parent := parent_process():
        parent.join()
        os._exit(1)
