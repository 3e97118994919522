"""Plain-torch twin of `kernel`: core.mxfp4 plus the flag protocol. Any device; the CPU path of this package."""

import torch
from torch import Tensor

from core import mxfp4
from core.mxfp4 import AMAX_CARRY, BLOCK, SCALE_NAN, Packed, ScaleRule

INF_BITS = 0x7F80  # BF16 bits of +Inf; larger magnitudes are NaN


def refused_from(rule: ScaleRule) -> int:
    """BF16 bits of the smallest amax whose block cannot be snapped: NaN, Inf, or a finite one that rounds to 2^128.

    Under EVEN and RCEIL an amax from 1.75 * 2^127 = 3.5 * 2^126 on becomes 4 * 2^126, which is Inf; FLOOR clips first.
    """
    return INF_BITS if AMAX_CARRY[rule] == 0 else 0x7F60


def refused_blocks(weight: Tensor, rule: ScaleRule) -> Tensor:
    """Bool [..., K/32]: the blocks of `weight` [..., K] that hold a NaN or Inf, or whose snapped value would be Inf."""
    bits_QB = weight.detach().to(torch.bfloat16).contiguous().view(torch.int16).unflatten(-1, (-1, BLOCK))
    return (bits_QB & 0x7FFF).amax(-1) >= refused_from(rule)


def snap_from(source: Tensor, out: Tensor, rule: ScaleRule, flag: Tensor) -> None:
    """out = snap(bf16(source)); blocks that cannot be snapped keep what `out` held and raise the flag."""
    refused_QB = refused_blocks(source, rule).repeat_interleave(BLOCK, dim=-1)
    snapped = mxfp4.snap(source.detach().masked_fill(refused_QB, 0).to(torch.bfloat16), rule)
    out.detach().copy_(torch.where(refused_QB, out, snapped.to(out.dtype)))
    flag.logical_or_(refused_QB.any())


def encode(weight: Tensor, rule: ScaleRule, flag: Tensor) -> Packed:
    """core.mxfp4.encode; a block with a NaN or Inf becomes zeros and raises the flag."""
    refused_QB = refused_blocks(weight, ScaleRule.floor).repeat_interleave(BLOCK, dim=-1)
    flag.logical_or_(refused_QB.any())
    return mxfp4.encode(weight.detach().masked_fill(refused_QB, 0), rule)


def decode(packed: Packed, dtype: torch.dtype, flag: Tensor) -> Tensor:
    """core.mxfp4.decode; a block with scale byte 0xFF or a value of 2^128 or more becomes NaN and raises the flag."""
    largest_Q = (packed.codes & 0x7).maximum(packed.codes >> 4 & 0x7).unflatten(-1, (-1, BLOCK // 2)).amax(-1)
    # 4 * 2^126 (index 6, byte 253) and 2 * 2^127 (index 4, byte 254) are 2^128.
    over_Q = ((packed.scales == 253) & (largest_Q >= 6)) | ((packed.scales == 254) & (largest_Q >= 4))
    bad_Q = (packed.scales == SCALE_NAN) | over_Q
    flag.logical_or_(bad_Q.any())
    value = mxfp4.decode(Packed(packed.codes, packed.scales.masked_fill(bad_Q, 0)), dtype)
    return value.masked_fill(bad_Q.repeat_interleave(BLOCK, dim=-1), torch.nan)
