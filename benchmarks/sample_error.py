"""Monte-Carlo error of the NLL against the number of samples, for independent and for antithetic draws.

    python -m benchmarks.sample_error outputs/RUN --out benchmarks/results/sample_error
    python -m benchmarks.sample_error outputs/RUN --groups 2 --largest 8 dset.validation_subset=20    # sooner

RUN is a folder of ``train_script.py`` with method=sgp; KEY=VALUE changes its settings. Every example is scored once
under ``groups * largest`` antithetic pairs of draws, whose first halves are the independent draws. NLL(S) needs S of
them: the pool is split at random into groups of S (of whole pairs for antithetic draws) and the variance of NLL(S) over
disjoint groups, which is unbiased, is averaged over many such partitions. Its square root is the standard error of one
prediction with S samples.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from benchmarks.figures import draw_sample_error
from benchmarks.measure import environment
from benchmarks.options import check_least, one_line_errors
from bnn.methods import Method
from pipeline.run import CONFIGS
from utils.data.batch import Batch, choice_scores
from utils.data.encode import Encoder
from utils.data.model_limits import position_limit
from utils.data.order import length_sorted
from utils.data.task import load_task
from utils.llm import fit_tokenizer, load_model, load_tokenizer, resolve_device, resolve_dtype
from utils.run import write_json_atomic
from utils.seeding import make_generator
from utils.settings import check, check_types, compose, model_settings, plain, tokenizer_settings, value_of

LEAST = {"groups": 2, "largest": 2, "partitions": 1}
"""The smallest value of an option."""


def settings(folder: Path, overrides: Sequence[str]) -> DictConfig:
    """The run's configuration with changes.

    Raises:
        FileNotFoundError: if the folder is no finished run.
        ValueError: if the run's method has no antithetic draws, for an unknown key or a group, or a value that no run
            can have.
    """
    for needed in ("config.yaml", "adapter"):
        if not (folder / needed).exists():
            raise FileNotFoundError(f"{folder} has no {needed}: name the folder of a finished run")
    cfg: Any = OmegaConf.load(folder / "config.yaml")
    for override in overrides:
        key = override.partition("=")[0]
        if (old := OmegaConf.select(cfg, key, default=cfg)) is cfg:
            raise ValueError(f"unknown key {key}: expected KEY=VALUE with a key of {folder / 'config.yaml'}")
        if isinstance(old, DictConfig):
            raise ValueError(f"{override}: {key} is a group, which a run keeps: change single keys of it")
        OmegaConf.update(cfg, key, value_of(override))
    complete = compose(CONFIGS, [])  # a run of an earlier version may lack keys
    OmegaConf.set_struct(complete, False)
    complete.merge_with(cfg)
    check(complete)
    check_types(complete, CONFIGS)
    if "antithetic" not in cfg.method.factory or "members" in cfg.method.factory:
        raise ValueError(f"{folder} was trained with method={cfg.method.name}: only sgp has such draws")
    return cfg


def load(cfg: DictConfig, folder: Path, split: str) -> tuple[nn.Module, list[Batch]]:
    """The trained model, and the batches of a split, both on the device."""
    device = resolve_device(cfg.device)
    tokenizer = load_tokenizer(**tokenizer_settings(cfg))
    encoder = Encoder(tokenizer, cfg.dset.scoring, cfg.dset.max_length, cfg.dset.too_long)
    dtype = resolve_dtype(cfg.dtype, device)
    model: Any = load_model(dtype=dtype, device=device, quantization=plain(cfg.quantization), **model_settings(cfg))
    fit_tokenizer(model, tokenizer)
    data = load_task(plain(cfg.dset), cfg.paths.data_dir, cfg.seed)
    examples = encoder.check(getattr(data, split), position_limit(model))
    sorted_ = length_sorted(examples, [encoder.length(e) for e in examples], cfg.eval.batch_size)
    batches = [encoder.collate(chosen).to(device) for _, chosen in sorted_]
    method: Method = instantiate(cfg.method.factory, _convert_="all")
    return method.load(model, folder / "adapter").eval(), batches


def answer_probabilities(model: nn.Module, batches: list[Batch], cfg: DictConfig, antithetic: bool, n: int) -> Tensor:
    """p(answer | x) of every example under each of n draws, (n, N) float64; antithetic pairs are neighbours.

    The draws 0, 2, 4, ... of antithetic pairs are the draws 0, 1, 2, ... without ``antithetic``.
    """
    method: Method = instantiate(cfg.method.factory, antithetic=antithetic, _convert_="all")
    scores = method.predict(
        model,
        lambda model, batch: choice_scores(model(**batch.model_inputs()).logits, batch),
        batches,
        n=n,
        generator=make_generator(cfg.seed, "sample_error", device=batches[0].input_ids.device),
        max_tokens_per_forward=cfg.eval.max_tokens_per_forward,
    )
    answer = torch.cat([batch.answer.cpu() for batch in batches])
    return scores.double().softmax(-1)[:, torch.arange(len(answer)), answer]


def error_of_nll(units: Tensor, S: int, partitions: int, generator: torch.Generator) -> dict[str, float]:
    """Mean and standard deviation of NLL(S) = -1/N sum_i log 1/S sum_s p_si over groups of S draws.

    Args:
        units: probabilities of the answers, (n, k, N); the n are independent of each other, the k draws of each not.
        S: draws of one prediction, a multiple of k.
        partitions: random partitions into groups over which mean and variance are averaged.
        generator: of the partitions.

    Returns:
        ``S``, ``units``, ``groups``; ``nll_mean``, its standard error ``nll_mean_error``, and ``nll_sd``, all in nats;
        ``sd_relative_error``, the standard error of ln nll_sd if NLL(S) is about normal.

    Raises:
        ValueError: if units would be torn, or do not make two groups.
    """
    per_group, torn = divmod(S, units.shape[1])
    if torn:
        raise ValueError(f"S={S} would tear units of {units.shape[1]} draws: expected a multiple")
    groups = len(units) // per_group
    if groups < 2:
        raise ValueError(
            f"{len(units)} units of {units.shape[1]} draws make {groups} groups of {S}: expected 2 or more"
        )
    means, variances = [], []
    for _ in range(partitions):
        chosen = torch.randperm(len(units), generator=generator)[: groups * per_group]
        mean_p = units[chosen].mean(1).unflatten(0, (groups, per_group)).mean(1)
        nll = -mean_p.log().mean(1)
        means.append(nll.mean())
        variances.append(nll.var())
    sd = float(torch.stack(variances).mean().sqrt())
    return {
        "S": S,
        "units": len(units),
        "groups": groups,
        "nll_mean": float(torch.stack(means).mean()),
        "nll_mean_error": sd / math.sqrt(groups),
        "nll_sd": sd,
        "sd_relative_error": 1 / math.sqrt(2 * (len(units) - 1)),
    }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Predict and evaluate; returns the record that is written as JSON."""
    check_least(arguments, LEAST)
    folder = Path(arguments.run)
    cfg = settings(folder, arguments.overrides)
    model, batches = load(cfg, folder, arguments.split)
    counts = [2**i for i in range(arguments.largest.bit_length())]
    pairs = answer_probabilities(model, batches, cfg, True, 2 * arguments.groups * counts[-1]).unflatten(0, (-1, 2))
    results: dict[str, list[dict[str, float]]] = {}
    for kind, units in {"independent": pairs[:, :1], "antithetic": pairs}.items():
        possible = [S for S in counts if S % units.shape[1] == 0]
        generator = make_generator(cfg.seed, "partitions")
        results[kind] = [error_of_nll(units, S, arguments.partitions, generator) for S in possible]
        for row in results[kind]:
            print(f"{kind:12s} S={row['S']:3d} NLL={row['nll_mean']:.5f} sd={row['nll_sd']:.5f}", flush=True)
    task = {
        "llm": cfg.llm.name_or_path,
        "dset": cfg.dset.name,
        "split": arguments.split,
        "examples": sum(len(batch.answer) for batch in batches),
    }
    found = environment(batches[0].input_ids.device)
    return {"command": vars(arguments), "environment": found, "task": task, "results": results}


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, predict, write ``<out>.json`` and ``<out>.png``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder: config.yaml and adapter are read")
    parser.add_argument("--split", default="validation", choices=("train", "validation", "test"))
    parser.add_argument("--largest", type=int, default=64, help="largest number of samples; powers of 2 up to it")
    parser.add_argument("--groups", type=int, default=4, help="independent draws, in groups of the largest number")
    parser.add_argument("--partitions", type=int, default=200, help="random partitions of the draws into groups")
    parser.add_argument("--out", default="outputs/sample_error", help="where to write, without suffix")
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE: changes of the run's settings")
    arguments = parser.parse_intermixed_args(argv)
    with one_line_errors():
        record = run(arguments)
    out = Path(record["command"]["out"])
    write_json_atomic(out.with_name(f"{out.name}.json"), record)
    draw_sample_error(record, out.with_name(f"{out.name}.png"))


if __name__ == "__main__":
    main()
