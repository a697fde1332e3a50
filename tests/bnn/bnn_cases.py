"""Cases and small helpers that several tests of the core share."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from bnn.inducing.posterior import FactorSpec, noise_shapes_of, unit_of
from bnn.linalg import inverse_softplus, lower_triangular
from bnn.noise import Noise, draw_noise, noise_size, shape_noise
from bnn.stack import FactorStack

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


@dataclass
class Rows:
    """A batch of token ids (N, T) with, where it matters, the right choices (N,); each has as many as ``choices``."""

    input_ids: Tensor
    answer: Tensor | None = None
    choices: int = 4

    def tile(self, n: int) -> "Rows":
        answer = None if self.answer is None else self.answer.repeat(n)
        return Rows(self.input_ids.repeat(n, 1), answer, self.choices)


def score(model, batch: Rows) -> Tensor:
    """The last token's logits of the first tokens, one for each choice."""
    return model(input_ids=batch.input_ids).logits[:, -1, : batch.choices]


def noise_for(
    spec: FactorSpec, n: int, samples: int, generator: torch.Generator, dtype: torch.dtype = torch.float64
) -> Noise:
    """``samples`` draws for ``n`` factors, (samples, n, ...)."""
    return shape_noise(flat_noise(spec, n, samples, generator, dtype), noise_shapes_of(spec), n)


def flat_noise(spec: FactorSpec, n: int, samples: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """The same, (samples, all numbers)."""
    size = noise_size(noise_shapes_of(spec), n)
    return draw_noise(samples * size, torch.device("cpu"), generator, dtype).view(samples, size)


def draw_alone(factors: list, noise: Tensor) -> tuple[Tensor, Tensor]:
    """W (samples, n, d_out, d_in) and KL (n,) of a stack of these factors."""
    stack = FactorStack(factors)
    return stack.draw(stack.tensors(), noise)


def raw_of(S: Tensor) -> Tensor:
    """What ``lower_triangular`` turns into S (..., m, m)."""
    diagonal = S.diagonal(dim1=-2, dim2=-1)
    relative = S.tril(-1) / diagonal[..., None] * S.shape[-1] ** 0.5
    return relative + torch.diag_embed(inverse_softplus(diagonal))


def q_of(tensors: dict[str, Tensor], i: int = 0) -> MultivariateNormal:
    """q(vec U), row-major, of a full Gaussian factor in its own units."""
    unit = unit_of(tensors)[i]
    tril = unit * lower_triangular(tensors["raw_tril"][i])
    return MultivariateNormal(unit * tensors["raw_loc"][i].flatten(), scale_tril=tril)
