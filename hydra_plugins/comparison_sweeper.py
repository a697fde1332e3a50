"""``hydra/sweeper=comparison``: the sweep that ``experiment=benchmark_small`` is."""

from pathlib import Path
from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, ListConfig

EXPERIMENT = "benchmark_small"


class ComparisonSweeper(Sweeper):
    """Tunes, trains and tests all methods on a grid of tasks (``benchmarks.comparison``) in ``hydra.sweep.dir``.

    Overrides on the command line hold for every run. A search decides on the runs as it goes, so they are made by
    worker processes of its own and not by a launcher. Finished runs are skipped.

    Args:
        tasks: names of tasks and grids.
        jobs: runs at a time.
        seconds: no run starts later than this; null: no limit.
        times: so many times the tasks' epochs.
        rules: by what settings are chosen (nll, acc), in order of importance.
        early_stopping: whether every method may stop early.
        params: of Hydra's own sweeper; not used.

    Raises:
        ValueError: for a value of another kind; what ``Comparison.run`` refuses is left to it.
    """

    def __init__(
        self,
        tasks: list[str],
        jobs: int,
        seconds: float | None,
        times: int,
        rules: list[str],
        early_stopping: bool,
        params: Any = None,
    ) -> None:
        for key, names, example in (("tasks", tasks, "[sst2_500]"), ("rules", rules, "[nll,acc]")):
            if not (isinstance(names, list | ListConfig) and names):
                raise ValueError(f"hydra.sweeper.{key}={names}: expected a list such as {example}")
        if type(jobs) is not int or jobs < 1:
            raise ValueError(f"hydra.sweeper.jobs={jobs}: expected a whole number, at least 1")
        if seconds is not None and not (type(seconds) in (int, float) and seconds >= 0):
            raise ValueError(f"hydra.sweeper.seconds={seconds}: expected a number, at least 0, or null")
        if not isinstance(early_stopping, bool):
            raise ValueError(f"hydra.sweeper.early_stopping={early_stopping}: expected true or false")
        self.tasks = tasks
        self.jobs = jobs
        self.seconds = float("inf") if seconds is None else seconds
        self.times = times
        self.rules = rules
        self.early_stopping = early_stopping
        self._folder = Path()

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """See ``Sweeper.setup``; raises ValueError in ``search_script.py``, which makes no comparison."""
        if "search" in config:
            raise ValueError("search_script.py makes no comparison: give experiment=benchmark_small to train_script.py")
        self._folder = Path(config.hydra.sweep.dir)

    def sweep(self, arguments: list[str]) -> None:
        """Run the comparison; see ``Comparison.run`` for the errors raised.

        Raises:
            ValueError: for another experiment, of whose keys the comparison's own would replace some.
        """
        from benchmarks.comparison import Comparison  # every start of any program here looks at this file
        from utils.settings import key_of, value_of

        experiments = [argument for argument in arguments if key_of(argument) == "experiment"]
        for argument in experiments:
            if value_of(argument) not in (EXPERIMENT, [EXPERIMENT]):
                raise ValueError(f"{argument}: expected {EXPERIMENT} alone; give other settings as KEY=VALUE")
        common = [argument for argument in arguments if argument not in experiments]
        comparison = Comparison(self._folder.resolve(), common, self.times, self.early_stopping)
        comparison.run(self.tasks, self.jobs, self.seconds, self.rules)
