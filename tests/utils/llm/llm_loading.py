"""What several tests share: a tiny architecture; model and tokenizer together, as the entry point loads them."""

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from utils.llm import fit_tokenizer, load_model, load_tokenizer

TINY = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
TOKENIZER_KEYS = ("cache_dir", "revision", "pypi", "gguf_dir", "tokenizer")


def load_llm(name_or_path: str, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    chosen = {key: options[key] for key in TOKENIZER_KEYS if key in options}
    tokenizer = load_tokenizer(name_or_path, **chosen)
    model = load_model(name_or_path, **{key: value for key, value in options.items() if key != "tokenizer"})
    fit_tokenizer(model, tokenizer)
    return model, tokenizer
