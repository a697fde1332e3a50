"""Where rows come from: JSON lines under the data folder, else the Hugging Face hub."""

import http.client
import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.data.example import DataError, Question
from utils.data.parsers import Parser

PROBE_SECONDS = 3.0


@dataclass(frozen=True)
class Rows:
    """The rows of one split: where each is (for messages), what it holds, and where they all come from."""

    located: list[tuple[str, Mapping[str, Any]]]
    origin: str


RowSource = Callable[[str], Rows | None]  # split name -> its rows, None where the source has no such split


def read_jsonl(file: Path) -> Rows:
    """Rows of a JSON lines file; empty lines are skipped.

    Raises:
        DataError: If a line is not a JSON object in UTF-8; the message names file and line.
    """
    located: list[tuple[str, Mapping[str, Any]]] = []
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                remedy = "unpack it" if line.startswith(b"\x1f\x8b") else "save the file as UTF-8"
                raise DataError(f"{file}:{number}: not UTF-8 ({error.reason}): {remedy}") from error
            except (ValueError, RecursionError) as error:  # also of numbers too long and of lists nested too deep
                why = getattr(error, "msg", str(error))
                raise DataError(f"{file}:{number}: not valid JSON ({why}): every line is an object") from error
            if b"\\u" in line and (half := _lone_surrogate(row)):
                raise DataError(f"{file}:{number}: {half} is half of a character, which is no text: correct the line")
            if not isinstance(row, dict):
                raise DataError(f"{file}:{number}: expected a JSON object, found {type(row).__name__}")
            located.append((f"{file}:{number}", row))
    return Rows(located, str(file))


def _lone_surrogate(row: Any) -> str:
    """The first in any text of a row, as JSON has it, or nothing."""
    found = re.search("[\ud800-\udfff]", json.dumps(row, ensure_ascii=False))
    return f"\\u{ord(found[0]):x}" if found else ""


def parse_rows(rows: Rows, parser: Parser, split: str, classes: int) -> list[Question]:
    """Parse every row of a split.

    Args:
        rows: The rows.
        parser: The parser of their schema.
        split: Prefix of the ids of rows that have none.
        classes: Number of classes of a question without options.

    Raises:
        DataError: On a row the parser rejects, with fewer than two options, or whose answer is none of them;
            the message names file and line (or split and row).
    """
    questions = []
    for index, (place, row) in enumerate(rows.located):
        try:
            question = parser(row, f"{split}-{index}")
            _check_answer(question, len(question.options) or classes)
            questions.append(question)
        except DataError as error:
            raise DataError(f"{place}: {error}") from error
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise DataError(f"{place}: malformed row ({type(error).__name__}: {error})") from error
    return questions


def _check_answer(question: Question, count: int) -> None:
    if count < 2:
        raise DataError(f"choices: {count}; at least 2 are needed")
    if question.answer is not None and not 0 <= question.answer < count:
        raise DataError(f"answer {question.answer} is not in 0..{count - 1}")


def open_source(path: str, config: str | None, data_dir: str | Path, split_names: list[str]) -> RowSource:
    """Find a data set: its folder under `data_dir` if that holds any wanted split, else the hub.

    The folder is `<data_dir>/<path>/<config>`, with or without the owner in front of the hub name. One
    data set is read from one place only, so that a run does not depend on whether the hub is reachable.

    Raises:
        DataError: If it is in neither place; the message says what was looked for and how to get it.
    """
    folders = [Path(data_dir).expanduser() / name / (config or "") for name in (path, path.split("/")[-1])]
    for folder in folders:
        if any((folder / f"{split}.jsonl").is_file() for split in split_names):
            return lambda split: read_jsonl(file) if (file := folder / f"{split}.jsonl").is_file() else None
    return _hub_source(path, config, f"no {'|'.join(split_names)}.jsonl in {' or '.join(map(str, folders))}")


def _hub_source(path: str, config: str | None, looked_for: str) -> RowSource:
    import datasets  # takes seconds to import and is not needed for local files

    remedy = f"put <split>.jsonl there, set data_dir, or load {path!r} once with a connection"
    if not datasets.config.HF_HUB_OFFLINE and not hub_reachable(datasets.config.HF_ENDPOINT):
        raise DataError(
            f"{looked_for}, and {datasets.config.HF_ENDPOINT} cannot be reached; {remedy} "
            "(HF_HUB_OFFLINE=1 then reads the local cache)"
        )
    try:
        splits = datasets.load_dataset(path, config)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{looked_for}, and the hub gave no {path} {config or ''}: {reason}; {remedy}") from error
    origin = f"hub {path}" + (f" {config}" if config else "")

    def rows(split: str) -> Rows | None:
        if split not in splits:
            return None
        located = [(f"{origin} {split} row {i}", row) for i, row in enumerate(splits[split])]
        return Rows(located, f"{origin} {split}")

    return rows


def hub_reachable(endpoint: str, seconds: float = PROBE_SECONDS) -> bool:
    """Whether the hub answers at all within a few seconds (any HTTP status counts); proxies are honoured."""
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=seconds).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError, http.client.HTTPException):  # nobody, no such address, no HTTP
        return False
    return True
