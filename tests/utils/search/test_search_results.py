"""Tables, analysis and figures of a search whose numbers are known."""

import csv
import io

import numpy as np
import optuna
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from optuna.trial import TrialState

from utils.run import RunLogger
from utils.search import figures
from utils.search.analysis import FEWEST, hypervolume_curves, importances
from utils.search.results import final_test, mean_sd, write_front
from utils.search.selection import Point, costs, hypervolume
from utils.search.study import METRICS, VALUES, points_of

ROWS = [(0.8, 0.30, 0.6), (0.9, 0.40, 0.5), (0.7, 0.10, 0.7), (0.6, 0.35, 0.9)]  # acc, ece, nll; the last is dominated
POINTS = [
    Point(n, {"opt.lr": 0.1 * n}, {"acc": acc, "ece": ece, "nll": nll, "brier": nll / 2})
    for n, (acc, ece, nll) in enumerate(ROWS)
]
TESTS = {
    1: [{"acc": 0.85, "ece": 0.45, "nll": 0.6, "brier": 0.3}, {"acc": 0.81, "ece": 0.43, "nll": 0.8, "brier": 0.3}]
}


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    found: list[Figure] = []
    save = figures.save_figure
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: found.append(figure) or save(figure, path))
    return found


def make_study(rows=ROWS, extra_pruned: bool = False) -> optuna.Study:
    study = optuna.create_study(directions=["maximize", "minimize"])
    for n, (acc, ece, nll) in enumerate(rows):
        if extra_pruned and n == 1:
            study.tell(study.ask(), state=TrialState.PRUNED)
            study.tell(study.ask(), state=TrialState.FAIL)  # no reason: lost with its process
        trial = study.ask()
        trial.suggest_float("x", 0, 1)
        trial.suggest_float("y", 0, 1)
        trial.set_user_attr(VALUES, {})
        trial.set_user_attr(METRICS, {"acc": acc, "ece": ece, "nll": nll, "brier": nll})
        study.tell(trial, [acc, ece])
    return study


def test_tables_hold_the_front_with_its_test_values(tmp_path):
    write_front(tmp_path, POINTS[:3], {"knee": POINTS[1], "lowest_nll": POINTS[1]}, TESTS)
    rows = list(csv.DictReader((tmp_path / "front.csv").open()))
    assert [row["trial"] for row in rows] == ["1", "0", "2"], "by falling ACC"
    assert rows[0]["selected"] == "knee; lowest_nll"
    assert float(rows[0]["validation_ece"]) == 0.4
    assert float(rows[0]["test_acc"]) == pytest.approx(0.83)
    assert float(rows[0]["test_nll_sd"]) == pytest.approx(np.std([0.6, 0.8], ddof=1))
    assert rows[1]["test_acc"] == ""
    assert float(rows[2]["opt.lr"]) == 0.2
    table = (tmp_path / "front.md").read_text().splitlines()
    assert len(table) == 5
    assert len({line.count("|") for line in table}) == 1


def test_a_text_keeps_to_its_cell_of_the_table(tmp_path):
    point = Point(0, {"dset.prompt_choice": "a | b\nc"}, POINTS[0].metrics)
    write_front(tmp_path, [point], {}, {})
    head, rule, row = (tmp_path / "front.md").read_text().splitlines()
    assert row.endswith(r"| a \| b c |")
    assert row.replace(r"\|", "").count("|") == head.count("|") == rule.count("|")
    (read,) = csv.DictReader((tmp_path / "front.csv").open(newline=""))
    assert read["dset.prompt_choice"] == "a | b\nc"


def test_one_run_has_no_spread():
    assert mean_sd([{"acc": 0.5}], "acc") == (0.5, 0.0)


def test_test_values_are_those_of_the_methods_own_prediction(tmp_path):
    assert final_test(tmp_path) is None
    log = RunLogger(tmp_path, io.StringIO())
    for split, mc, acc in (("test", "zero_shot", 0.1), ("test", 4, 0.2), ("test", "mean", 0.3), ("ood:x", 4, 0.4)):
        log.final(epoch=1, step=1, split=split, mc=mc, metrics={"acc": acc, "nll": 1.0, "ece": 0.0, "brier": 0.0})
    log.close()
    assert final_test(tmp_path) is None, "the run has not written its last file: it may have been killed"
    (tmp_path / "reliability.json").touch()
    assert final_test(tmp_path) == {"acc": 0.2, "nll": 1.0, "ece": 0.0, "brier": 0.0}


def test_hypervolume_after_each_trial_towards_a_common_corner():
    # corner: worst ACC 0.6 and worst ECE 0.5 (of the other study); areas of unions of rectangles by hand
    studies = {"a": make_study(), "b": make_study([(0.6, 0.5, 1.0), (0.7, 0.4, 1.0)])}
    curves = hypervolume_curves(studies, ["acc", "ece"], {"acc": None, "ece": None})
    assert curves["a"] == pytest.approx([0.2 * 0.2, 0.2 * 0.2 + 0.1 * 0.1, 0.04 + 0.01 + 0.1 * 0.2, 0.07])
    assert curves["b"] == pytest.approx([0.0, 0.1 * 0.1])
    given = hypervolume_curves({"a": make_study(ROWS[:1])}, ["acc", "ece"], {"acc": 0.5, "ece": 1.0})
    assert given["a"] == pytest.approx([0.3 * 0.7])


def test_hypervolume_by_the_front_so_far_is_that_of_all_points():
    rows = np.random.default_rng(0).uniform(0.1, 0.9, (40, 3)).round(1).tolist()
    study, names = make_study(rows), ["acc", "ece"]
    curve = hypervolume_curves({"a": study}, names, {"acc": 0.1, "ece": 1.0})["a"]
    points = costs(points_of(study), names)
    assert curve == pytest.approx([hypervolume(points[: k + 1], np.array([-0.1, 1.0])) for k in range(len(rows))])


def test_pruned_trials_count_in_the_curve_and_neither_lost_nor_running_ones_do():
    studies = {"plain": make_study(), "troubled": make_study(extra_pruned=True)}
    studies["troubled"].ask()
    curves = hypervolume_curves(studies, ["acc", "ece"], {"acc": 0, "ece": 1})
    assert curves["troubled"] == pytest.approx([curves["plain"][0], *curves["plain"]])


def test_importance_finds_the_key_that_matters():
    assert importances(make_study(ROWS[: FEWEST - 1]), ["acc", "ece"]) == {}
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(60):
        trial = study.ask()
        x, y = trial.suggest_float("x", 0, 1), trial.suggest_float("y", 0, 1)
        study.tell(trial, [x, y])
    shares = importances(study, ["acc", "ece"])
    assert shares["ACC"]["x"] > 0.8
    assert shares["ECE"]["y"] > 0.8
    assert sum(shares["ACC"].values()) == pytest.approx(1.0)


def test_all_figures_are_written(tmp_path, drawn):
    shares = {"ACC": {"x": 0.3, "y": 0.7}, "ECE": {"y": 0.5, "x": 0.5}}
    selected = {"knee": POINTS[0], "lowest_nll": POINTS[1]}
    volumes = {"a": [0.1, 0.2], "b": [0.1, 0.1, 0.3]}
    figures.plot_search(tmp_path, POINTS, POINTS[:3], selected, TESTS, volumes, shares, ["acc", "ece"])
    names = {"acc_ece.png", "ece_nll.png", "hypervolume.png", "importance.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert all(imread(tmp_path / name).std() > 0.01 for name in names)
    assert [line.get_xdata().tolist() for line in drawn[2].axes[0].lines] == [[1, 2], [1, 2, 3]]
    widths = [bar.get_width() for bar in drawn[3].axes[0].patches]
    assert widths == [0.3, 0.7, 0.5, 0.5]


@pytest.mark.parametrize(("name", "front"), [("acc_ece", {0, 1, 2}), ("ece_nll", {0, 1, 2})])
def test_the_shaded_region_is_what_the_front_dominates(tmp_path, drawn, name, front):
    figures.plot_trade_off(tmp_path / "x.png", name, POINTS, POINTS[:3], {"knee": POINTS[0]}, TESTS)
    axes = drawn[0].axes[0]
    region = next(patch for patch in axes.patches if patch.get_label() == "Dominated").get_path()
    x, y, colour = figures.TRADE_OFFS[name]
    sign_x, sign_y = figures.SIGNS[x], figures.SIGNS[y]
    (x0, x1), (y0, y1) = axes.get_xlim(), axes.get_ylim()
    for at in np.random.default_rng(0).uniform((x0, y0), (x1, y1), (200, 2)):
        beaten = any(sign_x * p.metrics[x] < sign_x * at[0] and sign_y * p.metrics[y] < sign_y * at[1] for p in POINTS)
        assert region.contains_point(at) == beaten
    dots, _, rings, cross = axes.collections[:4]
    assert dots.get_array().tolist() == [p.metrics[colour] for p in POINTS]
    assert {tuple(at) for at in rings.get_offsets()} == {(POINTS[n].metrics[x], POINTS[n].metrics[y]) for n in front}
    assert cross.get_offsets().tolist() == [[POINTS[0].metrics[x], POINTS[0].metrics[y]]]
    assert x0 < min(run[x] for run in TESTS[1])
    assert max(run[x] for run in TESTS[1]) < x1
