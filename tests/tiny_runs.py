"""The command line of a run that takes seconds: a random two-layer model on a dozen questions."""

import json
import logging
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FAST = (
    *("llm=tiny", "dset=jsonl", "dset.scoring=choice_sum", "device=cpu"),
    *("llm.architecture.vocab_size=300", "llm.architecture.hidden_size=32", "peft.target_modules=[q_proj,v_proj]"),
    *("train.batch_size=4", "train.epochs=2", "train.log_every=1", "eval.n_mc=3", "opt.lr=1e-2"),
)
Overrides = Callable[..., list[str]]


def row(number: int) -> dict[str, Any]:
    return {"id": f"q{number}", "question": f"{number} + 1 =", "choices": ["ten", str(number + 1), "no"], "answer": 1}


def finish(folder: Path, mc: int | str = "mean") -> None:
    """Leave in a new folder what a run on test leaves last."""
    folder.mkdir(parents=True)
    record = {"kind": "final", "split": "test", "mc": mc, "step": 5, "acc": 0.9, "nll": 0.3, "ece": 0.1}
    (folder / "metrics.jsonl").write_text(json.dumps(record | {"brier": 0.2}) + "\n")
    (folder / "reliability.json").write_text("{}")


def exit_message(script: ModuleType, arguments: Sequence[str]) -> str:
    """What a script's ``launch`` exits with, run in this process as if the script were the main module."""
    level = logging.getLogger().level
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script.__file__, *arguments])
        patch.setenv("HYDRA_FULL_ERROR", "0")
        patch.setenv("HYDRA_MAIN_MODULE", "__main__")
        patch.setattr(script, "DEBUG", False)
        with pytest.raises(SystemExit) as stop:
            script.launch(script.main)
    logging.getLogger().setLevel(level)  # Hydra has set another
    assert isinstance(stop.value.code, str), "a text makes Python exit with code 1"
    return stop.value.code


class Serial(Executor):
    """This process alone."""

    def submit(self, function, /, *arguments, **keywords):
        future: Future = Future()
        try:
            future.set_result(function(*arguments, **keywords))
        except Exception as error:
            future.set_exception(error)
        return future
