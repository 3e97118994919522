"""Routing in plain torch: the definition, and the path without a GPU.

Scores are computed in FP64 and rounded: torch's FP32 exponentials on a CPU differ with a value's place in memory.

Legend: T tokens, E experts, M groups, S experts of a group, K chosen.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kernels.router import Rule

LOWEST = float("-inf")


def first(rank: Tensor, count: int) -> Tensor:
    """Indices [..., count] of the largest, in order; of equals the lower index first; NaN after every number."""
    order = torch.where(rank.isnan(), LOWEST, rank).sort(dim=-1, descending=True, stable=True)[1]
    numbers_first = rank.isnan().gather(-1, order).to(torch.uint8).sort(dim=-1, stable=True)[1]
    return order.gather(-1, numbers_first)[..., :count]


def route(logits: Tensor, rule: "Rule", bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """logits FP32 [T, E] -> experts int32 [T, K], weights FP32 [T, K]."""
    if rule.kind == "sigmoid_bias":
        score_TE = logits.double().sigmoid().float()
        chosen_TK = first(within_groups(score_TE if bias is None else score_TE + bias, rule), rule.top_k)
        weight_TK = score_TE.gather(1, chosen_TK)
        if rule.normalise:
            weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + 1e-20)
    else:
        chosen_TK = first(logits, rule.top_k)
        if rule.kind == "softmax_topk":
            weight_TK = logits.double().softmax(-1).gather(1, chosen_TK).float()
            if rule.normalise:
                weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        else:
            weight_TK = logits.gather(1, chosen_TK).double().softmax(-1).float()
    return chosen_TK.to(torch.int32), weight_TK * rule.scaling


def within_groups(rank_TE: Tensor, rule: "Rule") -> Tensor:
    """Ranks with -Inf for experts outside the groups whose two best have the largest sums."""
    if rule.groups == 1:
        return rank_TE
    rank_TMS = torch.where(rank_TE.isnan(), LOWEST, rank_TE).unflatten(1, (rule.groups, -1))
    best_TM = rank_TMS.topk(2, dim=-1)[0].sum(-1)
    kept_TM = torch.zeros_like(best_TM).scatter_(1, first(best_TM, rule.top_groups), 1).bool()
    return rank_TMS.masked_fill(~kept_TM[:, :, None], LOWEST).flatten(1)
