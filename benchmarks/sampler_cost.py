"""Time and memory of drawing all factors of a model, against its size, the rank, the inducing size and the samples.

    python -m benchmarks.sampler_cost --out benchmarks/results/sampler_cost
    python -m benchmarks.sampler_cost --device cpu --hidden 32 --shrink 16 --repeats 2    # seconds, on a CPU
    python -m benchmarks.sampler_cost --device cpu --hidden 576 --step                    # also its share of a step

Every layer has two square linear modules, q and v, both adapted. Each quantity varies alone around ``DEFAULT``.
``training`` is the draw with its KL and the backward pass from a fixed gradient of weights and KL to the parameters,
``prediction`` the draw without gradients; there is no model to run. Memory is the allocator's peak above what is
allocated before the first draw, the capture of CUDA graphs included. ``--step`` adds the sampler's share of a training
step (forward, objective at the last position, backward, AdamW) of a whole language model with random weights.
"""

import argparse
import gc
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import get_peft_model
from torch import nn

from benchmarks.figures import draw_sampler_cost
from benchmarks.measure import environment, measure
from benchmarks.options import check_least, one_line_errors
from benchmarks.sampler_step import Draw, step_share, training
from bnn import LiveSample, Sampler, SGPLoraConfig
from utils.llm import resolve_device
from utils.run import write_json_atomic

LEAST = {"hidden": 1, "shrink": 1, "warmup": 0, "repeats": 1}
"""The smallest value of an option."""
RANK_WARNING = "an inducing matrix of .* cannot represent"


class Point(NamedTuple):
    """What is varied."""

    layers: int
    r: int
    m: int
    """m_r = m_c."""
    S: int


DEFAULT = Point(layers=32, r=8, m=9, S=1)
AXES = {
    "layers": (1, 4, 16, 32, 80),
    "r": (4, 8, 16, 32, 64),
    "m": (4, 9, 16, 32, 64),
    "S": (1, 3, 10, 30, 100),
}


class Layer(nn.Module):
    """q and v of one layer, with a weight that all layers share, so that only the adapters take memory."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        out_features, in_features = weight.shape
        self.q = nn.Linear(in_features, out_features, bias=False, device="meta")
        self.v = nn.Linear(in_features, out_features, bias=False, device="meta")
        self.q.weight = self.v.weight = weight


def adapted(point: Point, hidden: int, device: torch.device) -> nn.Module:
    """Layers with SGP-LoRA adapters."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    weight = nn.Parameter(torch.zeros(hidden, hidden, dtype=dtype, device=device), requires_grad=False)
    base = nn.ModuleList(Layer(weight) for _ in range(point.layers))
    config = SGPLoraConfig(r=point.r, target_modules=["q", "v"], inducing_rows=point.m, inducing_cols=point.m)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=RANK_WARNING)
        return get_peft_model(base, config)  # type: ignore[arg-type]


def prediction(draw: Draw) -> Callable[[], None]:
    """A draw without gradients."""

    def call() -> None:
        with torch.no_grad(), draw():
            pass

    return call


def cost(call: Callable[[], None], device: torch.device, warmup: int, repeats: int) -> dict[str, Any]:
    """``Measurement`` of a call, its peak above what is allocated now, the first call included."""
    if device.type != "cuda":
        return measure(call, device, warmup, repeats)._asdict()
    standing = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    first = torch.cuda.max_memory_allocated(device)
    found = measure(call, device, warmup, repeats)
    return found._replace(peak_bytes=max(first, found.peak_bytes or 0) - standing)._asdict()


def costs(point: Point, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """All variants at one point."""
    model = adapted(point, arguments.hidden, device)
    generator = torch.Generator(device).manual_seed(0)
    row: dict[str, Any] = point._asdict()
    for variant in ("training", "training, CUDA graph", "prediction"):
        cuda_graph = variant == "training, CUDA graph"
        if cuda_graph and device.type != "cuda":
            continue
        sampler = Sampler(model, own=True, cuda_graph=cuda_graph)

        def draw(sampler: Sampler = sampler) -> AbstractContextManager[LiveSample]:
            return sampler.draw(point.S, generator)

        parameters = [p for _, p in sampler.parameters()]
        call = prediction(draw) if variant == "prediction" else training(model, draw, point.S, parameters)
        row[variant] = cost(call, device, arguments.warmup, arguments.repeats)
        print(f"{point} {variant:22s} {row[variant]['median_ms']:9.2f} ms", flush=True)
        del sampler, draw, parameters, call
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return row


def sweeps(arguments: argparse.Namespace, device: torch.device) -> dict[str, list[dict[str, Any]]]:
    """Rows of every axis; a point on several axes is measured once."""

    def shrunk(value: int) -> int:
        return max(1, value // arguments.shrink)

    default = Point(*(shrunk(value) for value in DEFAULT))
    points = {
        axis: [default._replace(**{axis: value}) for value in sorted({shrunk(v) for v in values})]
        for axis, values in AXES.items()
    }
    each = dict.fromkeys(point for axis in points.values() for point in axis)
    found = {point: costs(point, arguments, device) for point in each}
    return {axis: [found[point] for point in chosen] for axis, chosen in points.items()}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure everything; returns the record that is written as JSON.

    Raises:
        ValueError: for a number that is too small.
        RuntimeError: for a device that is not there.
    """
    check_least(arguments, LEAST)
    device = resolve_device(arguments.device)
    step = step_share(arguments.step, device, arguments.warmup, arguments.repeats) if arguments.step else None
    if step:
        print(
            f"{step['sampler_ms']:.2f} ms of a step of {step['step_ms']:.2f} ms: {100 * step['share']:.1f} %",
            flush=True,
        )
    found = environment(device)
    return {"command": vars(arguments), "environment": found, "results": sweeps(arguments, device), "step": step}


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, measure, write ``<out>.json`` and ``<out>.png``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--hidden", type=int, default=4096, help="inputs and outputs of every linear module")
    parser.add_argument("--shrink", type=int, default=1, help="divide layers, r, m and S by this")
    parser.add_argument("--step", nargs="?", const="smollm2_135m", help="measure its share of a step of this llm")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", default="outputs/sampler_cost", help="where to write, without suffix")
    arguments = parser.parse_args(argv)
    with one_line_errors():
        record = run(arguments)
    out = Path(record["command"]["out"])
    write_json_atomic(out.with_name(f"{out.name}.json"), record)
    draw_sampler_cost(record, out.with_name(f"{out.name}.png"))


if __name__ == "__main__":
    main()
