"""Conversion of GGUF weights to a safetensors folder, and a check of the tokenizer that comes out of it."""

import itertools
from pathlib import Path

import torch
import transformers
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from utils.llm.errors import LLMLoadError

WORDS = 1000
"""How many words of the vocabulary, the most frequent ones, are looked at."""
SPLIT = 0.05
"""Share of them that a sound tokenizer may split: a few words of a vocabulary can be out of reach of its merges."""
GOOD_RELEASE = "5.23"
"""The first release of transformers that converts the tokenizers of all models here soundly."""


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Dequantise a GGUF file to float32 and save model and tokenizer into `folder`.

    Raises:
        LLMLoadError: If the saved tokenizer does not do what the file says (see `check_tokenizer`).
    """
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    check_tokenizer(AutoTokenizer.from_pretrained(folder), adds_bos(gguf))
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain float32 now: without these traces of GGUF, transformers agrees to save them.
    for trace in ("hf_quantizer", "is_quantized", "quantization_method"):
        model.__dict__.pop(trace, None)
    model.config.__dict__.pop("quantization_config", None)
    model.save_pretrained(folder)


def adds_bos(gguf: Path) -> bool:
    """Whether a GGUF file says that every text begins with the token for its beginning."""
    field = GGUFReader(gguf).fields.get("tokenizer.ggml.add_bos_token")
    return field is not None and bool(field.contents())


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, begins: bool) -> None:
    """Refuse a tokenizer that splits the words of its own vocabulary, or that forgets the token for the beginning.

    Some releases of transformers lose merges of a GGUF file or the beginning: texts become letters, or texts the model
    has never seen the like of. Nothing fails then; the model only answers badly.

    Args:
        tokenizer: As it is loaded from the converted folder.
        begins: Whether a text must begin with the token for its beginning.

    Raises:
        LLMLoadError: If it does either.
    """
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    words = list(itertools.islice((token for token in tokens if _is_word(token)), WORDS))
    split = [word for word in words if tokenizer.tokenize(f"a {word[1:]}")[1:] != [word]]
    if len(split) > SPLIT * len(words):
        fault = f"splits words of its own vocabulary ({len(split)} of {len(words)}, such as {split[0][1:]!r})"
    elif begins and tokenizer("a").input_ids[:1] != [tokenizer.bos_token_id]:
        fault = f"leaves out {tokenizer.bos_token}, with which texts begin"
    else:
        return
    raise LLMLoadError(
        f"the tokenizer, converted by transformers {transformers.__version__}, {fault}: "
        f"install transformers>={GOOD_RELEASE}, or set llm.name_or_path to a folder with the original tokenizer"
    )


def _is_word(token: str | None) -> bool:
    """Whether a token is a space, as byte-level or sentencepiece vocabularies write it, and ASCII letters."""
    return token is not None and token.startswith(("\u0120", "\u2581")) and token[1:].isascii() and token[1:].isalpha()
