"""Spaces from YAML, their proposals, and the overrides made of them."""

from pathlib import Path

import hydra
import optuna
import pytest
from omegaconf import OmegaConf

from utils.search.experiment import compose
from utils.search.space import first_values, overrides_of, read_space, suggest, values_of
from utils.settings import plain

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
TREE = {
    "opt": {"lr": {"type": "float", "low": 1e-4, "high": 1e-2, "log": True}},
    "inducing": {
        "inducing_rows": {"type": "int", "low": 2, "high": 6, "step": 2},
        "inducing_cols": {"type": "link", "to": "inducing.inducing_rows"},
        "prior_sd": {"type": "link", "to": "opt.lr", "times": 10},
        "family": {"type": "categorical", "choices": ["diagonal", "full"]},
    },
    "peft": {"target_modules": {"type": "categorical", "choices": [["q_proj"], ["q_proj", "v_proj"]]}},
    "method": {"type": "categorical", "choices": ["sgp", "mle"]},
}


def proposals(n: int) -> list[tuple[optuna.trial.FrozenTrial, dict]]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    space = read_space(TREE)
    found = []
    for _ in range(n):
        trial = study.ask()
        found.append((trial, suggest(trial, space)))
    return found


def test_proposals_lie_in_the_space_and_links_follow():
    found = [values for _, values in proposals(40)]
    assert list(found[0]) == list(read_space(TREE))
    assert {v["inducing.inducing_rows"] for v in found} == {2, 4, 6}
    assert all(v["inducing.inducing_cols"] == v["inducing.inducing_rows"] for v in found)
    assert all(v["inducing.prior_sd"] == 10 * v["opt.lr"] for v in found)
    assert all(1e-4 <= v["opt.lr"] <= 1e-2 for v in found)
    assert 10 < sum(v["opt.lr"] < 1e-3 for v in found) < 30, "log: about half of 40 draws below 1e-3 (3 sd are 9.5)"
    assert {str(v["peft.target_modules"]) for v in found} == {"['q_proj']", "['q_proj', 'v_proj']"}
    assert {v["method"] for v in found} == {"sgp", "mle"}


def test_stored_parameters_give_the_same_values_again():
    for trial, values in proposals(5):
        assert values_of(trial.params, read_space(TREE)) == values


def test_overrides_compose_to_the_values_exactly():
    for _, values in proposals(3):
        cfg = compose(CONFIGS, [*overrides_of(values, CONFIGS), "paths.output_dir=x"])
        assert cfg.method.name == values["method"]
        assert cfg.opt.lr == values["opt.lr"]
        assert cfg.inducing.inducing_cols == values["inducing.inducing_rows"]
        assert cfg.inducing.family == values["inducing.family"]
        assert list(cfg.peft.target_modules) == values["peft.target_modules"]


def test_overrides_keep_types_and_awkward_text():
    values = {"a": None, "b": True, "c": 'say "ü", {y}=1', "d": 1e-7, "opt": "adamw"}
    assert overrides_of(values, CONFIGS)[-1] == "opt=adamw"
    cfg = compose(CONFIGS, [f"+{o}" for o in overrides_of(values, CONFIGS)[:-1]])
    assert [cfg[key] for key in "abcd"] == [None, True, 'say "ü", {y}=1', 1e-7]


@pytest.mark.parametrize(
    "text", ["a\nb", "a\tb", r"a\nb", r"a\\b", "a\\", r"say \"a\"", "Question: {question}\nAnswer:"]
)
def test_overrides_compose_to_the_text_itself(text):
    values = {"dset.prompt_choice": text, "peft.target_modules": [text, "q_proj"]}
    cfg = compose(CONFIGS, [*overrides_of(values, CONFIGS), "paths.output_dir=x"])
    assert cfg.dset.prompt_choice == text
    assert list(cfg.peft.target_modules) == [text, "q_proj"]


def test_first_values_are_the_low_ends():
    values = first_values(read_space(TREE))
    assert values["opt.lr"] == 1e-4
    assert values["inducing.prior_sd"] == pytest.approx(1e-3)
    assert values["peft.target_modules"] == ["q_proj"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"type": "flaot", "low": 0, "high": 1}, "unknown type flaot.*did you mean float"),
        ({"type": "float", "low": 0}, r"has \['low'\]: type=float takes \['high', 'low'\]"),
        ({"type": "float", "low": 0.0, "high": 1.0, "lg": True}, "has .*'lg'"),
        ({"type": "float", "low": 0.0, "high": 1.0, "log": True}, "above 0 with log"),
        ({"type": "float", "low": 0.1, "high": 1.0, "log": True, "step": 0.1}, "both log and step"),
        ({"type": "float", "low": 1.0, "high": 1.0}, "low < high"),
        ({"type": "float", "low": "a", "high": 1.0}, "low=a"),
        ({"type": "int", "low": 1.5, "high": 3}, "low=1.5"),
        ({"type": "int", "low": 1, "high": 4, "step": 0.5}, "step=0.5: expected one of that type, above 0"),
        ({"type": "float", "low": 0.0, "high": 1.0, "step": 0}, "step=0: expected .* above 0"),
        ({"type": "float", "low": 0.0, "high": 1.0, "step": 2.0}, "step=2.0: expected .* at most high - low"),
        ({"type": "float", "low": 0.1, "high": 1.0, "log": 3}, "log=3: expected true or false"),
        ({"type": "categorical", "choices": []}, "expected a list"),
        ({"type": "categorical", "choices": ["a", "${seed}"]}, r"choices=.*: \$\{ begins a reference"),
        ({"type": "categorical", "choices": [["a"], ["${seed}"]]}, r"choices=.*: \$\{ begins a reference"),
        ({"type": "link", "to": "opt.beta"}, "to=opt.beta: expected a float or int key"),
        (0.1, "search.space.opt.lr=0.1: expected"),
    ],
)
def test_a_malformed_entry_is_named(entry, message):
    with pytest.raises(ValueError, match=message) as stop:
        read_space({"opt": {"lr": entry}})
    assert "search.space.opt.lr" in str(stop.value)


def test_an_empty_space_is_refused():
    with pytest.raises(ValueError, match=r"search\.space is empty"):
        read_space({"opt": {}})


@pytest.mark.parametrize("name", [file.stem for file in sorted((CONFIGS / "search_space").glob("*.yaml"))])
def test_every_shipped_space_names_keys_of_the_configuration(name):
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = hydra.compose("search", [f"search_space={name}", "paths.output_dir=x"])
    values = first_values(read_space(plain(cfg.search.space)))
    again = compose(CONFIGS, overrides_of(values, CONFIGS))
    assert {key: OmegaConf.select(again, key) for key in values} == values
    assert again.inducing.lambda_init < again.inducing.lambda_max
