"""What a folder must hold to count as a whole model."""

import json
from pathlib import Path

_SINGLE = ("model.safetensors", "pytorch_model.bin")
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def has_weights(folder: Path) -> bool:
    """Whether `folder` holds a config and all of its weight files (every shard its index names)."""
    if not (folder / "config.json").is_file():
        return False
    for name in _SINGLE:
        if (folder / name).is_file():
            return True
        index = folder / f"{name}.index.json"
        if index.is_file():
            try:
                shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            except (ValueError, KeyError, TypeError, AttributeError):  # damaged
                return False
            return all((folder / shard).is_file() for shard in shards)
    return False


def has_tokenizer(folder: Path) -> bool:
    """Whether `folder` holds the files of a tokenizer."""
    return any((folder / name).is_file() for name in _TOKENIZER)
