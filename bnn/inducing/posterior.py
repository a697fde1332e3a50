"""q(W) of one factor, or of n stacked factors of one shape: sample, mean and KL as functions of tensors.

A *sample* is a weight tensor drawn once, before the forward pass, from explicit standard normal ``Noise``. All
functions below take the tensors of n factors stacked along a leading dimension; one factor is n = 1, so the fast path
and the plain path are the same code.
"""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bnn.inducing.conditional import conditional_mean, conditional_sample, noise_shapes
from bnn.inducing.families import Family, make_family
from bnn.inducing.flow import InducingFlow, apply_stacked
from bnn.inducing.kl import conditional_kl, gaussian_kl, log_det_kronecker
from bnn.inducing.prior import Frame, whiten
from bnn.noise import Noise

FLOW_PREFIX = "flow."
MEAN_DRAWS = 256
"""Draws behind the posterior mean of a flow, which has no closed form (fixed noise: the mean is deterministic)."""


@dataclass(frozen=True)
class FactorSpec:
    """Structure of a factor: factors with equal specs are stacked and drawn together."""

    d_out: int
    d_in: int
    m_r: int
    m_c: int
    family: str = "diagonal"
    members: int = 1
    flow_depth: int = 0
    flow_hidden: int = 64
    whitened: bool = True
    lambda_max: float = 1.0
    conditional_noise: bool = True
    jitter: float = 1e-6

    def make_family(self) -> Family:
        """The family of q(U)."""
        return make_family(self.family, self.members)


class Draw(NamedTuple):
    """S samples of n factors with what the KL needs."""

    W: Tensor
    """(S, n, d_out, d_in)."""
    kl: Tensor
    """KL[q(U) || p(U)] + KL[q(W | U) || p(W | U)], nats, (n,)."""


Tensors = Mapping[str, Tensor]


def noise_shapes_of(spec: FactorSpec) -> list[tuple[int, int]]:
    """Shapes, per factor, of the fields of ``Noise`` that ``sample`` consumes."""
    conditional = noise_shapes(spec.d_out, spec.d_in, spec.m_r, spec.m_c) if spec.conditional_noise else ()
    return [(spec.m_r, spec.m_c), *conditional]


def frames(spec: FactorSpec, tensors: Tensors) -> tuple[Frame, Frame]:
    """Row and column frames of the inducing prior."""
    rows = whiten(tensors["Z_r"], F.softplus(tensors["raw_D_r"]), spec.jitter)
    cols = whiten(tensors["Z_c"], F.softplus(tensors["raw_D_c"]), spec.jitter)
    return rows, cols


def lambda_of(spec: FactorSpec, tensors: Tensors) -> Tensor:
    """lambda = lambda_max * sigmoid(raw_lambda), (n,): bounded smoothly, so that its gradient never stops."""
    return spec.lambda_max * torch.sigmoid(tensors["raw_lambda"])


def prior_sd_of(tensors: Tensors) -> Tensor:
    """sigma_p = exp(raw_prior_sd), the prior standard deviation of an entry of W, (n,)."""
    return tensors["raw_prior_sd"].exp()


def unit_of(tensors: Tensors) -> Tensor:
    """Unit of q's parameters, (n,): constant in W, hence W_unit / sigma_p in U; sigma_p scales the noise alone."""
    return tensors["W_unit"] / prior_sd_of(tensors)


def sample(spec: FactorSpec, tensors: Tensors, noise: Noise, flow: InducingFlow | None) -> Draw:
    """Draw W = sigma_p (P_r^T V P_c + lambda * noise), V ~ q, and the KL to the prior.

    Args:
        spec: structure.
        tensors: the factors' tensors, each stacked (n, ...).
        noise: with leading dimensions (S, n), see ``noise_shapes_of``.
        flow: structure of the flow, or None.

    Returns:
        The ``Draw``; without a flow its KL is exact, with one an unbiased estimate (``_kl_of_flow``).
    """
    rows, cols = frames(spec, tensors)
    Y = spec.make_family().sample(tensors, noise.eps)
    V = _to_whitened(spec, tensors, Y, rows, cols)
    kl = _closed_form_kl(spec, tensors, rows, cols)
    if flow is not None:
        V_0 = V
        Y, log_det = apply_stacked(flow, _flow_tensors(tensors), Y)
        V = _to_whitened(spec, tensors, Y, rows, cols)
        kl = kl + _kl_of_flow(spec, V_0, V, log_det)
    lambda_ = lambda_of(spec, tensors)
    if noise.E1 is None or noise.E2 is None or noise.E3 is None:
        W = conditional_mean(V, rows, cols)
    else:
        W = conditional_sample(V, lambda_[:, None, None], noise.E1, noise.E2, noise.E3, rows, cols)
        kl = kl + conditional_kl(lambda_, spec.d_out, spec.d_in)
    return Draw(prior_sd_of(tensors)[:, None, None] * W, kl)


def mean(spec: FactorSpec, tensors: Tensors, flow: InducingFlow | None) -> Tensor:
    """Posterior mean sigma_p P_r^T E[V] P_c, (n, d_out, d_in).

    With a flow E[V] averages ``MEAN_DRAWS`` fixed draws, or all members of an ensemble, which is exact.
    """
    rows, cols = frames(spec, tensors)
    if flow is None:
        Y = spec.make_family().mean(tensors)
    else:
        Y = spec.make_family().sample(tensors, _noise_of_mean(spec, tensors["Z_r"]))
        Y = apply_stacked(flow, _flow_tensors(tensors), Y)[0].mean(0)
    V = _to_whitened(spec, tensors, Y, rows, cols)
    return prior_sd_of(tensors)[:, None, None] * conditional_mean(V, rows, cols)


def in_function_transform() -> bool:
    """Whether a transform of ``torch.func`` is at work."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _noise_of_mean(spec: FactorSpec, Z_r: Tensor) -> Tensor:
    """Fixed draws whose average under a flow is the mean, (S, n, m_r, m_c): of point masses one for each."""
    shape = (len(Z_r), spec.m_r, spec.m_c)
    if spec.make_family().point_mass:
        chosen = torch.special.ndtri((torch.arange(spec.members, dtype=torch.float64) + 0.5) / spec.members)
        return chosen.to(Z_r)[:, None, None, None].expand(-1, *shape)
    generator = torch.Generator().manual_seed(0)
    with torch._C._DisableFuncTorch() if in_function_transform() else nullcontext():  # vmap allows no random numbers
        half = torch.randn(MEAN_DRAWS // 2, *shape, generator=generator, dtype=Z_r.dtype, device="cpu")
    return torch.cat([half, -half]).to(Z_r.device)


def _kl_of_flow(spec: FactorSpec, V_0: Tensor, V: Tensor, log_det: Tensor) -> Tensor:
    """What a flow adds to the closed-form KL of its base, estimated from the S draws, nats, (n,).

    KL[q, p] = KL[q_0, p] + E[log p(U_0) - log|det J| - log p(T(U_0))]: the base's KL as a control variate. log q_0 and
    the normalisers of p cancel, and with them most of the noise while the flow is near the identity.

    Args:
        spec: structure.
        V_0: the base's draws, whitened, (S, n, m_r, m_c).
        V: the same after the flow.
        log_det: log|det J|, (S, n); point masses have no volume and leave it out.
    """
    energy = 0.5 * (V.square().sum((-2, -1)) - V_0.square().sum((-2, -1)))
    return (energy if spec.make_family().point_mass else energy - log_det).mean(0)


def _closed_form_kl(spec: FactorSpec, tensors: Tensors, rows: Frame, cols: Frame) -> Tensor:
    """KL[q(U) || p(U)] of U = unit * Y without a flow, nats, (n,)."""
    family, unit = spec.make_family(), unit_of(tensors)
    entropy = family.entropy(tensors) + spec.m_r * spec.m_c * unit.log()  # of a point too: see ``Ensemble``
    whitener = (None, None) if spec.whitened else (rows.L_inv, cols.L_inv)
    energy = unit.square() * family.energy(tensors, *whitener)
    return gaussian_kl(entropy, energy, _log_det_prior(spec, rows, cols), spec.m_r * spec.m_c)


def _log_det_prior(spec: FactorSpec, rows: Frame, cols: Frame) -> Tensor:
    """log det of the prior covariance of what q describes: V (identity) or U (K_c (x) K_r)."""
    if spec.whitened:
        return rows.L.new_zeros(())
    return log_det_kronecker(rows.L, cols.L)


def _to_whitened(spec: FactorSpec, tensors: Tensors, Y: Tensor, rows: Frame, cols: Frame) -> Tensor:
    """V from Y = U / unit: V = U where q describes V, else V = L_r^{-1} U L_c^{-T}."""
    U = unit_of(tensors)[:, None, None] * Y
    return U if spec.whitened else rows.L_inv @ U @ cols.L_inv.mT


def _flow_tensors(tensors: Tensors) -> dict[str, Tensor]:
    return {name.removeprefix(FLOW_PREFIX): t for name, t in tensors.items() if name.startswith(FLOW_PREFIX)}


def log_of_scaled_prior_sd(prior_sd: float, scaling: str, d_out: int, d_in: int) -> float:
    """log sigma_p. ``width`` divides by sqrt(max(d_out, d_in)): the prior's spectral norm is then about ``prior_sd``.

    Raises:
        ValueError: for an unknown ``scaling`` or a ``prior_sd`` that is not positive.
    """
    if prior_sd <= 0:
        raise ValueError(f"prior_sd is a standard deviation and must be positive, got {prior_sd}")
    if scaling not in ("width", "fan_in", "none"):
        raise ValueError(f"unknown prior_scaling {scaling!r}: choose width, fan_in or none")
    width = {"width": max(d_out, d_in), "fan_in": d_in, "none": 1}[scaling]
    return math.log(prior_sd) - 0.5 * math.log(width)
