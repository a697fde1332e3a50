"""Which of PyTorch's attention kernels may run."""

import torch


def leave_out_cudnn_attention() -> None:
    """Leave this process's attention to PyTorch's other kernels, which give the same values but for rounding.

    Under a mask, at lengths of 64 more than a multiple of 128, cuDNN's backward pass is NaN where the log of the sum of
    a query's exponentiated scores is below about -88, since it scores what fills up the last tile of keys 0 instead of
    -inf (pytorch/pytorch#196678: torch from 2.11 on, H100 and H200). High learning rates lead there.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
