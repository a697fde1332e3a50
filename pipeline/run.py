"""A run and its preparation: everything is checked and loaded here, the cheapest first."""

import inspect
import json
import logging
import shutil
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from hydra.utils import instantiate
from omegaconf import DictConfig
from peft import PeftModel
from peft.utils import CONFIG_NAME, INCLUDE_LINEAR_LAYERS_SHORTHAND
from safetensors import SafetensorError
from torch import Tensor, nn

from bnn.adapter import SGPLoraConfig
from bnn.methods.base import Method, Schedule, trainable
from pipeline.claim import Claim, claim
from utils.checkpoint import load_checkpoint
from utils.data.batch import Batch, choice_scores
from utils.data.encode import Encoder, checked
from utils.data.example import DataError, TaskData
from utils.data.model_limits import position_limit
from utils.data.order import length_sorted
from utils.data.task import load_task
from utils.distributed import World, shard_frozen
from utils.llm import fit_tokenizer, load_config, load_model, load_tokenizer, resolve_device, resolve_dtype
from utils.llm.attention import leave_out_cudnn_attention
from utils.llm.digest import recorded_base, weights_digest
from utils.llm.errors import lacks_memory
from utils.llm.memory import MemoryPlan, Shape, plan_memory
from utils.run import METRICS_FILE, NoLogger, RunLogger, check_disk, read_metrics
from utils.seeding import seed_all
from utils.settings import (
    check,
    check_base_kept,
    check_types,
    fingerprint,
    model_settings,
    out_of_distribution,
    plain,
    tokenizer_settings,
)

logger = logging.getLogger("train")

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
EVALUATED = ("reliability.*", "predictions_*.npz")
"""What a run that goes on removes from its folder: the results of its end, which it will come to again."""
WRITTEN = (*EVALUATED, "adapter", "checkpoint", "curves.png")
"""What one that starts afresh removes; the rest is written over at once."""
DAMAGED = (SafetensorError, KeyError, json.JSONDecodeError, HFValidationError, RuntimeError)
"""Errors of reading an adapter whose files are not what they should be."""
FREE_DISK_BYTES = 200 * 2**20
"""What a run folder may need: adapter, checkpoint and predictions of the largest supported setting."""


@dataclass
class Run:
    """What training and evaluation share, in each process."""

    cfg: DictConfig
    folder: Path
    device: torch.device
    world: World
    method: Method
    model: PeftModel
    encoder: Encoder
    data: TaskData
    schedule: Schedule
    generator: torch.Generator
    """Of posterior samples in training; seeded for every step."""
    base: str
    """What the base model's weights are known by (``weights_digest``)."""
    optimizer: torch.optim.Optimizer
    log: RunLogger
    resumed: dict[str, Any] | None
    claim: Claim | None
    """Keeps other processes from the folder until the run has finished; None in all but the main one."""
    skipped: int = 0
    best: dict[str, Any] = field(default_factory=dict)
    interrupted: bool = False

    @property
    def per_step(self) -> int:
        """Examples of an optimiser step."""
        return self.cfg.train.batch_size * self.cfg.train.grad_accum

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of a pass over the training examples."""
        return self.schedule.steps_per_epoch


def score(model: nn.Module, batch: Batch) -> Tensor:
    """Unnormalised log-scores of the choices, (rows, C)."""
    return choice_scores(model(**batch.model_inputs()).logits, batch)


def prepare(cfg: DictConfig) -> Run:
    """Check everything that can be checked cheaply, then load data, tokenizer and model, in this order."""
    check_settings(cfg)
    start = cfg.train.init_adapter
    world = World(resolve_device(cfg.device))
    folder = Path(world.gather(cfg.paths.output_dir)[0])  # the main process's: its name may hold a time
    if not world.main:
        logging.getLogger().setLevel(logging.WARNING)
    held = claim(folder) if world.main else None
    if cfg.overwrite and start is not None and Path(str(start)).resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"overwrite=true removes train.init_adapter={start} with its run: set paths.output_dir")
    resumed = load_checkpoint(folder, fingerprint(cfg)) if cfg.resume else None
    begun = (folder / METRICS_FILE).exists()
    method: Method = instantiate(cfg.method.factory, _convert_="all")
    if cfg.resume and resumed is None:
        if not begun or ((folder / "adapter").exists() and not steps_unneeded(cfg, method, folder)):
            raise FileNotFoundError(f"resume=true, but {folder} holds no checkpoint: correct paths.output_dir")
        logger.warning("the run in %s ended before its first checkpoint: it starts afresh", folder)
    if world.main and begun and not (cfg.resume or cfg.overwrite):
        raise FileExistsError(f"{folder} already holds a run: set resume=true, overwrite=true or another folder")
    check_disk(folder, FREE_DISK_BYTES)
    leave_out_cudnn_attention()
    seed_all(cfg.seed)
    with world.main_first():
        data, encoder, model = load(cfg, world)
    if missing := [split for split in method.fitted_to if not getattr(data, split)]:
        raise ValueError(f"method={cfg.method.name} is fitted to {missing[0]} examples, and there are none: name some")
    base = world.gather(weights_digest(model) if world.main else "")[0]  # weights to be sharded are with rank 0 alone
    if resumed is not None:
        check_resumed(folder, resumed, data.digest, base)
    torch.manual_seed(cfg.seed)  # adapters start alike whatever was drawn before
    model = adapted(cfg, method, model)
    report_rounded(model)
    if start is not None:
        report_held(cfg, model)
        if cfg.eval.zero_shot:
            check_base_kept(vars(model.peft_config[model.active_adapter]), " of train.init_adapter")
        if recorded_base(Path(str(start))) not in (None, base):
            logger.warning("train.init_adapter=%s was trained with other base weights, or quantised otherwise", start)
    if cfg.train.fsdp:
        shard_frozen(model, world)
    groups = method.parameter_groups(model, cfg.opt.lr, cfg.opt.weight_decay)
    fused = world.device.type == "cuda"
    optimizer = torch.optim.AdamW(groups, betas=tuple(cfg.opt.betas), eps=cfg.opt.eps, fused=fused)
    schedule = schedule_of(cfg, method, len(data.train))
    if resumed is not None:
        check_groups(folder, resumed, groups)
    method.start(model, schedule)  # the last that may refuse to go on: results of a run before are still there
    if world.main and begun:
        clear(folder, EVALUATED if resumed else WRITTEN)
    log = RunLogger(folder, resumed_step=resumed["step"] if resumed else -1) if world.main else NoLogger()
    generator = torch.Generator(world.device)
    parts = (method, model, encoder, data, schedule, generator, base, optimizer, log)
    return Run(cfg, folder, world.device, world, *parts, resumed, held)


def steps_unneeded(cfg: DictConfig, method: Method, folder: Path) -> bool:
    """Whether neither this run nor that before in the folder has a step of training, so that a kill costs none."""
    trained = any(record["kind"] == "train" for record in read_metrics(folder))
    return not trained and not (method.trains and cfg.train.epochs)


def check_settings(cfg: DictConfig) -> None:
    """Check the settings by themselves, and that there is an adapter to start from; see those for the errors raised."""
    check(cfg)
    check_types(cfg, CONFIGS)
    if (start := cfg.train.init_adapter) is not None:
        check_adapter(str(start))


def check_adapter(start: str) -> None:
    """Raise FileNotFoundError where ``train.init_adapter`` is no folder of an adapter, or of an ensemble's."""
    folder = Path(start)
    if not start or not folder.is_dir():
        raise FileNotFoundError(f"train.init_adapter={start} is no folder: name that of a saved adapter")
    if not [*folder.glob(CONFIG_NAME), *folder.glob(f"*/{CONFIG_NAME}")]:
        raise FileNotFoundError(f"train.init_adapter={start} holds no {CONFIG_NAME}: name that of a saved adapter")
    if (folder / "adapter" / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"train.init_adapter={start} is a run's folder: name {folder / 'adapter'}")


def adapted(cfg: DictConfig, method: Method, model: Any) -> Any:
    """The model with an adapter, new or loaded.

    Raises:
        ValueError: for a setting of the adapter that does not fit, or a saved one that is damaged or another model's.
    """
    start = cfg.train.init_adapter
    try:
        return method.load(model, str(start)) if start is not None else method.adapt(model, plain(cfg.peft))
    except (TypeError, AttributeError, IndexError) as error:  # what PEFT makes of values of another kind
        raise ValueError(f"a key of peft or inducing does not fit: {error}") from error
    except DAMAGED as error:
        if start is None or lacks_memory(error):
            raise
        why = str(error).partition("\n")[0]
        raise ValueError(
            f"train.init_adapter={start} is damaged or of another model ({type(error).__name__}: {why}): take the "
            "model that it was trained with, or train it again"
        ) from error


def schedule_of(cfg: DictConfig, method: Method, n_train: int) -> Schedule:
    """How many steps training makes, in all and in a pass over the training examples."""
    steps_per_epoch = -(-n_train // (cfg.train.batch_size * cfg.train.grad_accum))
    total = min(steps_per_epoch * cfg.train.epochs, cfg.train.max_steps or sys.maxsize) if method.trains else 0
    return Schedule(total, steps_per_epoch, n_train)


def clear(folder: Path, patterns: tuple[str, ...]) -> None:
    """Remove what a run before has left in its folder."""
    for path in (path for pattern in patterns for path in folder.glob(pattern)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def check_resumed(folder: Path, resumed: dict[str, Any], data: str, base: str) -> None:
    """Refuse to go on with other examples or weights than a run began with; older checkpoints may not tell.

    Raises:
        ValueError: saying which.
    """
    known = {
        "training or validation examples": (resumed.get("data", data), data, "bring those back"),
        "weights of the base model": (resumed.get("base", base), base, "bring those back (device too, if random)"),
    }
    for name, (before, now, remedy) in known.items():
        if before != now:
            raise ValueError(f"{folder} was begun with other {name}: {remedy}, or set overwrite=true to start afresh")


def check_groups(folder: Path, resumed: dict[str, Any], groups: list[dict[str, Any]]) -> None:
    """Refuse a checkpoint whose optimiser has other parameters than ``groups``: ValueError saying so."""
    before, now = ([len(group["params"]) for group in of] for of in (resumed["optimizer"]["param_groups"], groups))
    if before != now:
        raise ValueError(
            f"{folder} was begun by a version that gives the optimiser other parameters ({before}, not {now}): go on "
            "with that version, or set overwrite=true to start afresh"
        )


def report_held(cfg: DictConfig, model: Any) -> None:
    """Warn of settings that a loaded adapter has otherwise: its own hold, whatever ``config.yaml`` will say."""
    config = model.peft_config[model.active_adapter]
    past = {"init_lora_weights", "task_type", *(("lora_dropout",) if cfg.method.name == "mc_dropout" else ())}
    given = {f"peft.{key}": value for key, value in plain(cfg.peft).items() if key not in past}
    if isinstance(config, SGPLoraConfig):
        given |= {f"inducing.{key}": value for key, value in plain(cfg.inducing).items() if key != "init_seed"}
    for key, value in given.items():
        name = "target_r" if key == "peft.r" and hasattr(config, "target_r") else key.partition(".")[2]
        own = getattr(config, name, None)
        if value == INCLUDE_LINEAR_LAYERS_SHORTHAND:  # which have names of their own in an adapter
            continue
        differs = sorted(own or (), key=str) != sorted(value, key=str) if isinstance(value, list) else own != value
        if differs:
            logger.warning("train.init_adapter has %s=%s, which holds, not %s", key, own, value)


def report_rounded(model: Any) -> None:
    """Warn of trained weights of less than 32 bits, which a step moves by a 256th of their value or not at all.

    PEFT's adapters have 32 bits in any case; layers that are trained whole (``modules_to_save``) have the base's.
    """
    if short := [(name, p.dtype) for name, p in trainable(model) if p.dtype in (torch.bfloat16, torch.float16)]:
        name, dtype = short[0]
        logger.warning(
            "%s and %d more weights are trained in %s, where small steps are lost: set dtype=float32",
            *(name, len(short) - 1, str(dtype).removeprefix("torch.")),
        )


def rehearse(cfg: DictConfig) -> None:
    """Check what can be checked before weights are read: settings, adapter to start from, data, tokenizer.

    For commands that make many runs, none of which could begin.
    """
    check_settings(cfg)
    load_data(cfg)


def load_data(cfg: DictConfig) -> tuple[TaskData, Encoder]:
    """Data, and an encoder whose tokenizer it has been checked against."""
    data = load_task(plain(cfg.dset), cfg.paths.data_dir, cfg.seed)
    known = (*data.train, *data.validation, *data.test) if cfg.eval.ood else ()
    own = {(e.prompt, e.choices) for e in known}
    for name, settings in out_of_distribution(cfg, CONFIGS).items():
        test = load_task(settings, cfg.paths.data_dir, cfg.seed, at_most=True).test
        data.ood[name] = [e for e in test if (e.prompt, e.choices) not in own]
        if not data.ood[name]:
            raise DataError(f"eval.ood names {name}, whose test examples are the run's own: leave it out")
        repeated = len(test) - len(data.ood[name])
        note = f", without {repeated} that are among the run's own" if repeated else ""
        data.notes.append(f"ood {name}: {len(data.ood[name])} test examples{note}")
    for note in data.notes:
        logger.info("data: %s", note)
    tokenizer = load_tokenizer(**tokenizer_settings(cfg))
    encoder = Encoder(tokenizer, cfg.dset.scoring, cfg.dset.max_length, cfg.dset.too_long)
    return checked(data, encoder, None), encoder


def load(cfg: DictConfig, world: World) -> tuple[TaskData, Encoder, Any]:
    """Data, encoder and base model; the data is checked against the tokenizer before weights are read."""
    (data, encoder), llm = load_data(cfg), model_settings(cfg)
    dtype = resolve_dtype(cfg.dtype, world.device)
    memory = plan(cfg, world, data, encoder, dtype, llm)
    logger.info("%s", memory)
    memory.check()
    device = world.device
    if cfg.train.fsdp:  # sharding moves one layer at a time, from rank 0 to all
        device = torch.device("cpu" if world.main else "meta")
    model: Any = load_model(dtype=dtype, device=device, quantization=plain(cfg.quantization), **llm)
    fit_tokenizer(model, encoder.tokenizer)
    return checked(data, encoder, position_limit(model)), encoder, model


def plan(
    cfg: DictConfig, world: World, data: TaskData, encoder: Encoder, dtype: torch.dtype, llm: dict[str, Any]
) -> MemoryPlan:
    """The memory that the longest training batch and the evaluations will need."""
    longest = sorted(data.train or data.test, key=encoder.length)[-cfg.train.batch_size :]
    graphs = cfg.train.graph_padding is not None and world.device.type == "cuda"
    tokens, keep = encoder.widths(longest, cfg.train.graph_padding if graphs else 1)
    rows = min(cfg.train.batch_size, -(-cfg.train.batch_size * cfg.train.grad_accum // world.size))
    sizes = (cfg.inducing.inducing_rows, cfg.inducing.inducing_cols) if "posterior" in cfg.method.factory else ()
    keys = inspect.signature(load_config).parameters
    return plan_memory(
        load_config(**{key: value for key, value in llm.items() if key in keys})[0],
        Shape(min(rows, len(longest)) * cfg.train.n_mc, tokens, keep),
        dtype=dtype,
        device=world.device,
        quantization=plain(cfg.quantization),
        targets=plain(cfg.peft)["target_modules"],
        rank=max((cfg.peft.r, *sizes)),
        checkpointing=cfg.llm.gradient_checkpointing,
        evaluation=evaluation_shapes(cfg, world, data, encoder),
        adapters=cfg.method.factory.get("members", 1),
        shards=world.size if cfg.train.fsdp else 1,
        graphs=graphs,
    )


def evaluation_shapes(cfg: DictConfig, world: World, data: TaskData, encoder: Encoder) -> list[Shape]:
    """The forward passes of evaluation, each with as many samples as may share it (see ``bnn.predictive.predict``)."""
    samples, found = max(cfg.eval.n_mc, cfg.eval.every_n_mc or 1), []
    splits = {name: getattr(data, name) for name in (cfg.eval.split, "validation", "test")}
    for examples in (*splits.values(), *data.ood.values()):
        lengths = [encoder.length(example) for example in examples]
        batches = [chosen for _, chosen in length_sorted(examples, lengths, cfg.eval.batch_size)]
        passes = [Shape(-(-len(chosen) // world.size), *encoder.widths(chosen)) for chosen in batches]
        largest = max((own.rows * own.tokens for own in passes), default=1)
        together = max(1, min(samples, cfg.eval.max_tokens_per_forward // largest))
        found += [replace(own, rows=together * own.rows) for own in passes]
    return found
