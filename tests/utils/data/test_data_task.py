import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import datasets
import numpy as np
import pytest
from omegaconf import OmegaConf

from utils.data import source
from utils.data.example import DataError, Question
from utils.data.splits import carve, sources_of
from utils.data.task import TaskConfig, load_task

CONFIG_DIR = Path(__file__).parents[3] / "configs" / "dset"
SHIPPED = sorted(file.stem for file in CONFIG_DIR.glob("*.yaml") if file.stem != "base")


def dset(name: str, **changes) -> dict:
    merged = OmegaConf.merge(*(OmegaConf.load(CONFIG_DIR / f"{file}.yaml") for file in ("base", name)), changes)
    values = OmegaConf.to_container(merged, resolve=True)
    values.pop("defaults")
    return values


def sst2(start: int, stop: int, label: int | None = None) -> list[dict]:
    return [{"sentence": f"film {i}", "label": i % 2 if label is None else label} for i in range(start, stop)]


def ids(examples) -> list[str]:
    return [example.prompt for example in examples]


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.setattr(source, "hub_reachable", lambda endpoint: False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)


@pytest.fixture
def full(tmp_path, write_rows):
    for split, rows in {"train": sst2(0, 50), "validation": sst2(50, 60), "test": sst2(60, 80)}.items():
        write_rows(f"glue/sst2/{split}.jsonl", rows)
    return tmp_path


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_config_is_complete(name):
    config = TaskConfig.from_dict(dset(name))
    assert config.name == name
    assert all(isinstance(label, str) for label in config.labels)  # an unquoted yes or no would be a bool


def test_local_splits_are_taken_as_they_are(full):
    task = load_task(dset("sst2"), full, seed=0)
    assert (len(task.train), len(task.validation), len(task.test)) == (50, 10, 20)
    assert any("test.jsonl (20)" in note for note in task.notes)


def test_hidden_test_labels_make_validation_the_test_and_carve_from_train(full, write_rows):
    write_rows("glue/sst2/test.jsonl", sst2(60, 80, label=-1))
    task = load_task(dset("sst2"), full, seed=0)
    assert ids(task.test) == [f"Review: film {i}\nSentiment:" for i in range(50, 60)]
    assert (len(task.train), len(task.validation)) == (45, 5)
    assert not set(ids(task.train)) & set(ids(task.validation))
    again, other = load_task(dset("sst2"), full, seed=0), load_task(dset("sst2"), full, seed=1)
    assert again.validation == task.validation
    assert other.validation != task.validation
    assert other.test == task.test
    assert any("carved" in note for note in task.notes)


def test_validation_is_carved_where_only_train_and_test_exist(full):
    (full / "glue/sst2/validation.jsonl").unlink()
    task = load_task(dset("sst2", validation_fraction=0.2), full, seed=0)
    assert (len(task.train), len(task.validation), len(task.test)) == (40, 10, 20)


@pytest.mark.parametrize("seed", range(5))
def test_a_carve_takes_what_belongs_together_as_a_whole(tmp_path, write_rows, seed):
    def row(i: int, side: int) -> dict:
        names = [f"Ann{i}", f"bob{i}"]
        first, second = names if side else (names[1].title(), names[0].upper())
        return {"sentence": f"{i} _ is {side}.", "option1": first, "option2": second, "answer": "12"[side]}

    write_rows("winogrande/winogrande_s/train.jsonl", [row(i, side) for i in range(20) for side in (0, 1)])
    write_rows("winogrande/winogrande_s/validation.jsonl", [row(30, 0), row(31, 1)])
    task = load_task(dset("wg_s", validation_fraction=0.25), tmp_path, seed=seed)
    assert (len(task.train), len(task.validation), len(task.test)) == (30, 10, 2)
    sources = [{e.prompt.split()[0] for e in split} for split in (task.train, task.validation)]
    assert [len(numbers) for numbers in sources] == [15, 5]
    assert not set.intersection(*sources)


def test_a_carve_follows_groups_through_other_rows():
    pairs = [("a", "b"), ("c", "d"), ("b", "e"), ("f", "g"), ("e", "h"), ("d", "f"), ("i", "j"), ("k", "l")]
    questions = [Question(str(i), {}, (), 0, groups=pair) for i, pair in enumerate(pairs)]
    source = sources_of(questions)
    members = [[i for i in range(8) if source[i] == own] for own in dict.fromkeys(source)]
    assert members == [[0, 2, 4], [1, 3, 5], [6], [7]]
    for seed in range(5):
        rest, carved = carve(questions, 0.25, seed=seed)
        assert len(carved) in (2, 3, 4)
        assert not {g for q in rest for g in q.groups} & {g for q in carved for g in q.groups}


@pytest.mark.parametrize("seed", range(3))
def test_a_carve_does_not_part_a_sentence_from_its_phrases(tmp_path, write_rows, seed):
    """As of the hub's SST-2, whose test labels are hidden."""
    whole = [f"a{i} film with{i} much{i} to like{i}" for i in range(12)]
    phrases = [" ".join(text.split()[i:j]) for text in whole for i, j in ((0, 2), (2, 4), (2, 3), (3, 6))]
    sentences = [*phrases, *whole, "film"]
    write_rows("glue/sst2/train.jsonl", [{"sentence": f"{text} ", "label": i % 2} for i, text in enumerate(sentences)])
    write_rows("glue/sst2/validation.jsonl", sst2(50, 60))
    write_rows("glue/sst2/test.jsonl", sst2(60, 80, label=-1))
    task = load_task(dset("sst2", validation_fraction=0.3), tmp_path, seed=seed)
    splits = (task.train, task.validation)
    train, carved = ([e.prompt[len("Review: ") : -len("\nSentiment:")] for e in split] for split in splits)
    assert len(train) + len(carved) == 61
    assert 18 <= len(carved) <= 24
    pairs = [(f" {a} ", f" {b} ") for a in carved for b in train if "film" not in (a, b)]
    assert not [pair for pair in pairs if pair[0] in pair[1] or pair[1] in pair[0]]


def test_a_carve_of_single_questions_is_a_seeded_draw():
    questions = [Question(str(i), {}, (), 0) for i in range(10)]
    rest, carved = carve(questions, 0.3, seed=4)
    drawn = np.random.default_rng([4, 1]).permutation(10)[:3]
    assert [q.id for q in carved] == [str(i) for i in sorted(drawn)]
    assert [q for q in questions if q not in carved] == rest


def test_a_carve_needs_more_than_one_source():
    questions = [Question(str(i), {}, (), 0, groups=("one",)) for i in range(10)]
    with pytest.raises(
        DataError, match=r"10 questions from 1 sources, .*dset.validation_fraction=0.3 would take all: name a file"
    ):
        carve(questions, 0.3, seed=0)
    with pytest.raises(DataError, match=r"11 questions from 2 sources, .*would take all: lower it, or add a file"):
        carve([*questions, Question("x", {}, (), 0)], 0.99, seed=0)


def test_no_labelled_split_to_test_on(full, write_rows):
    (full / "glue/sst2/validation.jsonl").unlink()
    write_rows("glue/sst2/test.jsonl", sst2(60, 80, label=-1))
    with pytest.raises(DataError, match="neither a labelled test"):
        load_task(dset("sst2"), full, seed=0)


def test_partly_hidden_labels_are_an_error(full, write_rows):
    write_rows("glue/sst2/test.jsonl", [*sst2(60, 63), *sst2(63, 64, label=-1)])
    with pytest.raises(DataError, match=r"test.jsonl: 1 of 4 rows have no answer \(first: test-3\)"):
        load_task(dset("sst2"), full, seed=0)


@pytest.mark.parametrize("scoring", ["label", "choice_mean"])
def test_questions_repeated_between_splits_are_removed_from_train(tmp_path, write_rows, scoring):
    def row(i: int, flip: bool = False) -> dict:
        text, key = [["x", "y"], ["y", "x"]][flip], "BA"[flip]
        return {
            "id": f"{i}{flip}",
            "question": f"q{i}",
            "choices": {"label": ["A", "B"], "text": text},
            "answerKey": key,
        }

    write_rows("ai2_arc/ARC-Easy/train.jsonl", [row(i) for i in range(6)])
    write_rows("ai2_arc/ARC-Easy/validation.jsonl", [row(1, flip=True), row(7)])
    write_rows("ai2_arc/ARC-Easy/test.jsonl", [row(0, flip=True), row(7), row(8)])
    task = load_task(dset("arc_e", scoring=scoring), tmp_path, seed=0)
    assert [e.id for e in task.train] == [f"{i}False" for i in range(2, 6)]
    assert [e.id for e in task.validation] == ["1True"]
    assert len(task.test) == 3
    assert any("1 from validation, 2 from train" in note for note in task.notes)


def test_subsets_are_seeded_and_limited(full):
    small = dset("sst2", train_subset=10, test_subset=3)
    task = load_task(small, full, seed=0)
    assert (len(task.train), len(task.validation), len(task.test)) == (10, 10, 3)
    assert load_task(small, full, seed=0).train == task.train
    assert load_task(small, full, seed=1).train != task.train
    most = load_task(dset("sst2", train_subset=50, test_subset=1), full, seed=0)
    assert (len(most.train), len(most.test)) == (50, 1)
    with pytest.raises(DataError, match=r"dset.train_subset is 51, but 50"):
        load_task(dset("sst2", train_subset=51), full, seed=0)
    with pytest.raises(DataError, match=r"dset.test_subset is 0"):
        load_task(dset("sst2", test_subset=0), full, seed=0)


def test_ood_split_is_loaded_or_noted_as_absent(tmp_path, write_rows):
    write_rows("nyu-mll/glue/cola/train.jsonl", sst2(0, 20))
    write_rows("nyu-mll/glue/cola/validation.jsonl", sst2(20, 30))
    without_ood = load_task(dset("cola"), tmp_path, seed=0)
    assert without_ood.ood == {}
    assert any("cola_ood" in note and "left out" in note for note in without_ood.notes)
    write_rows("nyu-mll/glue/cola/validation_ood.jsonl", sst2(100, 104))
    assert len(load_task(dset("cola"), tmp_path, seed=0).ood["cola_ood"]) == 4


def test_the_test_subset_limits_the_ood_split_too(tmp_path, write_rows):
    rows = {"train": sst2(0, 20), "validation": sst2(20, 40), "validation_ood": sst2(100, 110)}
    for split, found in rows.items():
        write_rows(f"nyu-mll/glue/cola/{split}.jsonl", found)
    whole = load_task(dset("cola"), tmp_path, seed=0).ood["cola_ood"]
    first, again, other = (load_task(dset("cola", test_subset=6), tmp_path, seed=seed) for seed in (0, 0, 1))
    assert len(first.test) == len(first.ood["cola_ood"]) == 6
    assert first.ood == again.ood != other.ood
    assert set(first.ood["cola_ood"]) < set(whole)
    assert load_task(dset("cola", test_subset=15), tmp_path, seed=0).ood["cola_ood"] == whole, "smaller than that"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", "not valid JSON .*: every line is an object"),
        ('{"label": ' + 5000 * "1" + "}", "not valid JSON"),
        (100_000 * "[", "not valid JSON"),
        ("[1]", "expected a JSON object"),
        ('{"sentence": "s", "label": 2}', "answer 2 is not in 0..1"),
        ('{"label": 1}', "'sentence' is missing"),
    ],
)
def test_malformed_rows_name_file_and_line(full, line, message):
    file = full / "glue/sst2/train.jsonl"
    file.write_text('{"sentence": "ok", "label": 1}\n\n' + line + "\n")
    with pytest.raises(DataError, match=rf"train\.jsonl:3: .*{message}"):
        load_task(dset("sst2"), full, seed=0)


def test_missing_choices_key_names_file_and_line(tmp_path, write_rows):
    write_rows("ai2_arc/ARC-Easy/test.jsonl", [{"id": "1", "question": "q", "answerKey": "A"}])
    with pytest.raises(DataError, match=r"test\.jsonl:1: malformed row \(KeyError: 'choices'\)"):
        load_task(dset("arc_e"), tmp_path, seed=0)


def test_missing_data_says_what_was_looked_for(tmp_path, no_hub):
    with pytest.raises(DataError, match=r"no train\|validation\|test.jsonl in .*boolq.* cannot be reached; put"):
        load_task(dset("boolq"), tmp_path, seed=0)


def test_offline_mode_asks_the_cache_without_a_probe(tmp_path, monkeypatch):
    def load_dataset(path, config):
        assert (path, config) == ("google/boolq", None)
        row = {"question": "q", "passage": "p", "answer": True}
        numbered = [{**row, "question": f"q{i}", "passage": f"p{i}"} for i in range(20)]
        return datasets.DatasetDict(
            train=datasets.Dataset.from_list(numbered), validation=datasets.Dataset.from_list([row])
        )

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(source, "hub_reachable", lambda endpoint: pytest.fail("probed although offline"))
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = load_task(dset("boolq"), tmp_path, seed=0)
    assert (len(task.train), len(task.validation), len(task.test)) == (18, 2, 1)
    assert task.test[0].prompt == "p\nQuestion: q?\nAnswer:"
    assert task.test[0].answer == 1
    assert any("hub google/boolq train" in note for note in task.notes)


class Answer(BaseHTTPRequestHandler):
    """A page, and nothing else."""

    def do_HEAD(self):
        self.send_response(200 if self.path == "/there" else 404)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_hub_is_reachable_if_it_answers_at_all(server):
    assert source.hub_reachable(f"{server}/there")
    assert source.hub_reachable(f"{server}/not_there")


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:1", "hub.example", "http://127.0.0.1:x"])
def test_a_hub_that_cannot_be_reached(endpoint, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    assert not source.hub_reachable(endpoint)


def test_a_single_choice_is_refused(tmp_path, write_rows):
    choices = {"label": ["A"], "text": ["only"]}
    write_rows("ai2_arc/ARC-Easy/test.jsonl", [{"id": "1", "question": "q", "choices": choices, "answerKey": "A"}])
    with pytest.raises(DataError, match=r"test\.jsonl:1: choices: 1; at least 2 are needed"):
        load_task(dset("arc_e"), tmp_path, seed=0)


def test_hub_errors_become_one_line(tmp_path, monkeypatch):
    def load_dataset(path, config):
        raise FileNotFoundError("no such data set\nlong story")

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"the hub gave no google/boolq.*: no such data set; put") as caught:
        load_task(dset("boolq"), tmp_path, seed=0)
    assert "\n" not in str(caught.value)


def test_user_files(write_rows):
    rows = [{"question": f"q{i}", "choices": ["x", "y"], "answer": "x"} for i in range(12)]
    train, test = write_rows("a.jsonl", rows[:10]), write_rows("b.jsonl", rows[10:])
    task = load_task(dset("jsonl", train_file=str(train), test_file=str(test)), ".", seed=0)
    assert (len(task.train), len(task.validation), len(task.test)) == (9, 1, 2)
    evaluation = load_task(dset("jsonl", test_file=str(test)), ".", seed=0)
    assert (evaluation.train, len(evaluation.test)) == ([], 2)


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("rows", [[], [{"question": "q", "choices": ["x", "y"], "label": 1}]], ids=["empty", "label"])
def test_a_file_of_one_s_own_without_answers_is_not_passed_over(rows, split, write_rows):
    """Another split would take its place, or a part of train."""
    whole = [{"question": f"q{i}", "choices": ["x", "y"], "answer": "x"} for i in range(30)]
    parts = {"train": whole[:10], "validation": whole[10:20], "test": whole[20:]}
    files = {f"{name}_file": str(write_rows(f"{name}.jsonl", part)) for name, part in parts.items()}
    assert load_task(dset("jsonl", **files), ".", seed=0).test
    files[f"{split}_file"] = str(write_rows("bad.jsonl", rows))
    what = ": none of 1 rows has an answer" if rows else " holds no rows"
    with pytest.raises(DataError, match=rf"bad.jsonl{what}; .*{split}_file=null"):
        load_task(dset("jsonl", **files), ".", seed=0)


def test_a_benchmark_without_what_it_trains_on_is_refused(full):
    (full / "glue/sst2/train.jsonl").unlink()
    with pytest.raises(DataError, match=r"sst2: the source has no split train .* dset.splits.train=null to evaluate"):
        load_task(dset("sst2"), full, seed=0)
    assert load_task(dset("sst2", splits={"train": None}), full, seed=0).test


def test_a_text_with_half_a_character_is_named_by_file_and_line(write_rows, tmp_path):
    row = {"question": "smile \U0001f600", "choices": ["a", "b"], "answer": 0}
    file = write_rows("whole.jsonl", [row, row])
    assert load_task(dset("jsonl", test_file=str(file)), tmp_path, seed=0).test[0].prompt.count("\U0001f600") == 1
    file = write_rows("half.jsonl", [row, row | {"question": "cut \ud83d"}])
    with pytest.raises(DataError, match=r"half.jsonl:2: \\ud83d is half of a character"):
        load_task(dset("jsonl", test_file=str(file)), tmp_path, seed=0)


def test_validation_that_test_repeats_as_a_whole_is_refused(full, write_rows):
    write_rows("glue/sst2/validation.jsonl", sst2(60, 70))
    with pytest.raises(DataError, match="every validation question of sst2 is one of test too"):
        load_task(dset("sst2"), full, seed=0)


@pytest.mark.parametrize("group", ["", float("nan")])
def test_rows_with_an_empty_group_are_alone(group, write_rows, tmp_path):
    rows = [{"question": f"q{i}", "choices": ["a", "b"], "answer": 0, "group": group} for i in range(10)]
    files = {"train_file": str(write_rows("t.jsonl", rows[:8])), "test_file": str(write_rows("e.jsonl", rows[8:]))}
    task = load_task(dset("jsonl", **files, validation_fraction=0.25), tmp_path, seed=0)
    assert (len(task.train), len(task.validation)) == (6, 2)


def test_a_subset_of_another_data_set_is_at_most_all_of_it(full):
    assert len(load_task(dset("sst2", test_subset=15), full, seed=0, at_most=True).test) == 15
    assert len(load_task(dset("sst2", test_subset=25), full, seed=0, at_most=True).test) == 20
    with pytest.raises(DataError, match="test_subset is 25, but 20 questions are available"):
        load_task(dset("sst2", test_subset=25), full, seed=0)


def test_user_files_missing_or_unset(tmp_path):
    with pytest.raises(DataError, match=r"dset.test_file=.*gone.jsonl does not exist"):
        load_task(dset("jsonl", test_file=str(tmp_path / "gone.jsonl")), ".", seed=0)
    with pytest.raises(DataError, match="none is set"):
        load_task(dset("jsonl"), ".", seed=0)


def test_unknown_and_missing_settings(full):
    with pytest.raises(DataError, match=r"dset.train_subsett; did you mean train_subset"):
        load_task({**dset("sst2"), "train_subsett": 3}, full, seed=0)
    with pytest.raises(DataError, match="did you mean label"):
        load_task(dset("sst2", scoring="labels"), full, seed=0)
    with pytest.raises(DataError, match="did you mean sst2"):
        load_task(dset("sst2", schema="sst-2"), full, seed=0)
    with pytest.raises(DataError, match=r"incomplete.*name"):
        load_task({"schema": "sst2"}, full, seed=0)
    with pytest.raises(DataError, match=r"dset.splits.tset"):
        load_task(dset("sst2", splits={"tset": "test"}), full, seed=0)
    with pytest.raises(DataError, match=r"dset.test_file=mine.jsonl is not read with schema sst2: choose another dset"):
        load_task(dset("sst2", test_file="mine.jsonl"), full, seed=0)
    with pytest.raises(DataError, match=r"dset.path=foo is not read with schema jsonl"):
        load_task(dset("jsonl", path="foo"), full, seed=0)
    with pytest.raises(DataError, match=r"dset.train_file=mine.jsonl is not read with schema quiz"):
        load_task(dset("quiz", train_file="mine.jsonl"), full, seed=0)
    for unset in ("path", "splits"):
        with pytest.raises(DataError, match=r"dset.path and dset.splits must be set for schema"):
            load_task(dset("sst2") | {unset: None}, full, seed=0)
    (full / "glue/sst2/validation.jsonl").unlink()
    for fraction in (0.0, 1.0):
        with pytest.raises(DataError, match=rf"validation_fraction is {fraction}"):
            load_task(dset("sst2", validation_fraction=fraction), full, seed=0)
