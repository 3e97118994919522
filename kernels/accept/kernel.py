"""Acceptance in Triton, bit for bit `reference`. After kernels.sampling has weighed all R * (K + 1) rows of logits:

    judge   (row) the test of each draft in turn: K sums and K single weights
    rest    (row, tile) a tile's sum of max(w - taken, 0) at the slot that the row ended at
    choose  (row) the tile that the noise points into, then the token

The host is never waited for, and every launch is the same whatever is accepted, so a round can be a CUDA graph.

Legend: R rows, K drafts, V vocabulary, N tiles, T tokens of a tile.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.follow import follow
from kernels.sampling.kernel import LAUNCH, TILE, kept, noise, share, tile_of, token_of, weigh
from kernels.sampling.reference import ACCEPT, RESIDUAL, SAMPLE, Params

ACCEPT_STREAM, RESIDUAL_STREAM, SAMPLE_STREAM = tl.constexpr(ACCEPT), tl.constexpr(RESIDUAL), tl.constexpr(SAMPLE)


@triton.jit
def taken_of(drafts, q, slot, total, index, size, GIVEN: tl.constexpr):
    """int64: what q takes of `total` at tokens `index`; `slot` counts drafts over all rows."""
    if GIVEN:
        inside = (index >= 0) & (index < size)
        chance = tl.load(q + slot.to(tl.int64) * size + index, mask=inside, other=0.0)
        taken = (chance.to(tl.float64) * total.to(tl.float64)).to(tl.int64)
    else:
        taken = tl.where(index == tl.load(drafts + slot), total, 0)
    return taken


@triton.jit
def judge_kernel(drafts, q, logits, peaks, edges, temperatures, sums, seeds, positions, drafted, accepted,
                 stride, size, sites, tiles, PER: tl.constexpr, TILES: tl.constexpr, GIVEN: tl.constexpr):  # fmt: skip
    """accepted int32 [R]."""
    follow()
    row, n = tl.program_id(0), tl.arange(0, TILES)
    seed, position = tl.load(seeds + row), tl.load(positions + row)
    count = tl.minimum(tl.load(drafted + row), PER - 1)
    led = tl.zeros((), tl.int32)
    for j in range(count):
        if led == j:
            site, slot = row * PER + j, row * (PER - 1) + j
            total = tl.sum(tl.load(sums + site * tiles + n, mask=n < tiles, other=0), axis=0)
            draft = tl.load(drafts + slot)
            weight = kept(logits, stride, size, peaks, edges, temperatures, site, draft, sites, tiles, PER, TILES)
            taken = taken_of(drafts, q, slot, total, draft, size, GIVEN)
            word = noise(seed, position + j, tl.full((), ACCEPT_STREAM, tl.int32))
            led += (share(word, taken) < weight).to(tl.int32)
    tl.store(accepted + row, led)


@triton.jit
def rest_of(drafts, q, logits, peaks, edges, temperatures, row, slot, total, index, rejected, stride, size, sites,
            tiles, PER: tl.constexpr, TILES: tl.constexpr, GIVEN: tl.constexpr):  # fmt: skip
    """int64: weights of tokens `index` at the slot, less what q takes if a draft was rejected there."""
    site = row * PER + slot
    weight = kept(logits, stride, size, peaks, edges, temperatures, site, index, sites, tiles, PER, TILES)
    if rejected:
        taken = taken_of(drafts, q, row * (PER - 1) + slot, total, index, size, GIVEN)
        weight = tl.maximum(weight - taken, 0)
    return weight


@triton.jit
def rest_kernel(drafts, q, logits, peaks, edges, temperatures, sums, drafted, accepted, rests, stride, size, sites,
                PER: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, GIVEN: tl.constexpr):  # fmt: skip
    """rests int64 [R, N]."""
    follow()
    row, tile, tiles = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    n, index_T = tl.arange(0, TILES), tile * TILE + tl.arange(0, TILE)
    slot = tl.load(accepted + row)
    rejected = slot < tl.minimum(tl.load(drafted + row), PER - 1)
    total = tl.sum(tl.load(sums + (row * PER + slot) * tiles + n, mask=n < tiles, other=0), axis=0)
    rest_T = rest_of(
        drafts, q, logits, peaks, edges, temperatures, row, slot, total, index_T, rejected, stride, size, sites, tiles,
        PER, TILES, GIVEN,
    )  # fmt: skip
    tl.store(rests + row * tiles + tile, tl.sum(rest_T, axis=0))


@triton.jit
def choose_kernel(drafts, q, logits, peaks, edges, temperatures, sums, seeds, positions, drafted, accepted, rests, out,
                  stride, size, sites, tiles, PER: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
                  GIVEN: tl.constexpr):  # fmt: skip
    """out int64 [R]."""
    follow()
    row, n = tl.program_id(0), tl.arange(0, TILES)
    slot = tl.load(accepted + row)
    rejected = slot < tl.minimum(tl.load(drafted + row), PER - 1)
    stream = tl.where(rejected, RESIDUAL_STREAM, SAMPLE_STREAM)
    word = noise(tl.load(seeds + row), tl.load(positions + row) + slot, stream)
    sum_N = tl.load(sums + (row * PER + slot) * tiles + n, mask=n < tiles, other=0)
    rest_N = tl.load(rests + row * tiles + n, mask=n < tiles, other=0)
    all_of_it = tl.sum(sum_N, axis=0)
    # p == q up to rounding leaves no residual: p then, as in the reference.
    rejected = rejected & (tl.sum(rest_N, axis=0) > 0)
    tile, place, total = tile_of(tl.where(rejected, rest_N, sum_N), word, TILES)
    index_T = tile * TILE + tl.arange(0, TILE)
    rest_T = rest_of(
        drafts, q, logits, peaks, edges, temperatures, row, slot, all_of_it, index_T, rejected, stride, size, sites,
        tiles, PER, TILES, GIVEN,
    )  # fmt: skip
    tl.store(out + row, token_of(rest_T, tile, place, total, TILE))


def accept(
    draft: Tensor, q: Tensor | None, logits: Tensor, params: Params, position: Tensor, drafted: Tensor
) -> tuple[Tensor, Tensor]:
    rows, slots, _ = logits.shape
    accepted = torch.empty(rows, dtype=torch.int32, device=logits.device)
    token = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if not rows:
        return accepted, token
    with torch.cuda.device_of(logits):
        w = weigh(logits.flatten(0, 1), params, per=slots)
        rests = torch.empty(rows, w.tiles, dtype=torch.int64, device=logits.device)
        given = q is not None
        common = (draft, q if given else logits, w.logits, w.peaks, w.edges, params.temperature, w.sums)
        shapes = {"PER": slots, "TILES": w.TILES, "GIVEN": given, **LAUNCH}
        judge_kernel[(rows,)](*common, params.seed, position, drafted, accepted, *w.shape, w.tiles, **shapes)
        rest_kernel[(rows, w.tiles)](*common, drafted, accepted, rests, *w.shape, TILE=TILE, **shapes)
        choose_kernel[(rows,)](
            *common, params.seed, position, drafted, accepted, rests, token, *w.shape, w.tiles, TILE=TILE, **shapes
        )
    return accepted, token


def compile_cases() -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """(name, kernel, argument types, constants, options): seven drafts of a vocabulary of 152k, with and without q."""
    types = {
        "drafts": "*i64", "q": "*fp32", "logits": "*fp32", "peaks": "*i32", "edges": "*i32", "temperatures": "*fp32",
        "sums": "*i64", "seeds": "*i64", "positions": "*i64", "drafted": "*i32", "accepted": "*i32", "rests": "*i64",
        "out": "*i64",
    }  # fmt: skip
    cases = []
    for given in (False, True):
        constants = {"PER": 8, "TILE": TILE, "TILES": 64, "GIVEN": given}
        for kernel in (judge_kernel, rest_kernel, choose_kernel):
            fixed = {k: v for k, v in constants.items() if k in kernel.arg_names}
            signature = {a: "constexpr" if a in fixed else types.get(a, "i32") for a in kernel.arg_names}
            name = f"{kernel.fn.__name__} {'with' if given else 'without'} q"
            cases.append((name, kernel, signature, fixed, LAUNCH))
    return cases
