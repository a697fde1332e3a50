"""Saving and loading SGP-LoRA with PEFT's own functions."""

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BartConfig, BartForConditionalGeneration

import bnn
from bnn.sampler import active_factors

CONFIGS = {
    "diagonal": {},
    "matrix_normal": {"family": "matrix_normal"},
    "full": {"family": "full"},
    "ensemble": {"family": "ensemble", "members": 3},
    "flow": {"flow_depth": 2, "flow_hidden": 8},
    "unwhitened": {"whitened": False, "learn_lambda": False, "learn_prior_sd": False},
    "no conditional noise": {"conditional_noise": False, "lambda_max": 0.5},
}


@torch.no_grad()
def outputs(model, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Mean logits and logits under two seeded draws."""
    with bnn.sample(model, 2, torch.Generator().manual_seed(3)):
        drawn = model(input_ids=ids.repeat(2, 1)).logits
    return model(input_ids=ids).logits, drawn


def assert_same(model, other, ids: Tensor) -> None:
    """Equal up to rounding: kernels may take another path for memory that safetensors maps unaligned."""
    for a, b in zip(outputs(model, ids), outputs(other, ids), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_reloaded_adapter_is_identical(config, low_cpu_mem_usage, make_llama, make_adapted, ids, tmp_path):
    model = make_adapted(**config)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert_same(model, loaded, ids)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert [f.spec for f in active_factors(loaded)] == [f.spec for f in active_factors(model)]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_loads_under_another_name_next_to_a_first(config, make_llama, make_adapted, ids, tmp_path):
    model = make_adapted(**config)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path, adapter_name="other").eval()
    assert_same(model, loaded, ids)
    loaded.load_adapter(tmp_path, adapter_name="third")
    loaded.set_adapter("third")
    assert_same(model, loaded, ids)


def test_a_flow_saved_with_the_adapter_s_name_in_its_keys_loads(make_llama, make_adapted, ids, tmp_path):
    """As earlier versions did."""
    model = make_adapted(**CONFIGS["flow"])
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = {name.replace(".flow.", ".default.flow."): t for name, t in load_file(file).items()}
    assert any(".default.flow." in name for name in tensors)
    save_file(tensors, file)
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path, adapter_name="other").eval()
    assert_same(model, loaded, ids)


@pytest.mark.parametrize("config", ["diagonal", "flow"])
def test_a_file_in_half_precision_is_float32_again(config, make_llama, make_adapted, ids, tmp_path):
    make_adapted(**CONFIGS[config]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({name: t.bfloat16() for name, t in load_file(file).items()}, file)
    how = {"low_cpu_mem_usage": True, "autocast_adapter_dtype": False}  # the file's tensors become the parameters
    loaded, usual = (PeftModel.from_pretrained(make_llama(), tmp_path, **each).eval() for each in (how, {}))
    assert {t.dtype for f in active_factors(loaded) for t in f.own_tensors().values()} == {torch.float32}
    assert_same(loaded, usual, ids)


def test_reloads_trainable(make_llama, make_adapted, ids, tmp_path):
    model = make_adapted(lambda_init=0.3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path, is_trainable=True)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == names
    with bnn.sample(loaded, 1) as live:
        (loaded(input_ids=ids, labels=ids).loss + live.kl()).backward()
    assert all(p.grad is not None for p in loaded.parameters() if p.requires_grad)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_stay_float32_on_any_base(dtype, low_cpu_mem_usage, make_llama, make_adapted, ids, tmp_path):
    model = make_adapted(make_llama(dtype))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_llama(dtype), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert {t.dtype for f in active_factors(loaded) for t in f.tensors().values()} == {torch.float32}
    assert_same(model, loaded, ids)


def test_auto_model_finds_the_base(make_llama, make_adapted, ids, tmp_path):
    base = make_llama()
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = base.config._name_or_path = str(tmp_path / "base")
    model = make_adapted(base)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float64).eval()
    assert_same(model, loaded, ids)


def test_only_the_adapter_is_saved_and_no_draw_with_it(make_adapted, tmp_path):
    model = make_adapted()
    with bnn.sample(model, 2, torch.Generator().manual_seed(0)):
        model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    expected = {"Z_r", "Z_c", "raw_D_r", "raw_D_c", "raw_loc", "raw_sd", "raw_lambda", "raw_prior_sd", "W_unit"}
    assert {name.rsplit(".", 1)[-1] for name in saved} == expected
    assert all(".lora_A." in name or ".lora_B." in name for name in saved)


def test_an_adapter_of_the_earlier_parametrisation_is_refused(make_llama, make_adapted, tmp_path):
    """Its keys do not fit, which PEFT itself only warns of, and it would be another posterior."""
    make_adapted().save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({name.replace("W_unit", "unit"): t for name, t in load_file(file).items()}, file)
    with pytest.raises(ValueError, match="train it again"):
        PeftModel.from_pretrained(make_llama(), tmp_path)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_adapted_head_of_a_tied_model_is_identical(make_llama, make_adapted, ids, tmp_path, low_cpu_mem_usage):
    model = make_adapted(make_llama(tied=True), target_modules=["lm_head"])
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(make_llama(tied=True), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert not any(p.is_meta for p in loaded.parameters())
    assert_same(model, loaded, ids)


def test_a_merged_tied_model_survives_its_own_saving(make_llama, make_adapted, ids, tmp_path):
    """The merged head differs from the embedding: a checkpoint that still called them tied would lose it."""
    merged = make_adapted(make_llama(tied=True), target_modules=["lm_head"]).merge_and_unload()
    assert not merged.config.tie_word_embeddings
    merged.save_pretrained(tmp_path)
    loaded = type(merged).from_pretrained(tmp_path, dtype=torch.float64).eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, merged(input_ids=ids).logits)


def test_a_merged_model_whose_head_was_tied_to_three_survives_its_own_saving(ids, tmp_path):
    small = {"layers": 1, "attention_heads": 2, "ffn_dim": 24}
    config = BartConfig(
        **{"vocab_size": 61, "d_model": 16, "max_position_embeddings": 20, "init_std": 0.3},
        **{f"{side}_{size}": n for side in ("encoder", "decoder") for size, n in small.items()},
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "forced_eos_token_id": 2},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = BartForConditionalGeneration(config)
    model = get_peft_model(base, bnn.SGPLoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)).eval()
    with torch.no_grad():
        before = model(input_ids=ids).logits
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids).logits, before)
        merged.save_pretrained(tmp_path)
        loaded = type(merged).from_pretrained(tmp_path).eval()
        assert torch.equal(loaded(input_ids=ids).logits, merged(input_ids=ids).logits)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_file_in_half_precision_is_read_into_float32(low_cpu_mem_usage, make_llama, make_adapted, ids, tmp_path):
    make_adapted().save_pretrained(tmp_path, save_embedding_layers=False)
    file = tmp_path / "adapter_model.safetensors"
    save_file({k: t.to(torch.bfloat16) for k, t in load_file(file).items()}, file, metadata={"format": "pt"})
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert {t.dtype for f in active_factors(loaded) for t in f.own_tensors().values()} == {torch.float32}
    assert all(torch.isfinite(logits).all() for logits in outputs(loaded, ids))


def test_a_model_loaded_in_inference_mode_computes(make_llama, make_adapted, ids, tmp_path):
    model = make_adapted()
    model.save_pretrained(tmp_path)
    with torch.inference_mode():
        loaded = PeftModel.from_pretrained(make_llama(), tmp_path).eval()
        before = loaded(input_ids=ids).logits
        torch.testing.assert_close(before, outputs(model, ids)[0], rtol=0, atol=2e-5)
        active_factors(loaded)[0].W_unit.mul_(3)
        assert not torch.equal(loaded(input_ids=ids).logits, before), "nothing is cached of what has no version"
