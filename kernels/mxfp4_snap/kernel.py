"""MXFP4 snap, encode and decode in Triton, bit-identical to core.mxfp4 for every BF16 pattern.

Snapping is memory-bound work (read 2 B, write 2 B a weight), so the arithmetic has to hide behind the copy: on an H200
there are about 15 integer or 30 float lanes-operations a weight to spend. Hence no table and no division:

- The scale is integer arithmetic on amax's bits (core.mxfp4.AMAX_CARRY); amax itself is an integer maximum of
  magnitude bits, which orders finite < Inf < NaN and so detects bad blocks for free.
- y = |x| * 2^-e is exact: 2^-e is built from bits and never subnormal. Where y underflows it is far below 1/4.
- E2M1 values are the multiples of 1/2 below 2, of 1 below 4 and of 2 from there. t = max(y, 1) * 2^22 has exactly these
  units in the last place, so (y + t) - t rounds y to the grid with FP32's own ties-to-even. t / ulp is even (y has 8
  significant bits), hence a tie goes to the even code. Both forms, fused multiply-add or not, give the same bits.
- Encoding needs the code, not the value: min(2y, y + 2, y/2 + 4) is linear between neighbours of the grid and maps them
  to 0, 1 .. 7. Adding 2^23 rounds it to an integer, ties to even codes, which then stands in the low bits. BF16 is read
  two values a word, the even element in the low half, which is also the order of the nibbles.
- r * 2^e is exact in BF16, so the upper half of its FP32 bits is the result; the sign is put back last (-0 survives).

FP32 subnormals occur for scale byte 0 only. Triton's FP32 multiply keeps them (`mul.f32`, not `mul.ftz.f32`).

Tiles are [ROWS, 32], one row a block: 8 BF16 values (16 bytes) a thread and access, the row maximum two shuffles.
A row that cannot be snapped is not stored, and one thread sets the flag; the host is never waited for.

Legend: R rows of a tile, B = 32 values of a block, H = 16 packed bytes of a block.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from core.mxfp4 import AMAX_CARRY, BLOCK, E2M1_EMAX, E2M1_MAX, Packed, ScaleRule
from kernels.mxfp4_snap.reference import INF_BITS, refused_from

SIGN = tl.constexpr(-(2**31))
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
INF = tl.constexpr(0x7F800000)
QUIET_NAN = tl.constexpr(0x7FC00000)


@dataclass(frozen=True)
class Tile:
    """Launch shape: blocks of 32 a program, and its warps."""

    rows: int = 128
    num_warps: int = 4


DEFAULT_TILE = Tile()
ENCODE_TILE = Tile(rows=256, num_warps=2)  # best of benchmarks.pack --sweep on an H200: 85 % of the copy rate


@triton.jit
def load_bf16(ptr, offset, mask):
    """FP32 bits (int32) of the BF16 casts of the values at ptr; int16 memory is BF16, int32 memory is FP32."""
    raw = tl.load(ptr + offset, mask=mask, other=0)
    if ptr.dtype.element_ty == tl.int16:
        bits = raw.to(tl.int32) << 16
    else:
        # Round to nearest even by hand. NaNs are first made small enough that the carry cannot reach the sign.
        magnitude = tl.minimum(raw & MAGNITUDE, QUIET_NAN)
        rounded = (magnitude + 0x7FFF + ((magnitude >> 16) & 1)) & 0x7FFF0000
        bits = rounded | (raw & SIGN)
    return bits


@triton.jit
def scale_byte(amax_R, CARRY: tl.constexpr, EMAX: tl.constexpr):
    """E8M0 byte (int32) from the FP32 bits of amax; at most 253, whatever amax holds."""
    return tl.maximum(((amax_R + CARRY) >> 23) - EMAX, 0)


@triton.jit
def exact_power(byte):
    """2^(byte - 127) as FP32."""
    return tl.where(byte == 0, 0x400000, byte << 23).to(tl.float32, bitcast=True)


@triton.jit
def round_to_grid(magnitude_RB, byte_R, MAX: tl.constexpr):
    """FP32 grid values in units of the scale, from the FP32 bits of magnitudes."""
    inverse_R = ((254 - byte_R) << 23).to(tl.float32, bitcast=True)
    y_RB = tl.minimum(magnitude_RB.to(tl.float32, bitcast=True) * inverse_R[:, None], MAX)
    t_RB = tl.maximum(y_RB, 1.0) * 4194304.0
    return (y_RB + t_RB) - t_RB


@triton.jit
def snap_kernel(source, out, flag, rows, REFUSED: tl.constexpr, CARRY: tl.constexpr, EMAX: tl.constexpr,
                MAX: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """out = snap(bf16(source)); source and out are int16 (BF16) or int32 (FP32) memory and may be the same."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    row_R = tl.arange(0, ROWS)
    here_R = row_R < rows - first
    offset_RB = row_R[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]

    bits_RB = load_bf16(source + first * BLOCK, offset_RB, here_R[:, None])
    magnitude_RB = bits_RB & MAGNITUDE
    amax_R = tl.max(magnitude_RB, axis=1)
    refused_R = amax_R >= REFUSED
    byte_R = scale_byte(amax_R, CARRY, EMAX)
    grid_RB = round_to_grid(magnitude_RB, byte_R, MAX)
    snapped_RB = (grid_RB * exact_power(byte_R)[:, None]).to(tl.int32, bitcast=True) | (bits_RB & SIGN)

    if out.dtype.element_ty == tl.int16:
        snapped_RB = (snapped_RB >> 16).to(tl.int16)
    tl.store(out + first * BLOCK + offset_RB, snapped_RB, mask=(here_R & (amax_R < REFUSED))[:, None])
    tl.store(flag + row_R * 0, 1, mask=here_R & refused_R)


@triton.jit
def load_pairs(source, row_RH, here_RH, BLOCK: tl.constexpr, PAIRED: tl.constexpr):
    """FP32 bits [R, H] of the even and of the odd elements; PAIRED: a 32-bit word holds two BF16 values."""
    HALF: tl.constexpr = BLOCK // 2
    if PAIRED:
        word_RH = tl.load(source + row_RH * HALF + tl.arange(0, HALF)[None, :], mask=here_RH, other=0)
        even_RH, odd_RH = word_RH << 16, word_RH & -65536
    else:
        bits_RB = load_bf16(source, row_RH * BLOCK + tl.arange(0, BLOCK)[None, :], here_RH)
        even_RH, odd_RH = tl.split(tl.reshape(bits_RB, (bits_RB.shape[0], HALF, 2)))
    return even_RH, odd_RH


@triton.jit
def code_of(magnitude_RH, inverse_R):
    """FP32 whose low bits are the three low bits of the code: see the head of the file."""
    y_RH = magnitude_RH.to(tl.float32, bitcast=True) * inverse_R[:, None]
    index_RH = tl.minimum(tl.minimum(y_RH + y_RH, y_RH + 2.0), tl.minimum(y_RH * 0.5 + 4.0, 7.0))
    return (index_RH + 8388608.0).to(tl.int32, bitcast=True)


@triton.jit
def encode_kernel(source, codes, scales, flag, rows, REFUSED: tl.constexpr, CARRY: tl.constexpr, EMAX: tl.constexpr,
                  MAX: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, PAIRED: tl.constexpr):  # fmt: skip
    """Pack each row into 16 bytes of codes (low nibble = even element) and one scale byte; refused rows become zero."""
    HALF: tl.constexpr = BLOCK // 2
    tl.static_assert(MAX == 6.0)
    first = tl.program_id(0).to(tl.int64) * ROWS
    row_R = tl.arange(0, ROWS)
    here_R = row_R < rows - first

    start = source + first * (HALF if PAIRED else BLOCK)
    even_RH, odd_RH = load_pairs(start, row_R[:, None], here_R[:, None], BLOCK, PAIRED)
    amax_R = tl.max(tl.maximum(even_RH & MAGNITUDE, odd_RH & MAGNITUDE), axis=1)
    refused_R = amax_R >= REFUSED
    byte_R = tl.where(refused_R, 0, scale_byte(amax_R, CARRY, EMAX))
    inverse_R = ((254 - byte_R) << 23).to(tl.float32, bitcast=True)
    code_RH = code_of(even_RH & MAGNITUDE, inverse_R) + (code_of(odd_RH & MAGNITUDE, inverse_R) << 4)
    code_RH |= ((even_RH >> 28) & 8) | ((odd_RH >> 24) & 128)
    code_RH = tl.where(refused_R[:, None], 0, code_RH)

    offset_RH = row_R[:, None] * HALF + tl.arange(0, HALF)[None, :]
    tl.store(codes + first * HALF + offset_RH, code_RH.to(tl.uint8), mask=here_R[:, None])
    tl.store(scales + first + row_R, byte_R.to(tl.uint8), mask=here_R)
    tl.store(flag + row_R * 0, 1, mask=here_R & refused_R)


@triton.jit
def decode_kernel(codes, scales, out, flag, rows, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Values of packed rows; a row with scale byte 0xFF, or with a value of 2^128, becomes NaN and sets the flag."""
    HALF: tl.constexpr = BLOCK // 2
    first = tl.program_id(0).to(tl.int64) * ROWS
    row_R = tl.arange(0, ROWS)
    here_R = row_R < rows - first
    offset_RB = row_R[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    offset_RH = row_R[:, None] * HALF + tl.arange(0, HALF)[None, :]

    packed_RH = tl.load(codes + first * HALF + offset_RH, mask=here_R[:, None], other=0).to(tl.int32)
    byte_R = tl.load(scales + first + row_R, mask=here_R, other=0).to(tl.int32)
    code_RB = tl.reshape(tl.join(packed_RH & 0xF, packed_RH >> 4), (ROWS, BLOCK))
    index_RB = code_RB & 7
    normal_RB = ((index_RB + 252) << 22).to(tl.float32, bitcast=True)
    value_RB = tl.where(index_RB < 2, index_RB.to(tl.float32) * 0.5, normal_RB) * exact_power(byte_R)[:, None]
    magnitude_RB = value_RB.to(tl.int32, bitcast=True) & MAGNITUDE
    bad_R = tl.max(magnitude_RB, axis=1) >= INF
    bits_RB = tl.where(bad_R[:, None], QUIET_NAN, magnitude_RB | ((code_RB & 8) << 28))

    if out.dtype.element_ty == tl.int16:
        bits_RB = (bits_RB >> 16).to(tl.int16)
    tl.store(out + first * BLOCK + offset_RB, bits_RB, mask=here_R[:, None])
    tl.store(flag + row_R * 0, 1, mask=here_R & bad_R)


def raw(tensor: Tensor) -> Tensor:
    """The same memory as integers: Triton then neither converts nor flushes anything behind our back."""
    return tensor.detach().view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32)


def launch(kernel, tensors: tuple[Tensor, ...], blocks: int, tile: Tile, **constants) -> None:
    """One program per `tile.rows` blocks, on the device of the first tensor."""
    if blocks == 0:
        return
    with torch.cuda.device_of(tensors[0]):
        kernel[(triton.cdiv(blocks, tile.rows),)](
            *tensors, blocks, BLOCK=BLOCK, ROWS=tile.rows, num_warps=tile.num_warps, **constants
        )


def rule_constants(rule: ScaleRule) -> dict[str, float]:
    return {"CARRY": AMAX_CARRY[rule], "EMAX": E2M1_EMAX, "MAX": E2M1_MAX}


def snap_from(source: Tensor, out: Tensor, rule: ScaleRule, flag: Tensor, tile: Tile = DEFAULT_TILE) -> None:
    refused = refused_from(rule) << 16
    tensors = (raw(source), raw(out), flag)
    launch(snap_kernel, tensors, source.numel() // BLOCK, tile, REFUSED=refused, **rule_constants(rule))


def encode(weight: Tensor, rule: ScaleRule, flag: Tensor, tile: Tile = ENCODE_TILE) -> Packed:
    *lead, k = weight.shape
    codes = torch.empty(*lead, k // 2, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(*lead, k // BLOCK, dtype=torch.uint8, device=weight.device)
    paired = weight.dtype == torch.bfloat16 and weight.storage_offset() % 2 == 0
    source = weight.detach().view(torch.int32) if paired else raw(weight)
    constants = rule_constants(rule) | {"REFUSED": INF_BITS << 16, "PAIRED": paired}
    launch(encode_kernel, (source, codes, scales, flag), scales.numel(), tile, **constants)
    return Packed(codes, scales)


def decode(packed: Packed, dtype: torch.dtype, flag: Tensor, tile: Tile = DEFAULT_TILE) -> Tensor:
    *lead, q = packed.scales.shape
    out = torch.empty(*lead, q * BLOCK, dtype=dtype, device=packed.scales.device)
    launch(decode_kernel, (packed.codes, packed.scales, raw(out), flag), packed.scales.numel(), tile)
    return out
