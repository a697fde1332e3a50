"""The comparison of methods: a small declared search on validation data, then three seeds on test data.

    python -m benchmarks.comparison --out outputs/comparison --tasks small --jobs 32 paths.data_dir=/data
    python -m utils.report outputs/comparison/by_nll.txt --out benchmarks/results/comparison/by_nll

For every task and every method that trains, each learning rate in ``RATES`` is trained once; further ones follow while
the best is at the end of those tried (``EXTENSIONS``), then the other values of the method's own setting (``OWN``) at
the best rates. The best ``FINALISTS`` are trained with the other ``TUNING_SEEDS`` too, since one seed cannot tell them
apart, nor show which of them diverge now and then; where all of them do, the next best follow. Each is judged by the
method's own prediction on validation data; test data is not read. ``--early-stopping`` has every method's search try
early stopping, as LoRA's does anyway. Methods that have no search of their own (``AS``, ``POST_HOC``) have the setting
of another, from whose adapters the latter start. Two selections are made (``RULES``) by the mean over the seeds: the
finalist with the lowest NLL, each method at its best; and that with the highest accuracy, as settings are chosen where
nobody looks at probabilities. The chosen are trained with the seeds 0, 1, 2 and evaluated on test. Runs that have
finished are skipped, and those that diverged (remove their folders to make them again), so the command can be repeated
after a kill; ``--known`` takes those of the search from the ``tuning.json`` that another such command has left.
``by_<rule>.txt`` lists the runs of a selection for the report, ``tuning.json`` what the search found, by seed.

Many runs share one GPU: they are bound by launches, not by arithmetic (start NVIDIA's multi-process service first;
it serves some 50 processes, more find no GPU).
"""

import itertools
import math
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from omegaconf import DictConfig

from benchmarks import tuning
from benchmarks.options import GOES_ON, alone_in, one_line_errors, parse, parser_of
from benchmarks.tuning import NAMES, BySeed, Metrics, Tuning
from benchmarks.workers import (
    DIVERGED_FILE,
    SETTINGS,
    TUNED,
    Chain,
    Job,
    by_key,
    carry_out,
    has_ended,
    is_finished,
    startable,
    tuned,
)
from pipeline.run import CONFIGS, check_settings, rehearse
from utils.run import write_json_atomic, write_text_atomic
from utils.settings import compose, quoted

TUNING_SEEDS = (100, 101, 102)
"""The first screens all settings, the others only finalists."""
FINALISTS = 2
"""How many of the best settings by each rule go on to the other seeds."""
SEEDS = (0, 1, 2)
CHOICES = ("eval.batch_size=64", "eval.max_tokens_per_forward=8192")
LABELS = ("eval.batch_size=64", "eval.max_tokens_per_forward=32768")
TASKS: dict[str, tuple[str, ...]] = {
    "sst2_100": (*LABELS, "dset=sst2", "dset.train_subset=100", "train.epochs=15"),
    "sst2_500": (*LABELS, "dset=sst2", "dset.train_subset=500", "train.epochs=5", "eval.ood=[cola]"),
    "sst2_2000": (*LABELS, "dset=sst2", "dset.train_subset=2000", "train.epochs=3"),
    "cola_500": (*LABELS, "dset=cola", "dset.train_subset=500", "train.epochs=5"),
    "cola": (*LABELS, "dset=cola", "train.epochs=1"),
    "arc_e_500": (*CHOICES, "dset=arc_e", "dset.train_subset=500", "train.epochs=5"),
    "arc_e": (*CHOICES, "dset=arc_e", "train.epochs=3"),
    "obqa_500": (
        *(*CHOICES, "dset=obqa", "dset.train_subset=500", "train.epochs=5"),
        "eval.ood=[arc_e,arc_c,mmlu:college_chemistry]",
    ),
    "obqa": (*CHOICES, "dset=obqa", "train.epochs=2"),
    "wg_s": (*CHOICES, "dset=wg_s", "dset.validation_fraction=0.3", "train.epochs=5"),  # 64 examples decide nothing
    "wg_m_500": (*CHOICES, "dset=wg_m", "dset.train_subset=500", "train.epochs=5"),
    "wg_m": (*CHOICES, "dset=wg_m", "train.epochs=3"),
    "arc_c": (*CHOICES, "dset=arc_c", "train.epochs=5"),
    "boolq": (*CHOICES, "dset=boolq", "train.epochs=1"),
}
GRIDS = {
    "small": ("sst2_500", "arc_e_500", "obqa_500", "cola_500", "sst2_100", "sst2_2000", "wg_s", "wg_m_500", "cola"),
    "commonsense": ("wg_s", "arc_c", "arc_e", "wg_m", "obqa", "boolq"),
}
"""Tasks by the name of a whole grid, in the order of their importance."""
RATES: dict[str, tuple[float, ...]] = {
    "mle": (6.67e-5, 2e-4, 6e-4, 1.8e-3),
    "map": (6.67e-5, 2e-4, 6e-4, 1.8e-3),
    "mc_dropout": (6.67e-5, 2e-4, 6e-4, 1.8e-3),
    "lora_plus": (1.67e-5, 5e-5, 1.5e-4, 4.5e-4),
    "adalora": (6e-4, 1.8e-3, 5.4e-3, 1.62e-2),
    "blob": (2e-4, 6e-4, 1.8e-3, 5.4e-3),
    "scalabl": (2e-4, 6e-4, 1.8e-3, 5.4e-3),
    "sgp": (6e-4, 1.8e-3, 5.4e-3, 1.62e-2),
}
"""Learning rates that are tried first, a factor of ``FACTOR`` apart; those beyond follow by the same factor."""
FACTOR = 3
EXTENSIONS = 2
"""While the best rate is the lowest or the highest tried, one more beyond it is tried, so many times at most."""
OWN: dict[str, dict[str, tuple[str, ...]]] = {
    "mle": {"early_stopping": ("eval.every=epoch", "eval.keep=best"), "dropout_0.1": ("peft.lora_dropout=0.1",)},
    "map": {"decay_0.1": ("method.factory.weight_decay=0.1",), "decay_10": ("method.factory.weight_decay=10",)},
    "mc_dropout": {"p_0.05": ("method.factory.dropout=0.05",), "p_0.3": ("method.factory.dropout=0.3",)},
    "lora_plus": {"ratio_4": ("method.factory.lr_ratio=4",), "ratio_64": ("method.factory.lr_ratio=64",)},
    "adalora": {
        "orthogonality_0.1": ("method.factory.orthogonality=0.1",),
        "rank_2": ("method.factory.init_rank_factor=2",),
    },
    "blob": {"eps_0.15": ("method.factory.init_eps=0.15",), "equal_kl": ("method.factory.gamma=null",)},
    "scalabl": {"eps_0.2": ("method.factory.init_eps=0.2",), "equal_kl": ("method.factory.gamma=null",)},
    "sgp": {"sd_b_0.7": ("inducing.prior_sd_b=0.7",), "sd_b_2.8": ("inducing.prior_sd_b=2.8",)},
}
"""Two other values of a setting of the method's own, tried at the best learning rate by either rule."""
EARLY_STOPPING = {"early_stopping": ("eval.every=epoch", "eval.keep=best", "eval.every_n_mc=4")}
"""A third, if asked for, of every method that has it not among its two; draws judge the epochs of one that samples."""
RULES = {
    "nll": lambda found: (found["nll"], -found["acc"]),
    "acc": lambda found: (-found["acc"], found["nll"]),
}
"""Selections among what was tried: what is minimised, on validation data."""
AS = {"mle": ("ensemble",), "sgp": ("sgp_ensemble",), "blob": ("blob_ensemble",)}
"""By method the others that are trained with its setting: what they are made of."""
POST_HOC = {"mle": ("temperature", "laplace", "laplace_last", "tfb"), "sgp": ("sgp_temperature",)}
"""By method the others that start from its adapters and train no further."""
POST_HOC_OWN = dict.fromkeys(
    ("laplace", "laplace_last"), ("eval.batch_size=16", "method.factory.precision_by=validation")
)
"""What a method has of its own: small batches, since every example has a Jacobian; a choice by validation data too."""
EPOCHS = "train.epochs"
VARIED = ("seed", "method", "opt.lr", "dset", "paths.output_dir", "train.init_adapter")
"""Keys that differ from run to run, so no override of all runs may set them."""
UNTESTED = "neither it nor what has its setting is tested"
"""What a method without a setting comes to."""
COMMON = (
    *("train.batch_size=16", "train.graph_padding=32", "train.checkpoint_every=1000000", "eval.every=none"),
    *("eval.n_mc=10", "eval.zero_shot=false", "eval.save_validation=true", "eval.figures=false"),
)


Key = TypeVar("Key")


class Setting(NamedTuple):
    """What is tried: a learning rate, and a value of the method's own setting by its name in ``OWN``."""

    rate: float
    own: str = "default"

    @classmethod
    def named(cls, name: str) -> "Setting":
        """The setting that ``str`` gives this name."""
        rate, _, own = name.partition("_")
        return cls(float(rate), own or "default")

    def __str__(self) -> str:
        return f"{self.rate:g}" if self.own == "default" else f"{self.rate:g}_{self.own}"


class Comparison(NamedTuple):
    """Where runs are kept, and how they are made."""

    out: Path
    common: Sequence[str] = ()
    """What is added to the command line of each."""
    times: int = 1
    """How many times a task's epochs they train."""
    early_stopping: bool = False
    """Whether every method may stop early (``EARLY_STOPPING``)."""

    def own(self, method: str) -> dict[str, tuple[str, ...]]:
        """The values of the method's own setting, by name; none of one that has another's."""
        if method not in OWN:
            return {}
        return (EARLY_STOPPING if self.early_stopping else {}) | OWN[method]

    def overrides(
        self, task: str, method: str, seed: int, setting: Setting, tuned_as: str = "", more: Sequence[str] = ()
    ) -> tuple[str, ...]:
        """The command line of a run; ``tuned_as`` names the method whose setting it is, if another."""
        own = self.own(tuned_as or method).get(setting.own, ())
        which = (f"method={method}", f"opt.lr={setting.rate:g}", f"seed={seed}")
        return (*COMMON, *self.of_task(task), *which, *own, *more, *self.common)

    def of_task(self, task: str) -> tuple[str, ...]:
        """What a task is on the command line."""
        of = TASKS[task]
        return (*of, f"{EPOCHS}={self.times * int(by_key(of)[EPOCHS])}")

    def check(self) -> None:
        """Raise ValueError, before any run, for what would undo the comparison."""
        check_common(self.common)
        own = {key for method in OWN for overrides in self.own(method).values() for key in by_key(overrides)}
        if undone := [key for key in by_key(self.common) if key in own]:
            raise ValueError(f"{undone[0]} is of the settings that the search tries: leave it out")
        check_whole(self.common, {*own, EPOCHS})
        if not isinstance(self.times, int) or self.times < 1:
            raise ValueError(f"times is {self.times}: take a whole number from 1 on")
        if self.times > 1 and EPOCHS in by_key(self.common):
            raise ValueError(f"{EPOCHS} is what times multiplies: leave one of them out")

    def check_runs(self, tasks: Collection[str]) -> None:
        """Raise ValueError for settings or data with which no run could be made, by any method that trains."""

        def settings(task: str, method: str) -> DictConfig:
            job = self.final_job(task, method, Setting(RATES[method][0]), SEEDS[0])
            return compose(CONFIGS, [*job.overrides, quoted("paths.output_dir", job.folder)])

        for task, method in itertools.product(tuple(tasks)[:1], RATES):
            check_settings(settings(task, method))
        for task in tasks:
            rehearse(settings(task, "mle"))

    def tuning_job(self, task: str, method: str, setting: Setting, seed: int) -> Job:
        """One setting of the search with one seed."""
        folder = self.out / "tune" / task / method / str(setting) / f"seed{seed}"
        return Job(folder, self.overrides(task, method, seed, setting), False)

    def final_folder(self, task: str, method: str, setting: Setting, seed: int) -> Path:
        """Where the run of a method with a setting and a seed is kept."""
        return self.out / "final" / task / method / str(setting) / f"seed{seed}"

    def final_job(
        self, task: str, method: str, setting: Setting, seed: int, tuned_as: str = "", more: Sequence[str] = ()
    ) -> Job:
        """A method with its chosen setting and one seed."""
        folder = self.final_folder(task, method, setting, seed)
        return Job(folder, self.overrides(task, method, seed, setting, tuned_as, more), True)

    def jobs_after(self, first: str, task: str, setting: Setting) -> list[Job]:
        """Methods that have the setting of the method ``first``; those of ``POST_HOC`` start from its adapters."""
        jobs = []
        for method, seed in itertools.product(POST_HOC.get(first, ()), SEEDS):
            adapter = self.final_folder(task, first, setting, seed) / "adapter"
            start = (quoted("train.init_adapter", adapter), "train.epochs=0", "eval.every=none", "eval.keep=last")
            job = self.final_job(task, method, setting, seed, first, POST_HOC_OWN.get(method, ()))
            jobs.append(job._replace(overrides=(*job.overrides, *start)))
        alike = itertools.product(AS.get(first, ()), SEEDS)
        return [*jobs, *(self.final_job(task, method, setting, seed, first) for method, seed in alike)]

    def test_stages(self, task: str, method: str, setting: Setting) -> tuple[list[Job], list[Job]]:
        """The method with its setting and each seed; then what has that setting or starts from those adapters."""
        first = [self.final_job(task, method, setting, seed) for seed in SEEDS]
        return first, self.jobs_after(method, task, setting)

    def zero_shot_job(self, task: str) -> Job:
        """The base model, which no seed changes."""
        overrides = (*COMMON, *self.of_task(task), "method=zero_shot", "seed=0", *self.common)
        return Job(self.out / "final" / task / "zero_shot", overrides, True)

    def by_seed(self, task: str, method: str, setting: Setting) -> BySeed:
        """Metrics on validation data of the runs of a setting that have finished."""
        jobs = {seed: self.tuning_job(task, method, setting, seed) for seed in TUNING_SEEDS}
        return {seed: tuned(job) for seed, job in jobs.items() if is_finished(job)}

    def found(self, task: str, method: str, tried: Sequence[Setting], seeds: Sequence[int]) -> dict[Setting, Metrics]:
        """Mean metrics over ``seeds`` of the settings that have finished with all of them."""
        return means({setting: self.by_seed(task, method, setting) for setting in tried}, seeds)

    def search(self, task: str, method: str, tried: list[Setting]) -> Iterator[Sequence[Job]]:
        """Stages of the search; ``tried`` collects its settings."""
        first, *others = TUNING_SEEDS

        def screen(settings: Sequence[Setting]) -> list[Job]:
            tried.extend(settings)
            return [self.tuning_job(task, method, setting, first) for setting in settings]

        def screened() -> dict[Setting, Metrics]:
            return self.found(task, method, tried, [first])

        yield screen([Setting(rate) for rate in RATES[method]])
        for _ in range(EXTENSIONS):
            yield screen(untried(beyond(screened()), tried))
        best = {setting.rate for setting in chosen(screened()).values()}
        yield screen([Setting(rate, own) for rate in sorted(best) for own in self.own(method)])
        left, whole = screened(), dict[Setting, Metrics]()
        while left and not whole:  # all of those before have diverged with some seed
            best_left = finalists(left)
            yield [self.tuning_job(task, method, setting, seed) for setting in best_left for seed in others]
            whole = self.found(task, method, best_left, TUNING_SEEDS)
            left = {setting: metrics for setting, metrics in left.items() if setting not in best_left}

    def chains(self, task: str, rules: Sequence[str]) -> list[Chain]:
        """The base model's run, which waits for no search, and those of every method."""
        return [iter([(0, [self.zero_shot_job(task)])]), *(self.chain(task, method, rules) for method in RATES)]

    def chain(self, task: str, method: str, rules: Sequence[str] = tuple(RULES)) -> Chain:
        """Search, then the runs on test by rule; those of rules after the first, of less interest, come last of all."""
        tried: list[Setting] = []
        for jobs in self.search(task, method, tried):
            yield 0, jobs
        best = chosen(self.found(task, method, tried, TUNING_SEEDS))
        if not best:
            print(f"{task}: every setting of {method} diverged with some seed: {UNTESTED}", flush=True)
        for priority, setting in enumerate(best[rule] for rule in rules if best):
            first, after = self.test_stages(task, method, setting)
            yield priority, first
            yield priority, startable(after)

    def take_over(self, tasks: Collection[str], known: Tuning) -> None:
        """Take the runs of a ``tuning.json`` at its word, of settings that are tried here and where none has ended."""
        for task, method in itertools.product(tasks, RATES):
            ended = known.unfinished is not None and method not in known.unfinished.get(task, ())
            for name, runs in known.of.get(task, {}).get(method, {}).items():
                setting = Setting.named(name)
                if setting.own not in ("default", *self.own(method)):
                    continue
                for seed, metrics in runs.items():
                    leave(self.tuning_job(task, method, setting, seed), TUNED, metrics)
                if ended and not runs:
                    first = self.tuning_job(task, method, setting, TUNING_SEEDS[0])
                    leave(first, DIVERGED_FILE, "where it was taken from")

    def searched(self, task: str, method: str) -> tuple[list[Setting], bool]:
        """The settings that the search has come to so far, and whether it has ended."""
        tried: list[Setting] = []
        jobs = [job for stage in self.search(task, method, tried) for job in stage]
        return tried, all(map(has_ended, jobs))

    def run(
        self,
        names: Sequence[str],
        jobs: int,
        seconds: float = float("inf"),
        rules: Sequence[str] = tuple(RULES),
        known: Sequence[Path] = (),
    ) -> None:
        """Search, train and test.

        Args:
            names: of tasks and grids.
            jobs: runs at a time.
            seconds: no run starts later than this.
            rules: names in ``RULES``, in order of importance; what only others choose is not trained for the test.
            known: ``tuning.json`` of searches made elsewhere with the same settings, whose runs are not made again.

        Raises:
            ValueError: before any run: for an unknown task or rule, data that are not there, an override of what is
                compared (``VARIED``, ``OWN``), a file that is no ``tuning.json`` or of other tasks, or a folder that
                holds runs with other settings.
            RuntimeError: before any run if another command makes runs in the folder; if no run on test has finished.
        """
        if unknown := [name for name in names if name not in (*GRIDS, *TASKS)]:
            raise ValueError(f"unknown task {unknown[0]}; there are {', '.join((*GRIDS, *TASKS))}")
        if unknown := [rule for rule in rules if rule not in RULES]:
            raise ValueError(f"unknown rule {unknown[0]}; there are {', '.join(RULES)}")
        self.check()
        tasks = dict.fromkeys(task for name in names for task in GRIDS.get(name, (name,)))
        searches = {path: tuning.read(path) for path in known}
        if other := [path for path, search in searches.items() if search.of.keys().isdisjoint(tasks)]:
            raise ValueError(f"{other[0]} has no search of {', '.join(tasks)}: name one that has")
        self.check_runs(tasks)
        with alone_in(self.out):
            self.write_lists(self.begun())  # refuses a folder of other settings before any run
            for search in searches.values():
                self.take_over(tasks, search)
            carry_out([chain for task in tasks for chain in self.chains(task, rules)], jobs, seconds)
            self.write_lists(self.begun())
        if not any((self.out / f"by_{rule}.txt").stat().st_size for rule in RULES):
            raise RuntimeError("no run on test has finished: see the lines above")

    def begun(self) -> list[str]:
        """Tasks with runs in the folder, of earlier calls too."""
        return [task for task in TASKS if (self.out / "tune" / task).is_dir()]

    def write_lists(self, tasks: Sequence[str]) -> None:
        """``tuning.json``, and by rule the finished runs on test."""
        tried: dict[str, dict[str, list[Setting]]] = {task: {} for task in tasks}
        unfinished: dict[str, set[str]] = {}
        for task, method in itertools.product(tasks, RATES):
            tried[task][method], ended = self.searched(task, method)
            if not ended:
                unfinished.setdefault(task, set()).add(method)
        table = {
            task: {method: {str(s): self.by_seed(task, method, s) for s in settings} for method, settings in of.items()}
            for task, of in tried.items()
        }
        tuning.write(self.out / "tuning.json", table, unfinished)
        for rule in RULES:
            jobs = [self.zero_shot_job(task) for task in tasks]
            for task, of in tried.items():
                for method, settings in of.items():
                    setting = chosen(self.found(task, method, settings, TUNING_SEEDS)).get(rule)
                    if setting is not None:
                        jobs += itertools.chain(*self.test_stages(task, method, setting))
            self.write_list(rule, jobs)

    def write_list(self, rule: str, jobs: Sequence[Job]) -> int:
        """``by_<rule>.txt``: those of the runs that have finished; returns how many there are."""
        finished = [job.folder for job in jobs if is_finished(job)]
        write_text_atomic(self.out / f"by_{rule}.txt", "".join(f"{folder}\n" for folder in finished))
        return len(finished)


def check_common(overrides: Sequence[str]) -> None:
    """Raise ValueError for an override of all runs that sets what differs from run to run."""
    if varied := [key for key in by_key(overrides) if key in VARIED]:
        raise ValueError(f"{varied[0]} differs from run to run here: leave it out")
    check_whole(overrides, VARIED)


def check_whole(overrides: Sequence[str], keys: Collection[str]) -> None:
    """Raise ValueError for a part of the configuration given as a whole that has one of these keys in it."""
    for whole, value in by_key(overrides).items():
        inside = sorted(key for key in keys if key.startswith(f"{whole}."))
        if inside and value.lstrip().startswith("{"):
            raise ValueError(f"{whole}={value} may set {inside[0]}, which is set here: name single keys instead")


def leave(job: Job, name: str, what: object) -> None:
    """Write how a run has ended, and with what it was made, unless its folder says so already."""
    if not any((job.folder / known).exists() for known in (TUNED, DIVERGED_FILE)):
        write_json_atomic(job.folder / SETTINGS, list(job.overrides))
        write_json_atomic(job.folder / name, what)


def means(runs: Mapping[Key, Mapping[int, Metrics]], seeds: Sequence[int]) -> dict[Key, Metrics]:
    """Mean metrics over ``seeds`` of the settings that have runs with all of them."""
    return {
        setting: {name: statistics.mean(own[seed][name] for seed in seeds) for name in own[seeds[0]] if name in NAMES}
        for setting, own in runs.items()
        if own.keys() >= set(seeds)
    }


def ranked(found: dict[Setting, Metrics], rule: str) -> list[Setting]:
    """Settings by a rule, the best first."""
    return sorted(found, key=lambda setting: RULES[rule](found[setting]))


def chosen(found: dict[Setting, Metrics]) -> dict[str, Setting]:
    """The best setting by each rule; none where nothing was found."""
    return {rule: ranked(found, rule)[0] for rule in RULES} if found else {}


def finalists(found: dict[Setting, Metrics]) -> list[Setting]:
    """The best settings by each rule, each once."""
    return list(dict.fromkeys(setting for rule in RULES for setting in ranked(found, rule)[:FINALISTS]))


def beyond(found: dict[Setting, Metrics]) -> list[Setting]:
    """What to train next: a rate beyond the best by any rule, where that is at the end of those that finished."""
    rates = [setting.rate for setting in found]
    best = {setting.rate for setting in chosen(found).values()}
    further = {rate / FACTOR for rate in best if rate == min(rates)}
    further |= {rate * FACTOR for rate in best if rate == max(rates)}
    return [Setting(float(f"{rate:.3g}")) for rate in sorted(further)]


def untried(settings: Sequence[Setting], tried: Sequence[Setting]) -> list[Setting]:
    """Without those whose rate, but for rounding, is one of those tried."""
    return [s for s in settings if not any(math.isclose(s.rate, other.rate, rel_tol=0.01) for other in tried)]


def main(argv: Sequence[str] | None = None) -> None:
    """Parse and run."""
    parser = parser_of(__doc__, Path("outputs/comparison"))
    parser.add_argument("--tasks", nargs="+", choices=[*GRIDS, *TASKS], default=["small"])
    parser.add_argument("--times", type=int, default=1, help="so many times the tasks' epochs, in the search too")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES), help="in order of importance")
    parser.add_argument("--known", nargs="+", type=Path, default=[], help="tuning.json of the same search elsewhere")
    parser.add_argument("--early-stopping", action="store_true", help="a setting that every method's search tries")
    arguments = parse(parser, argv)
    with one_line_errors(GOES_ON):
        out = arguments.out.resolve()
        comparison = Comparison(out, arguments.overrides, arguments.times, arguments.early_stopping)
        comparison.run(arguments.tasks, arguments.jobs, arguments.seconds, arguments.rules, arguments.known)


if __name__ == "__main__":
    main()
