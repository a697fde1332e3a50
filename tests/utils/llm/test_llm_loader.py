import importlib.util

import pytest
import torch
from llm_loading import TINY, load_llm
from safetensors.torch import load_file, save_file

from utils.llm import LLMLoadError, fit_tokenizer, load_model, load_tokenizer
from utils.llm.byte_tokenizer import build_byte_tokenizer


@pytest.fixture
def options(tmp_path):
    return {"cache_dir": tmp_path / "cache", "dtype": torch.float32, "device": torch.device("cpu")}


@pytest.fixture
def random_options(options):
    return {**options, "random_init": True, "architecture": TINY}


def test_a_saved_model_is_ready_for_adapters(model_folder, options):
    model, tokenizer = load_llm(str(model_folder), **options)
    assert not model.training
    assert not model.config.use_cache
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert tokenizer.padding_side == "left"
    assert model.config.pad_token_id == tokenizer.pad_token_id == 0
    assert not hasattr(model, "hf_device_map") or set(model.hf_device_map.values()) == {options["device"]}


def test_left_padding_changes_no_logits(model_folder, options):
    model, tokenizer = load_llm(str(model_folder), **options)
    batch = tokenizer(["a", "abcdef"], padding=True, return_tensors="pt")
    with torch.no_grad():
        padded = model(**batch).logits[0, -1]
        alone = model(**tokenizer("a", return_tensors="pt")).logits[0, -1]
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-5)


def test_a_missing_padding_token_becomes_the_end_token(model_folder, options):
    bare = build_byte_tokenizer()
    bare.pad_token = None
    bare.save_pretrained(model_folder)
    tokenizer = load_tokenizer(str(model_folder), cache_dir=options["cache_dir"])
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_random_weights_depend_on_their_seed_alone(random_options):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = load_model("x", **random_options).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    again = load_model("x", **random_options).state_dict()
    other = load_model("x", **random_options, random_init_seed=1).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_random_weights_on_a_saved_configuration(model_folder, options):
    saved = load_model(str(model_folder), **options)
    drawn = load_model(str(model_folder), **options, random_init=True, random_init_seed=7)
    assert drawn.config.hidden_size == saved.config.hidden_size
    assert not torch.equal(drawn.lm_head.weight, saved.lm_head.weight)


def test_overrides_reach_the_model(model_folder, options):
    model = load_model(str(model_folder), **options, config_overrides={"attention_dropout": 0.25})
    assert model.config.attention_dropout == 0.25
    assert model.model.layers[0].self_attn.attention_dropout == 0.25


@pytest.mark.parametrize("random_init", [False, True])
def test_unknown_override(model_folder, options, random_init):
    options |= {"random_init": random_init, "architecture": TINY}
    with pytest.raises(LLMLoadError, match=r"unknown key 'hiden_size'.*hidden_size"):
        load_model(str(model_folder), **options, config_overrides={"hiden_size": 8})


def test_unknown_model_type(options):
    with pytest.raises(LLMLoadError, match=r"unknown model_type 'lama'.*llama"):
        load_model("x", **options, random_init=True, architecture={"model_type": "lama"})


def test_a_tokenizer_too_large_for_the_model(random_options):
    with pytest.raises(LLMLoadError, match="259 tokens, the model's embedding 200, so none for"):
        load_llm("x", **random_options, tokenizer="bytes", config_overrides={"vocab_size": 200})


def test_a_special_token_needs_no_embedding_but_for_padding(random_options):
    """Gemma's tokenizer has one more than its text models."""
    model = load_model("x", **random_options)
    tokenizer = load_tokenizer("x", cache_dir=random_options["cache_dir"], tokenizer="bytes")
    size = model.get_input_embeddings().num_embeddings
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<{i}>" for i in range(len(tokenizer), size + 1)]})
    fit_tokenizer(model, tokenizer)
    tokenizer.pad_token = f"<{size}>"
    with pytest.raises(LLMLoadError, match=f"embedding {size}, so none for '<{size}>'"):
        fit_tokenizer(model, tokenizer)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_damaged_file_is_one_line(name, model_folder, options):
    """Such as the pointer that Git leaves without its extension for large files."""
    (model_folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(LLMLoadError, match=f"^{model_folder} .*: copy it again$"):
        load_llm(str(model_folder), **options)


def test_weights_that_are_missing_are_not_drawn_at_random(model_folder, options):
    file = model_folder / "model.safetensors"
    tensors = load_file(file)
    save_file({name: t for name, t in tensors.items() if name != "lm_head.weight"}, file, metadata={"format": "pt"})
    with pytest.raises(LLMLoadError, match=r"lacks 1 of the weights \(lm_head.weight is the first\): it holds"):
        load_model(str(model_folder), **options)


@pytest.mark.parametrize("random_init", [False, True])
def test_an_override_of_another_kind_is_one_line(model_folder, options, random_init):
    options |= {"random_init": random_init, "architecture": TINY}
    with pytest.raises(LLMLoadError, match=r"^llm.architecture or llm.config_overrides: .*num_hidden_layers"):
        load_model(str(model_folder), **options, config_overrides={"num_hidden_layers": "abc"})


@pytest.mark.parametrize("where", ["architecture", "config_overrides"])
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_attention_heads", 0, "ZeroDivisionError: .*: correct one of .*num_attention_heads=0"),
        ("num_attention_heads", 3, r"The hidden size \(16\) is not a multiple of .* heads \(3\)"),
        ("num_attention_heads", -2, "num_attention_heads=-2: expected a whole number, at least 0"),
        ("num_key_value_heads", 3, "The size of tensor .*: correct one of .*num_key_value_heads=3"),
        ("num_hidden_layers", -1, "num_hidden_layers=-1: expected a whole number, at least 0"),
        ("hidden_act", "foo", "KeyError: 'foo': correct one of .*hidden_act=foo"),
        ("rope_parameters", {"rope_type": "linear"}, "Missing required keys .*: correct one of .*rope_parameters="),
        ("pad_token_id", 400, "Padding_idx must be .*: correct one of .*pad_token_id=400"),
    ],
)
def test_values_of_which_no_model_can_be_made_are_named(random_options, where, key, value, message):
    changed = {"architecture": TINY, "config_overrides": {}}
    changed[where] = {**changed[where], key: value}
    with pytest.raises(LLMLoadError, match=rf"^llm.({where}\.|architecture or ).*{message}") as said:
        load_model("x", **{**random_options, **changed})
    assert "\n" not in str(said.value)


def test_an_override_of_a_saved_model_of_which_none_can_be_made(model_folder, options):
    with pytest.raises(LLMLoadError, match=r"KeyError: 'foo': correct one of hidden_act=foo$"):
        load_model(str(model_folder), **options, config_overrides={"hidden_act": "foo"})


def test_a_random_model_without_any_tokenizer(random_options):
    load_model("org/model", **random_options)
    with pytest.raises(LLMLoadError, match="org/model is not on this machine"):
        load_tokenizer("org/model", cache_dir=random_options["cache_dir"])


def test_checkpointing_gives_the_same_gradients(random_options):
    ids = torch.arange(12).view(2, 6)

    def gradient(checkpointing: bool) -> torch.Tensor:
        model = load_model("x", **random_options, gradient_checkpointing=checkpointing).train()
        assert model.model.layers[0].gradient_checkpointing == checkpointing
        weight = model.model.layers[0].self_attn.q_proj.weight.requires_grad_()
        model(ids, labels=ids).loss.backward()
        return weight.grad

    torch.testing.assert_close(gradient(True), gradient(False))


def test_quantisation_needs_bitsandbytes(model_folder, options, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find_spec(name, *a)
    )
    with pytest.raises(LLMLoadError, match="pip install bitsandbytes"):
        load_model(str(model_folder), **options, quantization={"load_in_8bit": True})


def test_random_weights_are_not_quantised(random_options):
    with pytest.raises(LLMLoadError, match="quantization=none or random_init=false"):
        load_model("x", **random_options, quantization={"load_in_8bit": True})


@pytest.mark.parametrize("text", ["plain text", "two  spaces\n\ttab", "naïve – 漢字 🙂", "</s> inside"])
def test_byte_tokenizer_is_exact(text):
    tokenizer = load_tokenizer("tiny", cache_dir=None, tokenizer="bytes")
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert max(ids) < len(tokenizer) == 259
    if "</s>" not in text:
        assert len(ids) == len(text.encode())


def test_unknown_tokenizer(tmp_path):
    with pytest.raises(LLMLoadError, match="use 'auto' or 'bytes'"):
        load_tokenizer("tiny", cache_dir=tmp_path, tokenizer="byte")
