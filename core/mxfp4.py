"""The MXFP4 format: the one definition that training, kernels and every exporter reproduce bit for bit.

OCP Microscaling (MX) v1.0: a block of 32 values along the reduction dimension shares one scale.
An element is E2M1: sign (bit 3) and an index (bits 0-2) into {0, .5, 1, 1.5, 2, 3, 4, 6}; no Inf, no NaN.
A scale is E8M0: byte b means 2^(b-127); 0xFF is NaN and never written. Two codes share a byte, the even
element in the low nibble. 4.25 bits a weight.

The format does not say how to choose the scale, and libraries disagree (docs/numerics.md). `ScaleRule`
therefore is part of every artefact's name. Elements are rounded to nearest, ties to the even code, and
saturate at +-6; the sign of a value that rounds to zero is kept (code 8); a block of zeros has scale byte 0.

The source of every quantisation is the BF16 cast of a value: two different sources (FP32 master, BF16
copy) would disagree on 0.7 % of the values. Snapped values are exact in BF16.

Legend: K reduction dim, Q = K/32 blocks, P = K/2 packed bytes; leading dims are free.
"""

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from core.errors import FormatError

BLOCK = 32
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_MAX = 6.0
E2M1_EMAX = 2  # exponent of the largest magnitude: 6 = 1.5 * 2^2
SCALE_BIAS = 127
SCALE_NAN = 255
SCALE_MAX = 254
SCALE_OVERFLOW = 253  # from this byte on, the largest magnitudes reach 2^128 and leave BF16 and FP32
BITS_PER_WEIGHT = 4 + 8 / BLOCK

# round(|x| / scale) to the nearest magnitude: index = number of midpoints below |x|; a tie goes to the
# even index, so odd-to-even boundaries (.25 -> 0, 1.25 -> 2, ...) count only strictly above the midpoint
# and even-to-odd ones (.75 -> 2, 1.75 -> 4, 3.5 -> 6) count from the midpoint on.
MIDPOINTS_ABOVE = (0.25, 1.25, 2.5, 5.0)
MIDPOINTS_FROM = (0.75, 1.75, 3.5)


class ScaleRule(Enum):
    """How a block's shared exponent follows from its largest magnitude (amax); value = name in manifests."""

    even = "even"  # amax rounded to one mantissa bit, then floor(log2) - 2: lowest error of the closed forms
    floor = "floor"  # floor(log2 amax) - 2: the OCP minimum; clips amax above 6
    rceil = "rceil"  # ceil(log2(amax / 6)): never clips


# A rule is one integer added to amax's FP32 bits before its exponent is read. Integer arithmetic, so no rounding of
# a division or a logarithm enters. The carry lifts the exponent when amax / 2^floor(log2 amax) is
AMAX_CARRY = {
    ScaleRule.even: 0x200000,  # at least 1.75
    ScaleRule.floor: 0,  # never
    ScaleRule.rceil: 0x3FFFFF,  # above 1.5, i.e. when amax > 6 * 2^(floor(log2 amax) - 2)
}


@dataclass(frozen=True)
class Packed:
    """`codes` uint8 [..., K/2], low nibble = even element; `scales` uint8 [..., K/32], E8M0."""

    codes: Tensor
    scales: Tensor


def check_blocks(size: int, what: str = "the reduction dimension") -> None:
    """Raise FormatError unless `size` divides into blocks of 32."""
    if size == 0 or size % BLOCK:
        raise FormatError(
            f"{what} is {size}, which is not a positive multiple of the MXFP4 block of {BLOCK}; "
            "leave this tensor out of quant.select or pad the model's width"
        )


def scale_bytes(amax: Tensor, rule: ScaleRule) -> Tensor:
    """E8M0 bytes (uint8, same shape) for block maxima `amax` (finite, non-negative; any float dtype)."""
    # E8M0 and FP32 share the bias of 127, so FP32's exponent field less E2M1_EMAX is the byte.
    bits = amax.to(torch.float32).view(torch.int32)
    byte = ((bits + AMAX_CARRY[rule]) >> 23) - E2M1_EMAX
    return byte.clamp(0, SCALE_MAX).to(torch.uint8)


def scale_values(scales: Tensor) -> Tensor:
    """2^(byte-127) as float32, exact for every byte but 0xFF (which becomes NaN); byte 0 is a subnormal."""
    byte = scales.to(torch.int32)
    bits = torch.where(byte == 0, 0x400000, byte << 23)
    return torch.where(byte == SCALE_NAN, 0x7FC00000, bits).view(torch.float32)


def encode(weight: Tensor, rule: ScaleRule = ScaleRule.even, name: str = "tensor") -> Packed:
    """Quantise along the last dimension.

    Args:
        weight: [..., K], any float dtype; the BF16 cast (round to nearest even) is what is quantised.
        rule: the scale rule.
        name: used in errors only.
    Returns:
        Packed codes [..., K/2] and scales [..., K/32].
    Raises:
        FormatError: K is not a multiple of 32, or a value is NaN or Inf (names the first block).
    """
    check_blocks(weight.shape[-1], f"the last dimension of {name}")
    block_QB = weight.to(torch.bfloat16).to(torch.float32).unflatten(-1, (-1, BLOCK))
    amax_Q = block_QB.abs().amax(-1)
    raise_if_not_finite(amax_Q, name)
    scales = scale_bytes(amax_Q, rule)
    # Dividing by a power of two is exact in FP64, also where the scale or the value is an FP32 subnormal.
    magnitude = block_QB.abs().to(torch.float64) / scale_values(scales).to(torch.float64).unsqueeze(-1)
    index = torch.zeros_like(magnitude, dtype=torch.uint8)
    for midpoint in MIDPOINTS_ABOVE:
        index += magnitude > midpoint
    for midpoint in MIDPOINTS_FROM:
        index += magnitude >= midpoint
    code = index | (torch.signbit(block_QB).to(torch.uint8) << 3)
    code = code.flatten(-2).unflatten(-1, (-1, 2))
    return Packed(code[..., 0] | (code[..., 1] << 4), scales)


def unpack_codes(codes: Tensor) -> Tensor:
    """uint8 [..., K/2] -> uint8 [..., K], one code an element."""
    return torch.stack((codes & 0xF, codes >> 4), dim=-1).flatten(-2)


def decode(packed: Packed, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Values [..., K] of packed codes; exact in BF16 and FP32 up to their common limit of 2^128.

    Raises:
        FormatError: shapes disagree, a scale byte is 0xFF (NaN), or a value is 2^128 or more (scale byte 253 or 254).
    """
    codes, scales = packed.codes, packed.scales
    if codes.shape[:-1] != scales.shape[:-1] or codes.shape[-1] * 2 != scales.shape[-1] * BLOCK:
        raise FormatError(f"codes {tuple(codes.shape)} and scales {tuple(scales.shape)} do not describe one tensor")
    if bool((scales == SCALE_NAN).any()):
        raise FormatError("a scale byte is 0xFF (NaN); the source file is damaged or not MXFP4")
    table = torch.tensor(E2M1_VALUES + tuple(-v for v in E2M1_VALUES), dtype=torch.float32, device=codes.device)
    value = table[unpack_codes(codes).to(torch.int64)].unflatten(-1, (-1, BLOCK))
    value = (value * scale_values(scales).unsqueeze(-1)).flatten(-2).to(dtype)
    if bool((scales >= SCALE_OVERFLOW).any()) and not bool(torch.isfinite(value).all()):
        raise FormatError(f"a value is 2^128 or more, which {dtype} cannot hold; the weights have diverged")
    return value


def snap(weight: Tensor, rule: ScaleRule = ScaleRule.even, dim: int = -1, name: str = "tensor") -> Tensor:
    """decode(encode(weight)) along `dim`, in `weight`'s dtype (BF16 or FP32; both hold the result exactly)."""
    moved = weight.transpose(dim, -1)
    return decode(encode(moved, rule, name), weight.dtype).transpose(dim, -1).contiguous()


def on_grid(weight: Tensor, dim: int = -1) -> bool:
    """Whether every value survives a snap unchanged; the same answer under all three rules."""
    return bool(torch.equal(snap(weight, ScaleRule.even, dim), weight))


def raise_if_not_finite(amax_Q: Tensor, name: str) -> None:
    """FormatError naming `name` and the first block whose amax is NaN or Inf."""
    bad = ~torch.isfinite(amax_Q)
    if bool(bad.any()):
        where = tuple(int(i) for i in bad.nonzero()[0])
        raise FormatError(
            f"{name} has a NaN or Inf in block {where}; MXFP4 cannot hold it: "
            "repair the checkpoint, or lower optim.lr if training produced it"
        )
