"""Paged attention in Triton: every query's bits depend on its own keys alone, however the work is divided.

The result is one fixed sum. Keys lie in **tiles** of 32 and tiles in **pieces**, both at absolute positions. Within a
piece the tiles are added up one after another, from zero; then the pieces are added up one after another. Two ways to
compute it give the same bits, and the launch picks by shapes known to the host:

split  one program a piece writes sum, weight and maximum to memory, and `merge_kernel` adds them up: decoding and
       verification of few requests, where a request's keys must be spread over all multiprocessors.
fold   one program walks all pieces of its queries: window layers (a window lies in a few pieces), prefill, many
       requests. No partial sums in memory, one launch.

Why the bits agree:
- A softmax may be taken relative to any number near the maximum. Here it is the maximum rounded up to an integer, in
  powers of two, so rescaling a sum when a larger score appears multiplies it by a power of two, which is exact.
- A tile in which a query sees nothing adds zeros to its sums and leaves its maximum: nothing changes.
- The weights are summed by the tensor cores like the values (a product with ones), so that the order of additions is
  that of the instruction, m16n8k16, and not of a layout. As a consequence the rounded weights are normalised to 1.

Pieces are 256 keys up to position 32,768 and double with every doubling of the position from there on, 64 of each size:
their numbers are floating-point numbers with six bits of mantissa. 32K keys are enough programs for 132
multiprocessors, and longer texts do not write ever more partial sums.

Products are transposed: scores [keys, rows] = k q^T and sums [value dims, rows] = v^T p, where a row is one query head
of one query. Keys and chunks of value dims, 32 each, are the instruction's M. It is below 64, so Triton takes mma.sync
and never wgmma, of which assemblers before 13.3 miscompile some forms; and rows divide among the warps, so that a
row's maximum needs no other warp. Head dims that are not powers of two are the sum of two (192 = 128 + 64).

Keys outside of what a program's rows see are masked where they are loaded, so pages that were given away are never
read, and what lies behind a request's end cannot turn a weight of zero into NaN.

Legend: K = 32 keys of a tile, Q rows (query x head of the group) of a program, D head dims, V value dims of a chunk.
"""

import os
from typing import Any

import triton
import triton.language as tl

from kernels.follow import follow

TILE = 32  # keys of a tile, and value dims of a chunk
PIECE_BITS = 8  # the smallest piece is 2^8 keys
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
KEYS = tl.constexpr(TILE)
PIECE = tl.constexpr(PIECE_BITS)
AHEAD = tl.constexpr(2 if INTERPRETED else 32)  # pieces of a row that are on their way at once; changes no bits
NOTHING = tl.constexpr(-(2.0**30))  # maximum over no key; finite, so that differences are never NaN
ROUNDING = {"enable_fp_fusion": False}  # scores are rounded before the maximum is subtracted, in every compiled form
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def piece_begin(piece):
    """First key of a piece."""
    piece = tl.cast(piece, tl.int32)  # the interpreter's loops count in Python integers
    return tl.where(piece < 64, piece << PIECE, (64 + piece % 64) << (piece // 64 + PIECE - 1))


@triton.jit
def piece_of(key):
    """Number of the piece that holds a key: exponent and six bits of mantissa of key / 256."""
    unit = key >> PIECE
    bits = unit.to(tl.float32).to(tl.int32, bitcast=True)
    return tl.where(unit < 64, unit, (bits >> 17) - (132 << 6))


@triton.jit
def power(exponent):
    """2^exponent, exactly, for integers up to 0 in FP32; 0 below 2^-126."""
    return ((tl.maximum(exponent, -127.0).to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def cast(x, TYPE: tl.constexpr):
    """x in another type, to nearest even. (The interpreter truncates to BF16; there the carry is added by hand.)"""
    if INTERPRETED and TYPE == tl.bfloat16:  # noqa: SIM300
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(TYPE)


@triton.jit
def product(a, b, add):
    """a b + add on the tensor cores. (The interpreter has no BF16 arithmetic: FP32 there.)"""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, add, input_precision="ieee")


@triton.jit
def with_sink(top_Q, sinks, head_Q, here_Q, SINKS: tl.constexpr):
    """The maximum including the sink, and the sink's weight relative to it."""
    if SINKS:
        sink_Q = tl.load(sinks + head_Q, mask=here_Q, other=0.0).to(tl.float32) * LOG2E
        most_Q = tl.maximum(top_Q, tl.ceil(sink_Q))
        extra_Q = tl.exp2(sink_Q - most_Q)
    else:
        most_Q = top_Q
        extra_Q = tl.zeros_like(top_Q)
    return most_Q, extra_Q


@triton.jit
def pages_of(tile, table, width, PAGE: tl.constexpr):
    """The physical pages of a tile: one if pages are no smaller than tiles, else KEYS / PAGE. All are valid numbers."""
    pages = ()
    for i in tl.static_range(0, KEYS, PAGE):
        pages = pages + (tl.load(table + tl.minimum((tile * KEYS + i) // PAGE, width - 1)),)  # noqa: RUF005
    return pages


@triton.jit
def places(pages, key_K, page_stride, slot_stride, PAGE: tl.constexpr):
    """Offsets of a tile's keys in a cache."""
    page_K = pages[0] + key_K * 0
    for i in tl.static_range(1, KEYS // PAGE):
        page_K = tl.where(key_K % KEYS // PAGE == i, pages[i], page_K)
    return page_K.to(tl.int64) * page_stride + (key_K % PAGE) * slot_stride


@triton.jit
def load_tile(base, place_K, live_K, LOW: tl.constexpr, WIDE: tl.constexpr, LIMIT: tl.constexpr, TURN: tl.constexpr):
    """[K, WIDE], or [WIDE, K] if TURN: dims LOW .. LOW + WIDE - 1 of the keys that are live, zeros elsewhere."""
    dim = tl.arange(0, WIDE) + LOW
    if TURN:
        offset, mask = place_K[None, :] + dim[:, None], live_K[None, :] & (dim < LIMIT)[:, None]
    else:
        offset, mask = place_K[:, None] + dim[None, :], live_K[:, None] & (dim < LIMIT)[None, :]
    return tl.load(base + offset, mask=mask, other=0.0)


@triton.jit
def load_query(q, place_Q, here_Q, LOW: tl.constexpr, WIDE: tl.constexpr, LIMIT: tl.constexpr):
    """[D, Q]: dims LOW .. LOW + WIDE - 1 of the program's rows."""
    dim = tl.arange(0, WIDE) + LOW
    x_QD = tl.load(q + place_Q[:, None] + dim[None, :], mask=here_Q[:, None] & (dim < LIMIT)[None, :], other=0.0)
    return tl.trans(x_QD)


@triton.jit(do_not_specialize=["tokens", "requests", "width", "row_limit"])
def attention_kernel(
    q, k_cache, v_cache, out, part, stat, sinks, table, length, start, scale, tokens, requests, width, row_limit,
    Q_TOKEN: tl.constexpr, Q_HEAD: tl.constexpr, K_PAGE: tl.constexpr, K_SLOT: tl.constexpr, K_HEAD: tl.constexpr,
    V_PAGE: tl.constexpr, V_SLOT: tl.constexpr, V_HEAD: tl.constexpr,
    H: tl.constexpr, KH: tl.constexpr, D: tl.constexpr, V: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr,
    CAUSAL: tl.constexpr, SINKS: tl.constexpr, ROWS: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr,
    CHUNKS: tl.constexpr, FOLD: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of rows, requests x KV heads, pieces or 1); in fold one more request, the rows that belong to nobody.

    scale: of the scores, in powers of two. LEAST, MOST: requests with other numbers of queries are left to another
    launch. part [requests x KH, pieces, row_limit, V] and stat [.., 2, row_limit] receive a piece's sums, maximum and
    weight.
    """
    follow()
    G: tl.constexpr = H // KH
    request = tl.program_id(1) // KH
    kv_head = tl.program_id(1) % KH
    begin = tl.load(start + request)
    ROW: tl.constexpr = ROWS
    row_Q = tl.program_id(0) * ROW + tl.arange(0, ROW)
    head_Q = kv_head * G + row_Q % G

    if FOLD:  # noqa: SIM102
        if request == requests:  # the rows from start[R] on
            rest = (tokens - begin) * G
            for first in range(tl.program_id(0) * ROW, rest, tl.num_programs(0) * ROW):
                free_Q = first + tl.arange(0, ROW)
                place_Q = (begin + free_Q // G).to(tl.int64) * (H * V) + (kv_head * G + free_Q % G) * V
                for c in tl.static_range(CHUNKS):
                    dim = c * KEYS + tl.arange(0, KEYS)
                    zero = tl.zeros([ROW, KEYS], tl.float32).to(out.dtype.element_ty)
                    tl.store(out + place_Q[:, None] + dim[None, :], zero,
                             mask=(free_Q < rest)[:, None] & (dim < V)[None, :])  # fmt: skip
            return

    count = tl.load(start + request + 1) - begin
    if (tl.program_id(0) * ROW >= count * G) | (count < LEAST) | (count > MOST):
        return
    keys = tl.load(length + request)
    here_Q = row_Q < count * G
    place_Q = keys - count + row_Q // G  # positions of the queries
    lowest = keys - count + tl.program_id(0) * ROW // G
    highest = tl.minimum(keys - count + (tl.program_id(0) * ROW + ROW - 1) // G, keys - 1)
    low = tl.cast(0, tl.int32)  # the program's rows see keys of low .. high - 1
    if WINDOW:
        low = tl.maximum(lowest - WINDOW + 1, 0)
    high = keys
    if CAUSAL:
        high = highest + 1
    if FOLD:
        piece, stop = piece_of(low), piece_of(high - 1) + 1
    else:
        piece = tl.program_id(2)
        stop = piece + 1
        if (piece_begin(piece) >= high) | (piece_begin(stop) <= low):
            return

    from_Q = (begin + row_Q // G).to(tl.int64) * Q_TOKEN + head_Q * Q_HEAD
    qa_DQ = load_query(q, from_Q, here_Q, 0, DA, D)
    if DB:
        qb_DQ = load_query(q, from_Q, here_Q, DA, DB, D)
    k_base, v_base = k_cache + kv_head.to(tl.int64) * K_HEAD, v_cache + kv_head.to(tl.int64) * V_HEAD
    table += request.to(tl.int64) * width
    ones = tl.full([16, KEYS], 1.0, tl.float32).to(v_cache.dtype.element_ty)

    whole_top_Q = tl.full([ROW], NOTHING, tl.float32)
    whole_weight = tl.zeros([16, ROW], tl.float32)
    whole = ()
    for _ in tl.static_range(CHUNKS):
        whole = whole + (tl.zeros([KEYS, ROW], tl.float32),)  # noqa: RUF005

    for current in range(piece, stop):
        top_Q = tl.full([ROW], NOTHING, tl.float32)
        weight = tl.zeros([16, ROW], tl.float32)
        sums = ()
        for _ in tl.static_range(CHUNKS):
            sums = sums + (tl.zeros([KEYS, ROW], tl.float32),)  # noqa: RUF005
        first = tl.maximum(piece_begin(current), low) // KEYS
        last = tl.cdiv(tl.minimum(piece_begin(current + 1), high), KEYS)
        pages = pages_of(first, table, width, PAGE)
        for tile in tl.range(first, last, num_stages=STAGES):
            key_K = tile * KEYS + tl.arange(0, KEYS)
            live_K = (key_K >= low) & (key_K < high)
            k_K = places(pages, key_K, K_PAGE, K_SLOT, PAGE)
            v_K = places(pages, key_K, V_PAGE, V_SLOT, PAGE)
            pages = pages_of(tile + 1, table, width, PAGE)  # ahead of need: loads of keys must not wait for them
            k_KD = load_tile(k_base, k_K, live_K, 0, DA, D, False)
            score_KQ = product(k_KD, qa_DQ, tl.zeros([KEYS, ROW], tl.float32))
            if DB:
                k_KD = load_tile(k_base, k_K, live_K, DA, DB, D, False)
                score_KQ = product(k_KD, qb_DQ, score_KQ)
            seen_KQ = live_K[:, None]
            if CAUSAL:
                seen_KQ = seen_KQ & (key_K[:, None] <= place_Q[None, :])
            if WINDOW:
                seen_KQ = seen_KQ & (key_K[:, None] > place_Q[None, :] - WINDOW)
            score_KQ = tl.where(seen_KQ, score_KQ * scale, float("-inf"))
            new_Q = tl.maximum(top_Q, tl.ceil(tl.max(score_KQ, axis=0)))
            shrink_Q = power(top_Q - new_Q)
            p_KQ = cast(tl.exp2(score_KQ - new_Q[None, :]), v_cache.dtype.element_ty)
            weight = product(ones, p_KQ, weight * shrink_Q[None, :])
            grown = ()
            for c in tl.static_range(CHUNKS):
                v_VK = load_tile(v_base, v_K, live_K, c * KEYS, KEYS, V, True)
                moved = product(v_VK, p_KQ, sums[c] * shrink_Q[None, :])
                grown = grown + (moved,)  # noqa: RUF005
            sums = grown
            top_Q = new_Q
        if FOLD:
            new_Q = tl.maximum(whole_top_Q, top_Q)
            old_Q, add_Q = power(whole_top_Q - new_Q), power(top_Q - new_Q)
            whole_weight = whole_weight * old_Q[None, :] + weight * add_Q[None, :]
            grown = ()
            for c in tl.static_range(CHUNKS):
                grown = grown + (whole[c] * old_Q[None, :] + sums[c] * add_Q[None, :],)  # noqa: RUF005
            whole = grown
            whole_top_Q = new_Q
        else:
            whole, whole_weight, whole_top_Q = sums, weight, top_Q

    weight_Q = tl.max(whole_weight, axis=0)  # its 16 rows are equal
    if FOLD:
        most_Q, extra_Q = with_sink(whole_top_Q, sinks, head_Q, here_Q, SINKS)
        rest_Q = power(whole_top_Q - most_Q)
        weight_Q = tl.where(here_Q, weight_Q * rest_Q + extra_Q, 1.0)
        to_Q = (begin + row_Q // G).to(tl.int64) * (H * V) + head_Q * V
        for c in tl.static_range(CHUNKS):
            dim = c * KEYS + tl.arange(0, KEYS)
            value = cast(tl.trans(whole[c] * rest_Q[None, :] / weight_Q[None, :]), out.dtype.element_ty)
            tl.store(out + to_Q[:, None] + dim[None, :], value, mask=here_Q[:, None] & (dim < V)[None, :])
    else:
        slot = tl.program_id(1).to(tl.int64) * tl.num_programs(2) + piece
        tl.store(stat + slot * 2 * row_limit + row_Q, whole_top_Q, mask=here_Q)
        tl.store(stat + (slot * 2 + 1) * row_limit + row_Q, weight_Q, mask=here_Q)
        to_Q = (slot * row_limit + row_Q) * V
        for c in tl.static_range(CHUNKS):
            dim = c * KEYS + tl.arange(0, KEYS)
            tl.store(part + to_Q[:, None] + dim[None, :], tl.trans(whole[c]),
                     mask=here_Q[:, None] & (dim < V)[None, :])  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "requests", "pieces", "row_limit"])
def merge_kernel(
    part, stat, out, sinks, length, start, tokens, requests, pieces, row_limit,
    H: tl.constexpr, KH: tl.constexpr, V: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr,
    SINKS: tl.constexpr, MOST: tl.constexpr, CLEAR: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Add up the pieces of one row and chunk of dims. Grid (row_limit, requests + 1 x KV heads, chunks).

    AHEAD pieces are loaded at once; those that the row does not see add zeros.
    """
    follow()
    G: tl.constexpr = H // KH
    row = tl.program_id(0)
    request = tl.program_id(1) // KH
    head = tl.program_id(1) % KH * G + row % G
    begin = tl.load(start + request)
    dim = tl.program_id(2) * KEYS + tl.arange(0, KEYS)
    if request == requests:  # the rows from start[R] on
        if CLEAR:
            for token in range(begin + row // G, tokens, tl.num_programs(0) // G):
                zero = tl.zeros([KEYS], tl.float32).to(out.dtype.element_ty)
                tl.store(out + (tl.cast(token, tl.int64) * H + head) * V + dim, zero, mask=dim < V)
        return
    count = tl.load(start + request + 1) - begin
    if (row >= count * G) | (count > MOST):
        return
    keys = tl.load(length + request)
    place = keys - count + row // G
    low = tl.cast(0, tl.int32)
    if WINDOW:
        low = tl.maximum(place - WINDOW + 1, 0)
    high = keys
    if CAUSAL:
        high = place + 1
    first, stop = piece_of(low), piece_of(high - 1) + 1

    slot = tl.program_id(1).to(tl.int64) * pieces
    stat += slot * 2 * row_limit + row
    part += (slot * row_limit + row) * V
    piece = tl.arange(0, PIECES)
    tops = tl.load(stat + piece * 2 * row_limit, mask=(piece >= first) & (piece < stop), other=NOTHING)
    most, extra = with_sink(tl.max(tops, axis=0), sinks, head, True, SINKS)
    weight = most * 0.0
    sums = tl.zeros([KEYS], tl.float32)
    for batch in range(first // AHEAD, tl.cdiv(stop, AHEAD)):
        for i in tl.static_range(AHEAD):
            current = tl.cast(batch * AHEAD + i, tl.int64)
            here = (current >= first) & (current < stop)
            scale = power(tl.load(stat + current * 2 * row_limit, mask=here, other=NOTHING) - most)
            weight += tl.load(stat + (current * 2 + 1) * row_limit, mask=here, other=0.0) * scale
            part_V = tl.load(part + current * row_limit * V + dim, mask=here & (dim < V), other=0.0)
            sums += part_V * scale
    value = cast(sums / (weight + extra), out.dtype.element_ty)
    tl.store(out + ((begin + row // G).to(tl.int64) * H + head) * V + dim, value, mask=dim < V)


STRIDES = ("Q_TOKEN", "Q_HEAD", "K_PAGE", "K_SLOT", "K_HEAD", "V_PAGE", "V_SLOT", "V_HEAD")


def halves(dims: int) -> tuple[int, int]:
    """Two powers of two, at least 16 each (the second may be 0), that hold `dims`: 192 = 128 + 64."""
    first = max(16, 1 << dims.bit_length() - 1)
    return first, triton.next_power_of_2(max(16, dims - first)) if dims > first else 0


def layer_constants(heads: int, kv_heads: int, head_dim: int, value_dim: int, page: int, window: int | None,
                    causal: bool, sinks: bool) -> dict[str, Any]:  # fmt: skip
    """What the kernels are compiled for, besides strides and the launch."""
    first, second = halves(head_dim)
    return {
        "H": heads, "KH": kv_heads, "D": head_dim, "V": value_dim, "PAGE": page, "WINDOW": window or 0,
        "CAUSAL": causal, "SINKS": sinks, "DA": first, "DB": second, "CHUNKS": triton.cdiv(value_dim, TILE),
    }  # fmt: skip


def compile_cases() -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Name, function, signature, constants and options of what an H200 runs for 16 query heads on one KV head."""
    from kernels.paged_attention.launch import FEW, FOLD_SHAPES, SPLIT_SHAPES

    types = {"scale": "fp32"} | dict.fromkeys(("q", "k_cache", "v_cache", "out"), "*bf16")
    types |= dict.fromkeys(("part", "stat", "sinks"), "*fp32") | dict.fromkeys(("table", "length", "start"), "*i32")
    found = []

    def add(name: str, function: Any, constants: dict[str, Any], **options: int) -> None:
        signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in function.arg_names}
        found.append(
            (name, function, signature, {n: constants[n] for n, t in signature.items() if t == "constexpr"}, options)
        )

    strides = dict(zip(STRIDES, (16 * 192, 192, 32 * 192, 192, 192, 32 * 128, 128, 128), strict=True))
    full, near = (layer_constants(16, 1, 192, 128, 32, window, True, True) | strides for window in (None, 128))
    for about, layer, shapes, folded in (
        ("split", full, SPLIT_SHAPES, False), ("fold", full, FOLD_SHAPES, True), ("window", near, FOLD_SHAPES, True)
    ):  # fmt: skip
        for shape in shapes:
            launch = {"ROWS": shape.rows, "FOLD": folded, "LEAST": 1, "MOST": FEW, "STAGES": shape.num_stages}
            add(f"{about}, {shape.rows} rows", attention_kernel, layer | launch, num_warps=shape.num_warps, **ROUNDING)
    add("merge", merge_kernel, full | {"MOST": FEW, "CLEAR": True, "PIECES": 128}, num_warps=1, **ROUNDING)
    return found
