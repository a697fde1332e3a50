"""Sweeps (``-m``): every job trains in a folder of its own, also where several run at once."""

import importlib.util
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from tiny_runs import exit_message

import search_script as ss
import train_script as ts
from benchmarks.comparison import Comparison
from hydra_plugins.comparison_sweeper import ComparisonSweeper
from utils.run import read_metrics

SCRIPT = Path(__file__).resolve().parent.parent / "train_script.py"
FILES = {"config.yaml", "environment.json", "metrics.jsonl", "adapter", "checkpoint", "curves.png", "reliability.png"}
FILES |= {"reliability.json", "predictions_test_mc3.npz", "predictions_test_mcmean.npz", ".hydra"}
needs_joblib = pytest.mark.skipif(
    importlib.util.find_spec("hydra_plugins.hydra_joblib_launcher") is None,
    reason="needs hydra-joblib-launcher: pip install hydra-joblib-launcher",
)


@pytest.mark.parametrize("launcher", ["basic", pytest.param("joblib", marks=needs_joblib)])
def test_jobs_that_differ_in_no_name_get_their_own_folders(launcher, tmp_path, overrides):
    """The same data, method and seed: only the job's number tells the folders apart. Dates are those of the sweep."""
    parallel = ["hydra.launcher.n_jobs=2"] if launcher == "joblib" else []
    common = [o for o in overrides("train.max_steps=2") if not o.startswith(("paths.output_dir", "opt.lr"))]
    command = [sys.executable, str(SCRIPT), "-m", *common, "opt.lr=0.01,0.02", f"hydra/launcher={launcher}", *parallel]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr

    (sweep,) = (tmp_path / "outputs").iterdir()
    assert sweep.name.endswith("_sweep")
    assert not (tmp_path / "multirun").exists()
    folders = sorted(path for path in sweep.iterdir() if path.is_dir())
    assert [folder.name for folder in folders] == ["0_jsonl_sgp_seed0", "1_jsonl_sgp_seed0"]
    for folder, lr in zip(folders, (0.01, 0.02), strict=True):
        assert {path.name for path in folder.iterdir()} >= FILES
        cfg = OmegaConf.load(folder / "config.yaml")
        assert (cfg.paths.output_dir, cfg.opt.lr) == (str(folder), lr)
        records = read_metrics(folder)
        assert [record["step"] for record in records if record["kind"] == "train"] == [1, 2]
        assert {record["mc"] for record in records if record["kind"] == "final"} == {"zero_shot", 3, "mean"}
    assert done.stdout.count("run folder:") == 2


def test_an_interrupted_sweep_goes_on_with_jobs_that_had_not_begun(tmp_path, overrides, monkeypatch):
    common = [o for o in overrides("train.max_steps=1", "seed=0,1") if not o.startswith("paths.output_dir")]
    command = ["-m", *common, f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    prepare = ts.prepare

    def stop(cfg):
        if cfg.seed == 1:
            raise ValueError("a failure of the second job")
        return prepare(cfg)

    monkeypatch.setattr(ts, "prepare", stop)
    assert "a failure of the second job" in exit_message(ts, command)
    again = [sys.executable, str(SCRIPT), *command, "resume=true"]
    done = subprocess.run(again, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    for seed in (0, 1):
        records = read_metrics(tmp_path / "sweep" / f"{seed}_jsonl_sgp_seed{seed}")
        assert [record["step"] for record in records if record["kind"] == "train"] == [1]


def test_one_folder_for_all_jobs_is_refused(tmp_path, overrides):
    message = exit_message(ts, ["-m", *overrides("seed=0,1")])
    assert message.startswith(f"error: paths.output_dir={tmp_path / 'run'} would be the folder of every job")
    assert not (tmp_path / "run").exists()


def test_the_experiment_is_a_comparison_in_the_folder_of_the_sweep(tmp_path):
    """Without its data none of its runs is tried."""
    own = ["hydra.sweeper.tasks=[sst2_100]", "hydra.sweeper.seconds=0", f"hydra.sweep.dir={tmp_path / 'out'}"]
    command = [sys.executable, str(SCRIPT), "experiment=benchmark_small", *own, "llm=tiny"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    started = partial(subprocess.run, cwd=tmp_path, capture_output=True, text=True, timeout=120, env=environment)
    done = started(command)
    assert done.stderr.splitlines()[-1].startswith("error: no train|validation|test.jsonl in data/nyu-mll/glue/sst2")
    assert not (tmp_path / "out").exists()
    place = tmp_path / "data" / "nyu-mll" / "glue" / "sst2"
    place.mkdir(parents=True)
    for split in ("train", "validation"):
        rows = [{"sentence": f"{split} {i}", "label": i % 2, "idx": i} for i in range(300)]
        (place / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = started([*command, "dset.scoring=choice_sum"])
    assert done.stderr.splitlines()[-1] == "error: no run on test has finished: see the lines above"
    assert "not complete: the same command goes on" in done.stdout
    assert (tmp_path / "out" / "by_nll.txt").read_text() == ""


@pytest.mark.parametrize("chosen", ["experiment=benchmark_small", "experiment=[benchmark_small]"])
def test_the_comparison_gets_what_the_command_line_says(tmp_path, monkeypatch, chosen):
    said = []
    monkeypatch.setattr(Comparison, "run", lambda self, *arguments: said.append((self, *arguments)))
    sweeper = ComparisonSweeper(["sst2_500", "small"], 3, None, 4, ["acc"], True, params={"paths": "sweep"})
    sweeper.setup(
        hydra_context=None, task_function=None, config=OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}})
    )
    sweeper.sweep([chosen, "llm=tiny", "paths.data_dir=x"])
    comparison = Comparison(tmp_path, ["llm=tiny", "paths.data_dir=x"], times=4, early_stopping=True)
    assert said == [(comparison, ["sst2_500", "small"], 3, float("inf"), ["acc"])]


@pytest.mark.parametrize("argument", ["experiment=[benchmark_small,ci]", "experiment=[benchmark_small,published]"])
def test_another_experiment_beside_the_comparison_is_refused(tmp_path, monkeypatch, argument):
    monkeypatch.setattr(Comparison, "run", None)
    message = exit_message(ts, [argument, "llm=tiny", f"hydra.sweep.dir={tmp_path / 'out'}"])
    assert message == f"error: {argument}: expected benchmark_small alone; give other settings as KEY=VALUE"


def test_the_search_script_makes_no_comparison(tmp_path, monkeypatch):
    monkeypatch.setattr(Comparison, "run", None)
    message = exit_message(ss, ["experiment=benchmark_small", f"hydra.sweep.dir={tmp_path / 'out'}"])
    assert message.startswith("error: search_script.py makes no comparison: give experiment=benchmark_small to train_")


def test_ctrl_c_in_a_sweep_is_one_line(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Comparison, "run", interrupted)
    message = exit_message(ts, ["experiment=benchmark_small", f"hydra.sweep.dir={tmp_path / 'out'}"])
    assert message == "interrupted: runs that have ended are kept"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("seconds=abc", "hydra.sweeper.seconds=abc: expected a number, at least 0, or null"),
        ("seconds=-1", "hydra.sweeper.seconds=-1: expected a number"),
        ("jobs=two", "hydra.sweeper.jobs=two: expected a whole number, at least 1"),
        ("jobs=0", "hydra.sweeper.jobs=0: expected a whole number, at least 1"),
        ("tasks=null", "hydra.sweeper.tasks=None: expected a list such as [sst2_500]"),
        ("tasks=sst2_500", "hydra.sweeper.tasks=sst2_500: expected a list"),
        ("rules=[]", "hydra.sweeper.rules=[]: expected a list such as [nll,acc]"),
        ("early_stopping=1", "hydra.sweeper.early_stopping=1: expected true or false"),
    ],
)
def test_a_value_of_another_kind_is_one_line_before_any_run(tmp_path, change, message):
    out = tmp_path / "out"
    own = ["experiment=benchmark_small", "llm=tiny", f"hydra.sweep.dir={out}", f"hydra.sweeper.{change}"]
    assert exit_message(ts, own).startswith(f"error: {message}")
    assert not (out / "tuning.json").exists()
