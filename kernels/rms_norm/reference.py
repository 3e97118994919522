"""RMSNorm in plain torch: the definition, and the path without a GPU."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, G], weight [G] of one dtype -> [T, G]. The mean square in FP32; rounded before and after the weight."""
    x32 = x.to(torch.float32)
    x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return weight * x32.to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(norm(s), s) with s = x + residual, rounded to their dtype."""
    summed = x + residual
    return rms_norm(summed, weight, eps), summed
