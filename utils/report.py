"""Tables and figures over many runs, from what they have written.

python -m utils.report RUNS... [--out DIR] [--split test]
python -m utils.report --from-csv results.csv... [--out DIR] [--split test]

RUNS are run folders, folders that hold some, or text files that name either, one a line, as the comparison's
by_nll.txt. Writes results.csv (a row per evaluation), report.md, report.tex, report.csv and figures to DIR. Only runs
that differ in nothing but the seed are averaged; the model, task or method of others is named with the settings that
differ, as in "mle [lr=0.001]". What tells that the data of one column differ is printed. Where runs have saved their
validation predictions (eval.save_validation), tables say what temperature scaling makes of every method. With
--from-csv the tables, and the figure of accuracy against calibration, are made from the numbers in one or more
results.csv alone.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.report_figures import (
    draw_accuracy_calibration,
    draw_reliability,
    draw_samples,
    file_names,
    sample_curve,
)
from utils.report_rows import Row, read_csv, write_csv
from utils.report_runs import collect, load_prediction, load_scores
from utils.report_scores import Prediction, digest, fit_temperature, same_examples, scaled, score
from utils.report_tables import Column, aggregates_csv, columns, latex, mark_significant, markdown, tables
from utils.run import write_text_atomic

Files = Mapping[tuple[Any, ...], Path]


def report_runs(roots: Sequence[Path], out: Path, split: str) -> tuple[list[Path], list[str]]:
    """Collect runs, write results.csv, tables and figures; returns what was written and notes, a line each.

    Raises:
        FileNotFoundError: If no finished run is found.
        ValueError: If none has a record of the split.
    """
    rows, files, notes = collect(roots)
    _check_split(rows, split)
    models = sorted({row.model for row in rows})
    written = [out / "results.csv"]
    panels = {(model, task): column for model in models for task, column in columns(rows, model, split).items()}
    figures = file_names([names if len(models) > 1 else names[1:] for names in panels])
    for ((model, task), column), figure in zip(panels.items(), figures.values(), strict=True):
        predictions = _predictions(column, files)
        for name, of_seeds in predictions.items():
            for row in column[name]:
                row.examples = digest(of_seeds[row.seed]) if row.seed in of_seeds else ""
        if unlike := _of_other_examples(predictions):
            text = "are not of the examples of other methods with the same seed, and are not paired with them"
            notes.append(f"{model} on {task}: predictions of {', '.join(unlike)} {text}")
        mark_significant(column, predictions)
        _scale(column, files)
        if found := {name: of_seeds for name, of_seeds in predictions.items() if of_seeds}:
            written.append(draw_reliability(found, out / f"reliability_{figure}"))
        if curves := _curves(column, files):
            written.append(draw_samples(curves, out / f"samples_{figure}"))
    write_csv(out / "results.csv", rows)
    return written + report_rows(rows, out, split), notes


def report_rows(rows: Sequence[Row], out: Path, split: str) -> list[Path]:
    """Write what rows alone give: the tables, and the figure of accuracy against calibration.

    Raises:
        ValueError: If no row is of the split.
    """
    _check_split(rows, split)
    found = tables(rows, split)
    texts = {
        "report.md": f"# Results on {split}\n\n" + "\n".join(map(markdown, found)),
        "report.tex": "% needs the package booktabs\n" + "\n".join(map(latex, found)),
        "report.csv": aggregates_csv(rows, split),
    }
    for name, text in texts.items():
        write_text_atomic(out / name, text)
    models = sorted({row.model for row in rows})
    panels = {
        f"{model}: {task}" if len(models) > 1 else task: column
        for model in models
        for task, column in columns(rows, model, split).items()
    }
    return [*(out / name for name in texts), draw_accuracy_calibration(panels, out / "accuracy_calibration.png")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the report that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m utils.report", description="Tables and figures over many runs.")
    parser.add_argument("runs", nargs="*", type=Path, help="run folders, folders that hold some, or lists of them")
    parser.add_argument("--out", type=Path, default=Path("report"), metavar="DIR", help="where to write (report)")
    parser.add_argument("--split", default="test", help="split of the tables (test)")
    parser.add_argument("--from-csv", nargs="+", type=Path, metavar="FILE", help="results.csv in place of run folders")
    options = parser.parse_args(arguments)
    if bool(options.runs) == bool(options.from_csv):
        parser.error("name run folders or lists of them, or --from-csv and a results.csv: one of the two")
    notes: list[str] = []
    try:
        if options.from_csv:
            written = report_rows(_joined(options.from_csv), options.out, options.split)
        else:
            written, notes = report_runs(options.runs, options.out, options.split)
    except (OSError, ValueError) as error:
        parser.error(" ".join(str(error).split()))
    print(*notes, *written, sep="\n")


def _joined(paths: Sequence[Path]) -> list[Row]:
    """The rows of all files; each task is compared within one file, where significance was tested."""
    found: dict[tuple[str, str], Path] = {}
    rows = []
    for path in paths:
        own = read_csv(path)
        for model, task in sorted({(row.model, row.column) for row in own}):
            if (model, task) in found:
                raise ValueError(f"{found[model, task]} and {path} both have {model} on {task}: leave one of them out")
            found[model, task] = path
        rows += own
    return rows


def _check_split(rows: Sequence[Row], split: str) -> None:
    known = sorted({row.split for row in rows})
    if split not in known:
        raise ValueError(f"no run has a final record of split {split!r}: choose --split from {', '.join(known)}")


def _file(row: Row, files: Files) -> Path:
    return files[(*row.run, row.split, row.mc)]


def _predictions(column: Column, files: Files) -> dict[str, dict[int, Prediction]]:
    """For each method and seed the prediction, where its file is there."""
    return {
        name: {row.seed: found for row in rows if (found := load_prediction(_file(row, files)))}
        for name, rows in sorted(column.items())
    }


def _of_other_examples(predictions: Mapping[str, Mapping[int, Prediction]]) -> list[str]:
    """The methods that have a prediction of other examples than the first method with the same seed."""
    first: dict[int, Prediction] = {}
    return [
        name
        for name, of_seeds in predictions.items()
        if any(not same_examples([first.setdefault(seed, own), own]) for seed, own in of_seeds.items())
    ]


def _scale(column: Column, files: Files) -> None:
    """Write to rows what temperature scaling makes of them, where the validation split was saved."""
    for row in (row for rows in column.values() for row in rows):
        path = files.get((*row.run, "validation", row.mc))
        judged, own = load_prediction(path) if path else None, load_prediction(_file(row, files))
        if judged is not None and own is not None:
            row.temperature = fit_temperature(judged)
            changed = scaled(own, row.temperature)
            row.nll_scaled, row.ece_scaled = score(changed, "nll"), score(changed, "ece")


def _curves(column: Column, files: Files) -> dict[str, list[Any]]:
    """For each method that samples its curves against the number of samples, one per seed."""
    curves: dict[str, list[Any]] = {}
    for name, rows in sorted(column.items()):
        for row in rows:
            found = load_scores(_file(row, files)) if row.mc.isdigit() else None
            if found is not None and len(found[0]) > 1:
                curves.setdefault(name, []).append(sample_curve(found[0], found[1]))
    return curves


if __name__ == "__main__":
    main()
