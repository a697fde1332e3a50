"""load_task: from the `dset` settings to the splits of a task."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from utils.data.encode import SCORINGS
from utils.data.example import DataError, Example, Question, TaskData, near_matches
from utils.data.parsers import get_parser
from utils.data.prompts import render
from utils.data.quiz import quiz_questions
from utils.data.source import Rows, open_source, parse_rows, read_jsonl
from utils.data.splits import RawSplit, labelled, resolve, subset, without

SPLITS = ("train", "validation", "test")
PHRASES = {"sst2": "sentence"}
"""By schema the field of which training rows may hold a part of another row's: SST-2 has its sentences' phrases."""
FILES = ("train_file", "validation_file", "test_file")
"""Keys of a user's own data."""
PLACE = ("path", "config", "splits")
"""Keys of where a benchmark is."""


@dataclass(frozen=True)
class TaskConfig:
    """The settings of one data set, as in configs/dset (where each key is described).

    `splits` maps train, validation and test to split names of the source (null: absent) and may hold `ood`,
    a mapping from the name of an out-of-distribution set to a split name. The schema `jsonl` reads `FILES`, the others
    but `quiz` read `PLACE`.
    """

    name: str
    schema: str
    scoring: str
    prompt_label: str
    prompt_choice: str
    labels: list[str]
    validation_fraction: float
    train_subset: int | None
    validation_subset: int | None
    test_subset: int | None
    max_length: int
    too_long: str
    path: str | None = None
    config: str | None = None
    splits: dict[str, Any] | None = None
    train_file: str | None = None
    validation_file: str | None = None
    test_file: str | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TaskConfig":
        """From a plain dictionary.

        Raises:
            DataError: On an unknown or missing key, or an unknown `scoring`.
        """
        known = {f.name for f in fields(cls)}
        for key in values:
            if key not in known:
                raise DataError(f"unknown key dset.{key}; {near_matches(key, known)}")
        labels = values.get("labels", ())
        if not isinstance(labels, list | tuple) or any(isinstance(label, bool) for label in labels):
            raise DataError(f"dset.labels={labels}: expected a list of words; YAML wants quotes around yes and no")
        words = {"labels": [str(label) for label in labels]} if labels else {}  # of [0,1] too
        try:
            config = cls(**{**values, **words})
        except TypeError as error:
            raise DataError(f"dset is incomplete: {error}") from error
        if config.scoring not in SCORINGS:
            raise DataError(f"unknown dset.scoring {config.scoring!r}; {near_matches(config.scoring, SCORINGS)}")
        return config


def _check_read(config: TaskConfig) -> None:
    """Raise DataError for an unknown schema, or a key that it does not read."""
    if config.schema != "quiz":
        get_parser(config.schema)
    vain = {"jsonl": PLACE, "quiz": (*FILES, *PLACE)}.get(config.schema, FILES)
    if given := [key for key in vain if getattr(config, key) is not None]:
        value = getattr(config, given[0])
        raise DataError(f"dset.{given[0]}={value} is not read with schema {config.schema}: choose another dset")


def load_task(dset: Mapping[str, Any], data_dir: str | Path, seed: int, at_most: bool = False) -> TaskData:
    """Load a task.

    Args:
        dset: The keys of `TaskConfig` as plain values.
        data_dir: Folder looked in before the hub (`<data_dir>/<path>/<config>/<split>.jsonl`).
        seed: Seed of carved splits and of subsets.
        at_most: Take all of a test split that is smaller than `test_subset`, which is then another data set's; of an
            out-of-distribution set always.

    Returns:
        Disjoint splits: questions of test and of the out-of-distribution sets are removed from validation
        and train where a source repeats them, those of validation from train; `notes` counts them.

    Raises:
        DataError: If a setting is wrong, the data is not found, or a row is malformed.
    """
    config = TaskConfig.from_dict(dset)
    _check_read(config)
    if config.schema == "quiz":
        sources, ood_questions, notes = _generated()
    elif config.schema == "jsonl":
        sources, ood_questions, notes = _files(config)
    else:
        sources, ood_questions, notes = _benchmark(config, data_dir)
    splits = resolve(sources, config.validation_fraction, seed, PHRASES.get(config.schema))
    notes = splits.notes + notes

    validation = without(splits.validation, splits.test, *ood_questions.values())
    train = without(splits.train, splits.test, validation, *ood_questions.values())
    repeated = len(splits.validation) - len(validation), len(splits.train) - len(train)
    if splits.train and not train:
        raise DataError(
            f"every training question of {config.name} is one of another split too, so none is left: correct the "
            "files, or name no training split (null) to evaluate only"
        )
    if splits.validation and not validation:
        raise DataError(
            f"every validation question of {config.name} is one of test too, so none is left: correct the files, or "
            "name no validation split (null), for one that is carved from train"
        )
    if any(repeated):
        notes.append(f"removed as repeats of another split: {repeated[0]} from validation, {repeated[1]} from train")

    def evaluated(questions: list[Question], at_most: bool) -> list[Example]:
        return _render(subset(questions, config.test_subset, seed, "dset.test_subset", at_most), config)

    return TaskData(
        name=config.name,
        train=_render(subset(train, config.train_subset, seed, "dset.train_subset"), config),
        validation=_render(subset(validation, config.validation_subset, seed, "dset.validation_subset"), config),
        test=evaluated(splits.test, at_most),
        ood={name: evaluated(questions, at_most=True) for name, questions in ood_questions.items()},
        notes=notes,
    )


def _render(questions: list[Question], config: TaskConfig) -> list[Example]:
    key = "prompt_label" if config.scoring == "label" else "prompt_choice"
    template = getattr(config, key)
    if not isinstance(template, str):
        raise DataError(f"dset.{key}={template}: expected a template, such as '{{question}}'")
    return [render(question, config.scoring, template, config.labels) for question in questions]


Loaded = tuple[dict[str, RawSplit | None], dict[str, list[Question]], list[str]]


def _generated() -> Loaded:
    quiz = quiz_questions()
    sources: dict[str, RawSplit | None] = {name: RawSplit(quiz[name], "generated") for name in SPLITS}
    ood = {"quiz_ood": quiz["ood"]}
    return sources, ood, [f"ood quiz_ood: generated ({len(quiz['ood'])})"]


def _files(config: TaskConfig) -> Loaded:
    sources: dict[str, RawSplit | None] = {}
    for split in SPLITS:
        name = getattr(config, f"{split}_file")
        if name is None:
            sources[split] = None
            continue
        if not isinstance(name, str | Path):
            raise DataError(f"dset.{split}_file={name}: expected the path of a file")
        file = Path(name).expanduser()
        if not file.is_file():
            what = "is a folder" if file.is_dir() else "does not exist"
            raise DataError(f"dset.{split}_file={name} {what} (looked for {file.absolute()})")
        sources[split] = rows = _parse(read_jsonl(file), config, split)
        if not rows.questions:
            raise DataError(f"{file} holds no rows; correct the file, or name none (dset.{split}_file=null)")
        if split != "train" and all(question.answer is None for question in rows.questions):
            raise DataError(
                f"{file}: none of {len(rows.questions)} rows has an answer; correct the file, or name none "
                f"(dset.{split}_file=null)"
            )
    if all(source is None for source in sources.values()):
        raise DataError("schema jsonl needs dset.train_file and dset.test_file (or validation_file); none is set")
    return sources, {}, []


def _benchmark(config: TaskConfig, data_dir: str | Path) -> Loaded:
    if config.path is None or config.splits is None:
        raise DataError(f"dset.path and dset.splits must be set for schema {config.schema}")
    unknown = set(config.splits) - {*SPLITS, "ood"}
    if unknown:
        raise DataError(f"unknown dset.splits.{unknown.pop()}; known: train, validation, test, ood")
    names: dict[str, str] = {split: config.splits[split] for split in SPLITS if config.splits.get(split)}
    ood_names: dict[str, str] = config.splits.get("ood") or {}
    source = open_source(config.path, config.config, data_dir, [*names.values(), *ood_names.values()])
    sources: dict[str, RawSplit | None] = {}
    for split, name in names.items():
        rows = source(name)
        sources[split] = None if rows is None else _parse(rows, config, split)
    if "train" in names and sources["train"] is None:
        raise DataError(
            f"{config.name}: the source has no split {names['train']} to train on; add it, or set "
            "dset.splits.train=null to evaluate only"
        )
    ood, notes = {}, []
    for ood_name, name in ood_names.items():
        rows = source(name)
        held_out = None if rows is None else labelled(_parse(rows, config, ood_name))
        if held_out is None:
            notes.append(f"ood {ood_name}: the source has no labelled split {name}; left out")
        else:
            ood[ood_name] = held_out.questions
            notes.append(f"ood {ood_name}: {held_out.origin} ({len(held_out.questions)})")
    return sources, ood, notes


def _parse(rows: Rows, config: TaskConfig, split: str) -> RawSplit:
    return RawSplit(parse_rows(rows, get_parser(config.schema), split, len(config.labels)), rows.origin)
