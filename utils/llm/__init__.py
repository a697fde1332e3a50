"""Loading of causal language models and their tokenizers."""

from utils.llm.device import resolve_device, resolve_dtype
from utils.llm.errors import LLMLoadError
from utils.llm.loader import fit_tokenizer, load_config, load_model, load_tokenizer

__all__ = [
    "LLMLoadError",
    "fit_tokenizer",
    "load_config",
    "load_model",
    "load_tokenizer",
    "resolve_device",
    "resolve_dtype",
]
