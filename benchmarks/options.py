"""What commands have in common: errors in one line; those of many runs also options, and a folder to themselves."""

import argparse
import contextlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pipeline.run import CONFIGS
from train_script import USER_ERRORS
from utils.distributed import started_several
from utils.locks import try_lock
from utils.settings import one_line

OVERRIDE = re.compile(r"\+{0,2}[A-Za-z_][\w.@]*=|~[A-Za-z_]")
"""How KEY=VALUE begins, or ~KEY; paths that contain = have a / before it."""

GOES_ON = "interrupted: runs that have ended are kept; the same command goes on"
"""What commands of many runs say at Ctrl-C."""


def parser_of(description: str | None, out: Path) -> argparse.ArgumentParser:
    """With ``--out``, ``--jobs``, ``--seconds`` and the overrides; other arguments are the command's own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=out, help=f"where runs are kept ({out} unless given)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no run later than this")
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; an override belongs to no option, not even to one before it that takes several words."""
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for every run")  # after all others
    words = list(sys.argv[1:] if argv is None else argv)
    overrides = [word for word in words if OVERRIDE.match(word)]
    arguments = parser.parse_intermixed_args([word for word in words if word not in overrides])
    try:
        check_least(arguments, {"jobs": 1})
    except ValueError as error:
        parser.error(str(error))
    if arguments.overrides:
        parser.error(f"{arguments.overrides[0]} is neither an option nor KEY=VALUE")
    arguments.overrides = overrides
    return arguments


def untrained(llm: str) -> list[str]:
    """Overrides of a model with random weights, for which nothing is read or written."""
    return [f"llm={llm}", "llm.random_init=true", "paths.output_dir=unused", "paths.cache_dir=unused"]


def check_least(arguments: argparse.Namespace, least: Mapping[str, int]) -> None:
    """Raise ValueError for a number below the smallest that its option takes."""
    for option, smallest in least.items():
        if (value := getattr(arguments, option)) < smallest:
            raise ValueError(f"--{option} {value}: expected {smallest} or more")


@contextlib.contextmanager
def one_line_errors(interrupted: str = "interrupted") -> Iterator[None]:
    """End the command with one line for what a user can put right, and at Ctrl-C (``interrupted``)."""
    try:
        yield
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        sys.exit(130)
    except USER_ERRORS as error:
        sys.exit(one_line(error, CONFIGS))


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other commands from making runs in a folder.

    Raises:
        ValueError: in one of several processes of torchrun, or for a folder whose name a configuration reads otherwise.
        RuntimeError: if another command makes runs there.
    """
    if started_several():
        raise ValueError("many runs are made without torchrun: start this command alone, with as many jobs as wanted")
    if "${" in str(folder):
        raise ValueError(f"{folder}: ${{ begins a reference in a configuration: choose a folder without it")
    folder.mkdir(parents=True, exist_ok=True)
    lock = try_lock(folder / ".lock")
    if lock is None:
        raise RuntimeError(f"another command makes runs in {folder}: wait until it has ended, or choose another folder")
    with lock:
        yield
