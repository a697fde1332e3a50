"""Time and memory of training steps and predictions: LoRA, DoRA, BLoB and SGP-LoRA side by side on one model.

    python -m benchmarks.speed --llm llama2_7b --out benchmarks/results/speed
    python -m benchmarks.speed --llm tiny --device cpu --repeats 3 --shrink 16     # seconds, on a CPU

The base model has random weights (``llm.random_init=true``), so nothing is downloaded. Every variant adapts the same
base model in turn, in one process. A training step is forward, objective at the last position, backward and AdamW
(fused on a GPU, for all variants). Ratios are to PEFT's LoRA with its default float32 adapters.
"""

import argparse
import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F

from benchmarks.figures import draw_speed
from benchmarks.measure import environment, measure
from bnn.methods.base import Method, trainable
from utils.llm import load_model
from utils.run import write_json_atomic
from utils.settings import compose, plain

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
BASELINE = "LoRA (float32)"


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


def workloads(model: Any, method: Method, shrink: int, samples: int) -> dict[str, Callable[[], Any]]:
    """Calls to be timed, by label."""
    device = next(model.parameters()).device
    groups = method.parameter_groups(model, 1e-4, 0.0)
    optimizer = torch.optim.AdamW(groups, fused=device.type == "cuda")
    generator = torch.Generator(device).manual_seed(0)
    length = max(2, 128 // shrink)

    def ids(rows: int, tokens: int) -> torch.Tensor:
        return torch.randint(model.config.vocab_size, (rows, tokens), device=device)

    def training(rows: int, tokens: int) -> Callable[[], None]:
        batch, labels = ids(rows, tokens), torch.randint(model.config.vocab_size, (rows,), device=device)

        def step() -> None:
            if not model.training:
                model.train()
            with method.sample(model, 1, generator) as live:
                logits = model(input_ids=batch, logits_to_keep=1, use_cache=False).logits[:, -1].float()
                (F.cross_entropy(logits, labels) + live.kl().to(device) / 1000).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    @torch.no_grad()
    def forward(batch: torch.Tensor) -> torch.Tensor:
        return model(input_ids=batch, logits_to_keep=1, use_cache=False).logits

    def predicting(rows: int, draws: int) -> Callable[[], None]:
        batch = ids(rows, length)

        def passes() -> None:
            if model.training:
                model.eval()
            if draws == 1 or not method.stochastic:
                for _ in range(draws):
                    forward(batch)
            else:
                with torch.no_grad(), method.sample(model, draws, generator):
                    forward(batch.repeat(draws, 1))

        return passes

    return {
        f"train 4x{length}": training(4, length),
        f"train 8x{2 * length}": training(8, 2 * length),
        f"1 pass 1x{length}": predicting(1, 1),
        f"1 pass {8 * samples}x{length}": predicting(8 * samples, 1),
        f"{samples} samples 1x{length}": predicting(1, samples),
        f"{samples} samples 8x{length}": predicting(8, samples),
    }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure everything; returns the record, which is written to ``<out>.json`` after each variant."""
    settings = [f"llm={arguments.llm}", "llm.random_init=true", "paths.output_dir=unused"]
    cfg = compose(CONFIGS, settings)
    device = torch.device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    llm = {k: v for k, v in plain(cfg.llm).items() if k not in ("dtype", "target_modules", "tokenizer")}
    llm["cache_dir"] = Path("unused")
    model: Any = load_model(dtype=dtype, device=device, quantization=None, **llm)
    lora = plain(cfg.peft) | {"target_modules": arguments.targets or list(cfg.peft.target_modules)}
    results: dict[str, dict[str, Any]] = {}
    record = {"command": vars(arguments), "environment": environment(device), "results": results}
    out = Path(arguments.out)
    for label, make in variants(settings).items():
        if arguments.only and label not in (BASELINE, *arguments.only):
            continue
        method = make()
        adapted = method.adapt(model, dict(lora))
        results[label] = {"parameters": sum(p.numel() for _, p in trainable(adapted))}
        for workload, call in workloads(adapted, method, arguments.shrink, arguments.samples).items():
            found = measure(call, device, arguments.warmup, arguments.repeats, arguments.seconds)
            results[label][workload] = found._asdict()
            print(f"{label:28s} {workload:22s} {found.median_ms:9.2f} ms (IQR {found.iqr_ms:.2f})", flush=True)
        model = adapted.unload()
        del method, adapted
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
    parser.add_argument("--only", nargs="*", help="labels of the variants to measure; all if absent")
    parser.add_argument("--samples", type=int, default=10, help="posterior samples of a prediction")
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=4.0, help="per workload; slow ones are repeated less often")
    parser.add_argument("--shrink", type=int, default=1, help="divide the sequence lengths 128 and 256 by this")
    parser.add_argument("--out", default="outputs/speed", help="where to write, without suffix")
    record = run(parser.parse_args(argv))
    out = Path(record["command"]["out"])
    draw_speed(record, BASELINE, out.with_name(f"{out.name}.png"))


if __name__ == "__main__":
    main()
