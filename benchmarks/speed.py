"""Time and memory of training steps and predictions: LoRA, DoRA, BLoB and SGP-LoRA side by side on one model.

    python -m benchmarks.speed --llm llama2_7b --out benchmarks/results/speed
    python -m benchmarks.speed --llm tiny --device cpu --repeats 3 --shrink 16     # seconds, on a CPU

The base model has random weights (``llm.random_init=true``), so nothing is downloaded. Every variant adapts the same
base model in turn, in one process. A training step is forward, objective at the last position, backward and AdamW
(fused on a GPU, for all variants); "graph": forward and backward replayed as a CUDA graph (``train.graph_padding``).
Samples are drawn anew for every prediction, unless "held": drawn once, as for a whole data set or a server. Ratios are
to PEFT's LoRA with its default float32 adapters.
"""

import argparse
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from peft import LoraConfig, get_peft_model
from torch import Tensor

from benchmarks.figures import draw_speed
from benchmarks.measure import environment, measure
from benchmarks.options import check_least, one_line_errors, untrained
from bnn.methods.base import Method, trainable
from bnn.objective import Loss, negative_elbo
from pipeline.graphs import StepGraphs
from pipeline.run import CONFIGS
from utils.data.batch import Batch
from utils.llm import load_model, resolve_device
from utils.run import write_json_atomic
from utils.settings import compose, model_settings, plain

BASELINE = "LoRA (float32)"
LEAST = {"samples": 1, "warmup": 0, "repeats": 1, "shrink": 1}
"""The smallest value of an option."""


class PlainLora(Method):
    """PEFT's LoRA with options that ``method=mle`` does not need."""

    def __init__(self, autocast: bool, **options: Any) -> None:
        self.autocast = autocast
        self.options = options

    def adapt(self, model: Any, lora: dict[str, Any]) -> Any:
        """See ``Method.adapt``."""
        return get_peft_model(model, LoraConfig(**lora, **self.options), autocast_adapter_dtype=self.autocast)


def variants(settings: Sequence[str]) -> dict[str, Callable[[], Method]]:
    """What is compared, by label; methods of this project as the configuration makes them."""

    def configured(*overrides: str) -> Callable[[], Method]:
        return lambda: instantiate(compose(CONFIGS, [*settings, *overrides]).method.factory, _convert_="all")

    return {
        BASELINE: lambda: PlainLora(True),
        "LoRA (bfloat16)": lambda: PlainLora(False),
        "DoRA": lambda: PlainLora(True, use_dora=True),
        "BLoB": configured("method=blob"),
        "SGP-LoRA": configured("method=sgp"),
        "SGP-LoRA, no CUDA graph": configured("method=sgp", "method.factory.cuda_graph=false"),
    }


def workloads(
    model: Any, method: Method, shrink: int, samples: int
) -> Mapping[str, AbstractContextManager[Callable[[], Any]]]:
    """Calls to be timed, by label; each is ready inside its context."""
    device = next(model.parameters()).device
    groups = method.parameter_groups(model, 1e-4, 0.0)
    parameters = [p for group in groups for p in group["params"]]
    optimizer = torch.optim.AdamW(groups, fused=device.type == "cuda")
    generator = torch.Generator(device).manual_seed(0)
    length = max(2, 128 // shrink)

    def ids(rows: int, tokens: int) -> Tensor:
        return torch.randint(model.config.vocab_size, (rows, tokens), device=device)

    def backward(batch: Batch, weight: Any, beta: Any) -> Loss:
        with method.sample(model, 1, generator) as live:
            logits = model(input_ids=batch.input_ids, logits_to_keep=1, use_cache=False).logits[:, -1].float()
            loss = negative_elbo(logits, batch.answer, live.kl(), 1000, beta)
            (weight * loss.loss).backward()
        return Loss(*(value.detach() for value in loss))

    @contextmanager
    def training(rows: int, tokens: int, graph: bool = False) -> Iterator[Callable[[], None]]:
        batch = fixed_length(ids(rows, tokens))
        graphs = StepGraphs(parameters, generator, device) if graph else None

        def step() -> None:
            if graphs:
                graphs(backward, batch, 1.0, 1.0, None)
            else:
                backward(batch, 1.0, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        model.train()
        yield step

    @torch.no_grad()
    def forward(batch: Tensor) -> Tensor:
        return model(input_ids=batch, logits_to_keep=1, use_cache=False).logits

    @contextmanager
    def predicting(rows: int, draws: int, held: bool = False) -> Iterator[Callable[[], Any]]:
        batch = ids(rows, length)

        def fresh() -> None:
            with torch.no_grad(), method.sample(model, draws, generator):
                forward(batch.repeat(draws, 1))

        def passes() -> None:
            for _ in range(draws):
                forward(batch)

        model.eval()
        if draws == 1 or not method.stochastic:
            yield passes
        elif held:
            with torch.no_grad(), method.sample(model, draws, generator):
                yield lambda: forward(batch.repeat(draws, 1))
        else:
            yield fresh

    shapes = ((4, length), (8, 2 * length))
    found = {f"train {rows}x{tokens}": training(rows, tokens) for rows, tokens in shapes}
    if device.type == "cuda":
        found |= {f"train {rows}x{tokens}, graph": training(rows, tokens, graph=True) for rows, tokens in shapes}
    return found | {
        f"1 pass 1x{length}": predicting(1, 1),
        f"1 pass {8 * samples}x{length}": predicting(8 * samples, 1),
        f"{samples} samples 1x{length}": predicting(1, samples),
        f"{samples} held samples 1x{length}": predicting(1, samples, held=True),
        f"{samples} samples 8x{length}": predicting(8, samples),
    }


def fixed_length(input_ids: Tensor) -> Batch:
    """Rows without padding, each with its first token for an answer at the last position."""
    rows, tokens = input_ids.shape
    zeros = torch.zeros(rows, 1, 1, dtype=torch.long)
    return Batch(
        ids=tuple(map(str, range(rows))),
        input_ids=input_ids,
        segment=torch.zeros(1, dtype=torch.long),  # not used: causal attention needs no mask
        position_ids=torch.arange(tokens),
        choice_source=zeros,
        choice_token=zeros,
        choice_weight=torch.ones(rows, 1, 1),
        choice_exists=torch.ones(rows, 1, dtype=torch.bool),
        answer=input_ids[:, 0],
        keep=1,
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure everything; returns the record, which is written to ``<out>.json`` after each variant.

    Raises:
        ValueError: before the model is loaded, for a number that is too small.
        RuntimeError: for a device that is not there.
    """
    check_least(arguments, LEAST)
    settings = untrained(arguments.llm)
    cfg = compose(CONFIGS, settings)
    device = resolve_device(arguments.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # CUDA graphs are recorded on the current one
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model: Any = load_model(dtype=dtype, device=device, quantization=None, **model_settings(cfg))
    lora = plain(cfg.peft) | {"target_modules": arguments.targets or plain(cfg.peft)["target_modules"]}
    results: dict[str, dict[str, Any]] = {}
    record = {"command": vars(arguments), "environment": environment(device), "results": results}
    out = Path(arguments.out)
    for label, make in variants(settings).items():
        if arguments.only and label not in (BASELINE, *arguments.only):
            continue
        method = make()
        adapted = method.adapt(model, dict(lora))
        results[label] = {"parameters": sum(p.numel() for _, p in trainable(adapted))}
        for workload, ready in workloads(adapted, method, arguments.shrink, arguments.samples).items():
            with ready as call:
                found = measure(call, device, arguments.warmup, arguments.repeats, arguments.seconds)
            if "graph" in workload:  # the allocator counts a graph's memory when it is recorded only
                found = found._replace(peak_bytes=None)
            results[label][workload] = found._asdict()
            print(f"{label:28s} {workload:22s} {found.median_ms:9.2f} ms (IQR {found.iqr_ms:.2f})", flush=True)
        model = adapted.unload()
        del method, adapted, ready, call
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        write_json_atomic(out.with_name(f"{out.name}.json"), record)  # a long benchmark may be cut short
    return record


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, measure, draw ``<out>.png``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", default="llama2_7b", help="a name in configs/llm")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--targets", nargs="*", help="adapted modules; those of the model's configuration if absent")
    parser.add_argument("--only", nargs="*", choices=variants(()), help="variants beside the baseline; all if absent")
    parser.add_argument("--samples", type=int, default=10, help="posterior samples of a prediction")
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=4.0, help="per workload; slow ones are repeated less often")
    parser.add_argument("--shrink", type=int, default=1, help="divide the sequence lengths 128 and 256 by this")
    parser.add_argument("--out", default="outputs/speed", help="where to write, without suffix")
    arguments = parser.parse_args(argv)
    with one_line_errors():
        record = run(arguments)
    out = Path(record["command"]["out"])
    draw_speed(record, BASELINE, out.with_name(f"{out.name}.png"))


if __name__ == "__main__":
    main()
