"""The comparison's search, its selections, and the whole of it on a random model."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from benchmarks import comparison
from benchmarks.comparison import RATES, choose, compare, pick, rates_beyond


def tuned(**by_rate: tuple[float, float]) -> dict[float, dict[str, float]]:
    """{"r1e-3": (nll, acc)} as metrics by rate."""
    return {
        float(re.sub("_(?=[0-9]+e)", ".", name[1:]).replace("_", "-")): {"nll": nll, "acc": acc}
        for name, (nll, acc) in by_rate.items()
    }


def test_the_search_goes_on_beyond_the_best_at_an_end():
    assert RATES["mle"] == (2e-4, 6e-4, 1.8e-3)
    inside = tuned(r2e_4=(0.5, 0.8), r6e_4=(0.4, 0.9), r1_8e_3=(0.6, 0.7))
    assert rates_beyond("mle", inside) == set()
    assert rates_beyond("mle", {}) == set()
    below = tuned(r2e_4=(0.3, 0.8), r6e_4=(0.4, 0.9), r1_8e_3=(0.6, 0.7))
    assert rates_beyond("mle", below) == {6.67e-5}
    both = tuned(r2e_4=(0.3, 0.8), r6e_4=(0.4, 0.9), r1_8e_3=(0.6, 0.95))
    assert rates_beyond("mle", both) == {6.67e-5, 5.4e-3}


def test_selections_and_their_ties():
    found = tuned(r1e_3=(0.4, 0.9), r2e_3=(0.3, 0.8), r4e_3=(0.5, 0.9))
    assert pick(found, "nll") == 2e-3
    assert pick(found, "acc") == 1e-3, "of equal accuracy the lower NLL"
    chosen = choose({("t", "mle"): found, ("t", "sgp"): {}}, "nll")
    assert chosen == {"t": {"mle": 2e-3, "ensemble": 2e-3}}


class Serial:
    """A pool of this process alone."""

    def imap_unordered(self, function: Callable[[Any], Any], arguments: Iterable[Any]) -> Iterator[Any]:
        return map(function, arguments)


def test_the_whole_comparison_and_its_repetition(tmp_path, overrides, monkeypatch, capsys):
    monkeypatch.setattr(comparison, "RATES", {"mle": (1e-3, 1e-2), "sgp": (1e-3, 1e-2), "map": (1e-3, 1e-2)})
    monkeypatch.setattr(comparison, "POST_HOC", ("temperature",))
    monkeypatch.setattr(comparison, "SEEDS", (0, 1))
    monkeypatch.setattr(comparison, "EXTENSIONS", 1)
    tiny = [o for o in overrides() if not o.startswith(("paths.output_dir", "opt.lr", "eval.n_mc"))]
    monkeypatch.setattr(comparison, "TASKS", {"tiny": tuple(tiny)})
    failing = ["+method.factory.no_such_key=1"]

    def faulty(task: str, method: str, rate: float, seed: int) -> tuple[str, ...]:
        return (*comparison.TASKS[task], f"method={method}", f"opt.lr={rate:g}", f"seed={seed}") + (
            tuple(failing) if method == "map" else ()
        )

    monkeypatch.setattr(comparison, "settings_of", faulty)
    out = tmp_path / "out"
    compare(Serial(), ["tiny"], out, ["eval.n_mc=2"])
    said = capsys.readouterr().out
    assert "no_such_key" in said, "a failing run is reported, the others go on"
    for rule in ("nll", "acc"):
        chosen = json.loads((out / f"chosen_by_{rule}.json").read_text())["tiny"]
        assert set(chosen) == {"mle", "sgp", "ensemble"}
        folders = (out / f"by_{rule}.txt").read_text().split()
        assert len(folders) == 2 * 4
        tuning = {p.parent.name: json.loads(p.read_text()) for p in out.glob("tune/tiny/mle/*/tuned.json")}
        assert len(tuning) >= 2
        rates = {float(rate): values for rate, values in tuning.items()}
        assert chosen["mle"] == pick(rates, rule)
        for folder in folders:
            lines = (comparison.Path(folder) / "metrics.jsonl").read_text()
            assert '"split": "test"' in lines
    assert not any('"split": "test"' in p.read_text() for p in out.glob("tune/*/*/*/metrics.jsonl"))
    temperature = next(p for p in (out / "final" / "tiny" / "temperature").rglob("config.yaml"))
    assert "/final/tiny/mle/" in temperature.read_text()

    monkeypatch.setattr(
        comparison, "execute", lambda job, common: "was to be skipped" if "map" not in str(job) else "x"
    )
    compare(Serial(), ["tiny"], out, ["eval.n_mc=2"])
    assert "was to be skipped" not in capsys.readouterr().out


@pytest.mark.parametrize("name", list(comparison.TASKS))
def test_tasks_compose(name):
    cfg = comparison.compose(comparison.CONFIGS, [*comparison.TASKS[name], "paths.output_dir=x"])
    assert cfg.train.epochs >= 1
