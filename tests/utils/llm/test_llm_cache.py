import json
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from utils.llm import LLMLoadError, cache

SAVED = b"x" * 100


def write_gguf(scratch: Path) -> Path:
    path = scratch / "some.gguf"
    path.write_bytes(b"gguf")
    return path


def pretended_conversion(gguf: Path, folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(SAVED)


def crash_half_way(gguf: Path, folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    raise KeyboardInterrupt


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def target(tmp_path):
    return cache.cache_folder(tmp_path / "cache", "org/model")


def test_folder_name_is_safe(tmp_path):
    assert cache.cache_folder(tmp_path, "org/model") == tmp_path / "org--model"


def test_crash_leaves_nothing_and_the_next_call_redoes(target, weights, monkeypatch):
    monkeypatch.setattr(cache, "convert_gguf", crash_half_way)
    with pytest.raises(KeyboardInterrupt):
        cache.fill_cache(target, weights, write_gguf)
    assert names(target.parent) == {".org--model.lock"}
    monkeypatch.setattr(cache, "convert_gguf", pretended_conversion)
    cache.fill_cache(target, weights, write_gguf)
    assert cache.is_whole(target, weights.sha256)
    assert names(target.parent) == {".org--model.lock", "org--model"}


def test_what_a_killed_conversion_left_is_removed_and_nothing_else(target, weights, monkeypatch):
    monkeypatch.setattr(cache, "convert_gguf", pretended_conversion)
    target.parent.mkdir()
    left = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    write_gguf(left)
    other = Path(tempfile.mkdtemp(prefix=f".{target.name}.2b.", dir=target.parent))  # of org/model.2b, perhaps alive
    cache.fill_cache(target, weights, write_gguf)
    assert names(target.parent) == {".org--model.lock", "org--model", other.name}


def test_who_waits_while_a_conversion_fails_has_the_lock_to_itself(target, weights, monkeypatch):
    """Each takes what the one before has left for that of a killed process."""
    monkeypatch.setattr(cache, "convert_gguf", crash_half_way)
    lock = target.parent / ".org--model.lock"
    target.parent.mkdir()
    with lock.open("a") as waiting:
        with pytest.raises(KeyboardInterrupt):
            cache.fill_cache(target, weights, write_gguf)
        assert lock.exists()
        assert lock.stat().st_ino == os.fstat(waiting.fileno()).st_ino


def test_half_written_folder_is_not_whole_and_is_replaced(target, weights, monkeypatch):
    monkeypatch.setattr(cache, "convert_gguf", pretended_conversion)
    pretended_conversion(target, _made(target))
    assert not cache.is_whole(target, weights.sha256)
    cache.fill_cache(target, weights, write_gguf)
    assert cache.is_whole(target, weights.sha256)


@pytest.mark.parametrize("damage", ["truncate", "delete", "manifest"])
def test_damage_is_seen(target, weights, monkeypatch, damage):
    monkeypatch.setattr(cache, "convert_gguf", pretended_conversion)
    cache.fill_cache(target, weights, write_gguf)
    if damage == "truncate":
        (target / "model.safetensors").write_bytes(SAVED[:-1])
    elif damage == "delete":
        (target / "config.json").unlink()
    else:
        (target / cache.MANIFEST).write_text("{")
    assert not cache.is_whole(target, weights.sha256)


def test_a_conversion_whose_tokenizer_was_never_checked_is_not_taken(target, weights, monkeypatch):
    monkeypatch.setattr(cache, "convert_gguf", pretended_conversion)
    cache.fill_cache(target, weights, write_gguf)
    manifest = json.loads((target / cache.MANIFEST).read_text())
    del manifest["transformers"]
    (target / cache.MANIFEST).write_text(json.dumps(manifest))
    assert not cache.is_whole(target, weights.sha256)


def test_other_weights_are_not_taken_for_these(target, weights, monkeypatch):
    monkeypatch.setattr(cache, "convert_gguf", pretended_conversion)
    cache.fill_cache(target, weights, write_gguf)
    assert not cache.is_whole(target, "0" * 64)


def test_a_faster_process_wins(target, weights, monkeypatch):
    def convert_while_another_finishes(gguf: Path, folder: Path) -> None:
        pretended_conversion(gguf, folder)
        pretended_conversion(gguf, target)
        sizes = {path.name: path.stat().st_size for path in target.iterdir()}
        by = {"packages": ["the other process"], "transformers": "5.24.0"}
        manifest = {"sha256": weights.sha256, "bytes": sizes, **by}
        (target / cache.MANIFEST).write_text(json.dumps(manifest))

    monkeypatch.setattr(cache, "convert_gguf", convert_while_another_finishes)
    cache.fill_cache(target, weights, write_gguf)
    assert cache.is_whole(target, weights.sha256)
    assert "the other process" in (target / cache.MANIFEST).read_text()
    assert names(target.parent) == {".org--model.lock", "org--model"}


def test_who_waited_for_another_process_takes_what_it_made(target, weights, monkeypatch):
    monkeypatch.setattr(cache, "convert_gguf", pretended_conversion)
    cache.fill_cache(target, weights, write_gguf)

    def never(_: Path) -> Path:
        raise AssertionError("fetched again")

    cache.fill_cache(target, weights, never)


def test_a_full_disk_is_told_before_starting(target, weights, monkeypatch):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))

    def never(_: Path) -> Path:
        raise AssertionError("started")

    with pytest.raises(LLMLoadError, match=r"0\.0 GB free and the model needs 0\.001 GB"):
        cache.fill_cache(target, weights, never)


def _made(target: Path) -> Path:
    target.parent.mkdir(parents=True)
    return target
