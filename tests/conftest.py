"""Shared fixtures: a tiny random Llama built in the test, adapters on it, and generic posterior tensors."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_runs import FAST, Overrides, row
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from bnn import SGPLoraConfig
from bnn.inducing.flow import InducingFlow
from bnn.inducing.posterior import FactorSpec
from bnn.linalg import inverse_softplus

VOCAB = 61
torch.set_num_threads(1)  # the tensors are tiny: threads only wait for each other


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def ids() -> Tensor:
    """Token ids, (3 rows, 7 tokens)."""
    return torch.randint(VOCAB, (3, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def make_llama() -> Callable[..., LlamaForCausalLM]:
    """Factory of one tiny Llama: two layers, width 16, the same weights at every call, float64 unless told."""

    def make(dtype: torch.dtype = torch.float64, tied: bool = False) -> LlamaForCausalLM:
        config = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            initializer_range=0.3,
            tie_word_embeddings=tied,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=None,
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return LlamaForCausalLM(config).to(dtype).eval()

    return make


def perturb(module: nn.Module, scale: float, seed: int = 0) -> None:
    """Move every trainable parameter by normal noise, so that nothing sits at its special initial value."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=noise).to(parameter))


@pytest.fixture
def make_adapted(make_llama) -> Callable[..., PeftModel]:
    """Factory of an SGP-LoRA model on the tiny Llama, off its initial values unless ``start=True``."""

    def make(
        model: nn.Module | None = None, *, start: bool = False, adapter_name: str = "default", **config: Any
    ) -> PeftModel:
        settings: dict[str, Any] = {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "v_proj"],
            "inducing_rows": 5,
            "inducing_cols": 5,
            "task_type": "CAUSAL_LM",
            "prior_sd": 0.3,
            "lambda_init": 0.1,
        }
        with torch.random.fork_rng():
            torch.manual_seed(1)
            adapted = get_peft_model(
                make_llama() if model is None else model, SGPLoraConfig(**settings | config), adapter_name
            )
        if not start:
            perturb(adapted, 0.1)
        return adapted.eval()

    return make


@pytest.fixture
def make_tensors() -> Callable[..., tuple[dict[str, Tensor], InducingFlow | None]]:
    """Factory of generic tensors of n stacked factors, float64, and the structure of their flow, if any."""

    def make(
        spec: FactorSpec, n: int = 1, *, seed: int = 0, D: float = 0.5, unit: float = 1.7, flow_scale: float = 0.3
    ) -> tuple[dict[str, Tensor], InducingFlow | None]:
        noise = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=noise, dtype=torch.float64)

        def factor() -> dict[str, Tensor]:
            tensors = {
                "Z_r": normal(spec.m_r, spec.d_out),
                "Z_c": normal(spec.m_c, spec.d_in),
                "raw_D_r": inverse_softplus(D * (1 + 0.2 * normal(spec.m_r).tanh())),
                "raw_D_c": inverse_softplus(D * (1 + 0.2 * normal(spec.m_c).tanh())),
                "raw_lambda": 0.5 * normal(),
                "raw_prior_sd": 0.3 * normal(),
            }
            tensors["W_unit"] = unit * tensors["raw_prior_sd"].exp()
            family = spec.make_family().init(normal(spec.m_r, spec.m_c), 0.6)
            tensors |= {name: value + 0.3 * normal(*value.shape) for name, value in family.items()}
            if flow is not None:
                tensors |= {
                    f"flow.{name}": p.detach() + flow_scale * normal(*p.shape) for name, p in flow.named_parameters()
                }
                tensors |= {f"flow.{name}": b for name, b in flow.named_buffers()}
            return tensors

        flow = None
        if spec.flow_depth:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                flow = InducingFlow(spec.m_r * spec.m_c, spec.flow_depth, spec.flow_hidden).double()
        factors = [factor() for _ in range(n)]
        return {name: torch.stack([f[name] for f in factors]) for name in factors[0]}, flow

    return make


@pytest.fixture
def overrides(tmp_path: Path) -> Overrides:
    """Command line of a run of 6 steps (12 examples, batches of 4, 2 epochs) in its own folder."""
    files = {"train": range(12), "validation": range(20, 25), "test": range(30, 36)}
    for split, numbers in files.items():
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row(number)) + "\n" for number in numbers))
    data = [f"dset.{split}_file={tmp_path / split}.jsonl" for split in files]

    def make(*extra: str, folder: str = "run") -> list[str]:
        return [*FAST, *data, f"paths.output_dir={tmp_path / folder}", *extra]

    return make
