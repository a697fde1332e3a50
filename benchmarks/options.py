"""What the commands that make many runs have in common: their options, and KEY=VALUE wherever it stands."""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

OVERRIDE = re.compile(r"\+{0,2}[A-Za-z_][\w.@]*=|~[A-Za-z_]")
"""How KEY=VALUE begins, or ~KEY; paths that contain = have a / before it."""


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
    if arguments.overrides:
        parser.error(f"{arguments.overrides[0]} is neither an option nor KEY=VALUE")
    arguments.overrides = overrides
    return arguments
