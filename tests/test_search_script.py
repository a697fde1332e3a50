"""The search from end to end, on a random two-layer model and the quiz."""

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import hydra
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from optuna.trial import TrialState, create_trial
from tiny_runs import exit_message

import search_script as ss
from bnn.metrics import evaluate_predictions
from pipeline import evaluation, training
from pipeline.run import Run, prepare
from utils.run import read_metrics
from utils.search import pruning
from utils.search.experiment import compose
from utils.search.study import VALUES, load_compared, points_of
from utils.settings import fingerprint

ROOT = Path(__file__).resolve().parent.parent
FAST = [
    *("llm=tiny", "dset=quiz", "device=cpu", "llm.architecture.vocab_size=300", "llm.architecture.hidden_size=32"),
    *("dset.train_subset=8", "dset.validation_subset=6", "dset.test_subset=6", "peft.target_modules=[q_proj]"),
    *("train.batch_size=4", "train.epochs=1", "eval.n_mc=2", "eval.every=1", "search_space=sst2"),
    *("search.sampler=random", "search.trials=2", "search.name=s"),
]
OBJECTIVES = ["acc", "ece", "nll"]


@pytest.fixture(autouse=True)
def _no_hydra_left():
    GlobalHydra.instance().clear()
    yield
    GlobalHydra.instance().clear()


def configure(arguments: list[str]) -> DictConfig:
    with hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return hydra.compose("search", arguments)


def run(folder: Path, *extra: str) -> Path:
    arguments = [*FAST, *extra, f"paths.output_dir={folder}"]
    return ss.search(configure(arguments), arguments)


def trials(folder: Path):
    return load_compared(str(folder / "journal.log"), OBJECTIVES).trials


def failure(arguments: list[str]) -> str:
    message = exit_message(ss, arguments)
    assert re.fullmatch("error: .*", message), "one line"
    return message


def test_a_dead_worker_of_the_final_runs_is_one_line(tmp_path, monkeypatch):
    class Broken(ThreadPoolExecutor):
        def map(self, *_):
            raise BrokenProcessPool("terminated abruptly")

    monkeypatch.setattr(ss, "processes", Broken)
    extra = ("search.final_seeds=[5]", "search.final_jobs=2", f"paths.output_dir={tmp_path}")
    assert "lower search.final_jobs=2, and the same command goes on" in failure([*FAST, *extra])


def test_a_search_that_is_refused_leaves_no_folder(tmp_path):
    folder = tmp_path / "search"
    assert "search.trials=-1: expected" in failure([*FAST, "search.trials=-1", f"paths.output_dir={folder}"])
    assert not folder.exists()


def test_a_sweep_of_searches_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "a search is one command: leave out -m" in failure(["-m", *FAST, "search.sampler=random,tpe"])
    assert not list(tmp_path.rglob("journal.log"))


def test_a_search_writes_its_results_and_final_runs(tmp_path, monkeypatch):
    run(tmp_path / "random")
    extra = ("search.final_seeds=[5]", "search.final_jobs=2")
    folder = run(tmp_path / "a", f"search.compare={tmp_path}/random/journal.log", *extra)
    files = {path.name for path in folder.iterdir()}
    assert {"front.csv", "front.md", "acc_ece.png", "ece_nll.png", "hypervolume.png", "journal.log"} <= files
    done = trials(folder)
    assert [t.params for t in done] == [t.params for t in trials(tmp_path / "random")], "the same seed proposes alike"
    assert [t.values for t in done] == [t.values for t in trials(tmp_path / "random")]
    assert [len(t.user_attrs["validation_nll"]) for t in done] == [2, 2]
    assert not list(folder.glob("trials/*/checkpoint"))

    with monkeypatch.context() as patch:  # the same command again only writes the results anew
        patch.setattr(ss, "prepare", None)
        patch.setattr(ss, "execute", None)
        run(tmp_path / "a", "search.final_seeds=[5]")
    rows = list(csv.DictReader((folder / "front.csv").open()))
    chosen = {rule: row for row in rows for rule in row["selected"].split("; ") if rule}
    assert set(chosen) == {"lowest_nll", "knee"}
    for rule, row in chosen.items():
        number = int(row["trial"])
        written = OmegaConf.load(folder / "selected" / f"{rule}.yaml")
        assert written.opt.lr == done[number].params["opt.lr"]
        final = folder / "final" / f"trial{number:04d}_seed5"
        assert '"split": "test"' in (final / "metrics.jsonl").read_text()
        assert {"config.yaml", "environment.json"} <= {path.name for path in final.iterdir()}, "a report needs them"
        assert float(row["test_nll"]) > 0
        trial_cfg = OmegaConf.load(folder / "trials" / f"{number:04d}" / "config.yaml")
        values = [f"{key}={value}" for key, value in done[number].params.items()]
        same = fingerprint(compose(ROOT / "configs", [*ss.training_overrides(FAST), *values]))
        assert fingerprint(trial_cfg) == OmegaConf.to_container(OmegaConf.create(same), resolve=True)


def test_a_final_run_that_fails_is_reported_and_the_others_count(tmp_path, monkeypatch, caplog):
    real = ss.execute

    def execute(cfg):
        if cfg.seed == 6:
            raise FloatingPointError("loss nan")
        return real(cfg)

    monkeypatch.setattr(ss, "execute", execute)
    with caplog.at_level("WARNING"):
        folder = run(tmp_path / "a", "search.trials=1", "search.final_seeds=[5,6]")
    (row,) = csv.DictReader((folder / "front.csv").open())
    assert float(row["test_nll"]) > 0
    assert "trial0000_seed6 failed: error: loss nan" in caplog.text


def test_final_runs_of_another_search_are_not_taken_for_those_of_this_one(tmp_path):
    folder = run(tmp_path / "a", "search.trials=1", "search.final_seeds=[5]")
    for name in ("journal.log", "study"):
        (folder / name).unlink()
    shutil.rmtree(folder / "trials")
    said = r"trial0000_seed5 holds a run of another search \(.*opt\.lr is \S+ there and \S+ now"
    with pytest.raises(ValueError, match=said):
        run(tmp_path / "a", "search.trials=1", "search.final_seeds=[5]", "search.seed=9")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("dset.train_subset=4", "dset.train_subset is 8 there and 4 now"),
        ("search.n_mc=3", r"search\.n_mc is \d+ there and 3 now"),
        ("search.sampler=tpe", r"search\.sampler is 'random' there and 'tpe' now"),
        ("search.seed=3", r"search\.seed is 0 there and 3 now"),
        ("search.space.opt.lr.low=1e-5", r"search\.space\.opt\.lr\.low is \S+ there and 1e-05 now"),
    ],
)
def test_a_study_does_not_go_on_with_other_settings(tmp_path, monkeypatch, change, said):
    monkeypatch.setattr(ss, "work", lambda *_, **__: None)
    monkeypatch.setattr(ss, "report", lambda *_: None)
    run(tmp_path / "a")
    run(tmp_path / "a", "search.trials=3")
    with pytest.raises(ValueError, match=f"study s began otherwise: {said}; go on with the settings there"):
        run(tmp_path / "a", change)


def test_two_studies_in_a_folder_and_two_folders_of_a_study_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(ss, "work", lambda *_, **__: None)
    monkeypatch.setattr(ss, "report", lambda *_: None)
    run(tmp_path / "a")
    with pytest.raises(ValueError, match=r"holds the study s: choose another paths\.output_dir for t"):
        run(tmp_path / "a", "search.name=t")
    storage = f"search.storage={tmp_path}/a/journal.log"
    with pytest.raises(ValueError, match=f"study s works in {tmp_path}/a: give that as paths.output_dir"):
        run(tmp_path / "b", storage)
    run(tmp_path / "b", storage, "search.name=t")


def test_data_that_are_not_there_are_found_before_a_study_is_made(tmp_path):
    files = ("dset=jsonl", f"dset.train_file={tmp_path}/none.jsonl", f"dset.test_file={tmp_path}/none.jsonl")
    with pytest.raises(ValueError, match=r"none\.jsonl does not exist"):
        run(tmp_path / "a", *files)
    assert not (tmp_path / "a").exists()


def test_torchrun_is_refused_before_any_trial(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="without torchrun: start the same command several times"):
        run(tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("elsewhere", [0, 1])
def test_whoever_ends_last_writes_the_results(tmp_path, monkeypatch, elsewhere):
    """Others that still work on the study will add trials: what is chosen without them would be out of date."""
    monkeypatch.setattr(ss, "work", lambda *_, **__: None)
    monkeypatch.setattr(ss.Worker, "running_elsewhere", lambda *_: elsewhere)
    locks, written, lock = [], [], ss.try_lock
    monkeypatch.setattr(ss, "try_lock", lambda path: locks.append(lock(path)) or locks[-1])
    monkeypatch.setattr(ss, "report", lambda *_: written.append(locks[-1].closed))
    run(tmp_path / "a")
    assert written == [False] * (1 - elsewhere)
    assert [held.closed for held in locks] == [True] * len(written), "who does not write keeps nobody from it"


def test_a_trial_that_ends_while_results_are_written_is_in_them(tmp_path, monkeypatch):
    known: list[int] = []

    def report(cfg, base, study, compare):
        known.append(len(points_of(study)))
        if len(known) == 1:
            ss.work(study, worker, lambda trial: ss.run_trial(cfg, base, space, study, trial), **budget)

    budget = {"trials": 2, "seconds": None, "max_failures": None, "failures": (), "say": lambda *_: None}
    worker, space = ss.Worker(tmp_path / "other"), ss.read_space(ss.plain(configure(FAST).search.space))
    monkeypatch.setattr(ss, "report", report)
    run(tmp_path / "a", "search.trials=1")
    assert known == [1, 2]


def test_a_trial_is_told_in_one_line(caplog):
    trial = create_trial(state=TrialState.FAIL, user_attrs={VALUES: {"dset.prompt_choice": "a\nb"}})
    with caplog.at_level("INFO"):
        ss.say(trial, "no")
    assert caplog.messages == ["[TRIAL -1] fail: no (dset.prompt_choice=a b)"]


def test_a_trial_is_judged_as_a_run_with_these_settings_is(tmp_path):
    folder = run(tmp_path / "a", "search.trials=1")
    cfg = OmegaConf.load(folder / "trials" / "0000" / "config.yaml")
    cfg.paths.output_dir = str(tmp_path / "again")
    again = prepare(cfg)
    training.train(again)
    logits, answer = evaluation.logits_of(again, again.data.validation, 2, "search")
    assert (
        evaluate_predictions(logits, answer) == points_of(load_compared(f"{folder}/journal.log", OBJECTIVES))[0].metrics
    )


@pytest.mark.parametrize("more", [("method=mle", "eval.keep=best"), ("method=temperature",)], ids=["best", "fitted"])
def test_a_trial_is_judged_by_what_a_run_ends_with(tmp_path, more):
    """Its best adapter where that is kept, though at such rates the last is worse; and fitted. Nothing is drawn."""
    lr = ("search.space.opt.lr.low=0.5", "search.space.opt.lr.high=1.0", "~search.space.inducing")
    folder = run(tmp_path / "a", "search.trials=1", *lr, *more)
    (judged,) = points_of(load_compared(f"{folder}/journal.log", OBJECTIVES))
    cfg = OmegaConf.load(folder / "trials" / "0000" / "config.yaml")
    cfg.paths.output_dir, cfg.eval.save_validation = str(tmp_path / "again"), True
    ss.execute(cfg)
    records = read_metrics(tmp_path / "again")
    nll = [record["nll"] for record in records if (record["split"], record.get("mc")) == ("validation", "mean")]
    assert judged.metrics["nll"] == nll[-1] < nll[-2], "the final evaluation, and that after the last step"


def test_test_data_are_never_looked_at(tmp_path, monkeypatch):
    seen, logits_of = [], evaluation.logits_of

    def watched(run_: Run, examples, *rest):
        seen.append(examples is run_.data.validation)
        return logits_of(run_, examples, *rest)

    monkeypatch.setattr(evaluation, "logits_of", watched)
    run(tmp_path / "a")
    assert len(seen) == 2 * 4  # before training, two steps, the judgement
    assert all(seen)


def test_bad_trials_are_recorded_and_the_study_goes_on(tmp_path, monkeypatch):
    accumulate = training.accumulate

    def troubled(run_: Run, *rest):
        loss = accumulate(run_, *rest)
        return loss._replace(loss=torch.tensor(float("nan"))) if run_.folder.name == "0000" else loss

    monkeypatch.setattr(training, "accumulate", troubled)
    evaluate, judged = ss.evaluate_predictions, []

    def sometimes_nan(*rest):
        judged.append(1)
        return evaluate(*rest) | ({"ece": float("nan")} if len(judged) == 1 else {})

    monkeypatch.setattr(ss, "evaluate_predictions", sometimes_nan)
    monkeypatch.setattr(pruning, "too_high", lambda nll, finished, *rest: len(finished) == 1)
    folder = run(tmp_path / "a", "search.trials=4")
    states = [(t.state.name, t.user_attrs.get("reason", "")[:9]) for t in trials(folder)]
    assert states == [
        ("FAIL", "loss nan,"),
        ("FAIL", "objective"),
        ("COMPLETE", ""),
        ("PRUNED", "NLL " + states[3][1][4:]),
    ]
    assert (folder / "front.csv").is_file()


def test_of_several_processes_one_is_killed_and_nothing_is_lost(tmp_path):
    arguments = [*FAST, "search.trials=4", f"paths.output_dir={tmp_path}/a"]
    log, running = tmp_path / "log", []
    for _ in range(2):
        with log.open("ab") as file:
            command = [sys.executable, "search_script.py", *arguments]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            running.append(subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment))
    deadline = time.monotonic() + 60
    while not (tmp_path / "a" / "trials" / "0002" / "config.yaml").exists():  # so one has ended
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.005)
    running[0].send_signal(signal.SIGKILL)
    running[0].wait()
    before = [(t.number, t.values) for t in trials(tmp_path / "a") if t.state.is_finished()]
    assert running[1].wait(120) == 0, log.read_text()
    after = trials(tmp_path / "a")
    states = [t.state.name for t in after]
    assert [(t.number, t.values) for t in after if (t.number, t.values) in before] == before
    assert states.count("COMPLETE") == 4
    assert states.count("FAIL") <= 1, "the trial that was killed, if it was within one"
    assert len({t.params["opt.lr"] for t in after if t.params}) == sum(bool(t.params) for t in after)
    assert (tmp_path / "a" / "front.csv").is_file()
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("search.sampler=gpp", "unknown search.sampler=gpp; did you mean gp"),
        ("search.objectives=[acc,eec]", "unknown search.objectives=eec; did you mean ece"),
        ("search.objectives=[]", "search.objectives="),
        ("search.trials=0", "search.trials=0: expected a whole number, at least 1"),
        ("search.trials=null", "would never end"),
        ("search.prune.factor=0.5", "search.prune.factor=0.5: expected"),
        ("search.final_seeds=[0]", "take fresh ones"),
        ("search.final_seeds=[4294967296]", "expected a list of different whole numbers from 0 to 4294967295, such as"),
        ("seed=4294967296", "seed=4294967296: expected a whole number, at most 4294967295"),
        ("search.reference.nll=nan", "search.reference.nll=nan: expected a finite number or null"),
        ("search.reference.nll=inf", "search.reference.nll=inf: expected a finite number or null"),
        ("search.reference=null", "search.reference.acc is missing: only its value can be changed"),
        ("search.select=null", "search.select.rules is missing"),
        ("~search.seed", "search.seed is missing"),
        ("search.seconds=inf", "search.seconds=inf: expected a finite number, at least 0"),
        ("search.name=null", "search.name=None: expected a text, or leave it out"),
        ("search.name=[a]", "search.name=['a']: expected a text, or leave it out"),
        ("search.storage=5", "search.storage=5: expected a text, or leave it out"),
        ("search.compare=3", "search.compare=3: expected a text, or leave it out"),
        ("~peft.lora_dropout", "cannot leave out peft.lora_dropout: do not delete keys with ~ in a search"),
        ("search.compare=/no/such.log", "no such file"),
        ("search.trails=3", "unknown key search.trails"),
        ("method=mle", "search.space has inducing.prior_sd_b, which method=mle does not read"),
        ("search_space=sst3", "did you mean sst2"),
        ("+search.space.opt.lrr={type: float, low: 0.1, high: 0.2}", "opt.lrr"),
        ("search.space.opt.lr.low=1", "search.space.opt.lr: low=1, high=0.01"),
        ("eval.split=test", "validation data only"),
        ("overwrite=true", "leave out resume and overwrite"),
        ("train.epochs=-1", "train.epochs=-1: expected"),
        ("inducing.whitened=no", "inducing.whitened=no: expected true or false"),
    ],
)
def test_bad_input_is_one_line_before_any_trial(tmp_path, change, expected):
    message = failure([*FAST, change, f"paths.output_dir={tmp_path}/a"])
    assert expected in message
    assert not (tmp_path / "a" / "journal.log").exists()


def test_a_search_that_selects_nothing_may_delete_keys(tmp_path, monkeypatch):
    monkeypatch.setattr(ss, "work", lambda *_, **__: None)
    monkeypatch.setattr(ss, "report", lambda *_: None)
    run(tmp_path / "a", "~peft.lora_dropout", "search.select.rules=[]")
