"""A linear layer in Triton: tiles of tokens times tiles of weights, each summed whole, in one order of K.

**Batch invariance.** Tiles grow with the number of rows, the arithmetic does not. In every tile K goes by in steps of
the same BLOCK_K from 0 on, and a step is a row of instructions of ascending k: mma.sync m16n8k16 for BF16, one fused
multiply-add a value for FP32. An output is accumulated by one program from its own row and column. No split of K, no
atomics; rows that fill up a tile are zero and stay in their own outputs. Nothing is specialised on the number of rows.

**No wgmma.** Two warps a program: wgmma needs four. Its register operands are miscompiled by every ptxas before 13.3,
and one instruction for all tiles is what makes their bits equal. (The interpreter's product is numpy's, whose order
follows the tile's shape. So it has one tile for all.)

**Decode** reads each weight once: many programs of few weight rows, several steps in flight (cp.async). A tile of 16
tokens is the least that mma.sync computes; what it wastes on 1 to 8 tokens is not what such a step waits for.
**Prefill** puts the tiles of tokens of one tile of weights next to each other, so that weights come from L2.

Legend: T tokens, N outputs, K inputs (tiles of each).
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.bf16 import INTERPRETED, operand, rounded
from kernels.follow import follow, followed

BLOCK_K = 128


@dataclass(frozen=True)
class Tile:
    """Launch shape: tokens and outputs of a program, and steps of K in flight. Any of them gives the same bits."""

    tokens: int
    outputs: int
    num_stages: int


# (rows up to, outputs from, tile); the first that fits. Wide layers get wider tiles: x is read once a program.
TILES = (
    (16, 16384, Tile(16, 32, 5)),
    (16, 0, Tile(16, 16, 6)),
    (32, 0, Tile(32, 32, 4)),
    (64, 0, Tile(64, 32, 3)),
)
PREFILL = Tile(64, 64, 3)
EXACT = Tile(16, 16, 2)  # FP32, whose products run on the plain units; and the interpreter
NUM_WARPS = 2


def tile_of(count: int, outputs: int, dtype: torch.dtype) -> Tile:
    if dtype == torch.float32 or INTERPRETED.value:
        return EXACT
    return next((tile for most, least, tile in TILES if count <= most and outputs >= least), PREFILL)


@triton.jit(do_not_specialize=["tokens"])
def linear_kernel(x, weight, bias, out, tokens, N: tl.constexpr, K: tl.constexpr, TILE_T: tl.constexpr,
                  TILE_N: tl.constexpr, TILE_K: tl.constexpr, BIAS: tl.constexpr):  # fmt: skip
    """out [T, N] = round(x [T, K] @ weight [N, K].T + bias)."""
    follow()
    tiles = tl.cdiv(tokens, TILE_T)
    row_T = (tl.program_id(0) % tiles) * TILE_T + tl.arange(0, TILE_T)
    column_N = (tl.program_id(0) // tiles) * TILE_N + tl.arange(0, TILE_N)
    column_K = tl.arange(0, TILE_K)
    here_T, here_N = row_T < tokens, column_N < N
    x_T1 = x + row_T.to(tl.int64)[:, None] * K
    weight_N1 = weight + column_N.to(tl.int64)[:, None] * K

    acc_TN = tl.zeros((TILE_T, TILE_N), tl.float32)
    for first in range(0, K, TILE_K):
        here_K = first + column_K < K
        x_TK = tl.load(x_T1 + first + column_K[None, :], mask=here_T[:, None] & here_K[None, :], other=0.0)
        weight_NK = tl.load(weight_N1 + first + column_K[None, :], mask=here_N[:, None] & here_K[None, :], other=0.0)
        acc_TN = tl.dot(operand(x_TK), tl.trans(operand(weight_NK)), acc_TN, input_precision="ieee")
    if BIAS:
        acc_TN += tl.load(bias + column_N, mask=here_N, other=0.0).to(tl.float32)[None, :]
    place_TN = row_T.to(tl.int64)[:, None] * N + column_N[None, :]
    tl.store(out + place_TN, rounded(acc_TN, out.dtype.element_ty), mask=here_T[:, None] & here_N[None, :])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype, tile: Tile | None = None) -> Tensor:
    """tile: None takes it from the sizes."""
    (count, inputs), outputs = x.shape, len(weight)
    out = torch.empty(count, outputs, dtype=out_dtype, device=x.device)
    if out.numel():
        tile = tile or tile_of(count, outputs, x.dtype)
        grid = (triton.cdiv(count, tile.tokens) * triton.cdiv(outputs, tile.outputs),)
        with torch.cuda.device_of(x):
            linear_kernel[grid](
                x, weight, weight if bias is None else bias, out, count,
                N=outputs, K=inputs, TILE_T=tile.tokens, TILE_N=tile.outputs, TILE_K=BLOCK_K, BIAS=bias is not None,
                num_warps=NUM_WARPS, num_stages=tile.num_stages, **followed(grid),
            )  # fmt: skip
    return out


def compile_cases() -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """(name, kernel, argument types, constants, options): every tile, BF16 with bias and FP32, at 5,120 x 4,096."""
    cases = []
    for name, dtype, tile in (
        *((f"{tile.tokens} x {tile.outputs}", "*bf16", tile) for *_, tile in TILES),
        ("prefill", "*bf16", PREFILL), ("FP32", "*fp32", EXACT),
    ):  # fmt: skip
        fixed = {
            "N": 5120, "K": 4096, "TILE_T": tile.tokens, "TILE_N": tile.outputs, "TILE_K": BLOCK_K, "BIAS": True,
        }  # fmt: skip
        signature = dict.fromkeys(("x", "weight", "bias"), dtype) | {"out": "*fp32", "tokens": "i32"}
        signature |= dict.fromkeys(fixed, "constexpr")
        options = {"num_warps": NUM_WARPS, "num_stages": tile.num_stages}
        cases.append((f"linear {name}", linear_kernel, signature, fixed, options))
    return cases
