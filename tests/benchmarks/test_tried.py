"""All settings tried in a comparison: medians, worst cases, and the setting a person would take for its accuracy."""

import json

import pytest

from benchmarks import tried


@pytest.fixture
def tuning(tmp_path):
    def runs(*of_seeds):
        return {str(100 + i): dict(zip(("acc", "nll", "ece"), m, strict=True)) for i, m in enumerate(of_seeds)}

    mle = {"1e-4": runs((0.8, 0.5, 0.1)), "1e-3": runs((0.9, 0.7, 0.2), (0.9, 0.9, 0.4)), "1e-2": {}}
    sgp = {"1e-3": runs((0.9, 0.3, 0.02)), "1e-2": runs((0.9, 0.25, 0.06)), "1e-1": runs((0.5, 0.7, 0.0))}
    path = tmp_path / "tuning.json"
    path.write_text(json.dumps({"sst2_100": {"mle": mle, "sgp": sgp, "blob": {}}, "cola": {"mle": {}, "sgp": {}}}))
    return path


def test_medians_worst_and_most_accurate(tuning):
    lines = tried.markdown(tried.read(tuning)).splitlines()[2:]
    assert lines == [
        "| sst2_100 | mle | 2 | 1 | 0.650 | 0.800 | 20.0 | 30.0 | 90.0 / 0.800 / 30.0 |",
        "| sst2_100 | sgp | 3 | 0 | 0.300 | 0.700 | 2.0 | 6.0 | 90.0 / 0.250 / 6.0 |",
    ]


def test_files_and_an_unknown_task(tuning, tmp_path, capsys):
    tried.main([str(tuning), "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "tried.md").read_text() == tried.markdown(tried.read(tuning))
    assert (tmp_path / "out" / "tried.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        tried.main([str(tuning), "--tasks", "cola"])
    assert "no runs of cola: it has sst2_100" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file or directory: name the tuning.json of a comparison"),
        ('{"sst2_100": {', "is damaged or of another kind: name the tuning.json"),
        ("[]", "is damaged or of another kind"),
        ('{"sst2_100": [1]}', "is damaged or of another kind"),
        ('{"sst2_100": {"mle": {"1e-4": {"100": {"acc": "0.8", "nll": 0.4, "ece": 0.1}}}}}', "is damaged"),
        ('{"unfinished": {"sst2_100": "mle"}}', "is damaged or of another kind"),
        ('{"sst2_100": {"mle": {"1e-4": {"first": {"acc": 0.8, "nll": 0.4, "ece": 0.1}}}}}', "is damaged"),
        ('{"sst2_100": {"mle": {"1e-4": {"100": {"acc": 0.8}}}}}', "is damaged or of another kind"),
        ("{}", "has no finished run: name the tuning.json"),
        ('{"sst2_100": {"mle": {"1e-4": {}}}}', "has no finished run"),
    ],
)
def test_a_file_without_results_is_one_line(tmp_path, text, message):
    path = tmp_path / "tuning.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit) as stop:
        tried.main([str(path), "--out", str(tmp_path / "out")])
    assert str(stop.value.code).startswith(f"error: {path}")
    assert message in str(stop.value.code)
    assert not (tmp_path / "out").exists()
