"""Device and precision by name."""

import difflib
import re

import torch

from utils.llm.errors import LLMLoadError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """Turn a device name into a device that is there.

    Args:
        name: `auto` (the process's current GPU, the first unless it has chosen another, or the CPU where there is
            none), `cpu`, `cuda` (the current GPU) or `cuda:<index>`.

    Raises:
        LLMLoadError: The name is unknown, or the GPU it names is absent.
    """
    if name == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if name == "cpu":
        return torch.device("cpu")
    match = re.fullmatch(r"cuda(?::(\d+))?", name)
    if match is None:
        raise LLMLoadError(f"unknown device {name!r}{_near(name, ['auto', 'cpu', 'cuda', 'cuda:0'])}")
    if not torch.cuda.is_available():
        raise LLMLoadError(f"device {name!r} asked for, but PyTorch finds no GPU: use device=cpu or device=auto")
    index = torch.cuda.current_device() if match.group(1) is None else int(match.group(1))
    count = torch.cuda.device_count()
    if index >= count:
        raise LLMLoadError(f"device {name!r} asked for, but the GPUs here are cuda:0 to cuda:{count - 1}")
    return torch.device("cuda", index)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Turn a precision name into a dtype that the device computes in.

    Args:
        name: `float32`, `bfloat16`, `float16`, or `auto`: float32 on a CPU, bfloat16 on a GPU that has it
            and float32 on one that has not.
        device: Where the model will run.

    Raises:
        LLMLoadError: The name is unknown, or the device lacks bfloat16.
    """
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and _has_bfloat16(device) else torch.float32
    if name not in DTYPES:
        raise LLMLoadError(f"unknown dtype {name!r}{_near(name, ['auto', *DTYPES])}")
    if name == "bfloat16" and device.type == "cuda" and not _has_bfloat16(device):
        raise LLMLoadError(f"{device} does not compute in bfloat16: use dtype=float32 or dtype=auto")
    return DTYPES[name]


def _has_bfloat16(device: torch.device) -> bool:
    """Native bfloat16 (compute capability 8.0 or later); emulation is slower than float32."""
    return torch.cuda.get_device_capability(device)[0] >= 8


def _near(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f": did you mean {close[0]!r}?" if close else f": use one of {', '.join(known)}"
