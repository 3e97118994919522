"""One launch before the products: x into the order in which weights unpack (see `kernel`), and the routing's table.

Legend: S = T k pairs, G items of the grid, C pairs of a chunk, R rows of x.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.follow import FOLLOW, follow
from kernels.moe_mxfp4.routing import Table, empty_table, sort_pairs

BLOCK_K = 256
ROUTED = 512  # more pairs than this are sorted by torch


@triton.jit
def place(element, STEP: tl.constexpr):
    """Where an element of K is stored: the step's start, then 64j + 2w + h."""
    inside = element % STEP
    return element - inside + (inside % 4) * (STEP // 4) + (inside // 8) * 2 + (inside // 4) % 2


@triton.jit
def route(chosen, order, expert, first, count, S, G, TILE: tl.constexpr, S_PAD: tl.constexpr, CHUNK: tl.constexpr):
    """routing.sort_pairs by counting, in one program: a pair's rank among its expert's, and its place by expert."""
    pair_S = tl.arange(0, S_PAD)
    e_S = tl.load(chosen + pair_S, mask=pair_S < S, other=-1).to(tl.int32)
    rank_S = tl.zeros((S_PAD,), tl.int32)
    alike_S = tl.zeros((S_PAD,), tl.int32)
    place_S = tl.zeros((S_PAD,), tl.int32)
    for start in range(0, S_PAD, CHUNK):
        other_C = start + tl.arange(0, CHUNK)
        e_C = tl.load(chosen + other_C, mask=other_C < S, other=-1).to(tl.int32)
        same_SC = e_S[:, None] == e_C[None, :]
        before_SC = (e_C[None, :] >= 0) & (e_C[None, :] < e_S[:, None])
        alike_S += tl.sum(same_SC.to(tl.int32), 1)
        rank_S += tl.sum((same_SC & (other_C[None, :] < pair_S[:, None])).to(tl.int32), 1)
        place_S += tl.sum(before_SC.to(tl.int32), 1)
    place_S += rank_S
    tl.store(order + place_S, pair_S, mask=e_S >= 0)
    leads_S = (e_S >= 0) & (rank_S % TILE == 0)
    item_S = tl.cumsum(leads_S.to(tl.int32), 0) - 1
    tl.store(expert + item_S, e_S, mask=leads_S)
    tl.store(first + item_S, place_S, mask=leads_S)
    tl.store(count + item_S, tl.minimum(alike_S - rank_S, TILE), mask=leads_S)
    tl.store(expert + pair_S, -1, mask=(pair_S >= tl.sum(leads_S.to(tl.int32), 0)) & (pair_S < G))


@triton.jit
def prepare_kernel(x, out, chosen, order, expert, first, count, S, G, K: tl.constexpr, OUT_ROW: tl.constexpr,
                   STEP: tl.constexpr, TILE: tl.constexpr, S_PAD: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """One step of a row of x into the weights' order; with S_PAD, the last program routes instead."""
    follow()
    steps: tl.constexpr = OUT_ROW // STEP
    program = tl.program_id(0)
    if S_PAD > 0 and program == tl.num_programs(0) - 1:
        route(chosen, order, expert, first, count, S, G, TILE, S_PAD, CHUNK)
    else:
        row = (program // steps).to(tl.int64)
        element = program % steps * STEP + tl.arange(0, STEP)
        tl.store(
            out + row * OUT_ROW + place(element, STEP),
            tl.load(x + row * K + element, mask=element < K),
            mask=element < K,
        )


def padded(k: int) -> int:
    """Length of a row of K in steps; what lies behind K is neither written nor read."""
    return triton.cdiv(k, BLOCK_K) * BLOCK_K


def prepare(x_RK: Tensor, chosen: Tensor, experts: int, tile: int) -> tuple[Tensor, Table]:
    """x in the weights' order, [R, padded K], and the routing's table."""
    rows, k = x_RK.shape
    pairs, routed = chosen.numel(), chosen.numel() <= ROUTED
    table = empty_table(pairs, experts, tile, x_RK.device) if routed else sort_pairs(chosen, experts, tile)
    out = torch.empty(rows, padded(k), dtype=x_RK.dtype, device=x_RK.device)
    size = max(16, triton.next_power_of_2(pairs)) if routed else 0
    prepare_kernel[(rows * (padded(k) // BLOCK_K) + routed,)](
        x_RK, out, chosen, table.order, table.expert, table.first, table.count, pairs, len(table.expert),
        K=k, OUT_ROW=padded(k), STEP=BLOCK_K, TILE=tile, S_PAD=size,
        CHUNK=min(size, 32), num_warps=max(4, size // 32), **FOLLOW,
    )  # fmt: skip
    return out, table
