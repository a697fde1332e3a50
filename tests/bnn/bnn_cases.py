"""Cases and small helpers that several tests of the core share."""

import torch
from torch import Tensor

FAMILIES = {
    "diagonal": {},
    "matrix_normal": {"family": "matrix_normal"},
    "full": {"family": "full"},
    "ensemble": {"family": "ensemble", "members": 3},
    "unwhitened": {"whitened": False},
    "flow": {"flow_depth": 2, "flow_hidden": 8},
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def logits_of(model, ids: Tensor, **kwargs) -> Tensor:
    return model(input_ids=ids, **kwargs).logits


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())
