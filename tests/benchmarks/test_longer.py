"""Training on with the settings that a search found, and the table and figure of what that does."""

import dataclasses
import json

import pytest
from tiny_runs import finish

from benchmarks import longer, longer_report, workers
from benchmarks.comparison import RATES, SEEDS, Comparison, Setting
from benchmarks.options import alone_in
from benchmarks.tuning import UNFINISHED
from utils.report_figures import PER_ROW, per_row
from utils.report_rows import Row, write_csv

ROW = Row("m", "sst2", "500", "mle", "", 0, "test", "mean", 160, "", 0.9, 0.3, 0.05, 0.2, None, None)


@pytest.fixture
def tuning(tmp_path, monkeypatch):
    monkeypatch.setattr(longer, "OWN", {method: {"own": ()} for method in RATES})

    def runs(acc, nll, seeds=(100, 101, 102)):
        return {str(seed): {"acc": acc + 0.01 * (seed - 101), "nll": nll, "ece": 0.1} for seed in seeds}

    of = {"0.001": runs(0.8, 0.3), "0.002_own": runs(0.9, 0.5), "0.004": runs(0.99, 0.1, seeds=(100,)), "0.008": {}}
    path = tmp_path / "tuning.json"
    one = {"0.001": runs(0.8, 0.3)}  # both rules choose it
    path.write_text(json.dumps({"sst2_500": dict.fromkeys(RATES, of) | {"map": one}, "cola": {"mle": of}}))
    return path


def test_the_choice_is_the_searchs_among_what_all_seeds_have(tuning):
    found = longer.chosen_in(tuning, "sst2_500")
    assert found.keys() == RATES.keys()
    assert found.pop("map") == {"nll": Setting(0.001), "acc": Setting(0.001)}
    assert all(rules == {"nll": Setting(0.001), "acc": Setting(0.002, "own")} for rules in found.values())
    for task in ("cola", "obqa_500"):
        with pytest.raises(
            ValueError, match=f"has no finished search of .* on {task}: run benchmarks.comparison first"
        ):
            longer.chosen_in(tuning, task)


def test_a_setting_that_is_no_more_is_not_taken_for_the_default(tuning, monkeypatch):
    monkeypatch.setattr(longer, "OWN", {method: {"other": ()} for method in RATES})
    with pytest.raises(ValueError, match="mle has no setting own any more"):
        longer.chosen_in(tuning, "sst2_500")


def test_a_search_in_which_every_method_could_stop_early(tmp_path, tuning, monkeypatch):
    monkeypatch.setattr(longer, "OWN", {method: {} for method in RATES})
    table = json.loads(tuning.read_text())
    for of in table["sst2_500"].values():
        of["0.001_early_stopping"] = of.pop("0.001")
        of.pop("0.002_own", None)
    tuning.write_text(json.dumps({**table, UNFINISHED: {}}))
    kept = []

    def carry_out(chains, jobs, seconds):
        kept.extend(workers.by_key(job.overrides).get("eval.keep") for chain in chains for _, s in chain for job in s)

    monkeypatch.setattr(longer, "carry_out", carry_out)
    with pytest.raises(SystemExit, match="no run has finished"):
        longer.main([str(tuning), "--times", "1", "--tasks", "sst2_500", "--methods", "blob", "--out", str(tmp_path)])
    assert kept == ["best"] * len(SEEDS)


def test_a_search_that_has_not_ended_is_refused(tuning):
    """Whatever settings have all seeds already."""
    table = json.loads(tuning.read_text())
    tuning.write_text(json.dumps({**table, UNFINISHED: {"cola": {"sgp": {}}}}))
    assert longer.chosen_in(tuning, "sst2_500")
    tuning.write_text(json.dumps({**table, UNFINISHED: {"sst2_500": {"sgp": {}}}}))
    with pytest.raises(ValueError, match="has no finished search of sgp on sst2_500"):
        longer.chosen_in(tuning, "sst2_500")


def test_a_file_that_is_no_search_is_one_line(tmp_path):
    path = tmp_path / "other.json"
    path.write_text('{"tiny": [1]}')
    with pytest.raises(SystemExit, match=r"^error: .*other.json is damaged or of another kind: name the tuning.json"):
        longer.main([str(path), "--times", "2", "--out", str(tmp_path / "out")])


@pytest.mark.parametrize("seeds", [(), ("100",)], ids=["at once", "with another seed"])
def test_a_method_that_always_diverged_keeps_no_other_from_the_test(tmp_path, tuning, asked, capsys, seeds):
    table = json.loads(tuning.read_text())
    runs = table["sst2_500"]["blob"]["0.001"]
    table["sst2_500"]["blob"] = {"0.001": {seed: runs[seed] for seed in seeds}}
    tuning.write_text(json.dumps({**table, "cola": table["sst2_500"], UNFINISHED: {}}))
    command = [str(tuning), "--times", "2", "--tasks", "sst2_500", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="no run has finished"):
        longer.main(command)
    untested = "neither it nor what has its setting is tested"
    assert capsys.readouterr().out == f"sst2_500: every setting of blob diverged in the search: {untested}\n"
    assert {folder.parts[-3] for folder in asked} >= set(RATES) - {"blob"}
    assert not any("/blob/" in str(folder) for folder in asked)
    with pytest.raises(SystemExit, match="no run has finished"):
        longer.main([*command, "--methods", "sgp"])
    assert capsys.readouterr().out == "", "nobody has asked for it"


def test_a_file_that_does_not_say_what_is_unfinished_has_diverged_nowhere(tuning):
    """Older ones: a search without a choice may have been cut short."""
    table = json.loads(tuning.read_text())
    table["sst2_500"]["blob"] = {"0.001": {}}
    tuning.write_text(json.dumps(table))
    with pytest.raises(ValueError, match="has no finished search of blob on sst2_500"):
        longer.chosen_in(tuning, "sst2_500")


def test_runs_with_other_metrics_too(tuning):
    table = json.loads(tuning.read_text())
    table["sst2_500"]["mle"]["0.001"]["100"]["brier"] = "none"
    tuning.write_text(json.dumps(table))
    assert longer.chosen_in(tuning, "sst2_500")["mle"]["nll"] == Setting(0.001)


def test_lists_of_finished_runs_and_a_line_where_none_is(tmp_path, tuning, monkeypatch):
    made = []

    def carry_out(chains, jobs, seconds):
        for chain in chains:
            for _, stage in chain:
                for job in stage:
                    made.append(job.folder)
                    if "/mle/" in str(job.folder):
                        finish(job.folder)

    monkeypatch.setattr(longer, "carry_out", carry_out)
    out = tmp_path / "out"
    command = [str(tuning), "--times", "2", "--tasks", "sst2_500", "--out", str(out), "--seconds", "1"]
    longer.main(command)
    assert len(made) == len(set(made)), "each run once, also where both rules agree"
    for rule, setting in (("nll", "0.001"), ("acc", "0.002_own")):
        folders = (out / f"by_{rule}.txt").read_text().split()
        assert folders == [str(out / "final" / "sst2_500" / "mle" / setting / f"seed{seed}") for seed in SEEDS]
    monkeypatch.setattr(longer, "carry_out", lambda *_: None)
    with pytest.raises(SystemExit, match="error: no run has finished"):
        longer.main([*command[:-3], str(tmp_path / "empty"), "dtype=float32"])
    for word, said in (
        ("seed=1", "seed differs from run to run here"),
        ("train.epochs=5", "train.epochs is what times multiplies: leave one of them out"),
        ("--times=0", "times is 0: take a whole number from 1 on"),
    ):
        with pytest.raises(SystemExit, match=f"error: {said}"):
            longer.main([*command, word])


@pytest.fixture
def asked(monkeypatch):
    """Folders of the runs that are asked for; none is made."""
    made = []

    def carry_out(chains, jobs, seconds):
        made.extend(job.folder for chain in chains for _, stage in chain for job in stage)

    monkeypatch.setattr(longer, "carry_out", carry_out)
    return made


def test_a_rule_alone_trains_nothing_of_the_other(tmp_path, tuning, asked):
    command = [str(tuning), "--times", "1", "--rules", "acc", "--tasks", "sst2_500", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="no run has finished"):
        longer.main(command)
    assert {folder.parts[-2] for folder in asked if "/mle/" in str(folder)} == {"0.002_own"}


@pytest.mark.parametrize(
    ("methods", "trained"),
    [
        (["blob", "sgp"], {"blob", "sgp"}),
        (["temperature"], {"mle", "temperature"}),
        (["ensemble"], {"ensemble"}),
        (["sgp_ensemble"], {"sgp_ensemble"}),
        (["mle", "ensemble"], {"mle", "ensemble"}),
    ],
)
def test_methods_that_are_named_and_what_they_start_from(tmp_path, tuning, asked, monkeypatch, methods, trained):
    monkeypatch.setattr(longer, "startable", list)  # as if what they start from had been made
    with pytest.raises(SystemExit, match="no run has finished"):
        longer.main([str(tuning), "--times", "2", "--methods", *methods, "--tasks", "sst2_500", "--out", str(tmp_path)])
    assert {folder.parts[-3] for folder in asked} == trained


def test_a_seed_that_diverged_stops_nothing_else(tmp_path, tuning, asked):
    with pytest.raises(SystemExit, match="no run has finished"):
        longer.main([str(tuning), "--times", "2", "--tasks", "sst2_500", "--out", str(tmp_path / "out")])
    assert not any("/temperature/" in str(folder) for folder in asked), "no adapter to start from"
    assert sum("/mle/" in str(folder) for folder in asked) == 2 * len(SEEDS), "the settings of both rules"
    assert sum("/map/" in str(folder) for folder in asked) == len(SEEDS), "one setting, chosen by both"


def test_a_folder_of_other_settings_is_refused_before_any_run(tmp_path, tuning, asked):
    """Also where the run is of a method that is not asked for: the lists would hold it."""
    old = Comparison(tmp_path / "out", ["dtype=float32"], 2).final_job("sst2_500", "map", Setting(0.001), 0)
    finish(old.folder)
    workers.write_json_atomic(old.folder / workers.SETTINGS, list(old.overrides))
    command = [str(tuning), "--times", "2", "--tasks", "sst2_500", "--methods", "sgp", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="dtype=bfloat16 dtype=float32"):
        longer.main([*command, "dtype=bfloat16"])
    assert asked == []


def test_two_commands_do_not_share_a_folder(tmp_path, tuning, asked):
    with alone_in(tmp_path), pytest.raises(SystemExit, match="error: another command makes runs in"):
        longer.main([str(tuning), "--times", "2", "--tasks", "sst2_500", "--out", str(tmp_path)])
    assert asked == []


def test_lists_keep_the_tasks_of_earlier_calls(tmp_path, tuning, monkeypatch):
    content = json.loads(tuning.read_text())
    tuning.write_text(json.dumps({**content, "obqa_500": content["sst2_500"]}))

    def carry_out(chains, jobs, seconds):
        for chain in chains:
            for _, stage in chain:
                for job in stage:
                    finish(job.folder)

    monkeypatch.setattr(longer, "carry_out", carry_out)
    for task in ("sst2_500", "obqa_500"):
        longer.main([str(tuning), "--times", "2", "--tasks", task, "--out", str(tmp_path / "out")])
    listed = (tmp_path / "out" / "by_nll.txt").read_text()
    assert "/sst2_500/" in listed
    assert "/obqa_500/" in listed


@pytest.fixture
def reports(tmp_path):
    def rows(steps, nll, **of):
        return [
            dataclasses.replace(
                ROW, method=method, seed=seed, steps=0 if method == "tfb" else steps, nll=nll + seed / 10
            )
            for method, seeds in of.items()
            for seed in range(seeds)
        ]

    write_csv(tmp_path / "before.csv", [*rows(160, 0.2, mle=3, sgp=3, tfb=2, map=1), *rows(160, 0.1, zero_shot=2)])
    write_csv(tmp_path / "after.csv", [*rows(640, 0.5, mle=2, sgp=3, tfb=2, map=2), *rows(640, 0.1, zero_shot=2)])
    return str(tmp_path / "before.csv"), str(tmp_path / "after.csv")


def test_table_and_figure(reports, tmp_path):
    longer_report.main([*reports, "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "longer.md").read_text().splitlines()[2:] == [
        "| sst2 (500) (160 → 640) | mle | 2 | mean → mean | 90.0 → 90.0 | 0.250 → 0.550 | 5.0 → 5.0 |",
        "| sst2 (500) (160 → 640) | sgp | 3 | mean → mean | 90.0 → 90.0 | 0.300 → 0.600 | 5.0 → 5.0 |",
        "| sst2 (500) (160 → 640) | tfb | 2 | mean → mean | 90.0 → 90.0 | 0.250 → 0.550 | 5.0 → 5.0 |",
    ], "the seeds of both; neither the base model nor a method with a single seed"
    assert (tmp_path / "out" / "longer.png").read_bytes().startswith(b"\x89PNG")


def test_reports_that_do_not_belong_together(reports, tmp_path):
    other = tmp_path / "other.csv"
    write_csv(other, [dataclasses.replace(ROW, task="cola", seed=seed) for seed in (0, 1)])
    with pytest.raises(SystemExit, match="share no task and method of m with two seeds"):
        longer_report.main([reports[0], str(other)])
    write_csv(other, [ROW, dataclasses.replace(ROW, model="n")])
    with pytest.raises(SystemExit, match=r"is of several models \(m, n\): report one at a time"):
        longer_report.main([reports[0], str(other)])


def test_a_report_that_cannot_be_written(reports, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"file.*: correct this path"):
        longer_report.main([*reports, "--out", str(tmp_path / "file")])


def test_tasks_go_below_where_there_are_many(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(longer_report, "save_figure", lambda figure, path: figures.append(figure))
    after = dataclasses.replace(ROW, steps=640, nll=0.5, ece=0.1)
    tasks = {f"task{i}": {name: ([ROW], [after]) for name in ("mle", "sgp")} for i in range(PER_ROW + 1)}
    longer_report.draw(tasks, tmp_path / "longer.png")
    assert len({ax.get_subplotspec().colspan.start for ax in figures[0].axes}) == per_row(PER_ROW + 1) < PER_ROW
    drawn = [ax for ax in figures[0].axes if ax.axison]
    assert [ax.get_title() for ax in drawn if ax.get_title()] == list(tasks)
    assert len(drawn) == 2 * len(tasks)
    for ax in drawn:
        before, later = (0.3, 0.5) if ax.get_title() else (0.05, 0.1)
        assert all(list(line.get_ydata()) == [before, later] for line in ax.get_lines())
        assert ax.get_xlabel() == ("" if ax.get_title() else "optimiser steps")
