"""The numbers of finished runs: one row per run, split and prediction."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from utils.report_rows import AUROCS, METRICS, ZERO_SHOT, Row
from utils.report_scores import Prediction, running_log_probs
from utils.run import METRICS_FILE, RELIABILITY_FILE, read_metrics
from utils.settings import CHOOSES_BEST, NOT_IN_TRAIN_FINGERPRINT

MODEL = (
    *("llm.name_or_path", "llm.revision", "llm.random_init", "llm.random_init_seed", "llm.architecture"),
    *("llm.config_overrides", "llm.tokenizer", "llm.pypi.file"),
)
"""Groups and keys of the configuration whose differing keys make another model."""
DATA = ("dset.schema", "dset.path", "dset.config", "dset.splits", "dset.test_file")
"""Those that make another task; ``dset.test_file`` is the validation file where that serves as test."""
EXAMPLES = (
    *("dset.train_file", "dset.validation_file", "dset.test_file", "dset.validation_fraction"),
    *("dset.validation_subset", "dset.test_subset", "dset.max_length", "dset.too_long"),
)
"""Keys that decide of which examples the splits of a task are."""
BASE = (
    *("quantization", "dtype", "dset.scoring", "dset.prompt_label", "dset.prompt_choice", "dset.labels"),
    *("dset.max_length", "dset.too_long", "dset.test_subset"),
)
"""Those that make a variant, and change the base model's predictions too."""
CHOICE = tuple(f"eval.{key}" for key in CHOOSES_BEST)
"""Those that make one only where they choose what is kept."""
VARIED = (
    *(*BASE, "method.factory", "peft", "opt", "train", "dset.train_file", "dset.validation_file"),
    *("dset.validation_fraction", "dset.validation_subset", "eval.keep", *CHOICE),
)
"""Those that make a variant."""
SAMPLES = "MC"
"""One more: the number of samples of the method's own prediction, whatever ``eval.n_mc`` is to a method without any."""
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
    """Those that tell runs apart, by dotted name, and ``SAMPLES``."""
    rows: list[Row]
    files: list[Path]
    """For each row the file of its raw predictions, which need not exist."""
    examples: dict[str, str]
    """The values of ``EXAMPLES``, files with their whole paths, but for training data that there is none of."""


def collect(roots: Sequence[str | Path]) -> tuple[list[Row], dict[tuple[Any, ...], Path], list[str]]:
    """Read every finished run at or below the given folders, and those that the given files name, one a line.

    Returns:
        The rows; for each row's (*row.run, split, mc) the file of its raw predictions, which need not exist; and a
        line for each folder that was left out, and for each setting in which the data of one column differ.

    Raises:
        FileNotFoundError: If there is no run at all, a folder that a file names is not there, or no run has finished.
        ValueError: If a file is no list of folders.
    """
    below = {folder: list(folder.rglob(METRICS_FILE)) for root in roots for folder in _named(Path(root))}
    folders = sorted({path.parent.resolve(): path.parent for paths in below.values() for path in paths}.values())
    where = ", ".join(map(str, roots))
    if not folders:
        raise FileNotFoundError(f"no runs found below {where}: no folder there holds a {METRICS_FILE}")
    runs, notes = [], [f"left out {folder}: no run there" for folder, paths in below.items() if not paths]
    for folder in folders:
        try:
            runs.append(_read_run(folder))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OmegaConfBaseException, YAMLError) as error:
            notes.append(f"left out {folder}: {' '.join(str(error).split())}")
    if not runs:
        raise FileNotFoundError(f"none of the {len(folders)} runs below {where} has finished: {notes[0]}")
    _name_apart(runs, MODEL, "model")
    _name_apart(runs, DATA, "task")
    _name_variants(runs)
    other_bases = _other_bases(runs)
    notes += [*other_bases.values(), *_other_data(runs)]
    rows: dict[tuple[Any, ...], Row] = {}
    files: dict[tuple[Any, ...], Path] = {}
    for run in runs:
        for row, file in zip(run.rows, run.files, strict=True):
            if row.method == ZERO_SHOT and run.folder in other_bases:
                continue
            key = (*row.run, row.split, row.mc)
            if key in rows:
                if row.method == ZERO_SHOT and abs((row.nll or 0.0) - (rows[key].nll or 0.0)) > SAME_MODEL:
                    notes.append(
                        f"left out the base model of {run.folder}, {row.split}: not that of {files[key].parent}, "
                        "though the settings are the same (dtype=auto depends on the device); report the two apart"
                    )
                elif row.method != ZERO_SHOT:
                    notes.append(f"left out {run.folder}, {row.split} MC={row.mc}: repeats {files[key].parent}")
                continue
            rows[key], files[key] = row, file
    return list(rows.values()), files, notes


def _named(root: Path) -> list[Path]:
    """The folder itself, or those that a file names."""
    if root.is_dir():
        return [root]
    if not root.exists():
        raise FileNotFoundError(f"there is no {root}: name run folders, or lists of them")
    no_list = f"{root} is no list of run folders (.txt): name folders, or --from-csv and a results.csv"
    if root.suffix != ".txt":
        raise ValueError(no_list)
    try:
        lines = root.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise ValueError(no_list) from None
    folders = [Path(line) for line in lines if line.strip()]
    if not folders:
        raise ValueError(f"{root} names no run: none had finished when it was written")
    if missing := [folder for folder in folders if not folder.is_dir()]:
        raise FileNotFoundError(f"{root} names {str(missing[0])!r}, which is no folder here: correct the list")
    return folders


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
        method = ZERO_SHOT if record["mc"] == ZERO_SHOT else config["method"]["name"]
        metrics: dict[str, Any] = {
            key: _finite(record[key] if key in METRICS else record.get(key)) for key in (*METRICS, *AUROCS)
        }
        steps = 0 if method == ZERO_SHOT else record["step"]
        mc = ZERO_SHOT if method == ZERO_SHOT else str(record["mc"])
        rows.append(Row(**shared, method=method, split=record["split"], mc=mc, steps=steps, **metrics))
    if config["dset"].get("test_file") is None:  # the validation file serves as test
        config["dset"] |= {"test_file": config["dset"].get("validation_file"), "validation_file": None}
    made = OmegaConf.create(config)
    ignored = () if OmegaConf.select(made, "eval.keep") == "best" else CHOICE
    settings = dict(
        pair
        for group in (*MODEL, *DATA, *VARIED)
        if group not in ignored
        for pair in _leaves(group, OmegaConf.select(made, group))
    )
    settings[SAMPLES] = next((row.mc for row in rows if row.mc.isdigit()), "mean")
    files = [folder / f"predictions_{r['split'].replace(':', '_')}_mc{r['mc']}.npz" for r in finals]
    examples = {key: str(OmegaConf.select(made, key)) for key in EXAMPLES}
    if config["dset"].get("train_file") is None:
        del examples["dset.train_file"]
    return Run(folder, settings, rows, files, examples)


def _finite(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Dotted names and values of what a variant may differ in."""
    leaf = name.rsplit(".", 1)[-1]
    if OmegaConf.is_dict(value):
        for key in value:
            yield from _leaves(f"{name}.{key}", value[key])
    elif leaf not in NOT_VARIED:
        if leaf in PATHS:
            value = "set" if value else "none"
        elif value and leaf.endswith("_file"):
            value = Path(*Path(value).parts[-2:])  # data may be elsewhere on another machine
        yield name, " ".join(str(value).split())


def _differing(runs: Sequence[Run], groups: Sequence[str]) -> set[str]:
    """The settings of some groups that are not the same in all runs."""
    names = {name for run in runs for name in run.settings if f"{name}.".startswith(tuple(f"{g}." for g in groups))}
    return {name for name in names if len({run.settings.get(name) for run in runs}) > 1}


def _told(run: Run, names: Iterable[str]) -> str:
    return ", ".join(f"{name.rsplit('.', 1)[-1]}={run.settings.get(name)}" for name in sorted(names))


def _name_apart(runs: Sequence[Run], groups: Sequence[str], part: str) -> None:
    """Add to the name of a model, or of a task, the settings in which the runs that bear it differ."""
    of_name: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        of_name.setdefault((run.rows[0].model, getattr(run.rows[0], part)), []).append(run)
    for alike in of_name.values():
        if names := _differing(alike, groups):
            for run in alike:
                for row in run.rows:
                    setattr(row, part, f"{getattr(row, part)} [{_told(run, names)}]")


def _name_variants(runs: Sequence[Run]) -> None:
    """Label each method's runs with the settings in which its runs of one task, model and size differ."""
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault((_method_of(run), *_base_of(run)), []).append(run)
    varied: dict[str, set[str]] = {}
    for (method, *_), group in groups.items():
        varied.setdefault(method, set()).update(_differing(group, (*VARIED, SAMPLES)))
    for run in runs:
        text = _told(run, varied[_method_of(run)])
        for row in run.rows:
            row.variant = "" if row.method == ZERO_SHOT else text


def _other_bases(runs: Sequence[Run]) -> dict[Path, str]:
    """By folder what tells a run's base model from that of the first run of its task, model and size."""
    first: dict[tuple[str, ...], Run] = {}
    found = {}
    for run in runs:
        if any(row.method == ZERO_SHOT for row in run.rows):
            other = first.setdefault(_base_of(run), run)
            if names := _differing([other, run], BASE):
                text = f"not that of {other.folder}, {', '.join(sorted(names))} differing; report the two apart"
                found[run.folder] = f"left out the base model of {run.folder}: {text}"
    return found


def _other_data(runs: Sequence[Run]) -> list[str]:
    """A line for each setting of the data in which the runs of one task, model and size differ, whatever their method.

    It names whole paths: files of the same name in folders of the same name are one task, since data may be moved.
    """
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(_base_of(run), []).append(run)
    notes = []
    for group in groups.values():
        for key in EXAMPLES:
            users: dict[str, list[Run]] = {}
            for run in group:
                if key in run.examples:
                    users.setdefault(run.examples[key], []).append(run)
            if len(users) > 1:
                told = "; ".join(f"{value} in {_seeds_of(found)}" for value, found in users.items())
                where = f"{group[0].rows[0].model} on {group[0].rows[0].column}"
                notes.append(f"{where}: {key} is {told}: report them apart, unless the examples are the same")
    return notes


def _seeds_of(runs: Sequence[Run]) -> str:
    """The runs by method and seed."""
    seeds: dict[str, list[int]] = {}
    for run in runs:
        seeds.setdefault(_own_row(run).label, []).append(run.rows[0].seed)
    return ", ".join(f"{label} seed {' '.join(map(str, sorted(found)))}" for label, found in sorted(seeds.items()))


def _own_row(run: Run) -> Row:
    """The first row that is not the base model's, if there is one."""
    return next((row for row in run.rows if row.method != ZERO_SHOT), run.rows[0])


def _method_of(run: Run) -> str:
    return _own_row(run).method


def _base_of(run: Run) -> tuple[str, str, str]:
    """What the base model of a run is evaluated for."""
    row = run.rows[0]
    return row.model, row.task, row.train_size
