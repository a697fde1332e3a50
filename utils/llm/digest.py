"""Which weights a base model has, told by a small part of them."""

import hashlib
import json
from pathlib import Path

import torch
from torch import nn

from utils.run import write_json_atomic

BASE_FILE = "base_weights.json"
"""In an adapter's folder: the digest of the weights that it was trained with."""
SAMPLED = 256
"""About how many values, evenly spaced, are taken of a large parameter; of a small one all."""


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of names, shapes and a sample of the values of a model's parameters, wherever and however it is loaded.

    Values count as bfloat16, to which every load of the same weights rounds alike. Quantised parameters are left out,
    since what they hold depends on the device that has quantised them: models that differ in these alone pass for one.

    Args:
        model: as loaded, before adapters and sharding.
    """
    whole = {name: p.detach() for name, p in sorted(model.named_parameters()) if type(p) is nn.Parameter}
    values = [p.flatten()[:: p.numel() // SAMPLED | 1].bfloat16() for p in whole.values()]  # odd: not one column alone
    found = hashlib.sha256(repr([(name, tuple(p.shape)) for name, p in whole.items()]).encode())
    found.update(torch.cat(values).view(torch.int16).cpu().numpy().tobytes())
    return found.hexdigest()


def record_base(folder: Path, digest: str) -> None:
    """Write into an adapter's folder which weights it belongs to."""
    write_json_atomic(folder / BASE_FILE, {"weights_digest": digest})


def recorded_base(folder: Path) -> str | None:
    """The digest in an adapter's folder; None where nothing, or nothing readable, is recorded."""
    try:
        return str(json.loads((folder / BASE_FILE).read_text())["weights_digest"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
