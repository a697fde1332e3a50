"""The ablations: every setting is a valid configuration, and the table is the mean over seeds."""

import csv
import json
import statistics

import pytest
from tiny_runs import finish

from benchmarks import ablations, workers
from benchmarks.ablations import SETTINGS, job_of, main, markdown, results, write
from benchmarks.options import alone_in
from pipeline.run import CONFIGS
from utils.settings import compose


@pytest.mark.parametrize("label", SETTINGS)
def test_every_setting_changes_the_configuration_and_no_two_share_a_folder(label, tmp_path):
    jobs = {name: job_of("sst2_500", name, 6e-4, 0, tmp_path) for name in SETTINGS}
    cfg = compose(CONFIGS, [*jobs[label].overrides, "paths.output_dir=unused"])
    assert cfg.opt.lr == 6e-4
    assert cfg.method.name == "sgp"
    if label != "default":
        assert cfg != compose(CONFIGS, [*jobs["default"].overrides, "paths.output_dir=unused"])
    assert len({job.folder for job in jobs.values()}) == len(SETTINGS)


def test_the_table_is_the_mean_over_finished_seeds_of_the_posterior_on_test(tmp_path):
    values = {0: 0.8, 1: 0.9, 2: 0.5}
    jobs = {("default", seed): job_of("sst2_500", "default", 6e-4, seed, tmp_path) for seed in values}
    for seed, acc in values.items():
        folder = jobs["default", seed].folder
        folder.mkdir(parents=True)
        record = {"kind": "final", "split": "test", "acc": acc, "nll": 0.3, "ece": 0.02, "brier": 0.1, "step": 5}
        other = {**record, "acc": 0.0}
        lines = [{**other, "mc": "zero_shot"}, {**record, "mc": 10}, {**other, "mc": "mean"}]
        lines += [{**other, "mc": 10, "split": "validation", "nll": 0.4 + seed / 10}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if seed != 2:  # unfinished
            (folder / "reliability.json").write_text("{}")
    rows = results(jobs)
    assert [(row["setting"], row["seed"], row["acc"]) for row in rows] == [("default", 0, 0.8), ("default", 1, 0.9)]
    spread = 100 * statistics.stdev([0.8, 0.9])
    assert [row["validation_nll"] for row in rows] == [0.4, 0.5]
    table = markdown(rows)
    assert f"| default | 2 | 85.0 ± {spread:.1f} | 0.300 ± 0.000 |" in table
    assert f"| 0.450 ± {statistics.stdev([0.4, 0.5]):.3f} |" in table


def test_the_csv_can_be_read_again_whatever_the_label(tmp_path):
    rows = [{"setting": "on q, k, v, o", "seed": 0, "acc": 0.9, "nll": 0.2, "ece": 0.1, "brier": 0.1}]
    rows = [{**row, "validation_nll": 0.3} for row in rows]
    write(rows, tmp_path)
    with (tmp_path / "ablations.csv").open() as file:
        assert list(csv.DictReader(file)) == [{name: str(value) for name, value in row.items()} for row in rows]
    assert (tmp_path / "ablations.md").read_text() == markdown(rows)


def test_what_differs_from_run_to_run_is_refused_before_any(tmp_path):
    with pytest.raises(SystemExit, match="error: seed differs from run to run here: leave it out"):
        main(["--rate", "1e-3", "--out", str(tmp_path / "out"), "seed=1"])
    assert not (tmp_path / "out").exists()


@pytest.fixture
def made(monkeypatch) -> list[str]:
    """Names of the settings' folders whose runs are asked for; each leaves its results, of two draws."""
    names: list[str] = []

    def carry_out(chains, jobs, seconds):
        for _, stage in chains[0]:
            for job in stage:
                names.append(job.folder.parent.name)
                finish(job.folder, mc=2)

    monkeypatch.setattr(ablations, "carry_out", carry_out)
    return names


def test_tables_of_tasks_stand_apart_and_only_what_is_named_is_made(tmp_path, made):
    main(["--rate", "1e-3", "--out", str(tmp_path), "--only", "default", "q_sd = 0.1"])
    assert made == ["default"] * 3 + ["q_sd___0_1"] * 3
    main(["--rate", "1e-3", "--out", str(tmp_path), "--only", "unwhitened", "--task", "cola"])
    first, second = ((tmp_path / task / "ablations.md").read_text() for task in ("sst2_500", "cola"))
    assert "| default | 3 |" in first
    assert "unwhitened" not in first
    assert "| unwhitened | 3 |" in second


def test_a_folder_of_other_settings_is_refused_before_any_run(tmp_path, made):
    """Also where the setting is not asked for: the table would hold it."""
    old = job_of("sst2_500", "default", 1e-3, 0, tmp_path)
    finish(old.folder)
    workers.write_json_atomic(old.folder / workers.SETTINGS, list(old.overrides))
    with pytest.raises(SystemExit, match=r"other settings \(opt.lr=0.001 opt.lr=0.002\)"):
        main(["--rate", "2e-3", "--out", str(tmp_path), "--only", "unwhitened"])
    assert made == []


def test_what_a_setting_changes_is_not_undone_by_what_holds_for_all(tmp_path):
    common = ("inducing.prior_sd_b=0.35", "dtype=float32")
    of = {
        label: workers.by_key(job_of("sst2_500", label, 1e-3, 0, tmp_path, common).overrides)
        for label in ("default", "prior sd of B 2.8")
    }
    assert [said["inducing.prior_sd_b"] for said in of.values()] == ["0.35", "2.8"]
    assert {said["dtype"] for said in of.values()} == {"float32"}


def test_what_is_not_complete_is_told(tmp_path, capsys):
    with pytest.raises(SystemExit, match="error: no run has finished: see the lines above"):
        main(["--rate", "1e-3", "--out", str(tmp_path), "--seconds", "0"])
    assert "not complete: the same command goes on" in capsys.readouterr().out


def test_two_commands_do_not_share_a_folder(tmp_path, made):
    with alone_in(tmp_path), pytest.raises(SystemExit, match="error: another command makes runs in"):
        main(["--rate", "1e-3", "--out", str(tmp_path)])
    assert made == []
