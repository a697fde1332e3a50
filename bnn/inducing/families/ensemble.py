"""Ensemble of point masses q(U) = 1/K sum_k delta(U - M_k); K = 1 is a point estimate (MAP over U)."""

import math

import torch
from torch import Tensor

from bnn.inducing.families.base import Params, squared_norm


class Ensemble:
    """``members`` point masses, parameter ``raw_members`` (K, m_r, m_c).

    A point mass has no density: its KL to the prior is infinite by a constant. What ``entropy`` returns is log K, the
    entropy of the mixture weights, so that the objective is the MAP one (the members' average of -log p), of points in
    the units of the parameters, as of narrow Gaussians: these units are constant in W, so that sigma_p, which scales U
    against them, has its maximum of likelihood and does not grow without bound.

    Args:
        members: K >= 1.
    """

    point_mass = True

    def __init__(self, members: int) -> None:
        if members < 1:
            raise ValueError(f"an ensemble needs at least 1 member, got {members}")
        self.members = members

    def init(self, loc: Tensor, sd: float) -> dict[str, Tensor]:
        """Members spread by ``sd`` along fixed, distinct directions whose mean is ``loc``: where one alone sits."""
        generator = torch.Generator().manual_seed(self.members)
        offsets = sd * torch.randn(self.members, *loc.shape, generator=generator, dtype=loc.dtype)
        return {"raw_members": loc + (offsets - offsets.mean(0))}

    def sample(self, params: Params, eps: Tensor) -> Tensor:
        """A uniformly chosen member; the choice is a function of ``eps``' first entry, so it is reparametrised."""
        members = params["raw_members"]
        uniform = torch.special.ndtr(eps[..., :1, :1])
        index = (uniform * self.members).long().clamp_(max=self.members - 1)
        chosen = members.expand(*eps.shape[:-2], *members.shape[-3:])
        index = index[..., None, :, :].expand(*eps.shape[:-2], 1, *eps.shape[-2:])
        return chosen.gather(-3, index).squeeze(-3)

    def mean(self, params: Params) -> Tensor:
        """The average of the members."""
        return params["raw_members"].mean(-3)

    def entropy(self, params: Params) -> Tensor:
        """log K (see the class)."""
        members = params["raw_members"]
        return members.new_full(members.shape[:-3], math.log(self.members))

    def energy(self, params: Params, A_r: Tensor | None, A_c: Tensor | None) -> Tensor:
        """The members' average of ||A_r M_k A_c^T||^2."""
        expand = lambda A: None if A is None else A[..., None, :, :]  # noqa: E731
        return squared_norm(params["raw_members"], expand(A_r), expand(A_c)).mean(-1)
