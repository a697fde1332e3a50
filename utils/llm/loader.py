"""Language models and tokenizers, ready for adapters: frozen, in evaluation mode, padded on the left."""

import logging
from collections.abc import Mapping
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from utils.llm.architecture import build_config, named_in_errors, override_config
from utils.llm.build import pretrained_model, random_model
from utils.llm.byte_tokenizer import build_byte_tokenizer
from utils.llm.errors import LLMLoadError
from utils.llm.pypi import PyPIWeights
from utils.llm.sources import Source, find_source

logger = logging.getLogger(__name__)


def load_config(
    name_or_path: str,
    *,
    cache_dir: Path,
    random_init: bool = False,
    architecture: Mapping[str, Any] | None = None,
    config_overrides: Mapping[str, Any] | None = None,
    revision: str | None = None,
    pypi: Mapping[str, Any] | None = None,
    gguf_dir: str | None = None,
) -> tuple[PreTrainedConfig, Source | None]:
    """A model's configuration, and where its weights are; None for random weights of the given architecture.

    Arguments and errors are those of `load_model`.
    """
    if random_init and architecture is not None:
        return build_config(architecture, config_overrides or {}), None
    source = _source(name_or_path, cache_dir, revision, pypi, gguf_dir)
    config = AutoConfig.from_pretrained(source.location, revision=source.revision)
    return override_config(config, config_overrides or {}), source


def load_model(
    name_or_path: str,
    *,
    cache_dir: Path,
    dtype: torch.dtype,
    device: torch.device,
    random_init: bool = False,
    random_init_seed: int = 0,
    architecture: Mapping[str, Any] | None = None,
    config_overrides: Mapping[str, Any] | None = None,
    revision: str | None = None,
    pypi: Mapping[str, Any] | None = None,
    gguf_dir: str | None = None,
    quantization: Mapping[str, Any] | None = None,
    gradient_checkpointing: bool = False,
) -> PreTrainedModel:
    """Load a model alone, its weights frozen, in evaluation mode, without a key-value cache.

    Args:
        name_or_path: A hub name, or a folder.
        cache_dir: The project's cache of converted weights.
        dtype: Precision of the weights (`resolve_dtype`).
        device: Where the model goes (`resolve_device`); `meta` for the structure without any weights.
        random_init: Random weights instead of real ones; needs no download if `architecture` is given.
        random_init_seed: Seed of the random weights; the global generators are left as they were.
        architecture: `model_type` and sizes, read only with `random_init`.
        config_overrides: Model configuration keys to change.
        revision: Branch, tag or commit on the hub.
        pypi: `model`, `packages`, `file`, `sha256`, `disk_gb`: see `PyPIWeights`.
        gguf_dir: A folder that holds the file named in `pypi` already.
        quantization: Arguments of `BitsAndBytesConfig`; None or empty for none.
        gradient_checkpointing: Recompute activations in the backward pass (non-reentrant), in training mode.

    Raises:
        LLMLoadError: The model cannot be loaded; the message names the remedy.
    """
    if random_init and quantization:
        raise LLMLoadError("random weights cannot be quantised on the fly: use quantization=none or random_init=false")
    config, source = load_config(
        name_or_path,
        cache_dir=cache_dir,
        random_init=random_init,
        architecture=architecture,
        config_overrides=config_overrides,
        revision=revision,
        pypi=pypi,
        gguf_dir=gguf_dir,
    )
    if device.type == "meta":
        model = random_model(config, random_init_seed, dtype, device)
    elif source is None or random_init:
        logger.info("%s: random weights (seed %d)", name_or_path, random_init_seed)
        with named_in_errors({**(architecture or {}), **(config_overrides or {})}):
            model = random_model(config, random_init_seed, dtype, device)
    else:
        logger.info("%s: weights from %s", name_or_path, source.location)
        model = pretrained_model(source, config, dtype, device, quantization)
    model.requires_grad_(False)
    model.config.use_cache = False
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.eval()


def load_tokenizer(
    name_or_path: str,
    *,
    cache_dir: Path,
    revision: str | None = None,
    pypi: Mapping[str, Any] | None = None,
    gguf_dir: str | None = None,
    tokenizer: str = "auto",
) -> PreTrainedTokenizerBase:
    """Load a tokenizer alone, so that data can be checked before any weights are read. It pads on the left.

    Args:
        name_or_path: The model, as in `load_model`; `cache_dir`, `revision`, `pypi` and `gguf_dir` likewise.
        cache_dir: The project's cache of converted weights.
        revision: Branch, tag or commit on the hub.
        pypi: See `PyPIWeights`.
        gguf_dir: A folder that holds the file named in `pypi` already.
        tokenizer: `auto` for the model's own, `bytes` for the built-in one with a token per byte.

    Raises:
        LLMLoadError: The tokenizer cannot be had, or `tokenizer` is unknown.
    """
    if tokenizer == "bytes":
        tokens: PreTrainedTokenizerBase = build_byte_tokenizer()
    elif tokenizer == "auto":
        source = _source(name_or_path, cache_dir, revision, pypi, gguf_dir, tokenizer_only=True)
        try:
            tokens = AutoTokenizer.from_pretrained(source.location, revision=source.revision)
        except (JSONDecodeError, KeyError) as error:
            raise LLMLoadError(f"{source.location} has a damaged tokenizer file ({error}): copy it again") from error
    else:
        raise LLMLoadError(f"unknown llm.tokenizer {tokenizer!r}: use 'auto' or 'bytes'")
    if tokens.pad_token_id is None:
        if tokens.eos_token_id is None:
            raise LLMLoadError(f"the tokenizer of {name_or_path} has neither a padding nor an end token: add one")
        tokens.pad_token = tokens.eos_token
    tokens.padding_side = "left"
    return tokens


def fit_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the model has an embedding for every token of a text, and tell it the padding token.

    Special tokens may have none (Gemma's tokenizer has one more, for images), but for that which pads.

    Raises:
        LLMLoadError: Another token has no embedding.
    """
    size = model.get_input_embeddings().num_embeddings
    harmless = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} - {tokenizer.pad_token_id}
    beyond = {token: i for token, i in tokenizer.get_vocab().items() if i >= size and i not in harmless}
    if beyond:
        first = min(beyond, key=beyond.__getitem__)
        raise LLMLoadError(
            f"the tokenizer of {tokenizer.name_or_path or 'this model'} has {len(tokenizer)} tokens, the model's "
            f"embedding {size}, so none for {first!r}: take the tokenizer that belongs to the model; of random weights "
            "correct vocab_size in llm.architecture or llm.config_overrides"
        )
    model.config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id


def _source(
    name_or_path: str,
    cache_dir: Path,
    revision: str | None,
    pypi: Mapping[str, Any] | None,
    gguf_dir: str | None,
    tokenizer_only: bool = False,
) -> Source:
    return find_source(
        name_or_path,
        cache_dir=Path(cache_dir),
        revision=revision,
        pypi=None
        if pypi is None
        else PyPIWeights(**{"model": name_or_path, **pypi, "packages": tuple(pypi["packages"])}),
        gguf_dir=None if gguf_dir is None else Path(gguf_dir).expanduser(),
        tokenizer_only=tokenizer_only,
    )
