"""The comparison's search, its selections, and the whole of it on a random model."""

import json
from pathlib import Path

import pytest
from tiny_runs import Serial, finish

from benchmarks import comparison, longer, tried, workers
from benchmarks.comparison import RATES, Comparison, Setting, beyond, chosen, finalists
from benchmarks.options import GOES_ON, alone_in
from benchmarks.workers import Job, run_chains
from pipeline.run import CONFIGS
from utils.settings import compose


@pytest.fixture(autouse=True)
def _data_are_there(monkeypatch):
    """Nothing here comes to read them."""
    monkeypatch.setattr(comparison, "rehearse", lambda cfg: None)


def found(**by_rate: tuple[float, float]) -> dict[Setting, dict[str, float]]:
    """{"r1em3": (nll, acc)} as metrics by setting."""
    return {
        Setting(float(name[1:].replace("m", "-").replace("_", "."))): {"nll": nll, "acc": acc}
        for name, (nll, acc) in by_rate.items()
    }


def test_the_search_goes_on_beyond_the_best_at_an_end():
    inside = found(r2em4=(0.5, 0.8), r6em4=(0.4, 0.9), r1_8em3=(0.6, 0.7))
    assert beyond(inside) == []
    assert beyond({}) == []
    below = found(r2em4=(0.3, 0.8), r6em4=(0.4, 0.9), r1_8em3=(0.6, 0.7))
    assert beyond(below) == [Setting(6.67e-5)]
    both = found(r2em4=(0.3, 0.8), r6em4=(0.4, 0.9), r1_8em3=(0.6, 0.95))
    assert beyond(both) == [Setting(6.67e-5), Setting(5.4e-3)]


def test_selections_and_their_ties():
    some = found(r1em3=(0.4, 0.9), r2em3=(0.3, 0.8), r4em3=(0.5, 0.9))
    assert chosen(some) == {"nll": Setting(2e-3), "acc": Setting(1e-3)}, "of equal accuracy the lower NLL"
    assert chosen({}) == {}


def test_finalists_are_the_best_by_either_rule(monkeypatch):
    some = found(r1em3=(0.4, 0.9), r2em3=(0.3, 0.8), r4em3=(0.5, 0.95), r8em3=(0.6, 0.7))
    assert finalists(some) == [Setting(2e-3), Setting(1e-3), Setting(4e-3)]
    monkeypatch.setattr(comparison, "FINALISTS", 1)
    assert finalists(some) == [Setting(2e-3), Setting(4e-3)]
    assert finalists({}) == []


def test_what_has_no_adapter_to_start_from_is_left_out(tmp_path):
    made = Comparison(tmp_path)
    jobs = made.jobs_after("mle", "sst2_100", Setting(1e-3))
    (made.final_folder("sst2_100", "mle", Setting(1e-3), 1) / "adapter").mkdir(parents=True)
    left = workers.startable(jobs)
    assert {job.folder.parts[-3:] for job in jobs} > {job.folder.parts[-3:] for job in left}
    assert {job.folder.name for job in left if "/ensemble/" not in str(job.folder)} == {"seed1"}
    assert sum("/ensemble/" in str(job.folder) for job in left) == 3


@pytest.mark.parametrize("override", ["opt.lr=1", "++opt.lr=1", "+seed=3", "method@_global_=sgp"])
def test_what_differs_from_run_to_run_cannot_be_set_for_all(tmp_path, override):
    with pytest.raises(ValueError, match="differs from run to run here"):
        Comparison(tmp_path, [override]).check()


def test_so_many_times_the_epochs_in_the_search_and_on_test(tmp_path):
    made = Comparison(tmp_path, ["dtype=float32"], times=4)
    first, after = made.test_stages("sst2_100", "mle", Setting(1e-3))
    jobs = [made.tuning_job("sst2_100", "sgp", Setting(1e-3), 100), made.zero_shot_job("sst2_100"), *first, *after]
    for job in jobs:
        said = workers.by_key(job.overrides)
        assert said["train.epochs"] == ("0" if "train.init_adapter" in said else "60")
        assert said["dtype"] == "float32"
    assert {job.folder.parts[-3] for job in after} >= {"ensemble", "temperature", "laplace"}


@pytest.mark.parametrize(
    ("times", "common", "said"),
    [
        (0, [], "times is 0: take a whole number from 1 on"),
        (1.5, [], "times is 1.5: take a whole number"),
        (None, [], "times is None: take a whole number"),
        (2, ["train.epochs=5"], "train.epochs is what times multiplies: leave one of them out"),
    ],
)
def test_a_length_that_cannot_be(tmp_path, times, common, said):
    with pytest.raises(ValueError, match=said):
        Comparison(tmp_path, common, times).check()


def test_the_command_passes_the_length_on(tmp_path):
    with pytest.raises(SystemExit, match="error: times is 0"):
        comparison.main(["--times", "0", "--out", str(tmp_path)])


def test_a_rate_is_not_tried_again_for_its_rounding():
    tried = [Setting(1.67e-5), Setting(5e-5)]
    assert comparison.untried([Setting(5.01e-5), Setting(1.5e-4)], tried) == [Setting(1.5e-4)]


def test_what_the_user_says_comes_last(tmp_path):
    made = Comparison(tmp_path, ["method.factory.precision_by=evidence"])
    jobs = [job for job in made.jobs_after("mle", "sst2_100", Setting(1e-3)) if "method=laplace" in job.overrides]
    assert len(jobs) == 3
    for job in jobs:
        assert workers.by_key(job.overrides)["method.factory.precision_by"] == "evidence"


def test_what_starts_from_an_adapter_trains_no_further_whatever_the_user_says(tmp_path):
    made = Comparison(tmp_path, ["train.epochs=3"])
    made.check()
    for job in made.jobs_after("mle", "sst2_100", Setting(1e-3, "early_stopping")):
        said = workers.by_key(job.overrides)
        started = "train.init_adapter" in said
        assert (said["train.epochs"], said["eval.keep"]) == (("0", "last") if started else ("3", "best"))


def test_the_choice_is_by_the_mean_over_the_seeds(tmp_path):
    """The first seed alone would choose the other setting."""
    made = Comparison(tmp_path)
    of = {
        Setting(rate): nll
        for rate, nll in zip(RATES["blob"], ((0.1, 0.9, 0.9), (0.2, 0.3, 0.3), (5,), (6,)), strict=True)
    }
    for setting, values in of.items():
        for seed, value in zip(comparison.TUNING_SEEDS, values, strict=False):
            job = made.tuning_job("sst2_500", "blob", setting, seed)
            workers.write_json_atomic(job.folder / workers.TUNED, {"nll": value, "acc": 0.5, "ece": 0.1})
    *_, (_, first), (_, after) = list(made.chain("sst2_500", "blob", ("nll",)))
    assert {job.folder.parent.name for job in first} == {f"{RATES['blob'][1]:g}"}
    assert {job.folder.parts[-3] for job in after} == {"blob_ensemble"}


def test_the_declared_search_whole(tmp_path):
    """Lower rates have the lower NLL, higher ones the accuracy: the search goes both ways, and its stages are these."""
    made, task, rates = Comparison(tmp_path), "sst2_500", RATES["blob"]

    def tune(job: Job) -> None:
        rate, _, own = job.folder.parent.name.partition("_")
        seed = int(job.folder.name.removeprefix("seed"))
        nll = float(rate) + (0.01 if own else 0)
        if own == "eps_0.15":  # the best by the first seed, not by the mean
            nll += -0.05 if seed == 100 else 0.1
        acc = float(rate) + (0.001 if own == "equal_kl" else 0)
        workers.write_json_atomic(job.folder / workers.TUNED, {"nll": nll, "acc": acc, "ece": 0.1})

    stages = []
    for jobs in made.search(task, "blob", []):
        stages.append({f"{job.folder.parent.name}/{job.folder.name}" for job in jobs})
        for job in jobs:
            tune(job)
    lowest, highest = f"{rates[0] / 9:.3g}", f"{rates[-1] * 9:g}"
    assert stages == [
        {f"{rate:g}/seed100" for rate in rates},
        {f"{rates[0] / 3:.3g}/seed100", f"{rates[-1] * 3:g}/seed100"},
        {f"{lowest}/seed100", f"{highest}/seed100"},
        {f"{rate}_{own}/seed100" for rate in (lowest, highest) for own in ("eps_0.15", "equal_kl")},
        {
            f"{setting}/seed{seed}"
            for setting in (f"{lowest}_eps_0.15", f"{highest}_eps_0.15", f"{highest}_equal_kl", lowest)
            for seed in (101, 102)
        },
    ]

    tried, ended = made.searched(task, "blob")
    assert ended
    for setting in made.found(task, "blob", tried, (100, 101, 102)):
        for seed in comparison.SEEDS:
            finish(made.final_folder(task, "blob", setting, seed))
    unfinished = made.zero_shot_job(task).folder
    unfinished.mkdir(parents=True)
    made.write_lists([task])
    folders = (tmp_path / "by_nll.txt").read_text().split()
    assert str(unfinished) not in folders
    assert [Path(folder).parent.name for folder in folders if "/blob/" in folder] == [lowest] * 3


def test_what_follows_a_method_has_its_setting_and_what_is_its_own(tmp_path):
    jobs = Comparison(tmp_path).jobs_after("mle", "sst2_100", Setting(1e-3, "dropout_0.1"))
    by_method = {job.folder.parts[-3]: job.overrides for job in jobs}
    assert by_method.keys() == {"ensemble", "temperature", "laplace", "laplace_last", "tfb"}
    for method, said in by_method.items():
        assert "peft.lora_dropout=0.1" in said
        assert ("method.factory.precision_by=validation" in said) == method.startswith("laplace")
        assert ("train.epochs=0" in said) == (method != "ensemble")


def test_an_unknown_rule_is_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown rule ece; there are nll, acc"):
        Comparison(tmp_path).run(["sst2_500"], 1, rules=["acc", "ece"])


def test_rules_come_in_order_and_others_are_left_out(tmp_path, monkeypatch):
    """Runs on test by the first rule go before further searches, those by the second after."""
    found = {Setting(1e-3): {"nll": 0.2, "acc": 0.8, "ece": 0.1}, Setting(2e-3): {"nll": 0.3, "acc": 0.9, "ece": 0.1}}
    monkeypatch.setattr(Comparison, "search", lambda *_: iter([]))
    monkeypatch.setattr(Comparison, "found", lambda *_: found)

    stages = list(Comparison(tmp_path).chain("sst2_500", "blob", ("acc", "nll")))
    made = [(priority, {job.folder.parent.name for job in stage}) for priority, stage in stages if stage]
    assert made == [(0, {"0.002"})] * 2 + [(1, {"0.001"})] * 2, "each with the ensemble that has the setting"
    alone = [stage for _, stage in Comparison(tmp_path).chain("sst2_500", "blob", ("nll",)) if stage]
    assert {job.folder.parent.name for stage in alone for job in stage} == {"0.001"}
    monkeypatch.setattr(Comparison, "found", lambda *_: {})
    assert not list(Comparison(tmp_path).chain("sst2_500", "blob")), "nothing was found"


def test_the_whole_comparison_and_its_repetition(tmp_path, overrides, monkeypatch, capsys):
    monkeypatch.setattr(comparison, "RATES", {"mle": (1e-3, 1e-2), "sgp": (1e-3, 1e-2), "map": (1e-3, 1e-2)})
    monkeypatch.setattr(comparison, "OWN", {m: {"dropout": ("peft.lora_dropout=0.1",)} for m in comparison.RATES})
    monkeypatch.setattr(comparison, "POST_HOC", {"mle": ("temperature",), "sgp": ("sgp_temperature",)})
    monkeypatch.setattr(comparison, "SEEDS", (0, 1))
    monkeypatch.setattr(comparison, "EXTENSIONS", 1)
    monkeypatch.setattr(comparison, "TUNING_SEEDS", (100, 101))
    tiny = [o for o in overrides() if not o.startswith(("paths.output_dir", "opt.lr", "eval.n_mc", "train.batch"))]
    monkeypatch.setattr(comparison, "TASKS", {"tiny": tuple(tiny)})
    real = Comparison.overrides

    def faulty(self, task, method, *arguments, **keywords):
        wrong = ("+method.factory.no_such_key=1",) if method == "map" else ()
        return (*real(self, task, method, *arguments, **keywords), *wrong)

    monkeypatch.setattr(Comparison, "overrides", faulty)
    made = Comparison(tmp_path / "out", ["eval.n_mc=2", "train.batch_size=4"])

    def compare() -> str:
        assert not run_chains(Serial(), made.chains("tiny", ("nll", "acc")), slots=2)
        made.write_lists(["tiny"])
        return capsys.readouterr().out

    assert "no_such_key" in compare(), "a failing run is reported, the others go on"
    tuning = json.loads((made.out / "tuning.json").read_text())["tiny"]
    assert tuning.keys() == {"mle", "sgp", "map"}
    assert all(not runs for runs in tuning["map"].values())
    for rule, best in (("nll", lambda v: (v["nll"], -v["acc"])), ("acc", lambda v: (-v["acc"], v["nll"]))):
        settings = {}
        for m in ("mle", "sgp"):
            assert {"0.001", "0.01"} <= tuning[m].keys()
            full = {s: list(runs.values()) for s, runs in tuning[m].items() if runs.keys() == {"100", "101"}}
            assert 2 <= len(full) < len(tuning[m]), "finalists alone have all seeds"
            means = {s: {k: (a[k] + b[k]) / 2 for k in ("nll", "acc")} for s, (a, b) in full.items()}
            settings[m] = min(means, key=lambda s: best(means[s]))
        folders = (made.out / f"by_{rule}.txt").read_text().split()
        assert len(folders) == 1 + 2 * 6
        of_sgp = (("sgp_temperature", "sgp"), ("sgp_ensemble", "sgp"))
        others = (("ensemble", "mle"), ("temperature", "mle"), *of_sgp)
        for method, setting in (("mle", "mle"), ("sgp", "sgp"), *others):
            for seed in (0, 1):
                assert str(made.out / "final" / "tiny" / method / settings[setting] / f"seed{seed}") in folders
        for folder in folders:
            assert '"split": "test"' in (comparison.Path(folder) / "metrics.jsonl").read_text()
    assert any("_dropout" in setting for setting in tuning["sgp"])
    assert not any('"split": "test"' in p.read_text() for p in made.out.glob("tune/**/metrics.jsonl"))
    for method, first in (("temperature", "mle"), ("sgp_temperature", "sgp")):
        config = next(p for p in (made.out / "final" / "tiny" / method).rglob("config.yaml"))
        assert f"/final/tiny/{first}/" in config.read_text()
    environments = [p.stat().st_mtime_ns for p in sorted(made.out.rglob("metrics.jsonl"))]

    assert "done" not in compare()
    assert [p.stat().st_mtime_ns for p in sorted(made.out.glob("final/**/metrics.jsonl"))] == [
        t for t, p in zip(environments, sorted(made.out.rglob("metrics.jsonl")), strict=True) if "final" in str(p)
    ]


def test_grids_name_tasks():
    for grid in comparison.GRIDS.values():
        assert len(set(grid)) == len(grid)
        assert set(grid) <= comparison.TASKS.keys()


@pytest.mark.parametrize("name", list(comparison.TASKS))
def test_every_task_composes(name, tmp_path):
    overrides = Comparison(tmp_path).overrides(name, "sgp", 0, Setting(1e-3))
    assert compose(CONFIGS, [*overrides, "paths.output_dir=x"]).train.epochs >= 1


@pytest.mark.parametrize("method", RATES)
def test_every_own_setting_composes_and_changes_something(method, tmp_path):
    made = Comparison(tmp_path, early_stopping=True)
    settings = [Setting(1e-3), *(Setting(1e-3, own) for own in made.own(method))]
    default, *others = (
        compose(CONFIGS, [*made.overrides("sst2_500", method, 0, s), "paths.output_dir=x"]) for s in settings
    )
    assert len(others) == (2 if method == "mle" else 3)
    assert all(default != other for other in others)


def test_a_search_made_elsewhere_is_taken_over(tmp_path, monkeypatch):
    """Its runs are not made again, those that diverged neither; what has ended here stays."""
    runs = {str(seed): {"acc": 0.5, "nll": 0.5 + seed / 1000, "ece": 0.1} for seed in comparison.TUNING_SEEDS}
    rates = {f"{rate:g}": runs for rate in RATES["mle"][1:]} | {f"{RATES['mle'][0]:g}": {}}
    known = tmp_path / "known.json"
    known.write_text(json.dumps({"sst2_500": {"mle": rates, "map": rates}, "unfinished": {"sst2_500": {"map": {}}}}))
    made = Comparison(tmp_path / "out")
    own = made.tuning_job("sst2_500", "mle", Setting(RATES["mle"][1]), 100).folder / workers.TUNED
    workers.write_json_atomic(own, {"acc": 0.9, "nll": 0.1, "ece": 0.2, "brier": 0.3})
    monkeypatch.setattr(comparison, "carry_out", lambda *_: None)
    with pytest.raises(RuntimeError, match="no run on test has finished"):
        made.run(["sst2_500"], 1, known=[known])

    found = made.found("sst2_500", "mle", [Setting(rate) for rate in RATES["mle"]], [100])
    assert list(found) == [Setting(rate) for rate in RATES["mle"][1:]]
    assert found[Setting(RATES["mle"][1])]["nll"] == 0.1
    assert found[Setting(RATES["mle"][2])] == runs["100"]
    asked = {m: [job for _, jobs in made.chain("sst2_500", m) for job in jobs] for m in ("mle", "map")}
    first = {m: made.tuning_job("sst2_500", m, Setting(RATES[m][0]), 100) for m in asked}
    assert all(first[m] in asked[m] for m in asked)
    assert workers.has_ended(first["mle"])
    assert not workers.has_ended(first["map"]), "the file does not say that it diverged"
    with pytest.raises(ValueError, match=r"known.json has no search of cola: name one that has"):
        made.run(["cola"], 1, known=[known])
    with pytest.raises(SystemExit, match=r"^error: .*no.json: No such file or directory: name the tuning.json"):
        comparison.main(["--out", str(tmp_path / "out"), "--tasks", "cola", "--known", str(tmp_path / "no.json")])


@pytest.mark.parametrize("method", RATES)
def test_every_method_may_stop_early_if_asked_for(method, tmp_path, monkeypatch):
    runs = {seed: {"nll": 0.5, "acc": 0.5} for seed in comparison.TUNING_SEEDS}
    monkeypatch.setattr(Comparison, "by_seed", lambda *_: runs)
    epochs = {}
    for asked in (False, True):
        made, tried = Comparison(tmp_path, early_stopping=asked), []
        jobs = [job for stage in made.search("sst2_500", method, tried) for job in stage]
        extra = {"early_stopping"} if asked else set()
        assert {setting.own for setting in tried} == {"default"} | comparison.OWN[method].keys() | extra
        for job in jobs:
            keys = workers.by_key(job.overrides)
            epochs[asked, "_early_stopping" in str(job.folder)] = keys["eval.every"], keys.get("eval.keep")
    assert epochs[True, True] == ("epoch", "best")
    assert {epochs[key] for key in epochs if not key[1]} == {("none", None)}
    first, after = made.test_stages("sst2_500", method, Setting(1e-3, "early_stopping"))
    for job in (*first, *after):
        keys = workers.by_key(job.overrides)
        trains = keys["method"] in (*RATES, *(name for names in comparison.AS.values() for name in names))
        assert keys["eval.keep"] == ("best" if trains else "last"), keys["method"]


@pytest.mark.parametrize("override", ["seed=3", "method=sgp", "opt.lr=1", "dset=cola"])
def test_what_is_compared_cannot_be_overridden(override, tmp_path):
    with pytest.raises(ValueError, match=f"{override.split('=')[0]} differs from run to run here: leave it out"):
        Comparison(tmp_path, ["dtype=float32", override]).run(["sst2_100"], 1)


@pytest.mark.parametrize(
    "override", ["opt={lr: 0.5}", "++opt={lr: 0.5}", "train={epochs: 1}", "inducing={prior_sd_b: 9}"]
)
def test_a_group_given_as_a_whole_overrides_nothing_that_is_compared(override, tmp_path):
    with pytest.raises(ValueError, match=r"may set .*, which is set here: name single keys instead"):
        Comparison(tmp_path, [override], 2).run(["sst2_100"], 1)


def test_what_no_run_could_be_made_with_is_found_before_any(tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "carry_out", lambda *_: pytest.fail("runs were begun"))
    for override, message in (("peft.rr=4", "unknown key peft.rr"), ("train.batch_size=0", "train.batch_size=0")):
        with pytest.raises(SystemExit, match=message):
            comparison.main(["--out", str(tmp_path / "out"), "--tasks", "sst2_100", override])
    assert not (tmp_path / "out").exists()


def test_what_is_taken_over_has_the_settings_of_the_command(tmp_path, monkeypatch):
    """A later command with others is refused; where there are runs with others, nothing is taken over."""
    monkeypatch.setattr(comparison, "carry_out", lambda *_: None)
    runs = {str(seed): {"acc": 0.5, "nll": 0.5, "ece": 0.1} for seed in comparison.TUNING_SEEDS}
    known = tmp_path / "known.json"
    known.write_text(json.dumps({"sst2_100": {"mle": {"0.0002": runs, "0.0002_forgotten": runs}}}))
    made = Comparison(tmp_path / "out", ["dtype=bfloat16"])
    with pytest.raises(RuntimeError, match="no run on test has finished"):
        made.run(["sst2_100"], 1, known=[known])
    assert made.found("sst2_100", "mle", [Setting(2e-4)], comparison.TUNING_SEEDS)
    assert not list((tmp_path / "out").rglob("*forgotten*"))
    with pytest.raises(ValueError, match="holds a run with other settings"):
        Comparison(tmp_path / "out", ["dtype=float32"]).run(["sst2_100"], 1)
    own = Comparison(tmp_path / "own", ["dtype=float32"])
    job = own.tuning_job("sst2_100", "mle", Setting(6.67e-5), 100)
    workers.write_json_atomic(job.folder / workers.SETTINGS, list(job.overrides))
    workers.write_json_atomic(job.folder / workers.TUNED, runs["100"])
    with pytest.raises(ValueError, match="holds a run with other settings"):
        Comparison(tmp_path / "own", ["dtype=bfloat16"]).run(["sst2_100"], 1, known=[known])
    assert len(list((tmp_path / "own").rglob(workers.TUNED))) == 1


def test_a_folder_with_other_settings_is_refused_before_any_run(tmp_path, monkeypatch):
    """Also where the runs are of a task that is not asked for, which the lists would hold."""
    old = Comparison(tmp_path, ["dtype=float32"]).tuning_job("sst2_100", "mle", Setting(RATES["mle"][0]), 100)
    workers.write_json_atomic(old.folder / workers.SETTINGS, list(old.overrides))
    workers.write_json_atomic(old.folder / workers.TUNED, {"nll": 1.0, "acc": 0.5})
    monkeypatch.setattr(comparison, "carry_out", lambda *_: pytest.fail("runs were made"))
    with pytest.raises(ValueError, match="dtype=bfloat16 dtype=float32"):
        Comparison(tmp_path, ["dtype=bfloat16"]).run(["cola_500"], 1)


@pytest.mark.parametrize(
    "command",
    [
        "--tasks sst2_500 arc_e --jobs 3 dtype=bfloat16 device=cpu",
        "dtype=bfloat16 device=cpu --tasks sst2_500 arc_e --jobs 3",
        "dtype=bfloat16 --tasks sst2_500 arc_e --jobs 3 device=cpu",
    ],
)
def test_overrides_stand_before_among_or_after_the_options(command, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(Comparison, "run", lambda self, *arguments: asked.append((list(self.common), *arguments)))
    comparison.main([*command.split(), "--out", str(tmp_path)])
    assert asked == [(["dtype=bfloat16", "device=cpu"], ["sst2_500", "arc_e"], 3, float("inf"), ["nll", "acc"], [])]


@pytest.mark.parametrize(
    "override", ["peft.lora_dropout=0.05", "++eval.keep=best", "~inducing.prior_sd_b", "+method.factory.gamma=null"]
)
def test_what_the_search_tries_cannot_be_set_for_all(override, tmp_path):
    key = override.partition("=")[0].lstrip("+~")
    with pytest.raises(ValueError, match=f"{key} is of the settings that the search tries"):
        Comparison(tmp_path, ["dtype=float32", override]).check()
    Comparison(tmp_path, ["eval.batch_size=8", "peft.r=4"]).check()


ODD = "a=b, c(d)[e]'f'"


def test_adapters_are_found_in_a_folder_of_any_name(tmp_path):
    made = Comparison(tmp_path / ODD)
    adapters = [made.final_folder("sst2_100", "sgp", Setting(1e-3), seed) / "adapter" for seed in comparison.SEEDS]
    for adapter in adapters[1:]:
        adapter.mkdir(parents=True)
    jobs = [job for job in made.jobs_after("sgp", "sst2_100", Setting(1e-3)) if "/sgp_temperature/" in str(job.folder)]
    found = [compose(CONFIGS, [*job.overrides, "paths.output_dir=x"]).train.init_adapter for job in jobs]
    assert found == [str(adapter) for adapter in adapters]
    assert workers.startable(jobs) == jobs[1:]


@pytest.fixture
def diverging(monkeypatch) -> set[tuple[str, int]]:
    """Settings, as their folders are named, and seeds that diverge; the other runs end well, the lower rates best."""
    those: set[tuple[str, int]] = set()

    def work(job: Job) -> str | None:
        setting, seed = job.folder.parts[-2:]
        if job.test:
            finish(job.folder)
        elif (setting, int(seed.removeprefix("seed"))) in those:
            workers.write_text_atomic(job.folder / workers.DIVERGED_FILE, "error: loss nan")
        else:
            rate = float(setting.partition("_")[0])
            workers.write_json_atomic(job.folder / workers.TUNED, {"nll": rate, "acc": -rate, "ece": 0.1})
        return None

    monkeypatch.setattr(workers, "work", work)
    monkeypatch.setattr(comparison, "carry_out", lambda chains, jobs, _: run_chains(Serial(), chains, jobs))
    monkeypatch.setattr(comparison, "RATES", dict.fromkeys(("mle", "blob"), (1e-3, 2e-3, 4e-3, 8e-3)))
    monkeypatch.setattr(comparison, "OWN", {"mle": {}, "blob": {}})
    monkeypatch.setattr(comparison, "EXTENSIONS", 0)
    return those


def test_the_next_best_follow_where_all_finalists_diverge(tmp_path, diverging, capsys):
    diverging |= {("0.001", 101), ("0.002", 102)}
    made = Comparison(tmp_path)
    last = made.tuning_job("sst2_500", "blob", Setting(8e-3), 102).folder / workers.TUNED
    for _ in range(2):
        last.unlink(missing_ok=True)  # as after a kill
        made.run(["sst2_500"], 1)
        assert last.exists()
        assert not (tmp_path / "final" / "sst2_500" / "blob" / "0.002").exists()
        folders = (tmp_path / "by_nll.txt").read_text().split()
        assert {Path(folder).parent.name for folder in folders if "/blob/" in folder} == {"0.004"}
    assert "diverged" not in capsys.readouterr().out


def test_a_method_without_a_choice_is_named_and_the_base_model_tested(tmp_path, diverging, capsys):
    diverging |= {(setting, 101) for setting in ("0.001", "0.002", "0.004", "0.008")}
    Comparison(tmp_path).run(["sst2_500"], 1)
    out = capsys.readouterr().out
    for method in ("mle", "blob"):
        assert f"sst2_500: every setting of {method} diverged with some seed: neither it nor" in out
    assert (tmp_path / "by_nll.txt").read_text() == f"{tmp_path}/final/sst2_500/zero_shot\n"


def test_lists_hold_what_was_made_and_searches_that_have_not_ended_are_named(tmp_path, diverging, monkeypatch):
    monkeypatch.setattr(longer, "RATES", comparison.RATES)
    diverging.add(("0.002", 100))
    made, path = Comparison(tmp_path), tmp_path / "tuning.json"
    made.run(["sst2_500"], 1)
    assert len((tmp_path / "by_nll.txt").read_text().split()) == 1 + 4 * 3, "base model, mle and blob, their ensembles"
    assert longer.chosen_in(path, "sst2_500")["blob"] == dict.fromkeys(("nll", "acc"), Setting(1e-3))

    (made.tuning_job("sst2_500", "blob", Setting(2e-3), 100).folder / workers.DIVERGED_FILE).unlink()
    made.write_lists(["sst2_500"])
    assert tried.read(path).keys() == {"sst2_500"}
    with pytest.raises(ValueError, match="no finished search of blob on sst2_500"):
        longer.chosen_in(path, "sst2_500")


def test_what_ends_the_command_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"^error: .*/file: File exists: correct this path, or what names it$"):
        comparison.main(["--out", str(tmp_path / "file")])
    with alone_in(tmp_path), pytest.raises(SystemExit, match=r"^error: another command makes runs in"):
        comparison.main(["--out", str(tmp_path)])

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Comparison, "run", interrupted)
    with pytest.raises(SystemExit) as stop:
        comparison.main(["--out", str(tmp_path)])
    assert stop.value.code == 130
    assert capsys.readouterr().err.strip() == GOES_ON
