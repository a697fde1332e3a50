"""Tests of significance and tables where the answer is known."""

from dataclasses import replace
from statistics import fmean

import numpy as np
import pytest
import torch
from scipy.stats import t, ttest_1samp, ttest_rel

from bnn import metrics
from utils import report_figures
from utils.report_figures import sample_curve
from utils.report_rows import Row, own_predictions
from utils.report_scores import (
    Prediction,
    constant_p,
    ece,
    example_losses,
    fit_temperature,
    pairable,
    paired_p,
    reliability,
    running_log_probs,
    score,
)
from utils.report_scores import welch_p as welch
from utils.report_tables import Table, best, columns, latex, mark_significant, markdown, significant, tables

IDS = np.array([f"q{i}" for i in range(400)])


def make_logits(seed: int, samples: int = 1, n: int = 400) -> torch.Tensor:
    logits = 2 * torch.randn(samples, n, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    logits[:, ::3, 3] = -torch.inf
    return logits


def prediction(seed: int, signal: float = 0.0) -> Prediction:
    answer = np.arange(400) % 3
    logits = make_logits(seed).numpy()
    logits[0, np.arange(400), answer] += signal
    return Prediction(IDS, answer, running_log_probs(logits)[-1])


def make_row(method: str, seed: int = 0, nll: float = 1.0, task: str = "arc", ece_: float = 0.1) -> Row:
    where = {"model": "m", "task": task, "train_size": "all", "variant": "", "split": "test", "mc": "mean"}
    measures = {"acc": 0.5, "nll": nll, "ece": ece_, "brier": 0.2, "auroc_entropy": None}
    extra = {"steps": 1, "commit": "", "auroc_mutual_information": None}
    return Row(method=method, seed=seed, **where, **measures, **extra)


def test_a_method_far_below_the_others_is_named_below_its_panel(tmp_path, monkeypatch):
    """Its bars would make one spot of all others, here at 0.8 and 0.75."""
    drawn = []
    monkeypatch.setattr(report_figures, "save_figure", lambda figure, path: drawn.append(figure) or path)
    accuracies = {"sgp": (0.79, 0.81), "mle": (0.74, 0.76), "blob": (0.9, 0.3), "zero_shot": (0.1,)}
    column = {
        name: [replace(make_row(name, seed, ece_=0.1 + seed / 10), acc=acc) for seed, acc in enumerate(of_seeds)]
        for name, of_seeds in accuracies.items()
    }
    report_figures.draw_accuracy_calibration({"arc": column, "boolq": {"sgp": column["sgp"]}}, tmp_path / "x.png")
    arc, boolq = drawn[0].axes
    assert arc.get_xlabel() == "ECE\nblob far below: 0.600 at ECE 0.150"
    assert len(arc.containers) == 2
    assert arc.get_ylim()[0] > 0.7
    assert boolq.get_xlabel() == "ECE"
    assert len(boolq.containers) == 1


def test_metrics_agree_with_those_of_the_library():
    logits, answer = make_logits(0, samples=8), torch.arange(400) % 3
    curve = sample_curve(logits.numpy(), answer.numpy())
    assert curve[0] == [1, 2, 4, 8]
    for count, nll_, ece_ in zip(*curve, strict=True):
        assert nll_ == pytest.approx(metrics.nll(logits[:count], answer), rel=1e-12)
        assert ece_ == pytest.approx(metrics.ece(logits[:count], answer), rel=1e-12)
    log_probs = running_log_probs(logits.numpy())[-1]
    losses = example_losses(log_probs, answer.numpy())
    assert losses["acc"].mean() == pytest.approx(metrics.accuracy(logits, answer))
    assert losses["brier"].mean() == pytest.approx(metrics.brier(logits, answer))
    ours, theirs = reliability([Prediction(IDS, answer.numpy(), log_probs)]), metrics.reliability_bins(logits, answer)
    for key in ("edges", "confidence", "accuracy", "count"):
        np.testing.assert_allclose(ours[key], getattr(theirs, key).numpy(), atol=1e-12)


def test_bins_are_right_closed():
    confidence = np.array([0.5, 0.75])  # the border of two bins, and above it
    log_probs = np.log(np.stack([confidence, 1 - confidence], axis=1))
    assert np.exp(log_probs[0, 0]) == 0.5  # exactly the border
    answer = np.array([1, 0])
    assert ece(log_probs, answer, n_bins=2) == pytest.approx((0.5 + 0.25) / 2)
    assert reliability([Prediction(IDS[:2], answer, log_probs)], n_bins=2)["count"].tolist() == [1, 1]


@pytest.mark.parametrize("mcs", [("mean", "10", "2"), ("10", "2", "mean"), ("10", "mean", "2")])
def test_the_own_prediction_is_the_first_with_samples(mcs):
    assert [row.mc for row in own_predictions([replace(make_row("sgp"), mc=mc) for mc in mcs])] == ["10"]
    assert [row.mc for row in own_predictions([make_row("mle")])] == ["mean"]


def test_paired_test_with_one_seed_is_the_paired_t_test_over_examples():
    first, second = prediction(1), prediction(2, 0.3)
    ours = paired_p({0: first}, {0: second}, "nll")
    losses = [example_losses(p.log_probs, p.answer)["nll"] for p in (first, second)]
    assert ours == pytest.approx(ttest_rel(*losses).pvalue, rel=1e-9)


@pytest.mark.parametrize("metric", ["acc", "nll", "brier", "ece"])
def test_paired_test_finds_a_large_difference_and_none_in_equals(metric):
    base = {seed: prediction(seed) for seed in range(3)}
    better = {seed: prediction(seed, 3.0) for seed in range(3)}
    assert paired_p(base, better, metric) < 0.01
    assert paired_p(base, base, metric) == 1.0


@pytest.mark.parametrize("scale", [100.0, 200.0, 400.0])
def test_differences_of_rounding_are_ties(scale):
    """Of predictions that are right beyond float64: squares of what is left underflow."""

    def sure(of_wrong: np.ndarray) -> dict[int, Prediction]:
        log_probs = np.stack([np.zeros(4), of_wrong], 1)
        return {0: Prediction(np.arange(4).astype(str), np.zeros(4, int), log_probs)}

    first, second = sure(-scale - np.arange(4.0)), sure(-scale - np.arange(7.0, 3.0, -1))
    for metric in ("brier", "acc", "nll", "ece"):
        assert paired_p(first, second, metric) == 1.0


def test_a_small_difference_that_is_none_of_rounding_is_found():
    own, other = of_losses(*[1e-9] * 50), of_losses(*[2e-9, 3e-9] * 25)
    assert paired_p({0: own}, {0: other}, "nll") < 1e-3


@pytest.mark.parametrize("metric", ["nll", "ece"])
def test_paired_test_keeps_its_level(metric):
    """100 pairs of independent equal methods: at level 0.05 a valid test exceeds 12 rejections with p < 0.002."""
    rejected = sum(paired_p({0: prediction(2 * i)}, {0: prediction(2 * i + 1)}, metric) < 0.05 for i in range(100))
    assert rejected <= 12


def of_losses(*losses: float) -> Prediction:
    """Predictions of two choices with these NLLs."""
    p = np.exp(-np.array(losses))
    return Prediction(np.arange(len(p)).astype(str), np.zeros(len(p), int), np.log(np.stack([p, 1 - p], 1)))


def test_paired_test_of_two_seeds_by_hand():
    """Differences 1, 2, 3 and 2, 3, 7: over the seeds 1.5, 2.5, 5 (variance 13/4), over examples 2, 4 (variance 2)."""
    zero = of_losses(0.1, 0.1, 0.1)
    own = {0: of_losses(1.1, 2.1, 3.1), 1: of_losses(2.1, 3.1, 7.1)}
    of_examples, of_seeds = 13 / 4 / 3, 2 / 2
    freedom = (of_examples + of_seeds) ** 2 / (of_examples**2 / 2 + of_seeds**2 / 1)
    expected = 2 * t.sf(3 / np.sqrt(of_examples + of_seeds), freedom)
    assert paired_p(own, {0: zero, 1: zero}, "nll") == pytest.approx(expected)


def test_a_difference_without_any_spread_is_certain():
    assert paired_p({0: of_losses(*[0.1] * 4)}, {0: of_losses(*[3.0] * 4)}, "acc") == 0.0


def test_a_confidence_that_rounding_puts_above_one_is_in_the_last_bin():
    sure = np.array([[1e-12, -np.inf], [1e-12, -np.inf]])
    assert ece(sure, np.array([0, 1])) == pytest.approx(0.5)
    assert reliability([Prediction(IDS[:2], np.array([0, 1]), sure)])["count"].tolist() == [0] * 14 + [2]


def test_a_temperature_ends_at_its_bound_where_nothing_is_right():
    wrong = Prediction(IDS[:4], np.zeros(4, int), np.log(np.array([[0.1, 0.9]] * 4)))
    assert fit_temperature(wrong) == pytest.approx(100, rel=1e-4)


def test_disagreeing_seeds_are_not_significant_however_many_examples():
    first = {0: prediction(0, 1.0), 1: prediction(1)}
    second = {0: prediction(0), 1: prediction(1, 0.8)}
    assert paired_p(first, second, "nll") > 0.5
    assert paired_p({0: first[0]}, {0: second[0]}, "nll") < 1e-3


def test_pairs_need_the_same_seeds_and_examples():
    one = prediction(0)
    alone = of_losses(0.1)
    assert not pairable({0: alone}, {0: alone}), "a single example has no spread"
    other = Prediction(IDS[::-1], one.answer, one.log_probs)
    renumbered = Prediction(IDS, (one.answer + 1) % 3, one.log_probs)
    assert pairable({0: one}, {0: one})
    assert not pairable({0: one}, {0: renumbered}), "examples of another file, numbered alike"
    assert not pairable({0: one}, {1: one})
    assert not pairable({0: one}, {0: other})
    assert not pairable({}, {})


def test_welch_never_calls_a_single_seed_significant():
    assert welch([0.1], [0.9]) == welch([0.1, 0.11, 0.1], [0.9]) == 1.0
    assert welch([0.5, 0.5], [0.6, 0.6]) == 1.0  # no spread to judge by
    assert welch([0.10, 0.11, 0.12], [0.90, 0.91, 0.92]) < 1e-4
    column = {"a": [make_row("a", nll=0.1)], "b": [make_row("b", nll=9.0)]}
    mark_significant(column, {})
    assert best(column, "nll") == "a"
    assert not significant(column, "nll", "a")


def test_without_predictions_the_base_model_is_a_constant():
    seeds = [0.10, 0.11, 0.12]
    assert constant_p(seeds, 0.9) == pytest.approx(ttest_1samp(seeds, 0.9).pvalue)
    assert constant_p(seeds, 0.9) < 1e-3
    assert constant_p([0.1], 0.9) == constant_p([0.1, 0.1], 0.9) == 1.0
    column = {"sgp": [make_row("sgp", i, nll) for i, nll in enumerate(seeds)]}
    column |= {"mle": [make_row("mle", i, nll + 0.5) for i, nll in enumerate(seeds)]}
    column |= {"zero_shot": [make_row("zero_shot", 0, 0.9)]}
    mark_significant(column, {})
    assert significant(column, "nll", "sgp")
    column["zero_shot"] = [make_row("zero_shot", 0, 0.115)]
    mark_significant(column, {})
    assert column["sgp"][0].test_nll == "one-sample"
    assert not significant(column, "nll", "sgp")


def drawn(seed: int, signal: float) -> Prediction:
    """A prediction on a subset of the examples that the seed draws."""
    whole, chosen = prediction(0, signal), np.random.default_rng(seed).permutation(400)[:200]
    return Prediction(IDS[chosen], whole.answer[chosen], whole.log_probs[chosen])


def scored_row(method: str, seed: int, found: Prediction) -> Row:
    return replace(
        make_row(method, seed), **{metric: score(found, metric) for metric in ("acc", "nll", "ece", "brier")}
    )


def test_a_base_model_whose_examples_a_seed_draws_is_compared_seed_by_seed():
    """Its spread over seeds is that of the methods', which the differences are rid of."""
    signals = {"sgp": 0.6, "mle": 0.5, "zero_shot": 0.4}
    predictions = {m: {seed: drawn(seed, signal) for seed in range(4)} for m, signal in signals.items()}
    column = {m: [scored_row(m, seed, p) for seed, p in found.items()] for m, found in predictions.items()}
    mark_significant({m: column[m] for m in ("sgp", "zero_shot")}, predictions)
    nll = {m: [row.nll for row in rows] for m, rows in column.items()}
    assert column["sgp"][0].test_nll == "by seed"
    assert column["sgp"][0].p_nll == pytest.approx(ttest_rel(nll["sgp"], nll["zero_shot"]).pvalue)
    assert column["sgp"][0].p_nll < 1e-3
    mark_significant(column, predictions)
    assert column["sgp"][0].test_nll == "by seed", "so are two methods that train"
    mark_significant({m: column[m] for m in ("sgp", "zero_shot")}, {})
    assert column["sgp"][0].test_nll == "welch", "nothing tells that the examples are the same"
    assert column["sgp"][0].p_nll == pytest.approx(welch(nll["sgp"], nll["zero_shot"]))


@pytest.mark.parametrize(("seed_of_base", "test"), [(0, "paired"), (3, "welch")])
def test_a_base_model_of_one_seeds_examples_is_no_constant(seed_of_base, test):
    """The other seeds have other examples; only with the same ones is there a pair."""
    predictions = {
        "sgp": {seed: drawn(seed, 4.0) for seed in range(3)},
        "zero_shot": {seed_of_base: drawn(seed_of_base, 0.4)},
    }
    column = {m: [scored_row(m, seed, p) for seed, p in found.items()] for m, found in predictions.items()}
    mark_significant(column, predictions)
    assert column["sgp"][0].test_nll == test
    of_one = paired_p({0: predictions["sgp"][0]}, {0: drawn(0, 0.4)}, "nll")
    assert column["sgp"][0].p_nll == (of_one if test == "paired" else 1.0)


def test_a_seed_that_draws_other_examples_for_each_method_is_no_pair():
    sgp, mle = {0: drawn(0, 4.0), 1: drawn(1, 4.0)}, {0: drawn(0, 0.1), 1: drawn(2, 0.1)}
    column = {m: [scored_row(m, seed, p) for seed, p in of.items()] for m, of in (("sgp", sgp), ("mle", mle))}
    mark_significant(column, {"sgp": sgp, "mle": mle})
    assert column["sgp"][0].test_nll == "welch"


def test_a_base_model_that_a_seed_changes_has_seeds_as_any_method():
    rows = [make_row("mle", seed, 0.9 + 0.1 * seed) for seed in range(3)]
    rows += [make_row("zero_shot", seed, 0.1 * seed) for seed in (1, 2)]
    column = columns(rows, "m", "test")["arc"]
    assert best(column, "nll") == "mle"
    cells = next(table for table in tables(rows, "test") if "summary" in table.title).cells
    assert {row[0][0]: row[5][0] for row in cells}["zero_shot"] == f"{100 * (1 - 0.15 / 1.05):.1f} %"
    column = columns([*rows, make_row("zero_shot", 0, 0.1)], "m", "test")["arc"]
    assert best(column, "nll") == "zero_shot"


def test_a_base_model_run_once_stands_for_all_seeds_only_on_their_examples():
    """Its one value on the examples of one seed is neither the best of all seeds nor to be subtracted from theirs."""
    rows = [replace(make_row("mle", seed, 0.5 + 0.1 * seed), examples=f"of {seed}") for seed in range(3)]
    base = replace(make_row("zero_shot", 0, 0.5), examples="of 0")

    def summary(rows: list[Row], split: str = "test") -> str:
        cells = next(table for table in tables(rows, split) if "summary" in table.title).cells
        return {row[0][0]: row[5][0] for row in cells}["zero_shot"]

    column = columns([*rows, base], "m", "test")["arc"]
    assert best(column, "nll") == "mle"
    assert summary([*rows, base]) == "0.0 %"
    same = [replace(row, examples="of all") for row in (*rows, base)]
    assert best(columns(same, "m", "test")["arc"], "nll") == "zero_shot"
    assert summary(same) == f"{100 * (1 - 0.5 / 0.6):.1f} %"
    unknown = [replace(row, examples="", split="validation") for row in same]
    assert summary(unknown, "validation") == "0.0 %", "which may have been set aside by each seed"


def test_rounding_leaves_the_base_model_a_constant():
    rows = [make_row("sgp", seed, 0.1 + 0.01 * seed) for seed in range(3)]
    for apart, test in ((1e-6, "one-sample"), (1e-2, "welch")):
        base = [make_row("zero_shot", seed, 0.9 + apart * seed) for seed in range(3)]
        mark_significant({"sgp": rows, "zero_shot": base}, {})
        assert rows[0].test_nll == test


def test_methods_are_paired_over_the_seeds_of_the_one_that_has_fewer():
    """The base model's one prediction stands for every seed; seeds without a partner fall to Welch's test."""
    runs = {"sgp": (0, 1, 2), "mle": (0, 1), "zero_shot": (0,)}
    column = {m: [make_row(m, s, 0.1 if m == "sgp" else 0.9) for s in seeds] for m, seeds in runs.items()}
    good, bad = prediction(0, 4.0), prediction(0, 0.5)
    predictions = {m: dict.fromkeys(seeds, good if m == "sgp" else bad) for m, seeds in runs.items()}
    mark_significant(column, predictions)
    assert column["sgp"][0].test_nll == "paired"
    assert significant(column, "nll", "sgp")
    predictions["mle"] = dict.fromkeys((1, 3), bad)
    mark_significant(column, predictions)
    assert column["sgp"][0].test_nll == "welch", "other seeds"
    predictions["mle"] = {0: bad}
    mark_significant(column, predictions)
    assert column["sgp"][0].test_nll == "welch", "the prediction of a seed is missing"


@pytest.mark.parametrize("metric", ["nll", "ece", "acc"])
def test_common_seeds_that_favour_the_other_method_are_no_evidence(metric):
    """sgp is best over its three seeds, but worse by far on the one seed that mle has too."""
    column = {"sgp": [make_row("sgp", s, 0.1, ece_=0.01) for s in range(3)], "mle": [make_row("mle", 0, 0.5)]}
    for row in column["sgp"]:
        row.acc = 0.9
    good, bad = prediction(0, 4.0), prediction(0, 0.5)
    assert (score(good, metric) > score(bad, metric)) == (metric == "acc")
    mark_significant(column, {"sgp": {0: bad, 1: good, 2: good}, "mle": {0: good}})
    assert getattr(column["sgp"][0], f"p_{metric}") == 1.0
    assert not significant(column, metric, "sgp")
    mark_significant(column, {"sgp": dict.fromkeys(range(3), good), "mle": {0: bad}})
    assert significant(column, metric, "sgp")


def test_the_best_is_bold_only_if_it_beats_every_other():
    values = {"a": (0.10, 0.11, 0.12), "b": (0.90, 0.91, 0.92)}
    rows = [make_row(m, s, nll) for m, seeds in values.items() for s, nll in enumerate(seeds)]
    column = columns(rows, "m", "test")["arc"]
    mark_significant(column, {})
    assert significant(column, "nll", "a")
    assert not significant(column, "nll", "b")
    assert not significant(column, "acc", "a")  # equal
    nll_table = next(table for table in tables(rows, "test") if "NLL" in table.title)
    assert "**0.1100 ± 0.0100**" in markdown(nll_table)
    rows += [make_row("c", s, nll) for s, nll in enumerate((0.09, 0.12, 0.125))]
    column = columns(rows, "m", "test")["arc"]
    mark_significant(column, {})
    assert not any(significant(column, "nll", name) for name in column)


def test_summary_counts_and_reductions():
    rows = [make_row("mle", s, 1.0 + 0.1 * s, ece_=0.2) for s in range(2)]
    rows += [make_row("sgp", s, 0.5, ece_=0.05) for s in range(2)]
    rows += [make_row("mle", s, 1.0 + 0.1 * s, "rte", 0.1) for s in range(2)]
    rows += [make_row("sgp", s, 1.09, "rte", 0.1) for s in range(2)]
    cells = next(table for table in tables(rows, "test") if "summary" in table.title).cells
    found = {row[0][0]: [text for text, _ in row[1:]] for row in cells}
    # rte: mle 1.05, standard error 0.05; sgp 1.09 is within it
    assert found["mle"] == ["2", "2 / 2", "1 / 1", "1 / 1", "", ""]
    nll_cut, ece_cut = (1 - 0.5 / 1.05 + 1 - 1.09 / 1.05) / 2, 0.75 / 2
    assert found["sgp"][2] == "1 / 2"
    assert found["sgp"][4:] == [f"{100 * nll_cut:.1f} %", f"{100 * ece_cut:.1f} %"]


def test_all_that_tie_have_the_best_mean():
    """As a method and itself with a temperature do in accuracy, up to the last bit of the mean."""
    rows = [make_row(m, s, 0.5 + 0.1 * s) for m in ("mle", "temperature", "sgp") for s in (0, 1, 2)]
    for row, acc in zip(rows, (0.1, 0.2, 0.3, 0.2, 0.2, 0.2 + 1e-16, 0.1, 0.1, 0.1), strict=True):
        row.acc = acc
    rows[-1].nll = 0.9
    assert len({fmean(row.acc for row in rows[i : i + 3]) for i in (0, 3)}) == 2, "not the same float"
    cells = next(table for table in tables(rows, "test") if "summary" in table.title).cells
    found = {row[0][0]: [text for text, _ in row[2:4]] for row in cells}
    assert (found["mle"], found["temperature"], found["sgp"]) == (["1 / 1"] * 2, ["1 / 1"] * 2, ["0 / 0"] * 2)


def test_fewer_seeds_than_others_have_neither_win_nor_tie():
    """One good seed against three whose third failed; the seed of both favours mle."""
    rows = [make_row("mle", s, nll, ece_=nll / 10) for s, nll in enumerate((0.3, 0.4, 1.2))]
    rows += [make_row("map", s, 0.7, ece_=0.07) for s in range(3)] + [make_row("sgp", 0, 0.45, ece_=0.045)]
    column = columns(rows, "m", "test")["arc"]
    mark_significant(column, {})
    assert best(column, "nll") == "mle"
    cells = next(table for table in tables(rows, "test") if "summary" in table.title).cells
    found = {row[0][0]: [text for text, _ in row[1:]] for row in cells}
    assert found["sgp"][2:] == ["0 / 0", "0 / 0", "-50.0 %", "-50.0 %"]


def test_near_is_one_standard_error_of_the_mean():
    rows = [make_row("mle", seed, nll) for seed, nll in enumerate((1.0, 1.1, 1.2, 1.3))]  # 1.15, its error 0.065
    summary = {}
    for other in (1.21, 1.22):
        both = [*rows, *(make_row("sgp", seed, other) for seed in range(4))]
        cells = next(table for table in tables(both, "test") if "summary" in table.title).cells
        summary[other] = {line[0][0]: line[3][0] for line in cells[1:]}
    assert summary == {1.21: {"mle": "1 / 1", "sgp": "0 / 1"}, 1.22: {"mle": "1 / 1", "sgp": "0 / 0"}}


def test_the_base_models_runs_are_no_seeds():
    """It was run beside every method, so it has the seeds of all of them; no seed changes it."""
    rows = [make_row("mle", seed, 0.9) for seed in (0, 1)] + [make_row("sgp", seed, 0.3) for seed in (1, 2)]
    column = columns([*rows, *(make_row("zero_shot", seed, 1.4) for seed in (0, 1, 2))], "m", "test")["arc"]
    assert best(column, "nll") == "sgp"
    alone = columns([*rows, make_row("zero_shot", 0, 0.1)], "m", "test")["arc"]
    assert best(alone, "nll") == "zero_shot"


def test_signs_that_latex_reads_otherwise():
    table = Table("a_b", "p^(1/T) ~ 5 % \\ 1 ± 2 | <s>", [[("x", False)]])
    assert latex(table).splitlines()[2] == (
        r"\caption{a\_b. p\textasciicircum{}(1/T) \textasciitilde{} 5 \% \textbackslash{} 1 $\pm$ 2 \textbar{} "
        r"\textless{}s\textgreater{}}"
    )


def test_signs_that_markdown_reads_otherwise():
    """In titles, captions and cells; what is a name as it stands is left so."""
    names = r"[<s>*a*] [_a_b__c_] [a|b](c) \ & ~`$1.5 (mc_dropout)"
    escaped = r"[\<s\>\*a\*] [\_a_b\_\_c\_] [a\|b\](c) \\ \& \~\`\$1.5 (mc_dropout)"
    text = markdown(Table(names, names, [[(names, False)], [(names, True)]]))
    assert text == f"## {escaped}\n\n| {escaped} |\n|---|\n| **{escaped}** |\n\n{escaped}\n"


def test_methods_that_train_have_a_summary_of_their_own():
    rows = [make_row("mle", s, 1.0) for s in range(2)] + [make_row("sgp", s, 0.8) for s in range(2)]
    assert sum("summary" in table.title for table in tables(rows, "test")) == 1
    rows += [replace(make_row("temperature", s, 0.5), steps=0) for s in range(2)]
    everyone, trained = (table for table in tables(rows, "test") if "summary" in table.title)
    best_by_nll = [{row[0][0]: row[3][0] for row in table.cells[1:]} for table in (everyone, trained)]
    assert best_by_nll[0] == {"mle": "0 / 0", "sgp": "0 / 0", "temperature": "1 / 1"}
    assert best_by_nll[1] == {"mle": "0 / 0", "sgp": "1 / 1"}
