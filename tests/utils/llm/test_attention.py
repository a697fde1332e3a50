"""The choice of attention kernels."""

import pytest
import torch
from torch.nn import functional as F

from utils.llm.attention import leave_out_cudnn_attention


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128, 192])
def test_gradients_under_a_mask_are_finite_where_all_scores_are_low(width):
    """Of all these cuDNN's kernel fails at 64 and 192."""
    leave_out_cudnn_attention()
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, width, 64, device="cuda", dtype=torch.bfloat16, generator=generator).unbind()
    q[..., 0], k[..., 0] = 1.0, -1000.0  # scores of about -1000 / sqrt(64)
    inputs = [t.clone().requires_grad_() for t in (q, k, v)]
    mask = torch.ones(width, width, dtype=torch.bool, device="cuda").tril()
    F.scaled_dot_product_attention(*inputs, attn_mask=mask).square().sum().backward()
    assert all(t.grad.isfinite().all() for t in inputs)
