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
    file = path.open("a")
    if sys.platform != "win32":
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        except OSError:
            file.close()
            raise
    return file
