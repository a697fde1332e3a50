"""Seeds: the global generators once, and independent named streams for everything else."""

import hashlib
import json
import random

import numpy as np
import torch


def seed_all(seed: int) -> None:
    """Seed the global generators of python, numpy and torch (every device); the entry point does so once.

    Raises:
        ValueError: If `seed` is not in [0, 2**32), the range numpy takes.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed}: expected an integer in [0, {2**32})")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def stream_seed(seed: int, *stream: str | int) -> int:
    """Seed of a named stream: a hash of the run's seed and the names; 3 and "3" differ."""
    digest = hashlib.sha256(json.dumps([seed, *stream]).encode()).digest()
    # torch's CPU engine keeps the low 32 bits, its CUDA engine all 63
    return int.from_bytes(digest[:8], "little") >> 1


def make_generator(seed: int, *stream: str | int, device: str | torch.device = "cpu") -> torch.Generator:
    """Make the generator of a named stream, such as `make_generator(seed, "train", epoch)`.

    Its seed is a hash of `seed` and the names, so streams are independent of each other and of how many
    draws another stream has made, and the same arguments always give the same stream.

    Args:
        seed: Seed of the run.
        *stream: Names and numbers that tell the stream from others; 3 and "3" differ.
        device: Where the generator draws.
    """
    return torch.Generator(device).manual_seed(stream_seed(seed, *stream))
