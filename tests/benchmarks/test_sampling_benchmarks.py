"""The benchmarks of speed and of sampling from end to end, tiny and on a CPU: their records and what must hold."""

import json
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

import bnn
from benchmarks import sample_error, sampler_cost, sampler_step, speed
from benchmarks.sample_error import answer_probabilities, error_of_nll
from bnn.metrics import nll
from tests.conftest import perturb
from utils.data.batch import choice_scores
from utils.llm import load_model
from utils.settings import model_settings, plain

ROOT = Path(__file__).resolve().parents[2]
MEASUREMENT = {"median_ms", "iqr_ms", "repeats", "peak_bytes"}
TINY = (
    *("llm=tiny", "dset=quiz", "device=cpu", "llm.architecture.vocab_size=300", "llm.architecture.hidden_size=32"),
    *("dset.train_subset=8", "dset.validation_subset=6", "dset.test_subset=6", "peft.target_modules=[q_proj,v_proj]"),
    *("inducing.q_sd=1.0", "inducing.prior_sd=30"),  # draws that differ by much
)


def record_of(out: Path) -> dict[str, Any]:
    assert out.with_suffix(".png").stat().st_size > 5000
    return json.loads(out.with_suffix(".json").read_text())


def check_measurement(found: dict[str, Any], repeats: int) -> None:
    assert found.keys() == MEASUREMENT
    assert found["median_ms"] > 0
    assert found["iqr_ms"] >= 0
    assert found["repeats"] == repeats
    assert found["peak_bytes"] is None, "a CPU's peak is not known"


def test_speed(tmp_path):
    out = tmp_path / "speed"
    tiny = ["--llm", "tiny", "--device", "cpu", "--repeats", "2", "--warmup", "1", "--shrink", "16"]
    speed.main([*tiny, "--out", str(out)])
    record = record_of(out)
    results = record["results"]
    assert record["command"]["llm"] == "tiny"
    assert record["environment"]["threads"] == torch.get_num_threads()
    assert {speed.BASELINE, "DoRA", "BLoB", "SGP-LoRA"} <= results.keys()
    workloads = results[speed.BASELINE].keys() - {"parameters"}
    assert {"train 4x8", "train 8x16", "1 pass 1x8", "10 samples 8x8"} <= workloads
    for row in results.values():
        assert row.keys() == workloads | {"parameters"}
        for workload in workloads:
            check_measurement(row[workload], repeats=2)
    parameters = {name: row["parameters"] for name, row in results.items()}
    assert parameters["LoRA (bfloat16)"] == parameters[speed.BASELINE] < parameters["DoRA"]
    assert parameters["SGP-LoRA"] == parameters["SGP-LoRA, no CUDA graph"] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--llm", "nosuch"], "llm=nosuch: no such file in configs/llm"),
        (["--repeats", "0"], "--repeats 0: expected 1 or more"),
        (["--warmup", "-1"], "--warmup -1: expected 0 or more"),
        (["--samples", "0"], "--samples 0: expected 1 or more"),
        (["--shrink", "0"], "--shrink 0: expected 1 or more"),
        (["--device", "nosuch"], "unknown device 'nosuch'"),
    ],
)
def test_speed_refuses_in_one_line_before_a_model_is_loaded(tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(speed, "load_model", None)
    with pytest.raises(SystemExit) as stop:
        speed.main(["--llm", "tiny", "--device", "cpu", "--out", str(tmp_path / "speed"), *change])
    assert re.fullmatch(f"error: .*{re.escape(message)}.*", str(stop.value.code))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--repeats", "0"], "--repeats 0: expected 1 or more"),
        (["--shrink", "0"], "--shrink 0: expected 1 or more"),
        (["--device", "nosuch"], "unknown device 'nosuch'"),
        (["--step", "nosuch"], "llm=nosuch: no such file in configs/llm"),
    ],
)
def test_sampler_cost_refuses_in_one_line(tmp_path, change, message):
    with pytest.raises(SystemExit) as stop:
        sampler_cost.main(["--device", "cpu", "--out", str(tmp_path / "cost"), *change])
    assert re.fullmatch(f"error: .*{re.escape(message)}.*", str(stop.value.code))
    assert not list(tmp_path.iterdir())


def test_speed_makes_the_named_gpu_the_current_one(monkeypatch):
    """CUDA graphs are recorded on the current GPU, whatever the tensors are on."""

    def load_model(device, **_):
        raise ValueError(f"{device} after {chosen}")

    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(speed, "resolve_device", torch.device)
    monkeypatch.setattr(speed, "load_model", load_model)
    with pytest.raises(SystemExit, match=r"cuda:1 after \[device\(type='cuda', index=1\)\]"):
        speed.main(["--llm", "tiny", "--device", "cuda:1"])


def test_a_timed_training_step_trains(tmp_path):
    """With the gradient alone a step would be shorter than those that are made in training."""
    method = speed.PlainLora(True)
    cfg = speed.compose(speed.CONFIGS, ["llm=tiny", f"paths.cache_dir={tmp_path}", "paths.output_dir=unused"])
    base = load_model(dtype=torch.float32, device=torch.device("cpu"), **model_settings(cfg))
    model = method.adapt(base, {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"})
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    with speed.workloads(model, method, 32, 2)["train 4x4"] as step:
        step()
    assert any(not torch.equal(p, old) for p, old in zip(trained, before, strict=True))
    assert all(p.grad is None for p in trained), "the next step starts without a gradient"


def test_sampler_cost(tmp_path):
    out = tmp_path / "cost"
    tiny = ["--device", "cpu", "--hidden", "16", "--shrink", "16", "--repeats", "2", "--warmup", "1", "--step", "tiny"]
    sampler_cost.main([*tiny, "--out", str(out)])
    record = record_of(out)
    results = record["results"]
    assert list(results) == ["layers", "r", "m", "S"]
    default = {"layers": 2, "r": 1, "m": 1, "S": 1}
    for axis, rows in results.items():
        values = [row[axis] for row in rows]
        assert values == sorted(set(values))
        assert len(values) > 1
        for row in rows:
            assert row.keys() == {*default, "training", "prediction"}, "CUDA graphs need a GPU"
            assert {name: row[name] for name in default if name != axis} == {
                name: value for name, value in default.items() if name != axis
            }
            check_measurement(row["training"], repeats=2)
            check_measurement(row["prediction"], repeats=2)
    at_default = [row for axis, rows in results.items() for row in rows if row[axis] == default[axis]]
    assert len(at_default) == 4
    assert all(row == at_default[0] for row in at_default), "one measurement serves all axes"
    step = record["step"]
    assert step["factors"] == 2 * (2 * 2 + 1)  # A and B of q and v of two layers, and of the head
    assert step["share"] == pytest.approx(step["sampler_ms"] / step["step_ms"])
    assert step["step_ms"] == step["step"]["median_ms"]


@pytest.mark.parametrize("S", [1, 3])
def test_the_timed_call_is_the_backward_pass_of_weights_and_kl(S):
    model = sampler_cost.adapted(sampler_cost.Point(layers=2, r=2, m=3, S=S), 8, torch.device("cpu"))
    perturb(model, 0.1)  # at Z_r = 0 some gradients vanish
    sampler = bnn.Sampler(model, own=True)
    parameters = [p for _, p in sampler.parameters()]
    noise = torch.Generator()
    sampler_step.training(model, lambda: sampler.draw(S, noise.manual_seed(0)), S, [])()
    timed = [p.grad.clone() for p in parameters]
    sampler_step.training(model, lambda: sampler.draw(S, noise.manual_seed(0)), S, parameters)()
    assert all(p.grad is None for p in parameters), "nothing is left for the next repetition"
    with sampler.draw(S, noise.manual_seed(0)) as live:
        (torch.stack([factor.weight.sum() for factor in sampler.factors]).sum() + live.kl()).backward()
    for p, grad in zip(parameters, timed, strict=True):
        torch.testing.assert_close(grad, p.grad)
        assert grad.abs().max() > 0


def make_run(folder: Path, *extra: str) -> DictConfig:
    """A run's folder as far as it is read: the settings, and an adapter that was not trained."""
    with hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = hydra.compose("train", [*TINY, f"paths.output_dir={folder}", f"paths.cache_dir={folder}", *extra])
    base = load_model(dtype=torch.float32, device=torch.device("cpu"), **model_settings(cfg))
    method = instantiate(cfg.method.factory, _convert_="all")
    torch.manual_seed(0)
    model = method.adapt(base, plain(cfg.peft))
    method.save(model, folder / "adapter")
    OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
    return cfg


def test_sample_error(tmp_path):
    make_run(tmp_path / "run")
    out = tmp_path / "error"
    few = ["--largest", "4", "--groups", "3", "--partitions", "20", "dset.validation_subset=5"]
    sample_error.main([str(tmp_path / "run"), "--out", str(out), *few])
    record = record_of(out)
    assert record["task"] == {"llm": "tiny", "dset": "quiz", "split": "validation", "examples": 5}
    independent, antithetic = record["results"]["independent"], record["results"]["antithetic"]
    assert [row["S"] for row in independent] == [1, 2, 4]
    assert [row["S"] for row in antithetic] == [2, 4], "one draw has no mirror image"
    for rows, draws in ((independent, 1), (antithetic, 2)):
        for row in rows:
            assert row["units"] == 12
            assert row["groups"] == 12 * draws // row["S"]
            assert row["nll_sd"] > 0
            assert row["nll_mean_error"] == pytest.approx(row["nll_sd"] / row["groups"] ** 0.5)
    for row in independent[1:]:  # Jensen: -log is convex, and the groups cover all draws
        assert row["nll_mean"] < independent[0]["nll_mean"]
    assert antithetic[1]["nll_mean"] < antithetic[0]["nll_mean"] + antithetic[0]["nll_sd"]


def test_the_pairs_hold_the_independent_draws(tmp_path):
    folder = tmp_path / "run"
    make_run(folder)
    cfg = sample_error.settings(folder, ["eval.max_tokens_per_forward=1"])  # one draw a forward: pairs are split
    model, batches = sample_error.load(cfg, folder, "test")
    pairs = answer_probabilities(model, batches, cfg, True, 6)
    assert pairs.shape == (6, 6)
    torch.testing.assert_close(pairs[::2], answer_probabilities(model, batches, cfg, False, 3), rtol=0, atol=1e-6)
    assert (pairs[::2] - pairs[1::2]).abs().max() > 1e-3, "the samples differ"
    together = sample_error.settings(folder, ["eval.max_tokens_per_forward=100000"])
    torch.testing.assert_close(pairs, answer_probabilities(model, batches, together, True, 6), rtol=0, atol=1e-5)
    with torch.no_grad():
        scores = torch.cat([choice_scores(model(**b.model_inputs()).logits, b) for b in batches])[None]
    answer = torch.cat([batch.answer for batch in batches])
    mean = scores.double().softmax(-1)[:, torch.arange(len(answer)), answer]
    found = error_of_nll(mean.expand(2, -1)[:, None], 1, 1, torch.Generator())
    assert found["nll_mean"] == pytest.approx(nll(scores, answer))
    assert found["nll_sd"] == 0


def test_error_of_nll_follows_the_law_of_independent_draws():
    """400 draws of nearly constant probabilities: sd is about sd(1) / sqrt(S), known to 3.5 %, tolerance 15 %."""
    generator = torch.Generator().manual_seed(0)
    p = 0.5 + 0.01 * torch.randn(400, 1, 5, generator=generator, dtype=torch.float64)
    rows = {S: error_of_nll(p, S, 50, generator) for S in (1, 4, 64)}
    assert rows[1]["nll_sd"] == pytest.approx(float(p.log().mean((1, 2)).std()))
    for S, row in rows.items():
        assert row["nll_sd"] == pytest.approx(0.02 / (5 * S) ** 0.5, rel=0.15)
        assert row["groups"] == 400 // S


def test_pairs_that_cancel_leave_no_error():
    first = 0.3 + 0.2 * torch.rand(16, 1, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pairs = torch.cat([first, 0.8 - first], dim=1)
    assert error_of_nll(pairs, 4, 5, torch.Generator())["nll_sd"] == pytest.approx(0, abs=1e-12)
    assert error_of_nll(first, 4, 5, torch.Generator())["nll_sd"] > 1e-3


def test_error_of_nll_refuses_torn_pairs_and_a_single_group():
    pairs = torch.full((8, 2, 3), 0.5)
    with pytest.raises(ValueError, match="S=3 would tear units of 2 draws"):
        error_of_nll(pairs, 3, 1, torch.Generator())
    with pytest.raises(ValueError, match="make 1 groups of 16"):
        error_of_nll(pairs, 16, 1, torch.Generator())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("dset=cola", "dset=cola: dset is a group, which a run keeps: change single keys of it"),
        ("llm=tiny", "llm=tiny: llm is a group"),
        ("quantization=nf4", "quantization=nf4: quantization is a group"),
        ("eval.batch_size=abc", "eval.batch_size=abc: expected a whole number, at least 1"),
        ("eval.max_tokens_per_forward=null", "eval.max_tokens_per_forward=None: expected a whole number, at least 1"),
        ("seed=x", "seed=x: expected a whole number, at least 0"),
        ("seed=1,2", "seed=1,2: expected one value"),
        ("seed", "seed: expected KEY=VALUE, a text with"),
        ("dset.max_length=[1", "dset.max_length=[1: expected KEY=VALUE, a text with"),
        ("inducing.whitened=no", "inducing.whitened=no: expected true or false"),
    ],
)
def test_sample_error_refuses_settings_in_one_line_before_a_model_is_loaded(tmp_path, monkeypatch, change, message):
    make_run(tmp_path / "run")
    monkeypatch.setattr(sample_error, "load", None)
    with pytest.raises(SystemExit) as stop:
        sample_error.main([str(tmp_path / "run"), "--out", str(tmp_path / "error"), change])
    assert re.fullmatch(f"error: .*{re.escape(message)}.*", str(stop.value.code))


def test_sample_error_takes_a_run_of_an_earlier_version(tmp_path):
    cfg = make_run(tmp_path / "run")
    OmegaConf.set_struct(cfg, False)
    del cfg.train.compile, cfg.eval.keep
    OmegaConf.save(cfg, tmp_path / "run" / "config.yaml", resolve=True)
    changed = sample_error.settings(
        tmp_path / "run", ["dset.validation_subset=5", "dset.prompt_choice='a: {question}'"]
    )
    assert (changed.dset.validation_subset, changed.dset.prompt_choice) == (5, "a: {question}")
    assert "compile" not in changed.train


def test_sample_error_refuses_what_it_cannot_use(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.yaml: name the folder of a finished run"):
        sample_error.settings(tmp_path, [])
    make_run(tmp_path / "sgp")
    with pytest.raises(ValueError, match=r"unknown key dset\.validation_subst"):
        sample_error.settings(tmp_path / "sgp", ["dset.validation_subst=3"])
    make_run(tmp_path / "mle", "method=mle")
    with pytest.raises(ValueError, match="method=mle: only sgp has such draws"):
        sample_error.settings(tmp_path / "mle", [])
    make_run(tmp_path / "ensemble", "method=sgp_ensemble")
    with pytest.raises(ValueError, match="method=sgp_ensemble: only sgp has such draws"):
        sample_error.settings(tmp_path / "ensemble", [])
    enough = {"groups": 2, "largest": 2, "partitions": 1}
    for option, least in enough.items():
        with pytest.raises(ValueError, match=f"--{option} {least - 1}: expected {least} or more"):
            sample_error.run(Namespace(**{**enough, option: least - 1}))
    with pytest.raises(SystemExit) as stop:
        sample_error.main([str(tmp_path / "none")])
    assert stop.value.code == f"error: {tmp_path / 'none'} has no config.yaml: name the folder of a finished run"
