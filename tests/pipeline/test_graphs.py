"""Training by CUDA graphs gives what training without them gives; needs a GPU."""

import pytest
import torch
from run_commands import METHODS

from pipeline import training
from pipeline.run import CONFIGS, prepare
from pipeline.training import accumulate, step_graphs
from utils.run import read_metrics
from utils.settings import compose


def test_a_cpu_has_no_graphs(command):
    run = prepare(compose(CONFIGS, command("train.graph_padding=32", "device=cpu")))
    assert step_graphs(run) is None


def test_no_training_data_have_no_graphs(command):
    """As where a GPU only evaluates with the configuration of a run that trained."""
    run = prepare(compose(CONFIGS, command("train.graph_padding=32", "device=cpu", "dset.train_file=null")))
    run.device = torch.device("cuda")
    assert step_graphs(run) is None


@pytest.mark.gpu
@pytest.mark.parametrize("name", METHODS)
def test_losses_with_and_without_graphs(command, tmp_path, name, monkeypatch):
    made = []
    monkeypatch.setattr(training, "step_graphs", lambda run: made.append(step_graphs(run)) or made[-1])
    settings = ("device=cuda", "dtype=float32", "train.epochs=4", "train.log_every=1", "train.grad_accum=2")
    losses = {}
    for folder in ("eager", "graphs"):
        cfg = compose(CONFIGS, command("train.graph_padding=8", *settings, *METHODS[name], folder=folder))
        if folder == "eager":
            cfg.train.graph_padding = None
        training.train(prepare(cfg))
        losses[folder] = [r["loss"] for r in read_metrics(tmp_path / folder) if r["kind"] == "train"]
    assert len(losses["eager"]) >= 8
    assert losses["graphs"] == pytest.approx(losses["eager"], rel=2e-3)
    assert len(set(losses["graphs"])) > 4
    assert made[0] is None
    assert made[1].recorded > 0


@pytest.mark.gpu
@pytest.mark.parametrize("name", METHODS)
def test_gradients_of_replays(command, name):
    """Every call on the same batch, weights and seed must leave the same gradients: usual, recorded, replayed."""
    run = prepare(compose(CONFIGS, command("device=cuda", "dtype=float32", "train.graph_padding=8", *METHODS[name])))
    run.model.train()
    graphs = step_graphs(run)
    assert graphs is not None
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    examples = run.data.train[:4]
    found = []
    for _ in range(4):
        for p in parameters:
            p.grad = None
        torch.manual_seed(0)
        run.generator.manual_seed(0)
        accumulate(run, examples, 0.1, graphs)
        found.append([None if p.grad is None else p.grad.clone() for p in parameters])
    assert graphs.recorded > 0
    for later in found[1:]:
        for first, second in zip(found[0], later, strict=True):
            assert (first is None) == (second is None)
            if first is not None:
                torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-5 * float(first.abs().max() + 1e-8))


@pytest.mark.gpu
def test_gradients_are_accumulated_on_the_stream_they_come_from(command, recwarn):
    """Else PyTorch warns and waits at every step, as after a capture with the parameters themselves."""
    run = prepare(compose(CONFIGS, command("device=cuda", "train.graph_padding=null", *METHODS["sgp"])))
    torch.set_warn_always(True)
    try:
        training.train(run)
    finally:
        torch.set_warn_always(False)
    assert not [w for w in recwarn if "stream" in str(w.message)]


@pytest.mark.gpu
def test_a_step_that_waits_for_the_device_is_refused_with_the_remedy(command, monkeypatch):
    run = prepare(compose(CONFIGS, command("device=cuda", "train.graph_padding=8")))
    real = training.negative_elbo

    def waiting(scores, *arguments):
        assert scores.sum().item() != 0
        return real(scores, *arguments)

    monkeypatch.setattr(training, "negative_elbo", waiting)
    with pytest.raises(RuntimeError, match=r"cannot be recorded as a CUDA graph .*train\.graph_padding=null"):
        training.train(run)
    later = prepare(compose(CONFIGS, command("device=cuda", "train.graph_padding=8", folder="later")))
    for generator in (None, run.generator, later.generator):
        assert torch.rand(4, device="cuda", generator=generator).std() > 0
    monkeypatch.setattr(training, "negative_elbo", real)
    training.train(later)
