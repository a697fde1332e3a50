"""A written experiment composes to what the overrides say."""

import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from utils.search.experiment import compose, experiment_of, flat, write_experiment
from utils.settings import fingerprint

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


@pytest.mark.parametrize(
    "overrides",
    [
        ("opt.lr=0.000123",),
        ("dset=sst2", "method=mle", "opt.weight_decay=0.1", "llm=tiny", "peft.target_modules=[q_proj]"),
        ("experiment=sst2_500", "train.epochs=2", "seed=3"),
        ("experiment=published", "inducing.inducing_rows=4", "llm=tiny"),
        ("+peft.use_rslora=true", "dset.prompt_choice='a: {question}'"),
    ],
    ids=" ".join,
)
def test_it_composes_to_the_same_settings(tmp_path, overrides):
    configs = tmp_path / "configs"
    shutil.copytree(CONFIGS, configs)
    path = write_experiment(configs / "experiment" / "chosen.yaml", CONFIGS, list(overrides), "Trial 3.")
    assert path.read_text().startswith("# @package _global_\n# Trial 3.\n")
    again, wanted = compose(configs, ["experiment=chosen"]), compose(CONFIGS, list(overrides))
    assert fingerprint(again) == fingerprint(wanted)
    assert again.eval == wanted.eval


def test_it_holds_overrides_only():
    assert experiment_of(CONFIGS, ["opt.lr=0.5", "paths.output_dir=x", "overwrite=true"]) == {"opt": {"lr": 0.5}}
    assert experiment_of(CONFIGS, ["opt.lr=0.5", "paths=sweep"]) == {"opt": {"lr": 0.5}}
    assert experiment_of(CONFIGS, ["method=mle"]) == {"defaults": [{"override /method": "mle"}]}


def test_interpolations_are_kept():
    written = experiment_of(CONFIGS, ["inducing.inducing_rows=4", "inducing.inducing_cols=${inducing.inducing_rows}"])
    assert written["inducing"]["inducing_cols"] == "${inducing.inducing_rows}"
    assert OmegaConf.create(written).inducing.inducing_cols == 4


def test_a_deleted_key_is_refused():
    with pytest.raises(ValueError, match=r"cannot leave out peft\.r"):
        experiment_of(CONFIGS, ["~peft.r"])


def test_flat():
    assert flat({"a": {"b": 1, "c": {"d": [2]}}, "e": {}, "f": None}) == {"a.b": 1, "a.c.d": [2], "e": {}, "f": None}
