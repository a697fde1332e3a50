"""Locks that end with their process, however it ends."""

import sys
from pathlib import Path
from typing import TextIO

if sys.platform != "win32":
    import fcntl


def try_lock(path: Path) -> TextIO | None:
    """Lock a file for this process while it stays open; None if another process holds it.

    Windows, which has no such locks, holds nobody back.
    """
    try:
        return _locked(path, wait=False)
    except BlockingIOError:
        return None


def wait_for_lock(path: Path) -> TextIO:
    """Lock a file as ``try_lock`` does, once no other process holds it any more."""
    return _locked(path, wait=True)


def _locked(path: Path, wait: bool) -> TextIO:
    file = path.open("a")
    try:
        if sys.platform != "win32":
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        file.close()
        raise
    return file
