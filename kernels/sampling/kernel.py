"""Sampling in Triton, bit for bit `reference`: many programs a row, and whole numbers between them.

A vocabulary is cut into tiles of 4,096 at fixed places; a row has up to 64 programs, so that eight rows of 152k logits
fill a GPU. Kernels of one call, each a grid of (row, tile) unless said:

    peak    a tile's largest key and the first token that has it
    narrow  one digit (4 bits) of a cut's edge: the count or weight of each of 16 digit values among keys that share the
            digits found so far. A tile writes 16 sums; whoever comes next adds up the tiles' sums and reads off the
            digit, so no program waits for another. 8 steps for FP32 logits, 4 for BF16, whose lower half is zero
    edge    (row) the last digit, hence the cut's edge
    mass    a tile's sum of kept weights
    pick    (row) the tile that the noise points into, then the token

Weights are computed again wherever they are needed: reading a logit from L2 is cheaper than storing eight bytes.
FP32 must be rounded operation by operation, so these kernels are built without fused multiply-add (`LAUNCH`).

Legend: R rows, V vocabulary, N tiles, D digit values, T tokens of a tile.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.follow import FOLLOW, follow
from kernels.sampling import reference
from kernels.sampling.reference import Params

TILE = 4096
DIGITS = 16
LAUNCH = {"num_warps": 8, "enable_fp_fusion": False} | FOLLOW

ONE = tl.constexpr(1 << reference.WEIGHT_BITS)
TOP_EXPONENT = tl.constexpr(127 + reference.WEIGHT_BITS)
LOG2E = tl.constexpr(reference.LOG2E)
MOST_RATE = tl.constexpr(reference.MOST_RATE)
MOST_HALVINGS = tl.constexpr(reference.MOST_HALVINGS)
C1, C2, C3, C4, C5, C6 = (tl.constexpr(c) for c in reference.HALVING)
INF = tl.constexpr(0x7F800000)
LARGEST = tl.constexpr(0x7FFFFFFF)


@triton.jit
def share(word, total):
    """floor(word * total / 2^32); see reference.share."""
    return (word * (total >> 31) + (word * (total & 0x7FFFFFFF) >> 31)) >> 1


@triton.jit
def noise(seed, position, stream):
    """The first word of Philox4x32-10 as int64; seed and position int64, stream int32."""
    low, high = (position & 0xFFFFFFFF).to(tl.uint32), ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    nothing = low ^ low
    first, _, _, _ = tl.philox(seed, low, high, nothing + stream.to(tl.uint32), nothing)
    return first.to(tl.int64)


@triton.jit
def order(logit):
    """int32 that orders FP32 values as they order; both zeros alike, NaN above everything."""
    bits = logit.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    return tl.where(magnitude > INF, LARGEST, tl.where(bits < 0, -magnitude, magnitude))


@triton.jit
def exponential(logit, top, rate):
    """int64 weight of a logit beside the row's largest; see reference.exponential."""
    halvings = tl.minimum((top - logit) * rate, MOST_HALVINGS)
    whole = tl.floor(halvings)
    rest = halvings - whole
    value = ((((rest * C6 + C5) * rest + C4) * rest + C3) * rest + C2) * rest + C1
    value = value * rest + 1.0
    power = ((-whole.to(tl.int32) + TOP_EXPONENT) << 23).to(tl.float32, bitcast=True)
    return (value * power).to(tl.int64)


@triton.jit
def kept(logits, stride, size, peaks, edges, temperatures, site, index, sites, tiles,
         PER: tl.constexpr, TILES: tl.constexpr):  # fmt: skip
    """int64 weights of tokens `index` (any shape) of row `site`, after the cuts found so far; 0 outside the vocabulary.

    PER rows of logits share a row of parameters.
    """
    n = tl.arange(0, TILES)
    key_N = tl.load(peaks + site * tiles + n, mask=n < tiles, other=-LARGEST)
    at_N = tl.load(peaks + (sites + site) * tiles + n, mask=n < tiles, other=LARGEST)
    top = tl.max(key_N, axis=0)
    best = tl.min(tl.where(key_N == top, at_N, LARGEST), axis=0)
    good = (top > -INF) & (top < INF)
    top = tl.where(good, top, 0)
    largest = tl.where(top < 0, (-top) | (-2147483648), top).to(tl.int32).to(tl.float32, bitcast=True)

    inside = (index >= 0) & (index < size)
    logit = tl.load(logits + site.to(tl.int64) * stride + index, mask=inside, other=-float("inf")).to(tl.float32)
    edge = tl.maximum(tl.load(edges + site), tl.load(edges + sites + site))
    temperature = tl.load(temperatures + site // PER)
    greedy = temperature <= 0
    rate = tl.minimum(tl.div_rn(LOG2E, tl.where(greedy, 1.0, temperature)), MOST_RATE)
    weight = tl.where(order(logit) >= edge, exponential(logit, largest, rate), 0)
    weight = tl.where(greedy, tl.where(index == best, ONE, 0), weight)
    return tl.where(inside & good, weight, 0)


@triton.jit
def peak_kernel(logits, peaks, stride, size, sites, TILE: tl.constexpr):
    """peaks int32 [2, R, N]: each tile's largest key and the first token that has it."""
    follow()
    site, n, tiles = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    index_T = n * TILE + tl.arange(0, TILE)
    row = logits + site.to(tl.int64) * stride
    key_T = order(tl.load(row + index_T, mask=index_T < size, other=-float("inf")).to(tl.float32))
    top = tl.max(key_T, axis=0)
    at = tl.min(tl.where((key_T == top) & (index_T < size), index_T, LARGEST), axis=0)
    tl.store(peaks + site * tiles + n, top)
    tl.store(peaks + (sites + site) * tiles + n, at)


@triton.jit
def need_of(top_ks, top_ps, temperatures, row, size, MASS: tl.constexpr):
    """(whether the row has this cut, what is asked of it): the count of top-k, or the word of what top-p may drop."""
    if MASS:
        need = 4294967296 - (tl.maximum(tl.load(top_ps + row), 0.0) * 4294967296.0).to(tl.int64)
        active = need > 0
    else:
        need = tl.load(top_ks + row).to(tl.int64)
        active = (need > 0) & (need < size)
    return active & (tl.load(temperatures + row) > 0), need


@triton.jit
def descend(states, bins, need, site, sites, tiles, step,
            MASS: tl.constexpr, TILES: tl.constexpr, DIGITS: tl.constexpr):  # fmt: skip
    """(digits found before `step`, what is still to be reached among the keys that share them).

    states int64 [steps, R, 2] and bins int64 [2, R, N, D] hold what the step before found.
    """
    prefix = tl.zeros((), tl.int64)
    if step > 0:
        last = states + ((step - 1) * sites + site) * 2
        prefix, need = tl.load(last), tl.load(last + 1)
        n, digit_D = tl.arange(0, TILES), tl.arange(0, DIGITS)
        here = bins + (((step - 1) % 2) * sites + site).to(tl.int64) * tiles * DIGITS
        part_ND = tl.load(here + n[:, None] * DIGITS + digit_D[None, :], mask=(n < tiles)[:, None], other=0)
        measure_D = tl.sum(part_ND, axis=0)
        total = tl.sum(measure_D, axis=0)
        if MASS and step == 1:
            need = tl.maximum(total - share(need, total), 1)
        # What keys of this digit and larger ones measure: falls from `total`, and the last that suffices is the edge's.
        from_D = total - tl.cumsum(measure_D, axis=0) + measure_D
        digit = tl.sum((from_D >= need).to(tl.int64), axis=0) - 1
        need -= tl.sum(tl.where(digit_D > digit, measure_D, 0), axis=0)
        prefix = prefix * DIGITS + digit
    return prefix, need


@triton.jit(do_not_specialize=["step"])
def narrow_kernel(logits, peaks, edges, states, bins, temperatures, top_ps, top_ks, stride, size, sites, step,
                  MASS: tl.constexpr, PER: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
                  DIGITS: tl.constexpr):  # fmt: skip
    """Digit `step` of an edge, from the top: bins of this tile, and (tile 0) the state that they continue."""
    follow()
    site, n, tiles = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    active, need = need_of(top_ks, top_ps, temperatures, site // PER, size, MASS)
    if active:
        prefix, need = descend(states, bins, need, site, sites, tiles, step, MASS, TILES, DIGITS)
        if n == 0:
            tl.store(states + (step * sites + site) * 2, prefix)
            tl.store(states + (step * sites + site) * 2 + 1, need)
        index_T = n * TILE + tl.arange(0, TILE)
        logit_T = tl.load(
            logits + site.to(tl.int64) * stride + index_T, mask=index_T < size, other=-float("inf")
        ).to(tl.float32)  # fmt: skip
        if MASS:
            value_T = kept(logits, stride, size, peaks, edges, temperatures, site, index_T, sites, tiles, PER, TILES)
        else:
            value_T = (index_T < size).to(tl.int64)
        # Digits are read from the key moved above zero. The shift of 32 at step 0 needs 64 bits.
        key_T = order(logit_T).to(tl.int64) + 2147483648
        shift = 28 - 4 * step
        value_T = tl.where((key_T >> (shift + 4)) == prefix, value_T, 0)
        digit_T = ((key_T >> shift) & (DIGITS - 1)).to(tl.int32)
        digit_D = tl.arange(0, DIGITS)
        measure_D = tl.zeros((DIGITS,), tl.int64)
        for digit in tl.static_range(DIGITS):
            measure_D = tl.where(digit_D == digit, tl.sum(tl.where(digit_T == digit, value_T, 0), axis=0), measure_D)
        here = bins + (((step % 2) * sites + site).to(tl.int64) * tiles + n) * DIGITS
        tl.store(here + digit_D, measure_D)


@triton.jit
def edge_kernel(edges, states, bins, temperatures, top_ps, top_ks, size, sites, tiles, STEPS: tl.constexpr,
                MASS: tl.constexpr, PER: tl.constexpr, TILES: tl.constexpr, DIGITS: tl.constexpr):  # fmt: skip
    """edges int32 [2, R]: the least key that top-k (0) and top-p (1) keep; stays the lowest where a row has no cut."""
    follow()
    site = tl.program_id(0)
    active, need = need_of(top_ks, top_ps, temperatures, site // PER, size, MASS)
    if active:
        step = tl.full((), STEPS, tl.int32)
        prefix, _ = descend(states, bins, need, site, sites, tiles, step, MASS, TILES, DIGITS)
        edge = (prefix << (32 - 4 * STEPS)) - 2147483648
        tl.store(edges + MASS * sites + site, edge.to(tl.int32))


@triton.jit
def mass_kernel(logits, peaks, edges, temperatures, sums, stride, size, sites,
                PER: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr):  # fmt: skip
    """sums int64 [R, N]."""
    follow()
    site, n, tiles = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    index_T = n * TILE + tl.arange(0, TILE)
    weight_T = kept(logits, stride, size, peaks, edges, temperatures, site, index_T, sites, tiles, PER, TILES)
    tl.store(sums + site * tiles + n, tl.sum(weight_T, axis=0))


@triton.jit
def tile_of(sum_N, word, TILES: tl.constexpr):
    """(the tile that the word points into, the place within the tile's weights, the sum of all)."""
    n = tl.arange(0, TILES)
    total = tl.sum(sum_N, axis=0)
    place = share(word, total)
    tile = tl.sum((tl.cumsum(sum_N, axis=0) <= place).to(tl.int32), axis=0)
    return tile, place - tl.sum(tl.where(n < tile, sum_N, 0), axis=0), total


@triton.jit
def token_of(weight_T, tile, place, total, TILE: tl.constexpr):
    """The token at that place, -1 where nothing weighs."""
    inside = tl.sum((tl.cumsum(weight_T, axis=0) <= place).to(tl.int32), axis=0)
    return tl.where(total > 0, tile * TILE + inside, -1).to(tl.int64)


@triton.jit
def pick_kernel(logits, peaks, edges, temperatures, sums, seeds, positions, out, stride, size, sites, tiles, stream,
                TILE: tl.constexpr, TILES: tl.constexpr):  # fmt: skip
    """out int64 [R]."""
    follow()
    site, n = tl.program_id(0), tl.arange(0, TILES)
    word = noise(tl.load(seeds + site), tl.load(positions + site), tl.program_id(0) * 0 + stream)
    sum_N = tl.load(sums + site * tiles + n, mask=n < tiles, other=0)
    tile, place, total = tile_of(sum_N, word, TILES)
    index_T = tile * TILE + tl.arange(0, TILE)
    weight_T = kept(logits, stride, size, peaks, edges, temperatures, site, index_T, sites, tiles, 1, TILES)
    tl.store(out + site, token_of(weight_T, tile, place, total, TILE))


@triton.jit
def probability_kernel(logits, peaks, edges, temperatures, sums, out, stride, size, sites,
                       TILE: tl.constexpr, TILES: tl.constexpr):  # fmt: skip
    """out FP32 [R, V]: weight over sum, rounded once from FP64; NaN where nothing weighs."""
    follow()
    site, n, tiles = tl.program_id(0), tl.arange(0, TILES), tl.num_programs(1)
    total = tl.sum(tl.load(sums + site * tiles + n, mask=n < tiles, other=0), axis=0)
    index_T = tl.program_id(1) * TILE + tl.arange(0, TILE)
    weight_T = kept(logits, stride, size, peaks, edges, temperatures, site, index_T, sites, tiles, 1, TILES)
    share_T = weight_T.to(tl.float64) / tl.maximum(total, 1).to(tl.float64)
    share_T = tl.where(total > 0, share_T, float("nan")).to(tl.float32)
    tl.store(out + site.to(tl.int64) * size + index_T, share_T, mask=index_T < size)


@triton.jit
def uniform_kernel(seeds, positions, out, count, stream, BLOCK: tl.constexpr):
    follow()
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    seed, position = tl.load(seeds + index, mask=inside, other=0), tl.load(positions + index, mask=inside, other=0)
    word = noise(seed, position, tl.program_id(0) * 0 + stream)
    tl.store(out + index, (word >> 8).to(tl.float32) * 5.9604644775390625e-08, mask=inside)


@dataclass(frozen=True)
class Weighed:
    """What is known of rows of logits once their cuts and sums are: all that drawing from them needs."""

    logits: Tensor
    peaks: Tensor  # int32 [2, R, N]
    edges: Tensor  # int32 [2, R]
    sums: Tensor  # int64 [R, N]
    tiles: int
    TILES: int  # the next power of two

    @property
    def shape(self) -> tuple[int, int, int]:
        """(row stride, V, R), the scalars of most kernels."""
        return self.logits.stride(0), self.logits.shape[1], len(self.logits)


def weigh(logits: Tensor, params: Params, per: int = 1) -> Weighed:
    """Cuts and sums of logits [R * per, V]; `per` rows share a row of the parameters."""
    sites, size = logits.shape
    tiles = triton.cdiv(size, TILE)
    made = {"dtype": torch.int64, "device": logits.device}
    peaks = torch.empty(2, sites, tiles, dtype=torch.int32, device=logits.device)
    edges = torch.full((2, sites), -(2**31), dtype=torch.int32, device=logits.device)
    sums = torch.empty(sites, tiles, **made)
    weighed = Weighed(logits, peaks, edges, sums, tiles, triton.next_power_of_2(tiles))
    shapes, grid = {"TILE": TILE, "TILES": weighed.TILES, "PER": per}, (sites, tiles)
    peak_kernel[grid](logits, peaks, *weighed.shape, TILE=TILE, **LAUNCH)
    if params.cut:
        steps = 4 if logits.dtype == torch.bfloat16 else 8
        states = torch.empty(steps, sites, 2, **made)
        bins = torch.empty(2, sites, tiles, DIGITS, **made)
        asked = (params.temperature, params.top_p, params.top_k)
        for mass in (False, True):
            for step in range(steps):
                narrow_kernel[grid](
                    logits, peaks, edges, states, bins, *asked, *weighed.shape, step,
                    MASS=mass, DIGITS=DIGITS, **shapes, **LAUNCH,
                )  # fmt: skip
            edge_kernel[(sites,)](
                edges, states, bins, *asked, size, sites, tiles,
                STEPS=steps, MASS=mass, PER=per, TILES=weighed.TILES, DIGITS=DIGITS, num_warps=1, **FOLLOW,
            )  # fmt: skip
    mass_kernel[grid](logits, peaks, edges, params.temperature, sums, *weighed.shape, **shapes, **LAUNCH)
    return weighed


def probabilities(logits: Tensor, params: Params) -> Tensor:
    out = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    if not len(logits):
        return out
    with torch.cuda.device_of(logits):
        w = weigh(logits, params)
        probability_kernel[(len(logits), w.tiles)](
            logits, w.peaks, w.edges, params.temperature, w.sums, out, *w.shape, TILE=TILE, TILES=w.TILES, **LAUNCH
        )
    return out


def sample(logits: Tensor, params: Params, position: Tensor, stream: int) -> Tensor:
    out = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    if not len(logits):
        return out
    with torch.cuda.device_of(logits):
        w = weigh(logits, params)
        pick_kernel[(len(logits),)](
            logits, w.peaks, w.edges, params.temperature, w.sums, params.seed, position, out, *w.shape, w.tiles, stream,
            TILE=TILE, TILES=w.TILES, **LAUNCH,
        )  # fmt: skip
    return out


def uniform(seed: Tensor, position: Tensor, stream: int) -> Tensor:
    seed, position = seed.contiguous(), position.contiguous()
    out = torch.empty(seed.shape, dtype=torch.float32, device=seed.device)
    if out.numel():
        with torch.cuda.device_of(seed):
            uniform_kernel[(triton.cdiv(out.numel(), 256),)](
                seed, position, out, out.numel(), stream, BLOCK=256, **FOLLOW
            )
    return out


def compile_cases() -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """(name, kernel, argument types, constants, options) of what an FP32 row of 152k tokens launches."""
    types = {
        "logits": "*fp32", "peaks": "*i32", "edges": "*i32", "states": "*i64", "bins": "*i64", "sums": "*i64",
        "temperatures": "*fp32", "top_ps": "*fp32", "top_ks": "*i32", "seeds": "*i64", "positions": "*i64",
    }  # fmt: skip
    constants = {"TILE": TILE, "TILES": 64, "PER": 8, "DIGITS": DIGITS, "STEPS": 8, "BLOCK": 256}
    chosen = [
        ("peak", peak_kernel, {}, {}),
        ("narrow by count", narrow_kernel, {"MASS": False}, {}),
        ("narrow by weight", narrow_kernel, {"MASS": True}, {}),
        ("edge", edge_kernel, {"MASS": True}, {}),
        ("mass", mass_kernel, {}, {}),
        ("pick", pick_kernel, {}, {"out": "*i64"}),
        ("probability", probability_kernel, {}, {"out": "*fp32"}),
        ("uniform", uniform_kernel, {}, {"out": "*fp32"}),
    ]
    cases = []
    for name, kernel, own, outs in chosen:
        fixed = {k: v for k, v in (constants | own).items() if k in kernel.arg_names}
        signature = {a: "constexpr" if a in fixed else (types | outs).get(a, "i32") for a in kernel.arg_names}
        cases.append((name, kernel, signature, fixed, LAUNCH))
    return cases
