"""The README's summary of all comparisons: what it counts, and that the documents have what the results give."""

from pathlib import Path

import pytest

from benchmarks import summary
from benchmarks.summary import LEARNED, SHOWN, TRAINED, Grid
from utils.report_rows import Row, write_csv

ROOT = Path(__file__).parents[2]


def row(method, seed, acc, nll, ece, task="cola", train_size="all"):
    which = (summary.SMOLLM2, task, train_size, method, "", seed, "test", "mean", 10, "abc")
    return Row(*which, acc, nll, ece, None, None, None)


def column(**found):
    """Every method alike, at 80 % / 0.50 / 10 % for three seeds, but for those given as (acc, nll, ece) by seed."""
    alike = [(0.8, 0.5, 0.1)] * 3
    return {name: [row(name, seed, *m) for seed, m in enumerate(found.get(name, alike))] for name in SHOWN}


def test_what_counts_as_best_as_tied_and_as_near():
    near = [(0.80, 0.44, 0.05), (0.80, 0.45, 0.06), (0.80, 0.46, 0.07)]  # mean 0.45, standard error 0.0058
    first = column(sgp=near)
    tied = column(sgp=near, blob=[(0.81, 0.43, 0.01), (0.82, 0.45, 0.01), (0.80, 0.46, 0.01)])  # 0.4467 +- 0.0088
    behind = column(sgp=near, blob=[(0.9, 0.3, 0.0599)] * 3)
    assert summary.counts({"a": first}) == ["1", "1", "1", "1", "1", "10 %", "40 %"]
    assert summary.counts({"a": tied}) == ["1", "0 (1)", "0", "0", "0", "10 %", "40 %"]
    assert summary.counts({"a": behind}) == ["1", "0", "0", "0", "0", "10 %", "40 %"]
    assert summary.counts({"a": first, "b": tied, "c": column()}) == ["3", "2 (3)", "2", "2", "2", "10 %", "40 %"]
    half = column(sgp=[(0.795, 0.5, 0.1)] * 3)
    assert summary.counts({"a": half})[3:5] == ["0", "1"]


def test_means_over_tasks_and_their_error_over_seeds():
    one = column(sgp=[(0.7, 0.4, 0.1), (0.8, 0.5, 0.1), (0.9, 0.6, 0.1)])  # standard errors 0.0577 of ACC and NLL
    tasks = {"a": one, "b": column()}
    assert summary.means(tasks, "sgp", ("acc", "nll", "ece")) == "80.0 ± 2.9 / 0.500 ± 0.029 / 10.0 ± 0.0"
    assert summary.means(tasks, "sgp", summary.SCALED) == ""
    for rows in (one["sgp"], tasks["b"]["sgp"]):
        for found in rows:
            found.nll_scaled, found.ece_scaled = found.nll - 0.1, 0.05
    assert summary.means(tasks, "sgp", summary.SCALED) == "0.400 ± 0.029 / 5.0 ± 0.0"
    del tasks["b"]["sgp"]
    assert summary.means(tasks, "sgp", ("nll",)) == "", "of a method that a task lacks"


def test_an_ensemble_of_posteriors_counts_in_the_place_of_what_it_is_of():
    one = column(sgp=[(0.8, 0.45, 0.08)] * 3, blob=[(0.8, 0.4, 0.09)] * 3)
    one["sgp_ensemble"] = [row("sgp_ensemble", seed, 0.82, 0.35, 0.06) for seed in range(3)]
    tasks = {"a": one, "b": column()}
    assert summary.counts(tasks)[1:4] == ["1", "2", "2"]
    assert summary.counts(summary.mixed(tasks, ["sgp"])) == ["2", "2", "2", "2", "2", "15 %", "20 %"]
    assert summary.mixed(tasks, ["blob"]) == tasks, "there is none"
    one["blob_ensemble"] = [row("blob_ensemble", seed, 0.83, 0.3, 0.07) for seed in range(3)]
    assert summary.counts(summary.mixed(tasks, summary.MIXTURES))[1:5] == ["1", "2", "1", "1"]
    table = summary.counted_mixtures({(Grid("any", "x"), "acc"): tasks, (Grid("any", "x"), "nll"): tasks}).splitlines()
    of_sgp = "| 2 | 2 | 2 | 2 | 2 | 15 % | 20 % |"
    assert table[2:] == [
        f"| any, by ACC {of_sgp}",
        "| the same, BLoB's ensemble too | 2 | 1 | 2 | 1 | 1 | 15 % | 20 % |",
        f"| any, by NLL {of_sgp}",
    ]


def test_tables_of_means_leave_out_ensembles_that_they_have_none_of():
    one = column()
    lines = summary.averaged({(Grid("any", "x"), "acc"): {"a": one}}, LEARNED).splitlines()
    assert [line.split("`")[1] for line in lines[2:]] == list(TRAINED)
    one["sgp_ensemble"] = [row("sgp_ensemble", seed, 0.8, 0.4, 0.1) for seed in range(3)]
    del one["map"]
    lines = summary.averaged({(Grid("any", "x"), "acc"): {"a": one}}, LEARNED).splitlines()
    assert [line.split("`")[1] for line in lines[2:]] == [*TRAINED, "sgp_ensemble"]
    assert "| `map` |  |" in lines


def test_ensembles_of_posteriors_are_in_files_of_their_own_and_need_all_seeds(tmp_path):
    for folder in ("comparison/by_acc", "mixtures"):
        (tmp_path / folder).mkdir(parents=True)
    write_csv(tmp_path / "comparison" / "by_acc" / "results.csv", [row for rows in column().values() for row in rows])
    found = [row("sgp_ensemble", seed, 0.8, 0.4, 0.1) for seed in range(3)]
    found += [row("blob_ensemble", seed, 0.8, 0.4, 0.1) for seed in range(2)]
    write_csv(tmp_path / "mixtures" / "times_1_by_acc.csv", found)
    read = summary.read(Grid("any", "comparison", mixtures=1), "acc", tmp_path)["cola"]
    assert read.keys() - set(SHOWN) == {"sgp_ensemble"}
    assert summary.read(Grid("any", "comparison"), "acc", tmp_path)["cola"].keys() == set(SHOWN)
    write_csv(tmp_path / "mixtures" / "times_1_by_acc.csv", found[1:])
    with pytest.raises(ValueError, match=r"times_1_by_acc\.csv: sgp_ensemble on cola has not all seeds that LoRA has"):
        summary.read(Grid("any", "comparison", mixtures=1), "acc", tmp_path)


@pytest.fixture
def results(tmp_path):
    """One task by accuracy, where early stopping changes the choices of LoRA+ and SGP-LoRA."""
    for folder, name in (("comparison/by_acc", "results.csv"), ("early_stopping", "times_1.csv")):
        (tmp_path / folder).mkdir(parents=True)
        of = column(**dict.fromkeys(SHOWN, [(0.9, 0.4, 0.1)] * 3)) if name == "times_1.csv" else column()
        rows = [row for name_, rows in of.items() if name == "results.csv" or name_ != "blob" for row in rows]
        write_csv(tmp_path / folder / name, rows)
    lines = ["1,cola,blob,acc,0.0006,0.0006", "1,cola,lora_plus,acc,5e-05,5e-05_early_stopping"]
    lines += ["1,cola,sgp,acc,0.0018,0.0018_early_stopping", "1,cola,blob,nll,0.0006,0.0002"]
    lines += ["4,cola,blob,acc,0.0006,0.0002"]
    text = "\n".join(["times,task,method,rule,without,with", *lines])
    (tmp_path / "early_stopping" / "chosen.csv").write_text(text)
    return tmp_path


def test_early_stopping_takes_the_place_of_what_it_changes(results):
    grid = Grid("any", "comparison", stopping=1)
    before = summary.read(grid._replace(stopping=None), "acc", results)["cola"]
    assert {row.acc for rows in before.values() for row in rows} == {0.8}
    found = summary.read(grid, "acc", results)["cola"]
    changed = {name for name, rows in found.items() if rows[0].acc == 0.9}
    assert changed == {"lora_plus", "sgp", "sgp_temperature"}


def test_a_choice_without_its_runs_is_refused(results):
    chosen = results / "early_stopping" / "chosen.csv"
    chosen.write_text(chosen.read_text().replace("1,cola,blob,acc,0.0006,0.0006", "1,cola,blob,acc,0.0006,0.0002"))
    with pytest.raises(ValueError, match="any, by acc: blob on cola has not all seeds that LoRA has"):
        summary.read(Grid("any", "comparison", stopping=1), "acc", results)


def test_tasks_as_reports_name_them():
    assert [summary.task_name(task) for task in ("sst2_100", "cola", "wg_s")] == ["sst2 (100)", "cola", "wg_s"]


def test_documents_have_what_the_results_give(tmp_path, capsys):
    assert len(TRAINED) == 9
    summary.main(["--figure", str(tmp_path / "means.png")])
    counted, mixtures, *averaged = capsys.readouterr().out.split("\n\n")
    readme, comparison = ((ROOT / name).read_text() for name in ("README.md", "benchmarks/results/COMPARISON.md"))
    assert counted in readme
    assert mixtures in readme
    assert len(averaged) == 4
    assert all(table.strip() in comparison for table in averaged)
    assert (tmp_path / "means.png").read_bytes().startswith(b"\x89PNG")
