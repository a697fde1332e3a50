"""Figures from synthetic runs: written, non-empty, and of the right numbers."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from utils import plots
from utils.run import RunLogger


def write_run(run_dir: Path, offset: float = 0.0, mcs: tuple = ("mean", 10), last: int = 40) -> Path:
    logger = RunLogger(run_dir, io.StringIO())
    for step in range(10, last + 1, 10):
        nll = 1 / step + offset
        progress = {"loss": math.nan if step == 20 else nll, "nll": nll, "kl": 1e6 / step, "beta": 1.0}
        logger.train(epoch=1, step=step, lr=1e-3, examples_per_second=5.0, metrics=progress)
        for mc in mcs:
            value = nll + (0.5 if mc == "mean" else 0.0)
            metrics = {"nll": value, "acc": 1 - value, "ece": 0.1, "brier": 0.2}
            logger.evaluation(epoch=1, step=step, lr=1e-3, split="validation", mc=mc, metrics=metrics)
    for mc in mcs:
        logger.final(epoch=1, step=last, split="test", mc=mc, metrics={"nll": offset, "acc": 0.5, "ece": 0, "brier": 0})
    bins = {"edges": [0, 0.5, 1], "confidence": [0, 0.9], "accuracy": [0, 0.7], "count": [0, 30], "ece": 0.2}
    logger.reliability({f"MC={mc}": bins for mc in mcs})
    logger.close()
    return run_dir


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """The figures drawn, in order."""
    drawn: list[Figure] = []
    save = plots.save_figure
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: drawn.append(figure) or save(figure, path))
    return drawn


def assert_image(path: Path) -> None:
    image = imread(path)
    assert min(image.shape[:2]) > 300
    assert image.std() > 0.01


def test_curves(tmp_path, figures):
    path = plots.plot_curves(write_run(tmp_path))
    assert path == tmp_path / "curves.png"
    assert_image(path)
    panels = {ax.get_title(): ax for ax in figures[0].axes}
    assert list(panels["Training KL (nats)"].lines[0].get_xdata()) == [10, 20, 30, 40]
    loss = panels["Training objective (nats per example)"].lines[0].get_ydata()
    assert np.isnan(loss[1])
    assert not np.isnan(loss[[0, 2, 3]]).any()
    validation = panels["Validation NLL (nats)"]
    assert [line.get_label() for line in validation.lines] == ["MC=mean", "MC=10"]
    assert validation.lines[1].get_ydata() == pytest.approx([1 / 10, 1 / 20, 1 / 30, 1 / 40])


def test_curves_of_a_run_without_validation(tmp_path, figures):
    assert_image(plots.plot_curves(write_run(tmp_path, mcs=())))
    assert len(figures[0].axes) == 3


def test_reliability_shows_each_label_with_its_ece(tmp_path, figures):
    assert_image(plots.plot_reliability(write_run(tmp_path)))
    titles = [ax.get_title() for ax in figures[0].axes]
    assert "MC=mean: ECE = 0.2000" in titles
    assert "MC=10: ECE = 0.2000" in titles
    assert len(figures[0].axes[0].patches) == 1  # the empty bin has no bar


def test_comparison_is_the_mean_over_seeds_of_the_sampled_prediction(tmp_path, figures):
    seeds = [write_run(tmp_path / f"s{i}", offset=0.1 * i, last=40 + 10 * i) for i in range(3)]
    lora = write_run(tmp_path / "lora", mcs=("mean",))
    path = plots.plot_learning_comparison({"LoRA": lora, "SGP-LoRA": [seeds[0]]}, tmp_path / "out" / "one.png")
    assert_image(path)
    plots.plot_learning_comparison(
        {
            "LoRA": lora,
            "SGP-LoRA": [
                write_run(tmp_path / "a", 0.0),
                write_run(tmp_path / "b", 0.1),
                write_run(tmp_path / "c", 0.2),
            ],
        },
        path,
    )
    panels = {ax.get_title(): ax for ax in figures[1].axes}
    assert panels["Validation NLL (nats)"].lines[0].get_ydata() == pytest.approx(
        [0.5 + 1 / s for s in (10, 20, 30, 40)]
    )
    assert panels["Validation NLL (nats)"].lines[1].get_ydata() == pytest.approx(
        [0.1 + 1 / s for s in (10, 20, 30, 40)]
    )
    (band,) = panels["Validation NLL (nats)"].collections[1].get_paths()
    at_first_step = band.vertices[np.isclose(band.vertices[:, 0], 10), 1]
    assert (at_first_step.min(), at_first_step.max()) == pytest.approx((0.1, 0.3))  # sd of 0, 0.1, 0.2 is 0.1
    assert [text.get_text() for text in figures[1].legends[0].texts] == [
        "LoRA (MC=mean)",
        "SGP-LoRA (MC=10, mean ± 1 sd of 3 runs)",
    ]
    with pytest.raises(ValueError, match="runs of SGP share no step with a test record of MC=10"):
        plots.plot_learning_comparison({"SGP": seeds}, path)


def test_comparison_needs_evaluations(tmp_path):
    RunLogger(tmp_path, io.StringIO()).close()
    with pytest.raises(ValueError, match="LoRA has no validation or test record"):
        plots.plot_learning_comparison({"LoRA": tmp_path}, tmp_path / "x.png")


def test_command(tmp_path, capsys):
    runs = [str(write_run(tmp_path / name)) for name in ("a", "b")]
    plots.main([*runs, "--compare", str(tmp_path / "c.png"), "--label", "one", "--label", "one"])
    printed = capsys.readouterr().out.split()
    assert len(printed) == 5
    assert all(Path(path).stat().st_size > 1000 for path in printed)


@pytest.mark.parametrize("text", ["[1, 2]", '{"mean": {"ece": 0.1'])
def test_a_damaged_file_and_a_place_that_cannot_be_written_are_named(tmp_path, capsys, text):
    write_run(tmp_path)
    (tmp_path / "curves.png").mkdir()
    with pytest.raises(SystemExit):
        plots.main([str(tmp_path)])
    assert "curves.png" in capsys.readouterr().err
    (tmp_path / "reliability.json").write_text(text)
    with pytest.raises(ValueError, match=r"reliability\.json is damaged"):
        plots.plot_reliability(tmp_path)


def test_command_on_a_folder_that_is_no_run(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        plots.main([str(tmp_path)])
    assert stopped.value.code == 2
    assert f"{tmp_path} is no run folder" in capsys.readouterr().err
    RunLogger(tmp_path, io.StringIO()).close()
    with pytest.raises(SystemExit):
        plots.main([str(tmp_path)])
    assert "nothing to draw" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match=r"no reliability\.json"):
        plots.plot_reliability(tmp_path)
