"""RMSNorm in Triton: one program a row, the whole row in registers, read once.

A decode step has 1 to 64 rows of some 10 kB, so this is latency, not bandwidth: two launches less than addition, norm
and weight apart. The launch shape depends on the length of a row and on nothing else, so do the order of its sum and
its bits; divisions and the root are IEEE's.

Legend: G values of a row, padded to a power of two.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.bf16 import rounded
from kernels.follow import FOLLOW, follow


@triton.jit
def norm_kernel(x, residual, weight, y, summed, eps, G: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr):
    """y = weight * round(s / rms(s)); with ADD, s = round(x + residual) is stored too."""
    follow()
    start = tl.program_id(0).to(tl.int64) * G
    column_G = tl.arange(0, BLOCK)
    here_G = column_G < G
    DTYPE: tl.constexpr = y.dtype.element_ty

    s_G = tl.load(x + start + column_G, mask=here_G, other=0.0).to(tl.float32)
    if ADD:
        kept_G = rounded(s_G + tl.load(residual + start + column_G, mask=here_G, other=0.0).to(tl.float32), DTYPE)
        tl.store(summed + start + column_G, kept_G, mask=here_G)
        s_G = kept_G.to(tl.float32)
    mean = tl.div_rn(tl.sum(s_G * s_G, axis=0), G * 1.0)
    scale = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    weight_G = tl.load(weight + column_G, mask=here_G, other=0.0).to(tl.float32)
    y_G = rounded(s_G * scale, DTYPE).to(tl.float32) * weight_G
    tl.store(y + start + column_G, rounded(y_G, DTYPE), mask=here_G)


def warps(block: int) -> int:
    """Eight BF16 values a thread and access, at most 16 warps."""
    return min(16, max(1, block // 256))


def launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    count, size = x.shape
    y = torch.empty_like(x)
    summed = y if residual is None else torch.empty_like(x)
    block = triton.next_power_of_2(size)
    if count:
        with torch.cuda.device_of(x):
            norm_kernel[(count,)](
                x, x if residual is None else residual, weight, y, summed, eps,
                G=size, BLOCK=block, ADD=residual is not None, num_warps=warps(block), **FOLLOW,
            )  # fmt: skip
    return y, summed


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return launch(x, None, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return launch(x, residual, weight, eps)


def compile_cases() -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """(name, kernel, argument types, constants, options) of a row of 6,144 BF16 values, with and without residual."""
    pointers = dict.fromkeys(("x", "residual", "weight", "y", "summed"), "*bf16") | {"eps": "fp32"}
    cases = []
    for add in (False, True):
        fixed = {"G": 6144, "BLOCK": 8192, "ADD": add}
        signature = pointers | dict.fromkeys(fixed, "constexpr")
        cases.append((f"rms_norm add={add}", norm_kernel, signature, fixed, {"num_warps": warps(8192)}))
    return cases
