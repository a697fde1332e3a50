"""Factors of one structure, stacked, so that a whole model's draws are a handful of batched operations."""

import torch
from torch import Tensor, nn

from bnn.inducing import posterior
from bnn.layers import InducingFactor
from bnn.noise import noise_size, shape_noise


class FactorStack:
    """n factors of equal structure on one device.

    ``tensors`` stacks the factors' own tensors at every call. After ``own`` the stacked tensors are the parameters,
    ``leaves``, and the factors' parameters views into them: an optimiser sees a dozen tensors instead of thousands,
    and gradients, those of the mean path too, arrive in ``leaves``.

    Args:
        factors: of equal spec, on one device.
    """

    def __init__(self, factors: list[InducingFactor]) -> None:
        self.factors = factors
        self.spec = factors[0].spec
        self.leaves: dict[str, Tensor] = {}
        self._shapes = posterior.noise_shapes_of(self.spec)
        self.noise_size = noise_size(self._shapes, len(factors))
        """Standard normal numbers behind one draw."""

    @property
    def device(self) -> torch.device:
        """Where the factors are."""
        return self.factors[0].W_unit.device

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the factors by name, (n, ...).

        Raises:
            RuntimeError: if owned parameters have been replaced (moved, loaded with assign=True, or owned by another).
        """
        if self.leaves:
            for i, factor in enumerate(self.factors):
                factor.check_stacked(self.leaves, i)
            return self.leaves
        return _stacked([factor.tensors() for factor in self.factors])

    def own(self) -> dict[str, nn.Parameter]:
        """Move the factors' parameters into stacked ones and return these by name."""
        if not self.leaves:
            own = [factor.own_tensors() for factor in self.factors]  # themselves: views of a stack before may be stale
            learned = self.factors[0].learned
            with torch.no_grad():
                stacked = _stacked(own)
            leaves: dict[str, Tensor] = {n: nn.Parameter(t) if n in learned else t for n, t in stacked.items()}
            for i, factor in enumerate(self.factors):
                factor.view_stack(leaves, i)
            self.leaves = leaves
        return {name: t for name, t in self.leaves.items() if isinstance(t, nn.Parameter)}

    def draw(self, tensors: dict[str, Tensor], noise: Tensor) -> tuple[Tensor, Tensor]:
        """Draw from explicit noise.

        Args:
            tensors: what ``tensors`` returns, or stands for it.
            noise: standard normal, (S, noise_size).

        Returns:
            W (S, n, d_out, d_in) in the compute dtype, and the KL of each factor, nats, (n,).
        """
        shaped = shape_noise(noise, self._shapes, len(self.factors))
        drawn = posterior.sample(self.spec, tensors, shaped, self.factors[0].flow)
        return drawn.W.to(self.factors[0].compute_dtype), drawn.kl


def _stacked(tensors: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([own[name] for own in tensors]) for name in tensors[0]}
