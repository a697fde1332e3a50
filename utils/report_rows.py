"""A row of results, and the file that holds them: results.csv, enough for every table."""

import csv
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.run import write_csv_atomic

METRICS = ("acc", "nll", "ece", "brier")
ZERO_SHOT = "zero_shot"
"""The base model, as a method and as a prediction of others' runs."""
AUROCS = ("auroc_entropy", "auroc_mutual_information")
LATER = ("examples",)
"""Columns that files written before do not have."""


@dataclass
class Row:
    """One evaluation of one finished run; the columns of results.csv, in order.

    Attributes:
        p_acc: Only at the best method of a column: the largest p value against the others (also p_nll, ...).
        test_acc: The test behind it: paired, by seed, one-sample or welch (also test_nll, ...).
        temperature: T that the run's validation split asks for, where that was saved.
        nll_scaled: NLL with the predictive distribution scaled by it (also ece_scaled).
        examples: A digest of the examples of the report's split, where its predictions are known.
    """

    model: str
    task: str
    train_size: str
    method: str
    variant: str
    seed: int
    split: str
    mc: str
    steps: int
    commit: str
    acc: float | None
    nll: float | None
    ece: float | None
    brier: float | None
    auroc_entropy: float | None
    auroc_mutual_information: float | None
    p_acc: float | None = None
    p_nll: float | None = None
    p_ece: float | None = None
    p_brier: float | None = None
    test_acc: str = ""
    test_nll: str = ""
    test_ece: str = ""
    test_brier: str = ""
    temperature: float | None = None
    nll_scaled: float | None = None
    ece_scaled: float | None = None
    examples: str = ""

    @property
    def run(self) -> tuple[Any, ...]:
        """What tells runs apart."""
        return (self.model, self.task, self.train_size, self.method, self.variant, self.seed)

    @property
    def label(self) -> str:
        """Name of the method in tables and figures."""
        return f"{self.method} [{self.variant}]" if self.variant else self.method

    @property
    def column(self) -> str:
        """Name of the task in tables and figures, with the number of training examples if not all."""
        return column_name(self.task, self.train_size)


def column_name(task: str, train_size: str) -> str:
    """Name of a task with so many training examples, or all."""
    return task if train_size == "all" else f"{task} ({train_size})"


def own_predictions(rows: Sequence[Row]) -> list[Row]:
    """Of each run and split the method's own prediction: the first with samples if there is one, else the mean."""
    chosen: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = (*row.run, row.split)
        if key not in chosen or (chosen[key].mc == "mean" and row.mc not in ("mean", ZERO_SHOT)):
            chosen[key] = row
    return list(chosen.values())


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write results.csv; numbers in full, so that reading gives the same rows."""
    write_csv_atomic(path, [field.name for field in dataclasses.fields(Row)], map(dataclasses.asdict, rows))


def read_csv(path: str | Path) -> list[Row]:
    """Read results.csv.

    Raises:
        ValueError: If it is no CSV in UTF-8, columns are missing, a number is none, or there is no row.
    """
    try:
        return _read_csv(path)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no CSV in UTF-8 ({error}): name a results.csv that a report wrote") from error


def _read_csv(path: str | Path) -> list[Row]:
    rows = []
    with Path(path).open(encoding="utf-8-sig", newline="") as file:  # with a mark, as spreadsheets save it
        reader = csv.DictReader(file)
        there = reader.fieldnames or ()
        if missing := [field.name for field in dataclasses.fields(Row) if field.name not in (*there, *LATER)]:
            raise ValueError(f"{path} lacks the columns {', '.join(missing)}: name a results.csv that a report wrote")
        fields = [field for field in dataclasses.fields(Row) if field.name in there]
        for number, values in enumerate(reader, start=2):
            try:
                rows.append(Row(**{field.name: _parse(field.type, values[field.name]) for field in fields}))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path} line {number} is no row of results: {error}; correct or delete it") from error
    if not rows:
        raise ValueError(f"{path} holds no results: name a results.csv that a report wrote")
    return rows


def _parse(kind: Any, text: str | None) -> Any:
    if text is None:
        raise ValueError("a cell is missing")
    if kind is int:
        return int(text)
    return text if kind is str else (float(text) if text else None)
