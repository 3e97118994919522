"""MXFP4 encoding and decoding on a CPU, in integer arithmetic on BF16 bits; bit for bit core.mxfp4.

A BF16 value is its 16 bits: sign, 8 exponent bits, 7 mantissa bits. Dividing by the block's scale 2^(b-127) subtracts
(b-127) from the exponent field, so |x| / scale has the bits `r = |bits| - ((b - 127) << 7)`, and the code is the number
of midpoints at or below it: seven integer comparisons. Exact while neither x nor the scale is subnormal, which holds
for every block with b >= 3 (a smaller x rounds to zero there); the few other blocks go through core.mxfp4.

Many times as fast as the definition on one core (benchmarks/pack.py --cpu): it runs on tiles that stay in the cache, in
2-byte integers, and numpy frees the interpreter lock, so threads add up.

Legend: Q blocks, B = 32 values of a block.
"""

import numpy as np
import torch
from torch import Tensor

from core.mxfp4 import (
    AMAX_CARRY,
    BLOCK,
    E2M1_EMAX,
    E2M1_VALUES,
    MIDPOINTS_ABOVE,
    MIDPOINTS_FROM,
    SCALE_BIAS,
    SCALE_MAX,
    SCALE_OVERFLOW,
    Packed,
    ScaleRule,
    check_blocks,
    decode,
    encode,
)  # fmt: skip

TILE = 8192  # blocks in one pass: 512 KiB of BF16
MANTISSA = 7  # bits
SMALLEST = 3  # from this scale byte on, integer arithmetic is exact
INFINITY = 0x7F80


def bits_of(value: float) -> int:
    return int(torch.tensor(value, dtype=torch.bfloat16).view(torch.int16))


# "r > m" is "r >= m + 1" in integers, so that all seven are comparisons of one kind
LIMITS = sorted([bits_of(m) + 1 for m in MIDPOINTS_ABOVE] + [bits_of(m) for m in MIDPOINTS_FROM])


def fast_encode(weight: Tensor, rule: ScaleRule = ScaleRule.even, name: str = "tensor") -> Packed:
    """core.mxfp4.encode for CPU tensors: same arguments, bytes and errors."""
    check_blocks(weight.shape[-1], f"the last dimension of {name}")
    bits = weight.to(torch.bfloat16).contiguous().view(torch.int16).numpy().reshape(-1, BLOCK)
    codes = np.empty((bits.shape[0], BLOCK // 2), dtype=np.uint8)
    scales = np.empty(bits.shape[0], dtype=np.uint8)
    tiny = False
    for at in range(0, bits.shape[0], TILE):
        tile = bits[at : at + TILE]
        byte, finite = encode_tile(tile, AMAX_CARRY[rule] >> 16, codes[at : at + TILE])
        if not finite:
            encode(weight, rule, name)  # raises, and names the block
        scales[at : at + TILE] = byte
        tiny = tiny or bool((byte < SMALLEST).any())
    shape = weight.shape[:-1]
    if tiny:
        rows = np.flatnonzero(scales < SMALLEST)
        exact = encode(torch.from_numpy(bits[rows]).view(torch.bfloat16), rule, name)
        codes[rows], scales[rows] = exact.codes.numpy(), exact.scales.numpy()[:, 0]
    size = weight.shape[-1]
    return Packed(
        torch.from_numpy(codes).reshape(*shape, size // 2), torch.from_numpy(scales).reshape(*shape, size // BLOCK)
    )


def encode_tile(bits_QB: np.ndarray, carry: int, out: np.ndarray) -> tuple[np.ndarray, bool]:
    """Codes of some blocks into `out` [Q, 16]; returns their scale bytes and whether all values are finite."""
    magnitude = bits_QB & 0x7FFF
    # a maximum over rows of 32 is slow in numpy; five halvings of the whole tile are not
    wide = np.maximum(magnitude[:, :16], magnitude[:, 16:])
    for half in (8, 4, 2, 1):
        wide = np.maximum(wide[:, :half], wide[:, half:])
    amax = wide[:, 0].astype(np.int32)
    byte = np.clip(((amax + carry) >> MANTISSA) - E2M1_EMAX, 0, SCALE_MAX)
    shift = ((byte - SCALE_BIAS) << MANTISSA).astype(np.int16)
    magnitude -= shift[:, None]
    code = (magnitude >= LIMITS[0]).view(np.uint8)
    for limit in LIMITS[1:]:
        code += (magnitude >= limit).view(np.uint8)
    code |= (bits_QB < 0).view(np.uint8) << 3
    pairs = code.view(np.uint16)  # low byte: even element
    np.bitwise_or(pairs, pairs >> 4, out=pairs)
    out[:] = pairs.astype(np.uint8)
    return byte.astype(np.uint8), bool(amax.max(initial=0) < INFINITY)


VALUES = torch.tensor(E2M1_VALUES + tuple(-v for v in E2M1_VALUES), dtype=torch.bfloat16).view(torch.int16).numpy()
PAIR_VALUES = np.stack([np.tile(VALUES, 16), np.repeat(VALUES, 16)], axis=1).reshape(-1).view(np.int32)  # by byte
PAIR_MASKS = np.where(PAIR_VALUES.view(np.int16) & 0x7FFF, -1, 0).astype(np.int16).view(np.int32)  # ones where not 0


def fast_decode(packed: Packed) -> Tensor:
    """core.mxfp4.decode to BF16 for CPU tensors: same values and errors."""
    shape = packed.codes.shape
    codes = packed.codes.contiguous().numpy().reshape(-1, BLOCK // 2)
    scales = packed.scales.contiguous().numpy().reshape(-1)
    if shape[:-1] != packed.scales.shape[:-1] or codes.shape[0] != scales.shape[0]:
        return decode(packed)  # raises, and says why
    out = np.empty((codes.shape[0], BLOCK), dtype=np.int16)
    for at in range(0, codes.shape[0], TILE):
        tile, end = codes[at : at + TILE], at + TILE
        values = np.take(PAIR_VALUES, tile).view(np.int16)
        shift = ((scales[at:end].astype(np.int32) - SCALE_BIAS) << MANTISSA).astype(np.int16)
        np.add(values, np.take(PAIR_MASKS, tile).view(np.int16) & shift[:, None], out=out[at:end])
    odd = np.flatnonzero((scales < SMALLEST) | (scales >= SCALE_OVERFLOW))
    if odd.size:
        exact = decode(Packed(torch.from_numpy(codes[odd]), torch.from_numpy(scales[odd])[:, None]))
        out[odd] = exact.view(torch.int16).numpy()
    return torch.from_numpy(out).view(torch.bfloat16).reshape(*shape[:-1], shape[-1] * 2)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal bit for bit: -0 is not 0."""
    return one.shape == other.shape and torch.equal(
        one.contiguous().view(torch.int16), other.contiguous().view(torch.int16)
    )
