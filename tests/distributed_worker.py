"""Started by torchrun: runs in turn what its argument lists, all in one group of processes."""

import json
import sys

from pipeline.evaluation import finish
from pipeline.run import CONFIGS, Run, prepare
from pipeline.training import train
from utils.settings import compose


def interrupt_at(run: Run, step: int) -> None:
    """Let the last process, and no other, be interrupted during the given step, counted from 1."""
    if run.world.rank == run.world.size - 1:
        after_step = run.method.after_step

        def watched(model, made: int, rate: float) -> None:
            after_step(model, made, rate)
            run.interrupted = made + 1 == step

        run.method.after_step = watched


def main() -> None:
    """Each entry: ``overrides`` and, if the run is to be cut short, ``interrupt``."""
    for entry in json.loads(sys.argv[1]):
        run = prepare(compose(CONFIGS, entry["overrides"]))
        if step := entry.get("interrupt"):
            interrupt_at(run, step)
        try:
            finish(run, train(run))
        except KeyboardInterrupt as stop:
            print(f"rank {run.world.rank} {stop}", flush=True)
    run.world.close()


if __name__ == "__main__":
    main()
