"""Routing in Triton: one warp a token, all of its logits in registers, k maxima one after another.

**Order.** A rank and its index make one 64-bit key: the rank's bits, mapped so that integers compare as the numbers do,
above the complement of the index. Keys are distinct, so the largest is one expert, the lower index among equals, and
taking it out is a comparison. NaN is mapped below -Inf; -0 equals 0.

One warp holds a row, so maxima are shuffles without barriers. Nothing depends on the number of tokens.

Legend: M groups, S experts of a group (both padded to powers of two), E = M S, K chosen (padded).
"""

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.follow import FOLLOW, follow

if TYPE_CHECKING:
    from kernels.router import Rule

TAKEN = tl.constexpr(-(2**63))
WORD = tl.constexpr(2**32 - 1)


@triton.jit
def key_of(rank, index):
    """int64 whose order is that of ranks, then of descending indices; above TAKEN, whatever the rank."""
    bits = tl.where(rank == 0.0, 0.0, rank).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    ordered = tl.where(rank == rank, ordered, -0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (index.to(tl.int64) ^ WORD)


@triton.jit
def index_of(key):
    return ((key & WORD) ^ WORD).to(tl.int32)


@triton.jit
def within_groups(rank_MS, real_MS, TOP: tl.constexpr):
    """Boolean [M, S]: experts of the TOP groups whose two best ranks have the largest sums."""
    place_MS = tl.arange(0, rank_MS.shape[0])[:, None] * 0 + tl.arange(0, rank_MS.shape[1])[None, :]
    key_MS = tl.where(real_MS, key_of(rank_MS, place_MS), TAKEN)
    best_M = tl.max(key_MS, axis=1)
    second_M = tl.max(tl.where(key_MS == best_M[:, None], TAKEN, key_MS), axis=1)
    low = float("-inf")
    largest_M = tl.max(tl.where((key_MS == best_M[:, None]) & (rank_MS == rank_MS), rank_MS, low), axis=1)
    next_M = tl.max(tl.where((key_MS == second_M[:, None]) & (rank_MS == rank_MS), rank_MS, low), axis=1)
    group_M = tl.arange(0, rank_MS.shape[0])
    key_M = tl.where(best_M != TAKEN, key_of(largest_M + next_M, group_M), TAKEN)
    kept_M = group_M < 0
    for _ in tl.static_range(TOP):
        top = tl.max(key_M, axis=0)
        kept_M = kept_M | (key_M == top)
        key_M = tl.where(key_M == top, TAKEN, key_M)
    return kept_M[:, None] & (rank_MS == rank_MS)


@triton.jit
def route_kernel(logits, bias, chosen, weight, scaling, KIND: tl.constexpr, TOP_K: tl.constexpr, GROUPS: tl.constexpr,
                 SIZE: tl.constexpr, TOP_GROUPS: tl.constexpr, NORMALISE: tl.constexpr, BIAS: tl.constexpr,
                 BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """One token: its TOP_K experts and their weights."""
    follow()
    token = tl.program_id(0).to(tl.int64)
    group_M1, place_1S = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_S)[None, :]
    index_MS = group_M1 * SIZE + place_1S
    real_MS = (group_M1 < GROUPS) & (place_1S < SIZE)
    logit_MS = tl.load(logits + token * (GROUPS * SIZE) + index_MS, mask=real_MS, other=float("-inf"))

    score_MS = logit_MS
    rank_MS = logit_MS
    if KIND == "sigmoid_bias":
        score_MS = tl.div_rn(1.0, 1.0 + tl.exp(-logit_MS))
        rank_MS = score_MS
        if BIAS:
            rank_MS = score_MS + tl.load(bias + index_MS, mask=real_MS, other=0.0)
        if GROUPS > 1:
            rank_MS = tl.where(within_groups(rank_MS, real_MS, TOP_GROUPS), rank_MS, float("-inf"))
    elif KIND == "softmax_topk":
        power_MS = tl.exp(logit_MS - tl.max(tl.max(logit_MS, axis=1), axis=0))
        score_MS = tl.div_rn(power_MS, tl.sum(tl.sum(power_MS, axis=1), axis=0) + tl.zeros_like(power_MS))

    key_MS = tl.where(real_MS, key_of(rank_MS, index_MS), TAKEN)
    slot_K = tl.arange(0, BLOCK_K)
    chosen_K = tl.zeros((BLOCK_K,), tl.int32)
    weight_K = tl.full((BLOCK_K,), float("-inf") if KIND == "topk_softmax" else 0.0, tl.float32)
    for slot in tl.static_range(TOP_K):
        top = tl.max(tl.max(key_MS, axis=1), axis=0)
        value = tl.sum(tl.sum(tl.where(key_MS == top, score_MS, 0.0), axis=1), axis=0)
        chosen_K = tl.where(slot_K == slot, index_of(top), chosen_K)
        weight_K = tl.where(slot_K == slot, value, weight_K)
        key_MS = tl.where(key_MS == top, TAKEN, key_MS)

    if KIND == "topk_softmax":
        power_K = tl.exp(weight_K - tl.max(weight_K, axis=0))
        weight_K = tl.div_rn(power_K, tl.sum(power_K, axis=0) + tl.zeros_like(power_K))
    elif NORMALISE:
        total = tl.sum(weight_K, axis=0) + (1e-20 if KIND == "sigmoid_bias" else 0.0)
        weight_K = tl.div_rn(weight_K, total + tl.zeros_like(weight_K))
    tl.store(chosen + token * TOP_K + slot_K, chosen_K, mask=slot_K < TOP_K)
    tl.store(weight + token * TOP_K + slot_K, weight_K * scaling, mask=slot_K < TOP_K)


def constants(rule: "Rule", experts: int, bias: bool) -> dict[str, Any]:
    size = experts // rule.groups
    return {
        "KIND": rule.kind, "TOP_K": rule.top_k, "GROUPS": rule.groups, "SIZE": size, "TOP_GROUPS": rule.top_groups,
        "NORMALISE": rule.normalise, "BIAS": bias, "BLOCK_M": triton.next_power_of_2(rule.groups),
        "BLOCK_S": triton.next_power_of_2(size), "BLOCK_K": triton.next_power_of_2(rule.top_k),
    }  # fmt: skip


def route(logits: Tensor, rule: "Rule", bias: Tensor | None) -> tuple[Tensor, Tensor]:
    count, experts = logits.shape
    chosen = torch.empty(count, rule.top_k, dtype=torch.int32, device=logits.device)
    weight = torch.empty(count, rule.top_k, dtype=torch.float32, device=logits.device)
    if count:
        with torch.cuda.device_of(logits):
            route_kernel[(count,)](
                logits, logits if bias is None else bias, chosen, weight, rule.scaling,
                **constants(rule, experts, bias is not None), num_warps=1, **FOLLOW,
            )  # fmt: skip
    return chosen, weight


def compile_cases() -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """(name, kernel, argument types, constants, options): the three families, and sixteen of 512 in groups."""
    from kernels.router import Rule

    types = {"logits": "*fp32", "bias": "*fp32", "chosen": "*i32", "weight": "*fp32", "scaling": "fp32"}
    cases = []
    for rule, experts in (
        (Rule("sigmoid_bias", 8), 384),
        (Rule("sigmoid_bias", 16, groups=8, top_groups=4), 512),
        (Rule("softmax_topk", 8), 128),
        (Rule("topk_softmax", 4), 128),
    ):
        fixed = constants(rule, experts, rule.kind == "sigmoid_bias")
        signature = types | dict.fromkeys(fixed, "constexpr")
        cases.append((f"route {rule.kind} {rule.groups}", route_kernel, signature, fixed, {"num_warps": 1}))
    return cases
