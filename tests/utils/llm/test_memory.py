"""The memory estimate against built models and measured peaks, and its refusal before weights are read."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedConfig

from pipeline import run as runs
from utils.data.batch import AT_ONCE
from utils.distributed import World
from utils.llm import LLMLoadError, load_config, memory
from utils.llm.memory import STATE_BYTES, MemoryPlan, Shape, plan_memory, weight_bytes
from utils.settings import compose, model_settings, plain

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")
TARGETS = ["q_proj", "v_proj"]
SHAPE = Shape(4, 128, 1)
NF4 = {"load_in_4bit": True, "bnb_4bit_use_double_quant": True, "llm_int8_skip_modules": ["lm_head"]}


def config_of(llm: str, **changes: int | bool) -> PreTrainedConfig:
    cfg = compose(ROOT / "configs", [f"llm={llm}", "llm.random_init=true", "paths.output_dir=x"])
    architecture = plain(cfg.llm)["architecture"] | changes
    return load_config("x", cache_dir=Path("x"), random_init=True, architecture=architecture)[0]


def estimate(config: PreTrainedConfig, shape: Shape = SHAPE, **changes: object) -> MemoryPlan:
    settings = {
        "dtype": torch.float32,
        "device": CPU,
        "quantization": None,
        "targets": TARGETS,
        "rank": 8,
        "checkpointing": False,
        "evaluation": [],
    }
    return plan_memory(config, shape, **settings | changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("targets", [TARGETS, "all-linear"], ids=str)
@pytest.mark.parametrize("tied", [True, False])
def test_weights_and_adapter_are_counted_as_they_are_built(tied, targets):
    config = config_of("tiny", tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config)
    found = estimate(config, targets=targets)
    assert found.model == sum(p.numel() * 4 for p in model.parameters())
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules=targets, task_type="CAUSAL_LM"))
    assert found.adapter == STATE_BYTES * sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def test_quantised_weights():
    config = config_of("llama2_7b")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert weight_bytes(model, {}) == 2 * 6_738_415_616  # the published number of parameters
    outside = 2 * 32000 * 4096 + (2 * 32 + 1) * 4096  # embeddings in and out, norms
    inside = 6_738_415_616 - outside
    assert weight_bytes(model, NF4) == round(2 * outside + inside * 4.127 / 8)
    int8 = {"load_in_8bit": True, "llm_int8_skip_modules": ["lm_head"]}
    assert weight_bytes(model, int8) == 2 * outside + inside


@pytest.mark.parametrize(("workload", "shape"), [("train 4x128", SHAPE), ("train 8x256", Shape(8, 256, 1))])
def test_the_estimate_is_near_the_measured_peak(workload, shape):
    record = json.loads((ROOT / "benchmarks" / "results" / "speed_7b.json").read_text())["results"]
    targets = ["q_proj", "v_proj", "lm_head"]
    found = estimate(config_of("llama2_7b"), shape, dtype=torch.bfloat16, targets=targets)
    for label in ("LoRA (bfloat16)", "SGP-LoRA"):
        assert found.total == pytest.approx(record[label][workload]["peak_bytes"], rel=0.05)


def test_the_estimate_of_an_evaluation_is_near_the_measured_peak():
    """Beyond the weights: 0.99 GB more for 80 rows than for one."""
    record = json.loads((ROOT / "benchmarks" / "results" / "speed_7b.json").read_text())["results"]["LoRA (bfloat16)"]
    few, many = (record[f"1 pass {rows}x128"]["peak_bytes"] for rows in (1, 80))
    config, settings = config_of("llama2_7b"), {"dtype": torch.bfloat16, "shape": Shape(0, 0, 0)}
    one, all_ = (estimate(config, evaluation=[Shape(rows, 128, 1)], **settings) for rows in (1, 80))
    assert all_.activations - one.activations == pytest.approx(many - few, rel=0.02)
    assert all_.total == pytest.approx(many, rel=0.01)


def larger(shape: Shape, **factors: int) -> Shape:
    return replace(shape, **{name: factor * getattr(shape, name) for name, factor in factors.items()})


def test_what_takes_more_memory():
    config, shape = config_of("smollm2_135m"), Shape(8, 128, 4)
    base = estimate(config, shape)
    assert estimate(config, larger(shape, rows=2)).activations == 2 * base.activations
    assert estimate(config, larger(shape, tokens=2)).activations > 1.5 * base.activations
    assert estimate(config, larger(shape, keep=2)).activations > base.activations
    assert estimate(config, shape, checkpointing=True).activations < base.activations / 5
    assert estimate(config, shape, dtype=torch.bfloat16).total < 0.6 * base.total
    assert estimate(config, shape, evaluation=[Shape(32, 128, 1)]).activations == base.activations
    assert estimate(config, shape, evaluation=[shape, Shape(32, 4096, 1)]).activations > base.activations
    assert estimate(config, shape, evaluation=[Shape(32, 4096, 4096)]).activations > 10 * base.activations, "logits"
    assert estimate(config, shape, graphs=True).activations == 2 * base.activations
    assert estimate(config, shape, shards=4).model == base.model // 4
    assert estimate(config, shape, adapters=3).adapter == 3 * base.adapter


@pytest.mark.parametrize(("dtype", "size", "transient"), [(torch.bfloat16, 2, 8), (torch.float32, 4, 4)])
def test_scored_positions_take_their_logits_and_gradient_and_some_of_them_float32(dtype, size, transient):
    config, vocabulary = config_of("smollm2_135m"), config_of("smollm2_135m").vocab_size

    def logits(rows: int, keep: int) -> int:
        none, some = (estimate(config, Shape(rows, 128, k), dtype=dtype).activations for k in (0, keep))
        return some - none

    assert logits(2, 4) == 2 * 4 * vocabulary * (2 * size + transient)
    at_once = AT_ONCE // vocabulary
    assert logits(64, 100) == (64 * 100 * 2 * size + at_once * transient) * vocabulary
    assert logits(2, 2000) == (2 * 2000 * 2 * size + 2000 * transient) * vocabulary, "a row goes at once"


def test_it_refuses_what_cannot_fit_and_nothing_else():
    plan = MemoryPlan(model=60, adapter=10, activations=40, available=110)
    assert str(plan) == (
        "memory: model 0.00 GB + adapter 0.00 GB + activations 0.00 GB = 0.00 GB of 0.00 GB (estimate)"
    )
    plan.check()
    replace(plan, available=100).check()  # activations are uncertain by a quarter
    with pytest.raises(LLMLoadError, match=r"cannot fit; set quantization=nf4, .* eval\.batch_size or"):
        replace(plan, available=99).check()


def test_a_run_that_cannot_fit_ends_before_weights_are_read(tmp_path, overrides: Callable[..., list[str]], monkeypatch):
    class Little:
        available = 1000

    monkeypatch.setattr(psutil, "virtual_memory", Little)
    monkeypatch.setattr(runs, "load_model", None)
    cfg = compose(ROOT / "configs", overrides())
    with pytest.raises(LLMLoadError, match=r"memory: model .* of 0.00 GB .* that cannot fit"):
        runs.prepare(cfg)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(("ensemble", "of"), [("ensemble", "mle"), ("sgp_ensemble", "sgp")])
def test_every_member_of_an_ensemble_counts(overrides: Callable[..., list[str]], ensemble, of):
    adapters = {}
    for method in (ensemble, of):
        cfg = compose(ROOT / "configs", overrides(f"method={method}"))
        data, encoder = runs.load_data(cfg)
        plan = runs.plan(cfg, World(CPU), data, encoder, torch.float32, model_settings(cfg))
        adapters[method] = plan.adapter
    assert adapters[ensemble] == 3 * adapters[of] > 0


def test_a_container_may_have_less_than_its_host(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    free = memory.available_bytes(CPU)
    assert free > 10**8, "no limit where there are no files"
    (tmp_path / "memory.current").write_text("300\n")
    (tmp_path / "memory.stat").write_text("anon 190\nactive_file 10\ninactive_file 100\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_bytes(CPU) == pytest.approx(free, rel=0.2)
    (tmp_path / "memory.max").write_text("1000\n")
    assert memory.available_bytes(CPU) == 810
