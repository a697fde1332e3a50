"""Normalising flow on the inducing matrix: masked autoregressive layers (Eq. 16), from zuko."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from zuko.flows.autoregressive import MaskedAutoregressiveTransform


class InducingFlow(nn.Module):
    """T_phi = T_k o ... o T_1 on the flattened m_r x m_c matrix, alternating the order of the variables.

    Every layer is affine autoregressive, y_i = mu_i(x_<i) + exp(s_i(x_<i)) x_i, evaluated in one pass in the sampling
    direction. The last linear layer of each starts at zero, so the flow starts as the identity.

    Args:
        size: m_r m_c.
        depth: number of layers, >= 1.
        hidden: width of the one hidden layer of each masked network.
    """

    def __init__(self, size: int, depth: int, hidden: int) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"a flow needs depth >= 1, got {depth}: use no flow for depth 0")
        self.layers = nn.ModuleList()
        for k in range(depth):
            order = torch.arange(size) if k % 2 == 0 else torch.arange(size - 1, -1, -1)
            layer = MaskedAutoregressiveTransform(size, order=order, hidden_features=(hidden,))
            last = layer if size == 1 else layer.hyper[-1]  # a single variable has no network, only two parameters
            for parameter in last.parameters():
                nn.init.zeros_(parameter)
            self.layers.append(layer)

    def forward(self, U_0: Tensor) -> tuple[Tensor, Tensor]:
        """Map U_0 (..., m_r, m_c) to T(U_0), same shape, and log|det J|, nats, (...)."""
        x = U_0.flatten(-2)
        log_det = x.new_zeros(x.shape[:-1])
        for layer in self.layers:
            x, ladj = layer().call_and_ladj(x)
            log_det = log_det + ladj
        return x.reshape(U_0.shape), log_det


def apply_stacked(flow: InducingFlow, tensors: Mapping[str, Tensor], U_0: Tensor) -> tuple[Tensor, Tensor]:
    """Apply n flows of the structure of ``flow`` at once.

    Args:
        flow: gives the structure; its own values are not used.
        tensors: parameters and buffers by name, each stacked as (n, ...).
        U_0: (S, n, m_r, m_c).

    Returns:
        (S, n, m_r, m_c) and log|det J|, nats, (S, n).
    """

    def one(values: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        return functional_call(flow, values, (x,))

    return vmap(one, in_dims=(0, 1), out_dims=(1, 1))(dict(tensors), U_0)
