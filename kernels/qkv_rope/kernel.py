"""Queries, keys and values in Triton, in two launches: the projection (kernels.linear), then everything else.

The second launch has a program a token and head, of queries, keys and values alike. It reads a head of the projection
(from L2, where the first launch left it), and writes it once, to q or into the cache. A rotated value needs its
partner half a rotation away; reading the head a second time in that order is cheaper than moving values between
threads, and both readings see the same norm.

The launch shape depends on the geometry alone: a token's bits do not depend on others.

Legend: D values of one head, padded to a power of two.
"""

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.bf16 import rounded
from kernels.follow import FOLLOW, follow
from kernels.linear import kernel as linear_kernel

if TYPE_CHECKING:
    from kernels.qkv_rope import Heads

COPIED = 1024  # values of a token that one program of `write_kv` copies


@triton.jit
def normed(head, weight, column_D, here_D, rms, DTYPE: tl.constexpr, NORM: tl.constexpr):
    """FP32 values of a head at the given columns, after its norm."""
    value_D = tl.load(head + column_D, mask=here_D, other=0.0).to(tl.float32)
    if NORM:
        weight_D = tl.load(weight + column_D, mask=here_D, other=0.0).to(tl.float32)
        value_D = rounded(rounded(value_D * rms, DTYPE).to(tl.float32) * weight_D, DTYPE).to(tl.float32)
    return value_D


@triton.jit
def turned(head, weight, cos, sin, place, inside, eps, D: tl.constexpr, ROTARY: tl.constexpr, BLOCK: tl.constexpr,
           DTYPE: tl.constexpr, NORM: tl.constexpr):  # fmt: skip
    """A query or key head after norm and rotation, in DTYPE; angles are row `place` of the tables."""
    HALF: tl.constexpr = ROTARY // 2
    column_D = tl.arange(0, BLOCK)
    here_D = column_D < D
    rms = 1.0
    if NORM:
        value_D = tl.load(head + column_D, mask=here_D, other=0.0).to(tl.float32)
        rms = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(value_D * value_D, axis=0), D * 1.0) + eps))
    value_D = normed(head, weight, column_D, here_D, rms, DTYPE, NORM)
    if ROTARY > 0:
        first_D, rotated_D = column_D < HALF, column_D < ROTARY
        angle_D = tl.where(first_D, column_D, column_D - HALF)
        partner_D = tl.where(first_D, column_D + HALF, column_D - HALF)
        other_D = normed(head, weight, partner_D, rotated_D, rms, DTYPE, NORM)
        # A position outside the tables makes NaN: nothing else can be said without waiting for the device.
        cos_D = tl.load(cos + place * HALF + angle_D, mask=rotated_D & inside, other=float("nan"))
        sin_D = tl.load(sin + place * HALF + angle_D, mask=rotated_D & inside, other=float("nan"))
        both_D = value_D * cos_D + tl.where(first_D, -other_D, other_D) * sin_D
        value_D = tl.where(rotated_D, both_D, value_D)
    return rounded(value_D, DTYPE)


@triton.jit
def place_kernel(qkv, cos, sin, position, slot, q_norm, k_norm, q, k_cache, v_cache, length, slots, eps, scale,
                 H: tl.constexpr, KH: tl.constexpr, D: tl.constexpr, V: tl.constexpr, ROTARY: tl.constexpr,
                 BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr):  # fmt: skip
    """Program (token, head): heads 0 .. H - 1 are queries, then KH keys, then KH values."""
    follow()
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    DTYPE: tl.constexpr = q.dtype.element_ty
    start = qkv + token * ((H + KH) * D + KH * V)
    place = tl.load(position + token).to(tl.int64)
    inside = (place >= 0) & (place < length)
    target = tl.load(slot + token).to(tl.int64)
    written = (target >= 0) & (target < slots)
    column_D, column_V = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    if head < H:
        value_D = turned(start + head * D, q_norm, cos, sin, place, inside, eps, D, ROTARY, BLOCK_D, DTYPE, Q_NORM)
        tl.store(q + (token * H + head) * D + column_D, value_D, mask=column_D < D)
    elif head < H + KH:
        value_D = turned(start + head * D, k_norm, cos, sin, place, inside, eps, D, ROTARY, BLOCK_D, DTYPE, K_NORM)
        tl.store(k_cache + (target * KH + head - H) * D + column_D, value_D, mask=(column_D < D) & written)
    else:
        number = head - H - KH
        from_V = start + (H + KH) * D + number * V + column_V
        value_V = tl.load(from_V, mask=column_V < V, other=0.0).to(tl.float32) * scale
        tl.store(v_cache + (target * KH + number) * V + column_V, rounded(value_V, DTYPE),
                 mask=(column_V < V) & written)  # fmt: skip


@triton.jit
def write_kernel(k, v, slot, k_cache, v_cache, slots, K_SIZE: tl.constexpr, V_SIZE: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    """Program (token, part of its values): copy k and v of all heads to the token's slot."""
    follow()
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    target = tl.load(slot + token).to(tl.int64)
    written = (target >= 0) & (target < slots)
    k_here, v_here = (column < K_SIZE) & written, (column < V_SIZE) & written
    tl.store(k_cache + target * K_SIZE + column, tl.load(k + token * K_SIZE + column, mask=k_here), mask=k_here)
    tl.store(v_cache + target * V_SIZE + column, tl.load(v + token * V_SIZE + column, mask=v_here), mask=v_here)


def constants(heads: "Heads", q_norm: bool, k_norm: bool) -> dict[str, Any]:
    return {
        "H": heads.heads, "KH": heads.kv_heads, "D": heads.head_dim, "V": heads.value_dim,
        "ROTARY": heads.rotary_dims, "BLOCK_D": triton.next_power_of_2(heads.head_dim),
        "BLOCK_V": triton.next_power_of_2(heads.value_dim), "Q_NORM": q_norm, "K_NORM": k_norm,
    }  # fmt: skip


def qkv_rope(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    angles: tuple[Tensor, Tensor, Tensor],
    target: tuple[Tensor, Tensor, Tensor],
    heads: "Heads",
    q_norm: Tensor | None,
    k_norm: Tensor | None,
) -> Tensor:
    """angles: cos, sin and position; target: slot and the two caches."""
    (cos, sin, position), (slot, k_cache, v_cache) = angles, target
    q = x.new_empty(len(x), heads.heads, heads.head_dim)
    if len(x):
        qkv = linear_kernel.linear(x, weight, bias, x.dtype)
        with torch.cuda.device_of(x):
            place_kernel[(len(x), heads.heads + 2 * heads.kv_heads)](
                qkv, cos, sin, position, slot, cos if q_norm is None else q_norm, cos if k_norm is None else k_norm,
                q, k_cache, v_cache, len(cos), k_cache.shape[0] * k_cache.shape[1], heads.eps, heads.value_scale,
                **constants(heads, q_norm is not None, k_norm is not None), num_warps=1, **FOLLOW,
            )  # fmt: skip
    return q


def write_kv(k: Tensor, v: Tensor, slot: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    sizes = k[0].numel() if len(k) else 0, v[0].numel() if len(v) else 0
    if max(sizes):
        with torch.cuda.device_of(k):
            write_kernel[(len(k), triton.cdiv(max(sizes), COPIED))](
                k, v, slot, k_cache, v_cache, k_cache.shape[0] * k_cache.shape[1],
                K_SIZE=sizes[0], V_SIZE=sizes[1], BLOCK=COPIED, **FOLLOW,
            )  # fmt: skip


def compile_cases() -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """(name, kernel, argument types, constants, options): heads as MiMo-V2's and Qwen3's, and the copy."""
    from kernels.qkv_rope import Heads

    types = dict.fromkeys(("qkv", "q_norm", "k_norm", "q", "k_cache", "v_cache"), "*bf16")
    types |= {"cos": "*fp32", "sin": "*fp32", "position": "*i64", "slot": "*i64"}
    types |= {"length": "i32", "slots": "i32", "eps": "fp32", "scale": "fp32"}
    cases = []
    for name, heads, norm in (
        ("part", Heads(64, 4, 192, 128, 64, 0.7), False),
        ("norm", Heads(32, 4, 128, 128, 128), True),
    ):
        fixed = constants(heads, norm, norm)
        signature = types | dict.fromkeys(fixed, "constexpr")
        cases.append((f"qkv_rope {name}", place_kernel, signature, fixed, {"num_warps": 1}))
    fixed = {"K_SIZE": 768, "V_SIZE": 512, "BLOCK": COPIED}
    signature = dict.fromkeys(("k", "v", "k_cache", "v_cache"), "*bf16") | {"slot": "*i64", "slots": "i32"}
    cases.append(("write_kv", write_kernel, signature | dict.fromkeys(fixed, "constexpr"), fixed, {}))
    return cases
