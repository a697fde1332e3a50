"""SGP-LoRA on base weights in 4 and 8 bits, mostly on a CPU: layers, gradients, saving, merging, and a whole run."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from peft import PeftModel, get_peft_model
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install bitsandbytes")

import bnn
from pipeline.evaluation import finish
from pipeline.run import prepare
from pipeline.training import train
from utils.llm import load_model
from utils.llm.architecture import build_config
from utils.llm.build import random_model
from utils.llm.memory import weight_bytes
from utils.run import read_metrics
from utils.settings import plain

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
CPU = torch.device("cpu")
SIZES = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
}
Load = Callable[..., PreTrainedModel]
both = pytest.mark.parametrize("bits", ["nf4", "int8"])


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    random_model(build_config(SIZES, {}), 0, torch.float32, CPU).save_pretrained(folder)
    return folder


@pytest.fixture
def load(saved, tmp_path) -> Load:
    """The saved model as the shipped file of configs/quantization says, products in float32."""

    def load(bits: str, dtype: torch.dtype = torch.float32, folder: Path = saved) -> PreTrainedModel:
        options = options_of(bits)
        if bits == "nf4":
            options["bnb_4bit_compute_dtype"] = "float32"
        return load_model(str(folder), cache_dir=tmp_path, dtype=dtype, device=CPU, quantization=options)

    return load


def options_of(bits: str) -> dict[str, Any]:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return plain(compose(overrides=[f"+quantization={bits}"]).quantization)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits


def adapt(model: nn.Module, **config: object) -> PeftModel:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "inducing_rows": 5, "inducing_cols": 5}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        adapted = get_peft_model(model, bnn.SGPLoraConfig(**settings | config))
    move(adapted)
    return adapted


@torch.no_grad()
def move(model: nn.Module) -> None:
    """Off the zero start, so that both factors matter."""
    noise = seeded(7)
    for name, p in model.named_parameters():
        if p.requires_grad and "Z_r" in name:
            p.add_(0.3 * torch.randn(p.shape, generator=noise))


def plain_copy(model: PreTrainedModel, load: Load) -> PreTrainedModel:
    """The unquantised model that has exactly the levels of the quantised one."""
    copy = load("none")
    for name, module in model.named_modules():
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt"):
            weight = dequantize_bnb_weight(module.weight, state=getattr(module, "state", None))
            copy.get_submodule(name).weight.data = weight.float()
    return copy


def gradients(model: PeftModel, ids: Tensor) -> dict[str, Tensor]:
    model.train()
    with bnn.sample(model, 2, seeded()) as live:
        logits = model(input_ids=ids.repeat(2, 1)).logits
        (logits.log_softmax(-1)[..., 5].mean() + 1e-6 * live.kl()).backward()
    model.eval()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_and_precision(bits, dtype, load):
    model = adapt(load(bits, dtype))
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    assert type(layer).__module__ == "peft.tuners.lora.bnb"
    assert type(layer).__name__ == {"nf4": "Linear4bit", "int8": "Linear8bitLt"}[bits]
    assert not layer.get_base_layer().weight.is_floating_point()
    factor = layer.lora_A["default"]
    assert factor.compute_dtype == dtype
    assert {p.dtype for p in factor.parameters()} == {torch.float32}
    assert type(model.base_model.model.lm_head) is nn.Linear


@both
def test_gradients_after_an_evaluation_are_those_of_the_same_unquantised_weights(bits, load, ids):
    """4 bits: the same products of the same numbers; 8 bits: activations are rounded to 1 part in 127 as well."""
    quantised = load(bits)
    reference = gradients(adapt(plain_copy(quantised, load)), ids)
    model = adapt(quantised)
    logits_of(model, ids)
    found = gradients(model, ids)
    assert found.keys() == reference.keys()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == found.keys()
    error = sum((found[name] - g).norm() ** 2 for name, g in reference.items()) ** 0.5
    size = sum(g.norm() ** 2 for g in reference.values()) ** 0.5
    assert size > 0
    assert error < {"nf4": 1e-4, "int8": 0.1}[bits] * size


@both
def test_saved_and_loaded_it_draws_alike(bits, load, ids, tmp_path):
    model = adapt(load(bits)).eval()
    model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    again = PeftModel.from_pretrained(load(bits), str(tmp_path / "adapter")).eval()
    with bnn.sample(model, 2, seeded()):
        drawn = logits_of(model, ids.repeat(2, 1))
    with bnn.sample(again, 2, seeded()):
        assert torch.equal(logits_of(again, ids.repeat(2, 1)), drawn)
    assert not torch.equal(drawn[: len(ids)], drawn[len(ids) :])


@both
def test_merging_says_what_rounding_loses(bits, load):
    model = adapt(load(bits), target_modules=["q_proj"], layers_to_transform=[1])
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    base = layer.get_base_layer()

    def weight() -> Tensor:
        return dequantize_bnb_weight(base.weight, state=getattr(base, "state", None)).float()

    before, change = weight(), layer.get_delta_weight("default").detach()
    with pytest.warns(UserWarning, match="merging into quantised weights rounds") as said:
        model.merge_adapter()
    error = float((weight() - before - change).norm() / change.norm())
    text = [str(warning.message) for warning in said]
    assert len(text) == 1
    assert (
        f": {error:.0%} of the adapter's change is lost in the worst layer (model.layers.1.self_attn.q_proj)" in text[0]
    )
    assert 0 < error < {"nf4": 1, "int8": 0.2}[bits]


def test_unloading_after_a_merge_counts_every_layer(load):
    model = adapt(load("nf4"))
    with pytest.warns(UserWarning, match="rounds") as said:
        merged = model.merge_and_unload()
    assert not any("lora" in name for name, _ in merged.named_modules())
    worst, median = map(int, re.findall(r"(\d+)%", str(said[0].message)))
    assert worst >= median > 0


def test_merging_unquantised_weights_says_nothing(load):
    model = adapt(load("none"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.merge_and_unload()


ARCHITECTURES = {
    "llama": SIZES,
    "gpt2": {"model_type": "gpt2", "vocab_size": 300, "n_positions": 64, "n_embd": 128, "n_layer": 2, "n_head": 4},
    "qwen3_moe": {
        **SIZES,
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "moe_intermediate_size": 64,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2}


def bytes_of(model: nn.Module) -> int:
    """Of all weights and their scales, tied ones once; without the 16 and 256 levels, a table per layer."""
    held: dict[int, int] = {}
    for p in model.parameters():
        state = getattr(p, "quant_state", None)
        scales = [] if state is None else [state.absmax, *([state.state2.absmax] if state.nested else [])]
        held |= {t.data_ptr(): t.nbytes for t in [p, *scales]}
    return sum(held.values())


@both
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_memory_plan_knows_what_is_quantised(bits, name, tmp_path, load):
    """GPT-2's Conv1D layers are, the stacked experts of a mixture are not."""
    config = build_config(ARCHITECTURES[name] | SPECIAL, {})
    random_model(config, 0, torch.float32, CPU).save_pretrained(tmp_path / "model")
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    quantised = load(bits, folder=tmp_path / "model")
    assert weight_bytes(skeleton, options_of(bits)) == pytest.approx(bytes_of(quantised), rel=0.01)
    assert bytes_of(quantised) < 0.9 * weight_bytes(skeleton, {})


@both
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_run_learns_on_a_quantised_base(bits, device, saved, overrides):
    model = ["llm.random_init=false", f"llm.name_or_path={saved}", f"quantization={bits}"]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("train", overrides(*model, f"device={device}", "train.epochs=8", "eval.n_mc=2"))
    run = prepare(cfg)
    finish(run, train(run))
    records = read_metrics(run.folder)
    nll = [record["nll"] for record in records if record["kind"] == "eval"]
    assert nll[-1] < 0.8 * nll[0]
    final = {record["mc"]: record["nll"] for record in records if record["kind"] == "final"}
    assert final.keys() == {"zero_shot", 2, "mean"}
    assert final["mean"] < final["zero_shot"]
