"""One study, one folder: each names the other, so that neither is taken for another's."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optuna import Study

from utils.run import write_text_atomic

FOLDER = "folder"
"""User attribute of a study: where it works. Seen from its journal, so that both can be moved; absolute for a URL."""
RECORD = "study"
"""File in the folder: the study's name."""


def check_place(folder: Path, location: str, name: str, attributes: Mapping[str, Any] | None) -> None:
    """Refuse a folder of another study, and a study of another folder; one that names none may have any.

    Args:
        folder: Where the study is to work.
        location: Journal file or URL of the study.
        name: Of the study.
        attributes: The study's user attributes; None for a new study.

    Raises:
        ValueError: naming the other study or folder.
    """
    held = (folder / RECORD).read_text(errors="replace") if (folder / RECORD).is_file() else None
    if held not in (None, name):
        raise ValueError(f"{folder} holds the study {held}: choose another paths.output_dir for {name}")
    if attributes is None and (held or (folder / "trials").exists()):
        remedy = "choose another paths.output_dir, or move it away"
        raise ValueError(f"{folder} holds trials of a study that is not in search.storage={location}: {remedy}")
    own = (attributes or {}).get(FOLDER, _seen_from(location, folder))
    if own != _seen_from(location, folder):
        place = (Path(location).resolve().parent / own).resolve()
        raise ValueError(f"study {name} works in {place}: give that as paths.output_dir, or use another search.name")


def keep_place(folder: Path, location: str, study: Study) -> None:
    """Let the study and its folder name each other."""
    if FOLDER not in study.user_attrs:
        study.set_user_attr(FOLDER, _seen_from(location, folder))
    write_text_atomic(folder / RECORD, str(study.study_name))


def _seen_from(location: str, folder: Path) -> str:
    whole = folder.resolve()
    return str(whole) if "://" in location else os.path.relpath(whole, Path(location).resolve().parent)
