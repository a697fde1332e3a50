"""The command line of a run that takes seconds: a random two-layer model on a dozen questions."""

from collections.abc import Callable
from typing import Any

FAST = (
    *("llm=tiny", "dset=jsonl", "dset.scoring=choice_sum", "device=cpu"),
    *("llm.architecture.vocab_size=300", "llm.architecture.hidden_size=32", "peft.target_modules=[q_proj,v_proj]"),
    *("train.batch_size=4", "train.epochs=2", "train.log_every=1", "eval.n_mc=3", "opt.lr=1e-2"),
)
Overrides = Callable[..., list[str]]


def row(number: int) -> dict[str, Any]:
    return {"id": f"q{number}", "question": f"{number} + 1 =", "choices": ["ten", str(number + 1), "no"], "answer": 1}
