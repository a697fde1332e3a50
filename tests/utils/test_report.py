"""Reports over synthetic run folders, made with the writers that runs use."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from bnn.metrics import evaluate_predictions
from utils import report, report_figures
from utils.report_rows import own_predictions, read_csv, write_csv
from utils.report_runs import collect, load_scores
from utils.run import RunLogger, save_predictions, write_json_atomic

N, C = 300, 3


def scores(method: str, seed: int, task: str, samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(samples, N, C) and the answers of a task; sgp is right more often than mle, and less sure."""
    data = torch.Generator().manual_seed(len(task))
    answer = torch.randint(C, (N,), generator=data)
    shared = torch.randn(N, C, generator=data)
    noise = torch.Generator().manual_seed(100 * len(method) + (0 if method == "zero_shot" else seed))
    signal, sharpness = {"mle": (1.0, 4.0), "sgp": (2.2, 1.2), "zero_shot": (0.2, 1.0)}[method]
    mean = signal * torch.nn.functional.one_hot(answer, C) + shared + 0.1 * torch.randn(N, C, generator=noise)
    return sharpness * (mean + 0.8 * torch.randn(samples, N, C, generator=noise)), answer


def write_run(
    folder: Path, method: str = "mle", seed: int = 0, task: str = "arc", *, ood: bool = False, epochs: int = 2, more=()
) -> Path:
    log = RunLogger(folder, io.StringIO())
    config = {
        "seed": seed,
        "llm": {"name_or_path": "org/tiny"},
        "dset": {"name": task, "train_subset": 64},
        "method": {"name": method, "factory": {"_target_": "x"}},
        "train": {"epochs": epochs, "init_adapter": None},
    }
    OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
    write_json_atomic(folder / "environment.json", {"git_commit": "abc"})
    others = {"zero_shot": [], "mle": [("zero_shot", 1)], "sgp": [("zero_shot", 1), (8, 8)]}[method]
    modes = [*others, ("mean", 1)]
    for split in ["test", *(["ood:far"] if ood else []), *more]:
        for mc, samples in modes:
            logits, answer = scores("zero_shot" if mc == "zero_shot" else method, seed, task, samples)
            metrics = evaluate_predictions(logits, answer)
            if ood and split != "test":
                metrics |= {"auroc_entropy": 0.75, "auroc_mutual_information": 0.625}
            log.final(epoch=1, step=7, split=split, mc=mc, metrics=metrics)
            ids = [f"q{i}" for i in range(N)]
            save_predictions(folder / f"predictions_{split.replace(':', '_')}_mc{mc}.npz", logits, answer, ids)
    log.reliability({})
    log.close()
    return folder


@pytest.fixture
def runs(tmp_path) -> Path:
    root = tmp_path / "runs"
    for seed in range(2):
        for method in ("mle", "sgp"):
            write_run(root / f"{method}{seed}", method, seed, ood=True)
    write_run(root / "boolq", "mle", 0, "boolq")
    return root


def texts(folder: Path) -> dict[str, str]:
    return {name: (folder / name).read_text() for name in ("report.md", "report.tex", "report.csv")}


def test_report_of_runs_and_round_trip_through_csv(runs, tmp_path, capsys):
    report.main([str(runs), "--out", str(tmp_path / "a")])
    first = texts(tmp_path / "a")
    for name in ("reliability_arc-64", "samples_arc-64", "accuracy_calibration", "reliability_boolq-64"):
        assert (tmp_path / "a" / f"{name}.png").stat().st_size > 5000
    assert not (tmp_path / "a" / "samples_boolq-64.png").exists()  # nothing samples there
    report.main(["--from-csv", str(tmp_path / "a" / "results.csv"), "--out", str(tmp_path / "b")])
    assert texts(tmp_path / "b") == first
    assert (tmp_path / "b" / "accuracy_calibration.png").exists()
    known = {row.column: row.examples for row in read_csv(tmp_path / "a" / "results.csv") if row.examples}
    assert len(set(known.values())) == len(known) == 2
    assert "**" in first["report.md"]  # sgp is better by far, with paired predictions
    assert "Not run: sgp on boolq (64)." in first["report.md"]
    assert "sgp (mean)" in first["report.md"]
    assert r"\textbf{" in first["report.tex"]
    assert "zero\\_shot" in first["report.tex"]
    far = first["report.md"].split("out of distribution")[1]
    assert "| arc (64) | far | sgp |" in far
    assert "0.7500 ± 0.0000 | 0.6250 ± 0.0000" in far


def test_temperature_scaling_of_runs_that_saved_validation_predictions(tmp_path):
    """T is the best for validation, where scores are twice as sharp; dividing test scores by it gives the numbers."""
    for method in ("mle", "sgp"):
        folder = write_run(tmp_path / "runs" / method, method, more=("validation",))
        for path in folder.glob("predictions_validation_*"):
            logits, answer, ids = load_scores(path)
            save_predictions(path, torch.from_numpy(2 * logits), torch.from_numpy(answer), list(ids))
    report.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    rows = {r.method: r for r in read_csv(tmp_path / "out" / "results.csv") if r.split == "test" and r.mc != "8"}
    assert 4 < rows["mle"].temperature < 20, "its scores are too large"
    logits, answer = scores("mle", 0, "arc", 1)
    expected = evaluate_predictions(logits / rows["mle"].temperature, answer)
    assert rows["mle"].nll_scaled == pytest.approx(expected["nll"], rel=1e-5)
    assert rows["mle"].ece_scaled == pytest.approx(expected["ece"], abs=1e-6)
    for other in (0.95, 1.05):
        worse = [evaluate_predictions(2 * logits / (t * rows["mle"].temperature), answer)["nll"] for t in (1, other)]
        assert worse[1] > worse[0], "not the best for validation"
    text = (tmp_path / "out" / "report.md").read_text()
    assert "NLL (nats) after temperature scaling on test" in text
    assert f"| mle | {rows['mle'].nll_scaled:.4f} |" in text


def test_files_of_different_tasks_make_one_report(runs, tmp_path, capsys):
    report.main([str(runs), "--out", str(tmp_path / "all")])
    report.main([str(runs / "boolq"), "--out", str(tmp_path / "boolq")])
    report.main([*(str(p) for p in runs.iterdir() if p.name != "boolq"), "--out", str(tmp_path / "arc")])
    files = [str(tmp_path / name / "results.csv") for name in ("arc", "boolq")]
    report.main(["--from-csv", *files, "--out", str(tmp_path / "joined")])
    assert texts(tmp_path / "joined") == texts(tmp_path / "all")
    with pytest.raises(SystemExit):
        report.main(["--from-csv", *files, files[1], "--out", str(tmp_path / "joined")])
    assert "both have tiny on boolq (64): leave one of them out" in capsys.readouterr().err


def test_rows_hold_what_was_recorded(runs):
    rows, files, notes = collect([runs])
    assert notes == []
    assert len({(*row.run, row.split, row.mc) for row in rows}) == len(rows)
    row = next(r for r in rows if r.method == "sgp" and r.seed == 1 and r.split == "test" and r.mc == "8")
    assert row.run == ("tiny", "arc", "64", "sgp", "", 1)
    assert (row.steps, row.commit) == (7, "abc")
    assert row.nll == pytest.approx(evaluate_predictions(*scores("sgp", 1, "arc", 8))["nll"])
    assert files[(*row.run, "test", "8")].is_file()
    zero = [r for r in rows if r.method == "zero_shot" and r.task == "arc" and r.split == "test"]
    assert [r.seed for r in zero] == [0, 1]  # once per seed, though two methods wrote it
    assert {(r.method, r.mc) for r in own_predictions(rows)} == {
        ("zero_shot", "zero_shot"),
        ("mle", "mean"),
        ("sgp", "8"),
    }


def test_unfinished_and_damaged_runs_are_named_and_left_out(runs, capsys, tmp_path):
    (runs / "mle0" / "reliability.json").unlink()
    (runs / "sgp0" / "config.yaml").write_text("a: [")
    (runs / "mle1" / "metrics.jsonl").write_text("broken\n")
    report.main([str(runs), "--out", str(tmp_path / "out")])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out")]
    assert [Path(line.split(":")[0].removeprefix("left out ")).name for line in lines] == ["mle0", "mle1", "sgp0"]
    assert "the run has not finished" in lines[0]


def test_a_damaged_file_of_predictions_is_as_good_as_none(runs, tmp_path):
    for path in runs.rglob("predictions_test_*.npz"):
        path.write_bytes(path.read_bytes()[:-100])
        assert load_scores(path) is None
    report.main([str(runs), "--out", str(tmp_path / "out")])
    assert "welch" in (tmp_path / "out" / "report.csv").read_text()


def test_another_base_model_is_not_left_out_in_silence(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", "sgp")
    assert collect([tmp_path])[2] == []
    log = (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in log]
    for record in records:
        if record.get("mc") == "zero_shot":
            record["nll"] += 0.5
    (tmp_path / "b" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert any("not that of" in note and "the settings are the same" in note for note in collect([tmp_path])[2])


def test_base_models_that_differ_in_a_setting_are_not_averaged(tmp_path):
    """One run per seed, so none repeats another: only the settings tell that the two belong apart."""
    for seed, scoring in enumerate(("label", "choice_sum", "label")):
        changed_config(write_run(tmp_path / str(seed), seed=seed), {"dset.scoring": scoring})
    rows, _, (note,) = collect([tmp_path])
    assert {row.seed for row in rows if row.method == "zero_shot"} == {0, 2}
    assert note == (
        f"left out the base model of {tmp_path}/1: not that of {tmp_path}/0, dset.scoring differing; "
        "report the two apart"
    )


def test_variants_are_named_by_what_differs(tmp_path):
    for epochs in (2, 3):
        write_run(tmp_path / f"e{epochs}", epochs=epochs)
    write_run(tmp_path / "repeated", epochs=3)
    rows, _, notes = collect([tmp_path])
    assert {row.label for row in rows} == {"zero_shot", "mle [epochs=2]", "mle [epochs=3]"}
    assert len(notes) == 1
    assert "repeats" in notes[0]


def test_variants_differ_in_what_changes_a_result_within_a_task(tmp_path):
    """Padding changes none, nor does a task that has its own epochs; other test examples do."""
    for seed, changed in enumerate(({"train.graph_padding": None}, {"train.graph_padding": 32})):
        changed_config(write_run(tmp_path / "a" / str(seed), seed=seed), changed)
    write_run(tmp_path / "a" / "rte", task="rte", epochs=5)
    assert {row.label for row in collect([tmp_path / "a"])[0]} == {"zero_shot", "mle"}
    for subset in (None, 100):
        changed_config(write_run(tmp_path / "b" / str(subset)), {"dset.test_subset": subset})
    labels = {row.label for row in collect([tmp_path / "b"])[0]}
    assert labels == {"zero_shot", "mle [test_subset=None]", "mle [test_subset=100]"}


def test_what_chose_the_adapter_tells_runs_apart_where_the_best_is_kept(tmp_path):
    for keep, labels in (("last", {"mle"}), ("best", {"mle [every=epoch]", "mle [every=5]"})):
        for seed, every in enumerate(("epoch", 5)):
            folder = write_run(tmp_path / keep / str(seed), seed=seed)
            changed_config(folder, {"eval.keep": keep, "eval.every": every})
        assert {row.label for row in collect([tmp_path / keep])[0]} == {"zero_shot", *labels}


@pytest.mark.parametrize(
    ("key", "first", "second", "model", "task"),
    [
        ("llm.name_or_path", "/a/tiny", "/b/tiny", "tiny [name_or_path={}]", "arc"),
        ("llm.revision", "one", "two", "tiny [revision={}]", "arc"),
        ("llm.tokenizer", "/a/own", "/b/own", "tiny [tokenizer={}]", "arc"),
        ("llm.pypi.file", "q4.gguf", "q8.gguf", "tiny [file={}]", "arc"),
        ("llm.random_init", False, True, "tiny [random_init={}]", "arc"),
        ("llm.config_overrides", {"rope_theta": 1}, {"rope_theta": 2}, "tiny [rope_theta={}]", "arc"),
        ("llm.random_init_seed", 0, 1, "tiny [random_init_seed={}]", "arc"),
        ("llm.architecture", {"hidden_size": 16}, {"hidden_size": 32}, "tiny [hidden_size={}]", "arc"),
        ("dset.config", "anatomy", "astronomy", "tiny", "arc [config={}]"),
        ("dset.test_file", "a/test.jsonl", "b/test.jsonl", "tiny", "arc [test_file={}]"),
    ],
)
def test_other_models_and_data_are_told_apart_whatever_the_seed(tmp_path, key, first, second, model, task):
    """Seeds 0 and 1 of one, 2 and 3 of the other; tables, base models and figures follow the names."""
    for seed, value in enumerate((first, first, second, second)):
        changed_config(write_run(tmp_path / "runs" / str(seed), seed=seed), {key: value})
    report.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    found: dict[tuple[str, str], set[int]] = {}
    for row in read_csv(tmp_path / "out" / "results.csv"):
        assert (row.label, row.train_size) in {("mle", "64"), ("zero_shot", "64")}
        found.setdefault((row.model, row.task), set()).add(row.seed)
    names = [next(iter(v.values())) if isinstance(v, dict) else v for v in (first, second)]
    assert found == {(model.format(v), task.format(v)): seeds for v, seeds in zip(names, ({0, 1}, {2, 3}), strict=True)}
    assert len(list((tmp_path / "out").glob("reliability_*.png"))) == 2


def test_data_that_was_moved_and_runs_without_training_data_are_of_one_task(tmp_path):
    for seed, place in enumerate(("/home/a", "/srv/b")):
        files = {f"dset.{split}_file": f"{place}/own/{split}.jsonl" for split in ("train", "test")}
        changed_config(write_run(tmp_path / str(seed), seed=seed), files)
    changed_config(write_run(tmp_path / "sgp", "sgp"), {"dset.train_file": None, "dset.test_file": "/x/own/test.jsonl"})
    rows = collect([tmp_path])[0]
    assert {row.task for row in rows} == {"arc"}
    assert {(row.label, row.seed) for row in rows if row.method == "mle"} == {("mle", 0), ("mle", 1)}


@pytest.mark.parametrize(
    ("key", "first", "second"),
    [
        ("test_subset", None, 10),
        ("validation_subset", None, 10),
        ("validation_file", "/x/own/a.jsonl", "/x/own/b.jsonl"),
        ("train_file", "/x1/own/train.jsonl", "/x2/own/train.jsonl"),
        ("test_file", "/x1/own/test.jsonl", "/x2/own/test.jsonl"),
    ],
)
def test_methods_of_one_column_with_other_data_are_named(tmp_path, capsys, key, first, second):
    files = {f"dset.{split}_file": f"/x/own/{split}.jsonl" for split in ("train", "validation", "test")}
    for method, value in (("mle", first), ("sgp", second)):
        for seed in range(2):
            folder = write_run(tmp_path / "runs" / f"{method}{seed}", method, seed)
            changed_config(folder, {**files, f"dset.{key}": value})
    report.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    rows = read_csv(tmp_path / "out" / "results.csv")
    assert {(row.task, row.label) for row in rows} == {("arc", name) for name in ("zero_shot", "mle", "sgp")}
    assert (
        f"tiny on arc (64): dset.{key} is {first} in mle seed 0 1; {second} in sgp seed 0 1: report them apart, "
        "unless the examples are the same"
    ) in capsys.readouterr().out.splitlines()


def test_seeds_of_one_method_on_files_elsewhere_are_named(tmp_path):
    """No training data is no other data."""
    for seed, place in enumerate(("/x1/d", "/x2/d")):
        files = {"dset.test_file": f"{place}/test.jsonl", "dset.train_file": "/x/d/train.jsonl"}
        changed_config(write_run(tmp_path / str(seed), seed=seed), files)
    changed_config(write_run(tmp_path / "sgp", "sgp"), {"dset.test_file": "/x1/d/test.jsonl", "dset.train_file": None})
    assert collect([tmp_path])[2] == [
        "tiny on arc (64): dset.test_file is /x1/d/test.jsonl in mle seed 0, sgp seed 0; /x2/d/test.jsonl in mle seed "
        "1: report them apart, unless the examples are the same"
    ]


def test_predictions_of_other_examples_are_named_and_not_paired(tmp_path, capsys):
    """No setting tells, as where a file was changed; rows without a name have the numbers of others."""
    for seed in range(2):
        for method in ("mle", "sgp"):
            folder = write_run(tmp_path / "runs" / f"{method}{seed}", method, seed)
        for path in folder.glob("predictions_test_*"):
            logits, answer, ids = load_scores(path)
            save_predictions(path, torch.from_numpy(logits), torch.from_numpy((answer + 1) % C), list(ids))
    report.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    tests = {row.label: row.test_nll for row in read_csv(tmp_path / "out" / "results.csv") if row.p_nll is not None}
    assert tests.keys() == {"sgp"}
    assert tests["sgp"] != "paired"
    note = "tiny on arc (64): predictions of sgp are not of the examples of other methods with the same seed"
    assert f"{note}, and are not paired with them" in capsys.readouterr().out.splitlines()


def test_a_validation_file_that_serves_as_test_makes_another_task(tmp_path):
    """Named as the test file it is the same data."""
    for method, file in (("mle", "a"), ("sgp", "b")):
        settings = {"dset.test_file": None, "dset.validation_file": f"/x/{file}.jsonl"}
        changed_config(write_run(tmp_path / method, method), settings)
    changed_config(write_run(tmp_path / "same", seed=1), {"dset.test_file": "/x/a.jsonl"})
    rows, _, notes = collect([tmp_path])
    assert {(row.label, row.seed, row.task) for row in rows if row.method != "zero_shot"} == {
        ("mle", 0, "arc [test_file=x/a.jsonl]"),
        ("mle", 1, "arc [test_file=x/a.jsonl]"),
        ("sgp", 0, "arc [test_file=x/b.jsonl]"),
    }
    assert notes == []


def test_names_of_data_files_fit_into_names_of_figures(tmp_path):
    for seed, folder in enumerate(("a" * 120, "b" * 120)):
        files = {f"dset.{split}_file": f"/data/{folder}/{split}.jsonl" for split in ("train", "test")}
        changed_config(write_run(tmp_path / "runs" / str(seed), seed=seed), files)
    report.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    assert len(list((tmp_path / "out").glob("reliability_*.png"))) == 2


def test_figures_of_tasks_of_similar_names_are_files_of_their_own(tmp_path):
    """arc (64), with 64 training examples, beside a task called arc-64, and one in capitals."""
    write_run(tmp_path / "runs" / "subset")
    for task in ("arc-64", "ARC-64"):
        changed_config(write_run(tmp_path / "runs" / task, task=task), {"dset.train_subset": None})
    write_run(tmp_path / "runs" / "boolq", task="boolq")
    report.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    names = {path.name for path in (tmp_path / "out").glob("reliability_*.png")}
    assert len({name.casefold() for name in names}) == 4
    assert "reliability_boolq-64.png" in names


def test_numbers_of_samples_are_variants_of_methods_that_sample_only(tmp_path):
    for seed, samples in enumerate((8, 4)):
        changed_config(write_run(tmp_path / f"mle{seed}", seed=seed), {"eval.n_mc": samples})
        folder = changed_config(write_run(tmp_path / f"sgp{seed}", "sgp", seed), {"eval.n_mc": samples})
        log = folder / "metrics.jsonl"
        log.write_text(log.read_text().replace('"mc": 8', f'"mc": {samples}'))
    labels = {(row.label, row.seed) for row in collect([tmp_path])[0] if row.method != "zero_shot"}
    assert labels == {("mle", 0), ("mle", 1), ("sgp [MC=8]", 0), ("sgp [MC=4]", 1)}


def test_prompts_and_rates_are_variants_in_one_line(tmp_path):
    for seed, (prompt, rate) in enumerate((("Q:\nA:", 2e-3), ("Q:", 1e-3))):
        changed_config(write_run(tmp_path / str(seed), seed=seed), {"dset.prompt_choice": prompt, "opt.lr": rate})
    labels = {row.label for row in collect([tmp_path])[0] if row.method == "mle"}
    assert labels == {"mle [prompt_choice=Q: A:, lr=0.002]", "mle [prompt_choice=Q:, lr=0.001]"}


def changed_config(folder: Path, changed: dict[str, Any]) -> Path:
    config = OmegaConf.load(folder / "config.yaml")
    for key, value in changed.items():
        OmegaConf.update(config, key, value)
    OmegaConf.save(config, folder / "config.yaml")
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["empty"], "no runs found below empty"),
        (["run", "none"], "there is no none: name run folders, or lists of them"),
        (["run", "bad.csv"], "bad.csv is no list of run folders (.txt): name folders, or --from-csv"),
        (["run", "bytes.txt"], "bytes.txt is no list of run folders"),
        (["run", "none.txt"], "none.txt names no run"),
        (["moved.txt"], "moved.txt names 'run/config.yaml', which is no folder here"),
        (["--from-csv", "bad.csv"], "bad.csv lacks the columns task"),
        (["--from-csv", "none.csv"], "none.csv"),
        ([], "one of the two"),
        (["run", "--split", "tset"], "choose --split from test"),
    ],
)
def test_errors_are_one_clear_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("bad.csv").write_text("model,acc\nx,1\n")
    Path("moved.txt").write_text("run\nrun/config.yaml\n")
    Path("none.txt").write_text("\n")
    Path("bytes.txt").write_bytes(b"caf\xe9\n")
    Path("empty").mkdir()
    write_run(Path("run"))
    with pytest.raises(SystemExit):
        report.main(arguments)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in last


def test_a_list_names_runs_whatever_their_folders_are_called(tmp_path, monkeypatch):
    """Blank lines name none, least of all the current folder; what is also named by itself is read once."""
    monkeypatch.chdir(tmp_path)
    listed = [write_run(tmp_path / "all runs\x85.txt" / f"seed {seed}", seed=seed) for seed in range(3)][:2]
    (tmp_path / "empty").mkdir()
    Path("by_nll.txt").write_text("\ufeff" + "".join(f"{folder}\n" for folder in (*listed, "empty")) + "\n")
    rows, _, notes = collect(["by_nll.txt", listed[0].relative_to(tmp_path)])
    assert {row.seed for row in rows} == {0, 1}
    assert notes == ["left out empty: no run there"]


def test_a_task_with_the_base_model_alone_has_no_panel(tmp_path, monkeypatch):
    write_run(tmp_path / "mle", "mle")
    write_run(tmp_path / "base", "zero_shot", task="boolq")
    made, grid = [], report_figures.panel_grid
    monkeypatch.setattr(report_figures, "panel_grid", lambda count, *size: made.append(count) or grid(count, *size))
    for folders, panels in ((["mle", "base"], 1), (["base"], 1), (["mle"], 1)):
        rows = collect([tmp_path / folder for folder in folders])[0]
        report.report_rows(rows, tmp_path / "out", "test")
        assert made.pop() == panels


@pytest.mark.parametrize(
    ("count", "columns", "rows"), [(1, 1, 1), (4, 4, 1), (5, 3, 2), (6, 3, 2), (9, 3, 3), (12, 4, 3), (13, 4, 4)]
)
def test_panels_fill_few_rows_evenly(count, columns, rows):
    figure, panels = report_figures.panel_grid(count, 1.0, 1.0)
    grid = panels[0].get_subplotspec().get_gridspec()
    assert (grid.ncols, grid.nrows, len(panels)) == (columns, rows, count)
    assert len(figure.axes) == count


def test_a_damaged_number_in_the_csv_is_named(runs, tmp_path):
    report.main([str(runs), "--out", str(tmp_path / "a")])
    path = tmp_path / "a" / "results.csv"
    write_csv(tmp_path / "again.csv", read_csv(path))
    assert (tmp_path / "again.csv").read_text() == path.read_text()
    marked = tmp_path / "marked.csv"
    marked.write_text(path.read_text(), encoding="utf-8-sig")  # as a spreadsheet saves it
    assert read_csv(marked) == read_csv(path)
    for damaged in (path.read_text().encode("utf-16"), b'"' + path.read_bytes() + 200_000 * b"x"):
        marked.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"marked\.csv is no CSV in UTF-8"):
            read_csv(marked)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1].replace("abc", "abc,x", 1)]))
    with pytest.raises(ValueError, match="line 2"):
        read_csv(path)


def test_a_run_of_the_base_model_is_paired_with_the_others_by_its_predictions(tmp_path):
    for seed in range(3):
        write_run(tmp_path / f"sgp{seed}", "sgp", seed)
    write_run(tmp_path / "base", "zero_shot")
    for path in tmp_path.glob("sgp*/predictions_test_mczero_shot.npz"):
        path.unlink()
    report.main([str(tmp_path), "--out", str(tmp_path / "out")])
    judged = [row for row in read_csv(tmp_path / "out" / "results.csv") if row.p_nll is not None]
    assert {row.method for row in judged} == {"sgp"}
    assert {row.test_nll for row in judged} == {"paired"}
    assert all(row.p_nll < 1e-6 for row in judged)


def test_missing_prediction_files_leave_tests_over_seeds(runs, tmp_path):
    for path in runs.rglob("*.npz"):
        path.unlink()
    report.main([str(runs), "--out", str(tmp_path / "a")])
    tests = {row.test_nll for row in read_csv(tmp_path / "a" / "results.csv")}
    assert tests == {"", "one-sample"}
    assert not list((tmp_path / "a").glob("reliability_*"))
