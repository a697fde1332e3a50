"""A run folder belongs to one process at a time."""

import errno
import logging
import shutil
import weakref
from pathlib import Path
from typing import TextIO

from utils.locks import try_lock

logger = logging.getLogger("train")

LOCK = ".lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""Errors of file systems that lock no files."""


class Claim:
    """A folder kept from other processes while anything in this one refers to the claim.

    Args:
        lock: The locked file; a process that is killed lets go of it too.
    """

    def __init__(self, lock: TextIO) -> None:
        weakref.finalize(self, lock.close)


_HELD: weakref.WeakValueDictionary[Path, Claim] = weakref.WeakValueDictionary()
"""Claims of this process, whose runs follow each other and may share one."""


def claim(folder: Path) -> Claim | None:
    """Keep other processes from making a run in a folder, which is made if absent.

    Returns:
        What holds the folder; None, after a warning, where the file system cannot lock files.

    Raises:
        RuntimeError: If another process makes a run there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.resolve() / LOCK
    if held := _HELD.get(path):
        return held
    try:
        lock = try_lock(path)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        logger.warning("%s lies where files cannot be locked: start no other run in it meanwhile", folder)
        return None
    if lock is None:
        raise RuntimeError(
            f"another process makes a run in {folder}: wait until it has ended, or choose another paths.output_dir"
        )
    return _HELD.setdefault(path, Claim(lock))


def withdraw(folder: Path) -> None:
    """Remove a folder that holds nothing of a run, or this process's lock alone.

    What else there is keeps it, such as a lock of another process, or a log; so does being the working directory.
    """
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else {""}
    ours = {LOCK} if folder.resolve() / LOCK in _HELD else set[str]()
    if found <= ours and folder.resolve() != Path.cwd():
        shutil.rmtree(folder, ignore_errors=True)
