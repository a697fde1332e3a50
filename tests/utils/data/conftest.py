import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from utils.data.example import Choice, Example

WORDS = "the cat sat on a mat because it was tired A B C D E yes no 1 2 dog red green Question Answer : . ?"


def build_tokenizer(bos: str | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer which knows the words above (with a blank before) and spells out all others."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([f" {WORDS}"] * 50, trainer)
    if bos:
        core.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token=bos)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="session")
def bos_tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer("<s>")


@pytest.fixture
def examples() -> list[Example]:
    """Different prompt lengths, 2 to 4 choices, choices of different lengths, with and without a context."""
    return [
        Example(
            "long", "the cat sat on a mat because it", (Choice(" was"), Choice(" sat on the mat"), Choice(" A")), 1
        ),
        Example("cloze", "the dog and the cat", (Choice(" was tired.", " it"), Choice(" was tired.", " the dog")), 0),
        Example("four", "red", (Choice(" green"), Choice(" dog cat"), Choice(" unknown"), Choice(" a")), 3),
    ]


@pytest.fixture
def write_rows(tmp_path: Path):
    """Write a list of rows as JSON lines below tmp_path; returns the file."""

    def write(name: str, rows: list[dict[str, Any]]) -> Path:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return file

    return write
