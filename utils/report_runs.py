"""The numbers of finished runs: one row per run, split and prediction."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from utils.report_rows import AUROCS, METRICS, Row
from utils.report_scores import Prediction, running_log_probs
from utils.run import METRICS_FILE, RELIABILITY_FILE, read_metrics
from utils.settings import NOT_IN_TRAIN_FINGERPRINT

VARIED = (
    *("method.factory", "peft", "opt", "train", "quantization", "dtype"),
    *("dset.scoring", "dset.validation_fraction", "dset.validation_subset", "dset.test_subset", "eval.keep"),
)
"""Groups and keys of the configuration whose differing keys make a variant."""
NOT_VARIED = (*NOT_IN_TRAIN_FINGERPRINT, "_target_", "init_seed")
"""Keys below them that change no result, or only with the seed or the method."""
SAME_MODEL = 0.01
"""Difference in NLL, nats, that padding and rounding can make to one base model."""
PATHS = ("init_adapter",)
"""Keys of which only whether they are set tells variants apart."""


@dataclass
class Run:
    """A finished run folder."""

    folder: Path
    settings: dict[str, Any]
    rows: list[Row]
    files: list[Path]
    """For each row the file of its raw predictions, which need not exist."""


def collect(roots: Sequence[str | Path]) -> tuple[list[Row], dict[tuple[Any, ...], Path], list[str]]:
    """Read every finished run at or below the given folders.

    Returns:
        The rows; for each row's (*row.run, split, mc) the file of its raw predictions, which need not exist; and a
        line for each folder that was left out.

    Raises:
        FileNotFoundError: If there is no run at all, or none has finished.
    """
    folders = sorted({path.parent for root in roots for path in Path(root).rglob(METRICS_FILE)})
    where = ", ".join(map(str, roots))
    if not folders:
        raise FileNotFoundError(f"no runs found below {where}: no folder there holds a {METRICS_FILE}")
    runs, notes = [], []
    for folder in folders:
        try:
            runs.append(_read_run(folder))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OmegaConfBaseException, YAMLError) as error:
            notes.append(f"left out {folder}: {' '.join(str(error).split())}")
    if not runs:
        raise FileNotFoundError(f"none of the {len(folders)} runs below {where} has finished: {notes[0]}")
    _name_variants(runs)
    rows: dict[tuple[Any, ...], Row] = {}
    files: dict[tuple[Any, ...], Path] = {}
    for run in runs:
        for row, file in zip(run.rows, run.files, strict=True):
            key = (*row.run, row.split, row.mc)
            if key in rows:
                if row.method == "zero_shot" and abs((row.nll or 0.0) - (rows[key].nll or 0.0)) > SAME_MODEL:
                    notes.append(
                        f"left out the base model of {run.folder}, {row.split}: not that of {files[key].parent}; "
                        "report runs of one dset.scoring, dtype and quantization at a time"
                    )
                elif row.method != "zero_shot":
                    notes.append(f"left out {run.folder}, {row.split} MC={row.mc}: repeats {files[key].parent}")
                continue
            rows[key], files[key] = row, file
    return list(rows.values()), files, notes


def load_scores(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Raw scores (S, N, C), answers (N,) and ids (N,) of a predictions file; None if it is absent or damaged."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays["logits"], arrays["answer"], arrays["ids"]
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None


def load_prediction(path: Path) -> Prediction | None:
    """The predictive distribution of a predictions file; None if it is absent or damaged."""
    found = load_scores(path)
    return None if found is None else Prediction(found[2], found[1], running_log_probs(found[0])[-1])


def _read_run(folder: Path) -> Run:
    """Rows of a run; raises ValueError, OSError or KeyError for one that is unfinished or unreadable."""
    finals = [record for record in read_metrics(folder) if record["kind"] == "final"]
    if not finals or not (folder / RELIABILITY_FILE).is_file():
        raise ValueError("the run has not finished")
    config: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"), resolve=True)
    environment: Any = OmegaConf.to_container(OmegaConf.load(folder / "environment.json"))
    subset = config["dset"].get("train_subset")
    shared: dict[str, Any] = {
        "model": Path(config["llm"]["name_or_path"]).name,
        "task": config["dset"]["name"],
        "train_size": "all" if subset is None else str(subset),
        "variant": "",
        "seed": int(config["seed"]),
        "commit": environment.get("git_commit") or "",
    }
    rows = []
    for record in finals:
        method = "zero_shot" if record["mc"] == "zero_shot" else config["method"]["name"]
        metrics: dict[str, Any] = {
            key: _finite(record[key] if key in METRICS else record.get(key)) for key in (*METRICS, *AUROCS)
        }
        steps = 0 if method == "zero_shot" else record["step"]
        mc = "zero_shot" if method == "zero_shot" else str(record["mc"])
        rows.append(Row(**shared, method=method, split=record["split"], mc=mc, steps=steps, **metrics))
    settings = dict(
        pair for group in VARIED for pair in _leaves(group, OmegaConf.select(OmegaConf.create(config), group))
    )
    files = [folder / f"predictions_{r['split'].replace(':', '_')}_mc{r['mc']}.npz" for r in finals]
    return Run(folder, settings, rows, files)


def _finite(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Dotted names and values of what a variant may differ in."""
    leaf = name.rsplit(".", 1)[-1]
    if OmegaConf.is_dict(value):
        for key in value:
            yield from _leaves(f"{name}.{key}", value[key])
    elif leaf not in NOT_VARIED:
        yield name, ("set" if value else "none") if leaf in PATHS else str(value)


def _name_variants(runs: Sequence[Run]) -> None:
    """Label each method's runs with the settings in which its runs of one task, model and size differ."""
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(_method_of(run)[:4], []).append(run)
    varied: dict[str, set[str]] = {}
    for (method, *_), group in groups.items():
        names = {name for run in group for name in run.settings}
        varied.setdefault(method, set()).update(
            name for name in names if len({run.settings.get(name) for run in group}) > 1
        )
    for run in runs:
        differing = sorted(varied[_method_of(run)[0]])
        text = ", ".join(f"{name.rsplit('.', 1)[-1]}={run.settings.get(name)}" for name in differing)
        for row in run.rows:
            row.variant = "" if row.method == "zero_shot" else text


def _method_of(run: Run) -> tuple[str, ...]:
    row = next((row for row in run.rows if row.method != "zero_shot"), run.rows[0])
    return row.method, row.model, row.task, row.train_size
