"""How methods bear being trained for longer than they were tuned for.

    python -m benchmarks.longer benchmarks/results/comparison/tuning.json --times 4 --jobs 32 paths.data_dir=/data
    python -m utils.report outputs/longer/by_acc.txt --out outputs/longer/by_acc

A comparison stops training where its tasks say (``TASKS``), and its search finds for every method the settings that do
well up to there. Here each method keeps the settings that the search chose, by either rule or the one that ``--rules``
names, and trains for ``--times`` as many epochs; three seeds, test data, nothing chosen anew. Finished runs are
skipped, ``by_<rule>.txt`` lists the runs. ``--methods`` names those of interest; what they start from is trained too.
``--times 1`` makes a comparison's runs on test again from its search alone, but for the base model's.
"""

from collections.abc import Collection, Sequence
from pathlib import Path

from benchmarks.comparison import (
    AS,
    EARLY_STOPPING,
    OWN,
    POST_HOC,
    RATES,
    RULES,
    TASKS,
    TUNING_SEEDS,
    UNTESTED,
    Comparison,
    Setting,
    chosen,
    means,
)
from benchmarks.options import GOES_ON, alone_in, one_line_errors, parse, parser_of
from benchmarks.tuning import read
from benchmarks.workers import Chain, by_key, carry_out, startable


def with_setting_of(method: str) -> tuple[str, ...]:
    """The method, and those that have its setting."""
    return (method, *AS.get(method, ()), *POST_HOC.get(method, ()))


METHODS = [name for method in RATES for name in with_setting_of(method)]


def chosen_in(path: Path, task: str) -> dict[str, dict[str, Setting]]:
    """By method and rule the setting that a comparison's ``tuning.json`` has; none of a method that always diverged.

    Raises:
        ValueError: if it is no such file, does not hold the task's search to its end, or one with values that the
            search no longer has.
    """
    tuning = read(path)
    found = {}
    for method in RATES:
        tried = tuning.of.get(task, {}).get(method, {})
        whole = means(tried, TUNING_SEEDS)
        found[method] = chosen({_parsed(method, setting): metrics for setting, metrics in whole.items()})
        unfinished = tuning.unfinished
        ended = bool(whole) if unfinished is None else method not in unfinished.get(task, ())
        if not (tried and ended):
            raise ValueError(f"{path} has no finished search of {method} on {task}: run benchmarks.comparison first")
    return found


def _parsed(method: str, name: str) -> Setting:
    setting = Setting.named(name)
    if setting.own not in ("default", *EARLY_STOPPING, *OWN[method]):
        raise ValueError(f"{method} has no setting {setting.own} any more, which the search tried: search anew")
    return setting


def run(
    comparison: Comparison,
    tuning: Path,
    tasks: Sequence[str],
    jobs: int,
    seconds: float = float("inf"),
    rules: Collection[str] = tuple(RULES),
    methods: Collection[str] = tuple(METHODS),
) -> None:
    """Train and test.

    Args:
        comparison: where runs are kept, and how long they train.
        tuning: a comparison's ``tuning.json``.
        tasks: names in ``TASKS``.
        jobs: runs at a time.
        seconds: no run starts later than this.
        rules: names in ``RULES``; what the others chose is neither trained nor listed.
        methods: names in ``METHODS``; others are trained only where one of these starts from them.

    Raises:
        ValueError: before any run: for an override of what is compared, a file that is no ``tuning.json`` or lacks a
            search, or a folder that holds runs with other settings.
        RuntimeError: before any run if another command makes runs in the folder; if no run has finished.
    """
    comparison.check()
    begun = [task for task in TASKS if (comparison.out / "final" / task).is_dir()]
    of = {
        (task, method): found
        for task in dict.fromkeys((*tasks, *begun))
        for method, found in chosen_in(tuning, task).items()
    }
    for task, method in (key for key, found in of.items() if not found and key[0] in tasks):
        if not set(methods).isdisjoint(with_setting_of(method)):
            print(f"{task}: every setting of {method} diverged in the search: {UNTESTED}", flush=True)
    of = {key: found for key, found in of.items() if found}

    def chain(task: str, method: str, setting: Setting) -> Chain:
        first, after = comparison.test_stages(task, method, setting)
        if not {method, *POST_HOC.get(method, ())}.isdisjoint(methods):
            yield 0, first
        yield 0, startable([job for job in after if by_key(job.overrides)["method"] in methods])

    asked = {(*key, found[rule]): None for key, found in of.items() if key[0] in tasks for rule in rules}
    with alone_in(comparison.out):
        write_lists(comparison, of, rules)  # refuses a folder of other settings before any run
        carry_out([chain(*each) for each in asked], jobs, seconds)
        if not write_lists(comparison, of, rules):
            raise RuntimeError("no run has finished: see the lines above")


def write_lists(comparison: Comparison, of: dict[tuple[str, str], dict[str, Setting]], rules: Collection[str]) -> int:
    """By rule the finished runs of all tasks begun; returns how many there are."""
    count = 0
    for rule in rules:
        both = [comparison.test_stages(*key, found[rule]) for key, found in of.items()]
        count += comparison.write_list(rule, [job for first, after in both for job in (*first, *after)])
    return count


def main(argv: Sequence[str] | None = None) -> None:
    """Parse and run."""
    parser = parser_of(__doc__, Path("outputs/longer"))
    parser.add_argument("tuning", type=Path, help="a comparison's tuning.json")
    parser.add_argument("--times", type=int, required=True, help="so many times the epochs of the comparison")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["sst2_500", "arc_e_500", "obqa_500"])
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES), help="whose settings to train")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="those of interest")
    arguments = parse(parser, argv)
    with one_line_errors(GOES_ON):
        comparison = Comparison(arguments.out.resolve(), arguments.overrides, arguments.times, early_stopping=True)
        which = (arguments.rules, arguments.methods)
        run(comparison, arguments.tuning, arguments.tasks, arguments.jobs, arguments.seconds, *which)


if __name__ == "__main__":
    main()
