"""Training with compiled layers gives what training without them gives."""

import functools
import os
import shutil

import pytest
import torch
from run_commands import METHODS
from torch import nn
from torch._dynamo.utils import counters

from pipeline import compilation, training
from pipeline.compilation import CompiledLayers
from pipeline.run import CONFIGS, Run, prepare
from pipeline.training import accumulate
from utils.run import read_metrics
from utils.settings import compose


@pytest.fixture(autouse=True)
def forget_compiled():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.fixture
def traced_only(monkeypatch):
    """Trace, and derive the backward, as for a compiler, but let the operations run as they are: in a second or two."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


def gradients(run: Run, examples: list, layers: CompiledLayers | None) -> list[torch.Tensor | None]:
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    for p in parameters:
        p.grad = None
    torch.manual_seed(0)
    run.generator.manual_seed(0)
    accumulate(run, examples, 0.1, None, layers)
    return [None if p.grad is None else p.grad.clone() for p in parameters]


def assert_equal_gradients(run: Run) -> None:
    run.model.train()
    layers = CompiledLayers(run.model)
    for start in (0, 4, 8):  # batches of different widths
        examples = run.data.train[start : start + 4]
        for own, other in zip(gradients(run, examples, None), gradients(run, examples, layers), strict=True):
            assert (own is None) == (other is None)
            if own is not None:
                torch.testing.assert_close(other, own, rtol=1e-4, atol=1e-6 * float(own.abs().max() + 1e-8))


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("compiled", "warm-up")])
def test_gradients_of_traced_layers(command, traced_only, name):
    run = prepare(compose(CONFIGS, command(*METHODS[name], "train.graph_padding=null")))
    assert_equal_gradients(run)
    assert not counters["graph_break"]
    assert 0 < counters["stats"]["unique_graphs"] <= 6  # layers share them; an ensemble has its own per member


def test_every_member_of_an_ensemble_is_compiled(command, traced_only, monkeypatch):
    """Each has as many variants of a layer as a single adapter."""
    monkeypatch.setattr(compilation, "VARIANTS", 2)
    run = prepare(compose(CONFIGS, command("method=sgp_ensemble", "train.graph_padding=null", "eval.every=none")))
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        assert_equal_gradients(run)
    assert counters["stats"]["unique_graphs"] > 2


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler")
def test_gradients_of_compiled_layers(command):
    assert_equal_gradients(prepare(compose(CONFIGS, command("method=sgp"))))


def test_a_run_with_compiled_layers(command, traced_only, tmp_path):
    losses = {}
    for compiled in ("true", "false"):
        run = prepare(compose(CONFIGS, command(f"train.compile={compiled}", "eval.every=epoch", folder=compiled)))
        training.train(run)
        rows = read_metrics(tmp_path / compiled)
        losses[compiled] = [r["nll"] for r in rows if r["kind"] in ("train", "eval")]
        assert bool(counters["stats"]["unique_graphs"]) == (compiled == "true")
        assert all("forward" not in vars(module) for module in run.model.modules())
        counters.clear()
    assert len(losses["true"]) > 12
    assert losses["true"] == pytest.approx(losses["false"], rel=1e-5)


def test_a_model_without_known_layers_is_refused():
    with pytest.raises(ValueError, match=r"Linear names no decoder layers to compile: set train\.compile=false"):
        CompiledLayers(nn.Linear(2, 2))


def test_a_compiler_that_is_not_there_is_one_line_with_the_remedy(command, monkeypatch):
    def no_compiler(*_):
        raise RuntimeError("no working compiler")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=no_compiler))
    with pytest.raises(RuntimeError, match=r"cannot be compiled \(.*no working compiler.*\): set train\.compile=false"):
        training.train(prepare(compose(CONFIGS, command("train.compile=true"))))
