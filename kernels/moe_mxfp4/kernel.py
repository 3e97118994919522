"""MXFP4 experts in Triton: weights go from memory to tensor cores through registers, in four launches.

    prepare (route, and put x in the weights' order) -> gate_up (product, bias, activation) -> down -> combine (slots)

Decode is bound by the bytes of the experts that are hit. So a program reads 128 contiguous bytes of codes of each of
its rows a step (STEP = 256 weights), several steps ahead (cp.async), reads x only for pairs that exist, and spends 3.0
instructions a weight and lane; an H200 has about 6 of them at 55 % of its copy rate. Rows of scales whose length is no
multiple of 4 bytes (K = 2880) cannot be copied asynchronously; they are loaded into registers a step early.

**Unpacking.** A 32-bit word has codes 0..7, code 0 lowest, so codes j and j + 4 stand at the same place of its two
16-bit halves. Multiplied by 2^6 + 2^12 (less where they stand higher), the three low bits e e m come to bits 8..6 and
the sign to bit 15, where with all else masked away they are BF16 bits of value * 2^-126 (0.5 is a subnormal). Then one
multiplication of both halves by 2^126 * 2^(b - 127) = 2^(b - 1) puts the block's scale in as well, exactly. It is a
BF16 number up to scale byte b = 128; a program that meets a larger byte starts again and multiplies twice (2^126, then
2^(b - 127)): the same exact weights, so the same bits. All of it is done on 32-bit integers (`times` is one
instruction): written as separate BF16 numbers, the halves cost ptxas copies, a tenth of all instructions.

**Order of K.** Codes j and j + 4 are neighbours in a register, so K is permuted: element 8w + j + 4h of a step is
at 64j + 2w + h. x is stored in this order once (`prepare`; gate_up writes h in it for down), and four products of 64
follow, one a j.

**Batch invariance.** Weights are the left operand, tokens are columns, and a column of m16n8k16 knows nothing of the
others. STEP, the order of the products and the instruction are the same for every tile (a test compares the compiled
layouts), a pair's sum is whole in one program, and slots are added in order: no atomics, no split of K.

**No wgmma.** Two warps a program, so mma.sync is chosen: its register operands are safe with every ptxas, those of
wgmma are not before 13.3.

Legend: R rows of weights of a tile, P its pairs, W words of a step (32), Q blocks of a step (8), S = T k pairs,
G items.
"""

import os
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.follow import FOLLOW, follow, followed
from kernels.moe_mxfp4.prepare import BLOCK_K, ROUTED, padded, place, prepare, prepare_kernel
from kernels.moe_mxfp4.routing import Table
from kernels.moe_mxfp4.weights import Activation, ExpertWeights

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
KEPT = tl.constexpr(0x81C081C0 - 2**32)  # of each half: sign, last two bits of the exponent, first of the mantissa
HIGH = tl.constexpr(-0x10000)  # the upper half of an int32
TWICE = tl.constexpr(0x10001)  # puts 16 bits into both halves
MULTIPLY = tl.constexpr("{ .reg .b32 z; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, $1, $2, z; }")  # sm_80 has no mul
FOLDED = tl.constexpr(128)  # the largest scale byte that one BF16 multiplication can put in
COMBINED = 512  # columns a program of `combine`


@dataclass(frozen=True)
class Tile:
    """Launch shape of the products: weight rows and pairs of a program, its warps and steps in flight."""

    rows: int = 64
    pairs: int = 8
    num_warps: int = 2  # no multiple of 4: see the head of the file
    num_stages: int = 4
    registers: int | None = 168  # a lane may have: with two warps, six programs a multiprocessor


# Measured on an H200 at the shapes of benchmarks/moe_mxfp4.py; any of them gives the same bits.
DECODE = Tile(num_stages=3)
LONG = Tile()  # rows of 4,096 values and more, or few pairs
SPREAD = Tile(rows=32, num_stages=6)  # few pairs and few rows: more programs, more of the bytes on their way at once
SINGLE = Tile(num_warps=1, registers=None)  # a row is one step
PREFILL = Tile(pairs=32, num_stages=3, registers=None)
PROGRAMS = 132  # multiprocessors of an H200


@triton.jit
def bf16(bits):
    """The number whose BF16 bits are the low half of an int32. (The interpreter has no BF16 arithmetic: FP32 there.)"""
    return (bits << 16).to(tl.float32, bitcast=True) if INTERPRETED else bits.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def rounded(value):
    """FP32 to BF16, to nearest even. (The interpreter's cast truncates; there the carry is added by hand.)"""
    if INTERPRETED:
        bits = value.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        value = (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        value = value.to(tl.bfloat16)
    return value


@triton.jit
def times(both, factor):
    """Both BF16 halves of an int32 times those of another."""
    if INTERPRETED:
        low = (both << 16).to(tl.float32, bitcast=True) * (factor << 16).to(tl.float32, bitcast=True)
        high = (both & HIGH).to(tl.float32, bitcast=True) * (factor & HIGH).to(tl.float32, bitcast=True)
        product = ((low.to(tl.int32, bitcast=True) >> 16) & 0xFFFF) | (high.to(tl.int32, bitcast=True) & HIGH)
    else:
        product = tl.inline_asm_elementwise(MULTIPLY, "=r,r,r", [both, factor], dtype=tl.int32, is_pure=True, pack=1)
    return product


@triton.jit
def unpack(word_RW, small_RW, large_RW, J: tl.constexpr, WIDE: tl.constexpr):
    """Weights [R, 2W] of codes J and J + 4 of each word, which stay in one register until they are operands."""
    low_RW = word_RW if J < 2 else word_RW >> 8
    code_RW = low_RW & (0x000F000F << (4 * (J % 2)))
    both_RW = times((code_RW * (0x1040 >> (4 * (J % 2)))) & KEPT, small_RW)
    if WIDE:
        both_RW = times(both_RW, large_RW)
    weight_RW2 = tl.join(bf16(both_RW), bf16(both_RW >> 16))
    return tl.reshape(weight_RW2, (word_RW.shape[0], word_RW.shape[1] * 2))


@triton.jit
def spread(factor_RQ):
    """[R, Q] -> [R, W]: a block of 32 is four words."""
    R: tl.constexpr = factor_RQ.shape[0]
    Q: tl.constexpr = factor_RQ.shape[1]
    return tl.reshape(tl.broadcast_to(factor_RQ[:, :, None], (R, Q, 4)), (R, Q * 4))


@triton.jit
def scale_bytes(scales, row_R1, step, K: tl.constexpr, STEP: tl.constexpr):
    """uint8 [R, Q] of a step, zeros behind K."""
    block_Q = tl.arange(0, STEP // 32)[None, :]
    if K % STEP == 0:
        byte_RQ = tl.load(scales + step * (STEP // 32) + (row_R1 * (K // 32) + block_Q))
    else:
        here_Q = block_Q < K // 32 - step * (STEP // 32)
        byte_RQ = tl.load(scales + step * (STEP // 32) + (row_R1 * (K // 32) + block_Q), mask=here_Q, other=0)
    return byte_RQ


@triton.jit
def multiply(x_P1, here_P1, codes, scales, row_R1, K: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
             WIDE: tl.constexpr):  # fmt: skip
    """FP32 [R, P] = weights times x, and the largest scale byte of each lane. One expert's weights, so rows
    are told apart by 32 bits and a step moves one pointer, not one for every row."""
    R: tl.constexpr = row_R1.shape[0]
    P: tl.constexpr = x_P1.shape[0]
    W: tl.constexpr = STEP // 8
    CARRIED: tl.constexpr = K % 128 != 0  # rows of scales start at odd places: no cp.async, so a step early by hand
    word_W = tl.arange(0, W)[None, :]
    quarter_C = tl.arange(0, STEP // 4)[None, :]
    acc_RP = tl.zeros((R, P), tl.float32)
    largest_RQ = tl.zeros((R, STEP // 32), tl.int32)
    if CARRIED:
        next_RQ = scale_bytes(scales, row_R1, 0, K, STEP)
    for step in tl.range(0, (K + STEP - 1) // STEP, num_stages=STAGES):
        if K % STEP == 0:
            word_RW = tl.load(codes + step * W + (row_R1 * (K // 8) + word_W))
        else:
            word_RW = tl.load(codes + step * W + (row_R1 * (K // 8) + word_W), mask=word_W < K // 8 - step * W, other=0)
        if CARRIED:
            byte_RQ = next_RQ.to(tl.int32)
            next_RQ = scale_bytes(scales, row_R1, step + 1, K, STEP)
        else:
            byte_RQ = scale_bytes(scales, row_R1, step, K, STEP).to(tl.int32)
        largest_RQ = tl.maximum(largest_RQ, byte_RQ)
        if WIDE:
            large_RW = spread(tl.where(byte_RQ == 0, 0x40, byte_RQ << 7) * TWICE)  # 2^(byte - 127)
            small_RW = tl.full((R, W), 253 << 7, tl.int32) * TWICE  # 2^126
        else:
            small_RW = spread(((byte_RQ + 126) << 7) * TWICE)  # 2^(byte - 1)
            large_RW = small_RW
        for j in tl.static_range(4):
            x_PC = x_P1 + step * STEP + j * (STEP // 4) + quarter_C
            if K % STEP == 0:
                x_PC = tl.load(x_PC, mask=here_P1, other=0.0)
            else:
                x_PC = tl.load(x_PC, mask=here_P1 & (quarter_C < K // 4 - step * (STEP // 4)), other=0.0)
            w_RC = unpack(word_RW, small_RW, large_RW, j, WIDE)
            acc_RP = tl.dot(w_RC, tl.trans(x_PC).to(w_RC.dtype), acc_RP)
    return acc_RP, largest_RQ


@triton.jit
def product(x_P, here_P, codes, scales, row_R, K: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr):
    """multiply, again in the wide form where a scale byte does not fit the narrow one."""
    x_P1 = x_P[:, None]
    # Most columns of a decode tile are idle, and x read for them would be half as many bytes as the codes, out of L2.
    here_P1 = here_P[:, None] if x_P.shape[0] <= 8 else tl.full((x_P.shape[0], 1), True, tl.int1)
    acc_RP, largest_RQ = multiply(x_P1, here_P1, codes, scales, row_R[:, None], K, STEP, STAGES, False)
    if tl.max(largest_RQ) > FOLDED:
        acc_RP, _ = multiply(x_P1, here_P1, codes, scales, row_R[:, None], K, STEP, 1, True)
    return acc_RP


@triton.jit
def pairs_of(order, start, number, P: tl.constexpr):
    """An item's pairs (pair 0 where there are fewer than P, so that loads stay inside) and which are there."""
    slot_P = tl.arange(0, P)
    here_P = slot_P < number
    return tl.load(order + start + slot_P, mask=here_P, other=0).to(tl.int64), here_P


@triton.jit
def gate_up_kernel(x, codes, scales, bias, out, order, expert, first, count, alpha, limit, HIDDEN: tl.constexpr,
                   WIDTH: tl.constexpr, X_ROW: tl.constexpr, OUT_ROW: tl.constexpr, SLOTS: tl.constexpr,
                   CLAMPED: tl.constexpr, PLACED: tl.constexpr, R: tl.constexpr, P: tl.constexpr,
                   STEP: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """out[pair] = act(gate, up) for R/2 of the columns; rows alternate gate and up, so that both meet here."""
    follow()
    item = tl.program_id(0)
    e, start, number = tl.load(expert + item).to(tl.int64), tl.load(first + item), tl.load(count + item)
    if e < 0:
        return
    pair_P, here_P = pairs_of(order, start, number, P)
    row_R = tl.program_id(1) * (R // 2) + tl.arange(0, R) // 2
    row_R = tl.minimum(row_R, WIDTH - 1) + (tl.arange(0, R) % 2) * WIDTH
    codes += e * (2 * WIDTH) * (HIDDEN // 8)
    scales += e * (2 * WIDTH) * (HIDDEN // 32)

    acc_RP = product(x + pair_P // SLOTS * X_ROW, here_P, codes, scales, row_R, HIDDEN, STEP, STAGES)
    if bias is not None:
        acc_RP += tl.load(bias + e * (2 * WIDTH) + row_R).to(tl.float32)[:, None]
    gate_CP, up_CP = tl.split(tl.permute(tl.reshape(acc_RP, (R // 2, 2, P)), (0, 2, 1)))
    if CLAMPED:
        gate_CP = tl.minimum(gate_CP, limit)
        up_CP = tl.minimum(tl.maximum(up_CP, -limit), limit)
        h_CP = gate_CP * tl.sigmoid(alpha * gate_CP) * (up_CP + 1.0)
    else:
        h_CP = gate_CP * tl.sigmoid(gate_CP) * up_CP

    column_C = tl.program_id(1) * (R // 2) + tl.arange(0, R // 2)
    at_C = place(column_C, STEP) if PLACED else column_C
    out_CP = out + pair_P[None, :] * OUT_ROW + at_C[:, None]
    tl.store(out_CP, rounded(h_CP), mask=here_P[None, :] & (column_C < WIDTH)[:, None])


@triton.jit
def down_kernel(h, codes, scales, bias, weight, out, order, expert, first, count, HIDDEN: tl.constexpr,
                WIDTH: tl.constexpr, H_ROW: tl.constexpr, R: tl.constexpr, P: tl.constexpr, STEP: tl.constexpr,
                STAGES: tl.constexpr):  # fmt: skip
    """out[pair] = weight[pair] * (down h[pair] + bias) in FP32, for R of the columns."""
    follow()
    item = tl.program_id(0)
    e, start, number = tl.load(expert + item).to(tl.int64), tl.load(first + item), tl.load(count + item)
    if e < 0:
        return
    pair_P, here_P = pairs_of(order, start, number, P)
    column_R = tl.program_id(1) * R + tl.arange(0, R)
    row_R = tl.minimum(column_R, HIDDEN - 1)
    codes += e * HIDDEN * (WIDTH // 8)
    scales += e * HIDDEN * (WIDTH // 32)

    acc_RP = product(h + pair_P * H_ROW, here_P, codes, scales, row_R, WIDTH, STEP, STAGES)
    if bias is not None:
        acc_RP += tl.load(bias + e * HIDDEN + row_R).to(tl.float32)[:, None]
    acc_RP *= tl.load(weight + pair_P)[None, :]
    out_RP = out + pair_P[None, :] * HIDDEN + column_R[:, None]
    tl.store(out_RP, acc_RP, mask=here_P[None, :] & (column_R < HIDDEN)[:, None])


@triton.jit
def combine_kernel(part, chosen, out, SLOTS: tl.constexpr, HIDDEN: tl.constexpr, C: tl.constexpr):
    """out[token] = the sum of its slots in order; a slot with a negative id was never written and is not read."""
    follow()
    token = tl.program_id(0).to(tl.int64)
    column_C = tl.program_id(1) * C + tl.arange(0, C)
    total_C = tl.zeros((C,), tl.float32)
    for slot in tl.static_range(SLOTS):
        here = tl.load(chosen + token * SLOTS + slot) >= 0
        part_C = part + (token * SLOTS + slot) * HIDDEN + column_C
        total_C += tl.load(part_C, mask=here & (column_C < HIDDEN), other=0.0)
    tl.store(out + token * HIDDEN + column_C, rounded(total_C), mask=column_C < HIDDEN)


def tile_for(pairs: int, experts: int, rows: int, k: int) -> Tile:
    """For a product with `rows` outputs over k inputs. Narrow tiles while an expert has few pairs."""
    if pairs > 4 * experts:
        return PREFILL
    if k <= BLOCK_K:
        return SINGLE
    if pairs * triton.cdiv(rows, DECODE.rows) < PROGRAMS:
        return SPREAD
    return LONG if k >= 4096 or pairs <= 16 else DECODE


def tiles_for(pairs: int, weights: ExpertWeights) -> tuple[Tile, Tile]:
    """Of gate_up and of down, which share a table and so have as many pairs."""
    first = tile_for(pairs, weights.experts, 2 * weights.intermediate, weights.hidden)
    return first, tile_for(pairs, weights.experts, weights.hidden, weights.intermediate)


def first_half(x: Tensor, weights: ExpertWeights, table: Table, slots: int, activation: Activation, tile: Tile,
               out: Tensor, placed: bool) -> None:  # fmt: skip
    """Write h of every pair of `table` into `out` [S, ...], in the weights' order if `placed`."""
    grid = (len(table.expert), triton.cdiv(weights.intermediate, tile.rows // 2))
    gate_up_kernel[grid](
        x, weights.gate_up.codes.view(torch.int32), weights.gate_up.scales, weights.gate_up_bias, out,
        table.order, table.expert, table.first, table.count, activation.alpha, activation.limit,
        HIDDEN=weights.hidden, WIDTH=weights.intermediate, X_ROW=x.shape[-1], OUT_ROW=out.shape[-1], SLOTS=slots,
        CLAMPED=activation.kind == "clamped", PLACED=placed, **tile_options(tile), **followed(grid),
    )  # fmt: skip


def second_half(h: Tensor, weights: ExpertWeights, table: Table, weight: Tensor, tile: Tile) -> Tensor:
    """FP32 [S, H] from h [S, ...] in the weights' order; rows of pairs without an expert are not written."""
    part = torch.empty(len(h), weights.hidden, dtype=torch.float32, device=h.device)
    grid = (len(table.expert), triton.cdiv(weights.hidden, tile.rows))
    down_kernel[grid](
        h, weights.down.codes.view(torch.int32), weights.down.scales, weights.down_bias, weight, part,
        table.order, table.expert, table.first, table.count,
        HIDDEN=weights.hidden, WIDTH=weights.intermediate, H_ROW=h.shape[-1], **tile_options(tile), **followed(grid),
    )  # fmt: skip
    return part


def combine(part: Tensor, chosen: Tensor, dtype: torch.dtype) -> Tensor:
    """[T, H] from second_half's [S, H]."""
    (tokens, slots), hidden = chosen.shape, part.shape[1]
    out = torch.empty(tokens, hidden, dtype=dtype, device=part.device)
    grid = (tokens, triton.cdiv(hidden, COMBINED))
    combine_kernel[grid](part, chosen, out, SLOTS=slots, HIDDEN=hidden, C=COMBINED, num_warps=4, **FOLLOW)
    return out


def tile_options(tile: Tile) -> dict[str, Any]:
    return tile_constants(tile) | compile_options(tile)


def tile_constants(tile: Tile) -> dict[str, int]:
    return {"R": tile.rows, "P": tile.pairs, "STEP": BLOCK_K, "STAGES": tile.num_stages}


def compile_options(tile: Tile) -> dict[str, Any]:
    return {"num_warps": tile.num_warps, "maxnreg": tile.registers}


def gate_up(
    x: Tensor, weights: ExpertWeights, chosen: Tensor, activation: Activation, tile: Tile | None = None
) -> Tensor:
    out = torch.zeros(*chosen.shape, weights.intermediate, dtype=x.dtype, device=x.device)
    if chosen.numel() == 0:
        return out
    tile = tile or tiles_for(chosen.numel(), weights)[0]
    with torch.cuda.device_of(x):
        placed, table = prepare(x, chosen, weights.experts, tile.pairs)
        first_half(placed, weights, table, chosen.shape[1], activation, tile, out.flatten(0, 1), placed=False)
    return out


def down(h: Tensor, weights: ExpertWeights, chosen: Tensor, weight: Tensor, tile: Tile | None = None) -> Tensor:
    if chosen.numel() == 0:
        return torch.zeros(len(h), weights.hidden, dtype=h.dtype, device=h.device)
    tile = tile or tiles_for(chosen.numel(), weights)[1]
    with torch.cuda.device_of(h):
        placed, table = prepare(h.flatten(0, 1), chosen, weights.experts, tile.pairs)
        return combine(second_half(placed, weights, table, weight, tile), chosen, h.dtype)


def experts(x: Tensor, weights: ExpertWeights, chosen: Tensor, weight: Tensor, activation: Activation,
            tile: Tile | None = None) -> Tensor:  # fmt: skip
    if chosen.numel() == 0:
        return torch.zeros_like(x)
    first, second = (tile, tile) if tile else tiles_for(chosen.numel(), weights)
    with torch.cuda.device_of(x):
        placed, table = prepare(x, chosen, weights.experts, first.pairs)
        h = torch.empty(chosen.numel(), padded(weights.intermediate), dtype=x.dtype, device=x.device)
        first_half(placed, weights, table, chosen.shape[1], activation, first, h, placed=True)
        return combine(second_half(h, weights, table, weight, second), chosen, x.dtype)


def compile_cases() -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """(name, function, signature, constants, options) as used on Hopper: MiMo-V2.5-Pro's rank of eight and gpt-oss."""
    table = dict.fromkeys(("order", "expert", "first", "count"), "*i32")
    packed = {"codes": "*i32", "scales": "*u8"}
    first = {"x": "*bf16", **packed, "bias": "*bf16", "out": "*bf16", **table, "alpha": "fp32", "limit": "fp32"}
    second = {"h": "*bf16", **packed, "bias": "*bf16", "weight": "*fp32", "out": "*fp32", **table}
    prepared = {"x": "*bf16", "out": "*bf16", "chosen": "*i32", **table, "S": "i32", "G": "i32"}
    added = {"part": "*fp32", "chosen": "*i32", "out": "*bf16"}
    cases = []

    def add(name: str, function: Any, signature: dict[str, str], constants: dict[str, Any], options: Any) -> None:
        cases.append((name, function, signature | dict.fromkeys(constants, "constexpr"), constants, options))

    for model, hidden, width, clamped in (("mimo_v2_5_pro rank", 6144, 256, False), ("gpt_oss_120b", 2880, 2880, True)):
        bias = {} if clamped else {"bias": None}
        for tile in (SPREAD, LONG, PREFILL) if width == 256 else (DECODE, PREFILL):
            common = {"HIDDEN": hidden, "WIDTH": width} | tile_constants(tile)
            rows = {"X_ROW": padded(hidden), "OUT_ROW": padded(width), "SLOTS": 8, "CLAMPED": clamped, "PLACED": True}
            name = f"{model}, {tile.rows} rows, {tile.pairs} pairs"
            add(f"gate_up {name}", gate_up_kernel, first, common | rows | bias, compile_options(tile))
            add(f"down {name}", down_kernel, second, common | {"H_ROW": padded(width)} | bias, compile_options(tile))
        sizes = {
            "K": hidden,
            "OUT_ROW": padded(hidden),
            "STEP": BLOCK_K,
            "TILE": DECODE.pairs,
            "S_PAD": ROUTED,
            "CHUNK": 32,
        }
        add(f"prepare {model}", prepare_kernel, prepared, sizes, {"num_warps": 4})
        add(f"combine {model}", combine_kernel, added, {"SLOTS": 8, "HIDDEN": hidden, "C": COMBINED}, {"num_warps": 4})
    return cases
