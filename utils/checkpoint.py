"""A resumable checkpoint in `<run_dir>/checkpoint/`, written atomically and verified when read.

The file is one header line, `bayesian-lora-checkpoint <version> <sha256 of the rest>`, and then what
`torch.save` wrote, restricted to what `torch.load(weights_only=True)` reads.
"""

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.run import check_disk, open_atomic
from utils.settings import differing

FOLDER = "checkpoint"
FILE = "state.pt"
MAGIC = "bayesian-lora-checkpoint"
VERSION = 2
START_AFRESH = "delete the folder to start afresh"


def save_checkpoint(run_dir: str | Path, state: Mapping[str, Any]) -> None:
    """Replace the checkpoint of a run; a kill at any moment leaves the previous one whole.

    Args:
        run_dir: Folder of the run.
        state: Everything needed to continue: `parameters` (name -> trainable tensor), `optimizer` (its
            state_dict), `step`, `best` (best metric so far) and `fingerprint` (config keys that must agree on
            resuming; required). Random generators need no state: a step's draws follow from (seed, step).

    Raises:
        KeyError: If there is no `fingerprint`.
        TypeError: If a value is neither plain data nor a tensor or numpy array; the message names its key.
        OSError: If the disk is too full.
    """
    if "fingerprint" not in state:
        raise KeyError("a checkpoint needs the key 'fingerprint': the config keys that must agree on resuming")
    buffer = io.BytesIO()
    torch.save(_plain(state, "state"), buffer)
    payload = buffer.getbuffer()
    path = Path(run_dir) / FOLDER / FILE
    check_disk(path, len(payload))
    with open_atomic(path) as file:
        file.write(f"{MAGIC} {VERSION} {hashlib.sha256(payload).hexdigest()}\n".encode())
        file.write(payload)


def load_checkpoint(run_dir: str | Path, fingerprint: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read the checkpoint of a run onto the CPU.

    Args:
        run_dir: Folder of the run.
        fingerprint: The present config's values of the keys that must agree.

    Returns:
        The state that was saved, or None if there is no checkpoint.

    Raises:
        ValueError: If the file is no checkpoint, of another version, damaged, or of another config; the
            message names the file, the key and the remedy.
    """
    path = Path(run_dir) / FOLDER / FILE
    if not path.exists():
        return None
    header, _, payload = path.read_bytes().partition(b"\n")
    magic, version, checksum = (*header.decode("utf-8", "replace").split(" "), "", "")[:3]
    if magic != MAGIC:
        raise ValueError(f"{path} is no checkpoint of this program (no {MAGIC} header): {START_AFRESH}")
    if version != str(VERSION):
        raise ValueError(f"{path} has checkpoint version {version}, this program reads {VERSION}: {START_AFRESH}")
    if hashlib.sha256(payload).hexdigest() != checksum:
        raise ValueError(f"{path} is damaged or cut short (checksum differs): {START_AFRESH}")
    state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    if others := differing(state["fingerprint"], _plain(fingerprint, "fingerprint")):
        raise ValueError(
            f"{path} belongs to another config: {', '.join(others)}; repeat that run's whole command with "
            f"resume=true, or use another run folder, or {START_AFRESH}"
        )
    return state


def _plain(value: Any, key: str) -> Any:
    """Copy nested data with tensors detached on the CPU and numpy values made plain; `key` is for errors."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()  # a view would be saved with its whole storage
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {name: _plain(item, f"{key}.{name}") for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(item, f"{key}[{index}]") for index, item in enumerate(value))
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(
        f"{key} is a {type(value).__name__}: a checkpoint holds only tensors, numbers, strings, lists, dicts"
    )
