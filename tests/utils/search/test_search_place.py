"""A study and its folder: which belong together."""

from pathlib import Path

import optuna
import pytest

from utils.search.place import check_place, keep_place
from utils.search.study import open_storage

NEW = None


def begin(folder: Path, location: str, name: str = "s") -> optuna.Study:
    folder.mkdir(exist_ok=True)
    check_place(folder, location, name, NEW)
    study = optuna.create_study(storage=open_storage(location), study_name=name)
    keep_place(folder, location, study)
    return study


def test_a_study_goes_on_in_its_folder_however_that_is_written(tmp_path, monkeypatch):
    folder = tmp_path / "a"
    study = begin(folder, f"{folder}/journal.log")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(folder)
    for path in ("a", "./b/../a", "link"):
        check_place(Path(path), f"{path}/journal.log", "s", study.user_attrs)


def test_a_folder_holds_one_study(tmp_path):
    folder = tmp_path / "a"
    begin(folder, f"{folder}/journal.log")
    with pytest.raises(ValueError, match=f"{folder} holds the study s: choose another paths.output_dir for t"):
        check_place(folder, f"{folder}/journal.log", "t", NEW)
    with pytest.raises(ValueError, match=r"of a study that is not in search\.storage=other\.log: choose another"):
        check_place(folder, "other.log", "s", NEW)


def test_trials_of_a_study_that_left_no_name_are_not_written_over(tmp_path):
    (tmp_path / "trials").mkdir()
    check_place(tmp_path, "journal.log", "s", {})
    with pytest.raises(ValueError, match=r"holds trials of a study that is not in search\.storage=journal\.log"):
        check_place(tmp_path, "journal.log", "s", NEW)


@pytest.mark.parametrize("location", ["{}/a/journal.log", "{}/journals/s.log", "sqlite:///{}/study.db"])
def test_a_study_works_in_one_folder(tmp_path, location):
    there = location.format(tmp_path)
    study = begin(tmp_path / "a", there)
    check_place(tmp_path / "a", there, "s", study.user_attrs)
    said = f"study s works in {tmp_path}/a: give that as paths.output_dir, or use another search.name"
    with pytest.raises(ValueError, match=said):
        check_place(tmp_path / "b", there, "s", study.user_attrs)


def test_a_folder_may_be_moved_with_the_journal_in_it(tmp_path):
    attributes = begin(tmp_path / "a", f"{tmp_path}/a/journal.log").user_attrs
    (tmp_path / "a").rename(tmp_path / "b")
    check_place(tmp_path / "b", f"{tmp_path}/b/journal.log", "s", attributes)


def test_a_study_that_names_no_folder_gets_one(tmp_path):
    location = f"{tmp_path}/journal.log"
    study = optuna.create_study(storage=open_storage(location), study_name="s")
    check_place(tmp_path, location, "s", study.user_attrs)
    keep_place(tmp_path, location, study)
    with pytest.raises(ValueError, match=f"works in {tmp_path}: "):
        check_place(tmp_path / "b", location, "s", study.user_attrs)
