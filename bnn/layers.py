"""``InducingFactor``: the module that stands where LoRA has ``lora_A`` or ``lora_B``."""

import math
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from bnn.inducing import posterior
from bnn.inducing.flow import InducingFlow
from bnn.inducing.posterior import FLOW_PREFIX, FactorSpec
from bnn.inducing.prior import Frame
from bnn.linalg import inverse_softplus


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Context for what is computed in float32 whatever the model around it: factorisations, means, draws."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


@contextmanager
def _float32_on_cpu() -> Iterator[None]:
    """Context for what is computed with a CPU generator in float32, whatever PyTorch's defaults are set to."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


def can_compute(dtype: torch.dtype) -> bool:
    """Whether a dtype is one to compute in: of one byte there are only those to store weights in."""
    return dtype.is_floating_point and dtype.itemsize > 1


class InducingFactor(nn.Module):
    """A random matrix W (d_out x d_in) with an inducing-variable posterior.

    It owns the parameters (float32) Z_r (m_r, d_out), Z_c (m_c, d_in), raw_D_r, raw_D_c, raw_lambda, raw_prior_sd and
    those of q(U), and the live sample, if any. Outside ``bnn.sample`` it computes with the posterior mean, in train and
    eval mode alike; inside, with the S draws handed over by the sampler: of a batch of S*B rows, rows i*B to (i+1)*B
    use draw i. A factor never draws anything itself. The draws are cast once to ``compute_dtype``, an attribute that
    the adapter sets to the dtype of the layer it adapts.

    Args:
        spec: structure of the factor.
        weight: the initial posterior mean (d_out, d_in), reproduced within rounding when min(m_r, m_c) is at least
            its rank; None for LoRA's zero start, mean exactly 0 with Z_r = 0 (see ``_zero_start``).
        log_prior_sd: log sigma_p.
        learn_prior_sd: learn sigma_p (type-II maximum likelihood) or hold it.
        lambda_init: initial lambda, in (0, spec.lambda_max).
        learn_lambda: learn lambda or hold it.
        q_sd: initial standard deviation of an entry of V (the prior's is 1), or of U where q is not whitened.
        d_init: initial D relative to rows of Z of norm 1. Small: P is nearly orthonormal; large: W is linear in Z.
        d_init_zero: initial D_r on the zero-started side.
        mean_gain: speed at which a zero-started mean leaves 0, relative to LoRA's.
        generator: for the rows of Z that ``weight`` leaves free.

    Raises:
        ValueError: for lambda_init outside (0, lambda_max), sizes below 1, or what is not finite in float32.
    """

    W_unit: Tensor
    compute_dtype: torch.dtype

    def __init__(
        self,
        spec: FactorSpec,
        weight: Tensor | None,
        *,
        log_prior_sd: float,
        learn_prior_sd: bool,
        lambda_init: float,
        learn_lambda: bool,
        q_sd: float,
        d_init: float,
        d_init_zero: float,
        mean_gain: float,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if min(spec.m_r, spec.m_c) < 1:
            raise ValueError(f"inducing sizes must be at least 1, got {spec.m_r} x {spec.m_c}")
        if not 0 < lambda_init < spec.lambda_max:
            raise ValueError(f"lambda_init must lie in (0, lambda_max={spec.lambda_max}), got {lambda_init}")
        self.spec = spec
        self.in_features, self.out_features = spec.d_in, spec.d_out
        self.bias = None
        self.compute_dtype = torch.float32
        with _float32_on_cpu():
            self._own("raw_prior_sd", torch.tensor(float(log_prior_sd)), learn_prior_sd)
            self._own("raw_lambda", torch.logit(torch.tensor(lambda_init / spec.lambda_max)), learn_lambda)
            if weight is None or not weight.any():
                initial = _zero_start(spec, d_init, d_init_zero, mean_gain, log_prior_sd, generator)
            else:
                initial = _mean_start(spec, weight.detach().float().cpu(), d_init, log_prior_sd, generator)
            loc, unit = initial.pop("loc"), initial.pop("unit")
            if not 0 < float(unit) < math.inf:
                raise ValueError("with these values the mean is not finite in float32, or 0: stay nearer the defaults")
            self.register_buffer("W_unit", unit * math.exp(log_prior_sd))
            for name, value in (initial | spec.make_family().init(loc, q_sd / float(unit))).items():
                self._own(name, value, True)
            size, depth = spec.m_r * spec.m_c, spec.flow_depth
            self.flow = InducingFlow(size, depth, spec.flow_hidden) if depth else None
        self._sample: Tensor | None = None
        self._mean: tuple[list[tuple[int, int]], Tensor, int, list[Tensor]] | None = None
        self._stack: tuple[dict[str, weakref.ref[Tensor]], int] | None = None
        self.register_load_state_dict_post_hook(_stay_in_float32)

    def _own(self, name: str, value: Tensor, learned: bool) -> None:
        if not value.isfinite().all():
            raise ValueError(f"with these values {name} is not finite in float32: stay nearer the defaults")
        if learned:
            self.register_parameter(name, nn.Parameter(value))
        else:
            self.register_buffer(name, value)

    def tensors(self) -> dict[str, Tensor]:
        """Every parameter and buffer by name, as the functions of ``bnn.inducing.posterior`` want them, unstacked.

        Where the parameters are views into stacked ones, under autograd: differentiable slices of those.
        """
        own, leaves = self.own_tensors(), self._leaves()
        if leaves and torch.is_grad_enabled():
            assert self._stack is not None
            _, i = self._stack
            self.check_stacked(leaves, i)
            own |= {name: leaf[i] for name, leaf in leaves.items()}
        return own

    def _leaves(self) -> dict[str, Tensor]:
        """The stacked tensors that own parameters are views into, those that a sampler or an optimiser still holds."""
        refs = {} if self._stack is None else self._stack[0]
        return {name: leaf for name, ref in refs.items() if (leaf := ref()) is not None}

    def own_tensors(self) -> dict[str, Tensor]:
        """The module's parameters and buffers themselves, by the same names, views or not."""
        own = {name: t for name, t in (*self._parameters.items(), *self._buffers.items()) if t is not None}
        if self.flow is not None:
            own |= {f"{FLOW_PREFIX}{name}": t for name, t in self.flow.named_parameters()}
            own |= {f"{FLOW_PREFIX}{name}": t for name, t in self.flow.named_buffers()}
        return own

    @property
    def learned(self) -> frozenset[str]:
        """Names of the own tensors that are to be trained."""
        return frozenset(name for name, t in self.own_tensors().items() if t.requires_grad)

    def view_stack(self, leaves: dict[str, Tensor], i: int) -> None:
        """Make every own tensor a view of row ``i`` of ``leaves``, which hold the same values.

        It does not hold the leaves: once nobody trains them, gradients are those of the own parameters again.
        """
        for name, t in self.own_tensors().items():
            t.data = leaves[name].data[i]
        self._stack = ({name: weakref.ref(leaf) for name, leaf in leaves.items()}, i)

    def check_stacked(self, leaves: dict[str, Tensor], i: int) -> None:
        """Raise RuntimeError unless the own parameters still are views of row ``i`` of ``leaves``."""
        refs, own = {} if self._stack is None else self._stack[0], self.own_tensors()
        for name, leaf in leaves.items():
            if name in refs and refs[name]() is leaf and own[name].data_ptr() == leaf.data_ptr() + i * own[name].nbytes:
                continue
            raise RuntimeError(
                "the adapter's parameters were moved, replaced or stacked anew after they had been stacked for "
                "training: move or load the model first, then make the Sampler (or the optimiser) anew"
            )

    @property
    def weight(self) -> Tensor:
        """Inside ``bnn.sample`` the live draws (S, d_out, d_in), of one draw (d_out, d_in); else the posterior mean."""
        return self.mean_weight() if self._sample is None else self._sample

    def mean_weight(self) -> Tensor:
        """Posterior mean (d_out, d_in); when no gradient is wanted, cached until a tensor it depends on may change.

        Tensors' version counters tell most changes; fused optimisers and writing to ``.data`` do not raise them, so
        drawing, ``train()`` and ``eval()`` clear the cache too, and gradients that wait for a step keep it empty. It
        holds the memory of the tensors that it is of, so that others are never found where those were. Tensors made in
        inference mode have no counter, and those of a function transform or of forward-mode derivatives are of that
        alone: no cache. Nor is a mean kept that its reader has written to.
        """
        wanted = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        if wanted or _is_transformed():
            self._mean = None
            with without_autocast(self.W_unit.device):
                return posterior.mean(self.spec, _stack_one(self.tensors()), self.flow)[0]
        behind = [t for t in (*self._parameters.values(), *self._buffers.values()) if t is not None]
        behind += () if self.flow is None else self.flow.parameters()
        behind += self._leaves().values()
        key = self._versions(behind)
        if key is not None and self._mean is not None:
            known, W, version, _ = self._mean
            if known == key and W._version == version:
                return W
        with torch.inference_mode(False), torch.no_grad(), without_autocast(self.W_unit.device):
            W = posterior.mean(self.spec, _stack_one(self.own_tensors()), self.flow)[0]
        self._mean = None if key is None else (key, W, W._version, [t.detach() for t in behind])
        return W

    @staticmethod
    def _versions(behind: list[Tensor]) -> list[tuple[int, int]] | None:
        """What changes with the values of the tensors while their storage lives, or None where nothing tells."""
        if any(t.grad is not None for t in behind):
            return None
        try:
            return [(t.data_ptr(), t._version) for t in behind]
        except RuntimeError:  # one was made in inference mode
            return None

    @property
    def has_sample(self) -> bool:
        """Whether draws are live."""
        return self._sample is not None

    def hold(self, W: Tensor | None) -> None:
        """Make ``W`` (S, d_out, d_in) or (d_out, d_in) the live draws, or None to go back to the posterior mean."""
        self.__dict__.update(_sample=W, _mean=None)  # no tensor to register: Module's own way takes microseconds

    def train(self, mode: bool = True) -> Self:
        """Set the mode, which changes nothing in the computation, and forget the cached mean."""
        self._mean = None
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move devices as asked, but stay in float32: factorisations and small KL gradients need it.

        A change of dtype is one of ``compute_dtype``, unless it is one to store weights in.
        """
        asked = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        if can_compute(asked):
            self.compute_dtype = asked

        def move(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        return super()._apply(move, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy: parameters of its own, no draws and nothing cached."""
        return self.__dict__ | {"_sample": None, "_mean": None, "_stack": None}

    def forward(self, x: Tensor) -> Tensor:
        """W x for x (rows, ..., d_in), with the draws tiled over the rows inside ``bnn.sample``."""
        W = self.weight
        if W.dim() == 2:
            return F.linear(x, W.to(x.dtype))
        S = W.shape[0]
        if x.shape[0] % S:
            raise ValueError(
                f"{S} posterior samples are live, but the batch has {x.shape[0]} rows: tile it to a multiple of {S}"
            )
        y = torch.bmm(x.reshape(S, -1, x.shape[-1]), W.to(x.dtype).mT)
        return y.reshape(*x.shape[:-1], W.shape[-2])

    def extra_repr(self) -> str:
        """The structure, as printed in a model's summary."""
        s = self.spec
        return f"{s.d_in} -> {s.d_out}, inducing {s.m_r}x{s.m_c}, q={s.family}, flow={s.flow_depth}"


def _is_transformed() -> bool:
    """Whether ``torch.func`` or forward-mode differentiation is at work."""
    return posterior.in_function_transform() or forward_ad._current_level >= 0


def _stay_in_float32(factor: nn.Module, _: Any) -> None:
    """Also where tensors of a file have taken the place of the own ones (``assign``)."""
    for t in (*factor.parameters(), *factor.buffers()):
        if t.dtype in (torch.bfloat16, torch.float16):
            t.data = t.data.float()


def _stack_one(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t[None] for name, t in tensors.items()}


def _unit_rows(rows: int, columns: int, generator: torch.Generator | None) -> Tensor:
    """Random rows of expected norm 1."""
    return torch.randn(rows, columns, generator=generator) / columns**0.5


def _zero_start(
    spec: FactorSpec,
    d_init: float,
    d_init_zero: float,
    mean_gain: float,
    log_prior_sd: float,
    generator: torch.Generator | None,
) -> dict[str, Tensor]:
    """LoRA's start for B: mean exactly 0 through Z_r = 0, with ``mean_gain`` times the gradient LoRA has.

    With Z_r = 0 the mean is sigma_p Z_r^T (D_r^{-1} V P_c), linear in Z_r; V is chosen so that the bracket times
    sigma_p has orthogonal columns, the identity times ``mean_gain`` on the first min(m_r, m_c, d_in): Z_r^T then moves
    exactly as the B of LoRA with an alpha that much larger does. A start at V = 0 instead would leave Z_r without
    gradient. As P_r is a contraction, the spectral norm of the mean cannot exceed sigma_p ||V||, which is
    ``mean_gain * d_init_zero`` at first: too small a gain stops the mean, not only slows it.
    """
    k = min(spec.m_r, spec.m_c, spec.d_in)
    Z_c = _unit_rows(spec.m_c, spec.d_in, generator)
    Z_c[:k] = torch.eye(k, spec.d_in)
    Z_c[k:] *= d_init
    state = _frame_parameters(spec, torch.zeros(spec.m_r, spec.d_out), Z_c, d_init_zero, d_init)
    rows, cols = posterior.frames(spec, _stack_one(state))
    target = mean_gain * torch.eye(spec.m_r, spec.d_in) * (torch.arange(spec.d_in) < k)
    V = rows.L[0] @ target @ torch.linalg.pinv(cols.P[0]) * torch.exp(torch.tensor(-log_prior_sd))
    return state | _located(spec, V, rows.L[0], cols.L[0])


def _mean_start(
    spec: FactorSpec, weight: Tensor, d_init: float, log_prior_sd: float, generator: torch.Generator | None
) -> dict[str, Tensor]:
    """Z spans the leading singular directions of ``weight``; V solves P_r^T V P_c = weight / sigma_p."""
    U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    U, S, Vh = U.float(), S.float(), Vh.float()
    rank = int((S[0] * 1e-6 < S).sum())
    k = min(spec.m_r, spec.m_c, rank)
    if k < rank:
        error = float(S[k:].norm() / S.norm())
        warnings.warn(
            f"an inducing matrix of {spec.m_r} x {spec.m_c} cannot represent a weight of rank {rank}: "
            f"relative error {error:.2g}; use inducing sizes >= {rank} to reproduce it",
            stacklevel=3,
        )
    Z_r, Z_c = _unit_rows(spec.m_r, spec.d_out, generator), _unit_rows(spec.m_c, spec.d_in, generator)
    Z_r[:k], Z_c[:k] = U[:, :k].mT, Vh[:k]
    Z_r[k:] *= d_init
    Z_c[k:] *= d_init
    state = _frame_parameters(spec, Z_r, Z_c, d_init, d_init)
    rows, cols = (Frame(*(t[0].double() for t in f)) for f in posterior.frames(spec, _stack_one(state)))
    target = (U[:, :k] * S[:k]) @ Vh[:k]
    V = torch.linalg.pinv(rows.P.mT) @ target.double() @ torch.linalg.pinv(cols.P)
    V = (V * torch.exp(torch.tensor(-log_prior_sd, dtype=torch.float64))).float()
    return state | _located(spec, V, rows.L.float(), cols.L.float())


def _frame_parameters(spec: FactorSpec, Z_r: Tensor, Z_c: Tensor, d_r: float, d_c: float) -> dict[str, Tensor]:
    return {
        "Z_r": Z_r,
        "Z_c": Z_c,
        "raw_D_r": inverse_softplus(torch.full((spec.m_r,), d_r)),
        "raw_D_c": inverse_softplus(torch.full((spec.m_c,), d_c)),
    }


def _located(spec: FactorSpec, V: Tensor, L_r: Tensor, L_c: Tensor) -> dict[str, Tensor]:
    """Location and unit: q's parameters are kept in units in which the location is of order 1, whatever V's scale."""
    U = V if spec.whitened else L_r @ V @ L_c.mT
    unit = U.abs().max()
    return {"loc": U / unit, "unit": unit}
