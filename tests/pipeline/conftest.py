"""Command lines of tiny runs."""

import json
from pathlib import Path

import pytest
from tiny_runs import FAST, row


@pytest.fixture
def command(tmp_path: Path):
    for split, numbers in {"train": range(24), "validation": range(20, 25), "test": range(30, 36)}.items():
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row(i)) + "\n" for i in numbers))
    data = [f"dset.{split}_file={tmp_path / split}.jsonl" for split in ("train", "validation", "test")]

    def make(*extra: str, folder: str = "run") -> list[str]:
        return [*FAST, *data, "eval.every=none", f"paths.output_dir={tmp_path / folder}", *extra]

    return make
