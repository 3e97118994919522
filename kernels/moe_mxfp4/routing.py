"""Which tokens each program multiplies: the table of items, built on the device with shapes that T, k and E fix.

An item is one expert with at most `tile` of its pairs (a pair is a token's slot, numbered t * k + s). S pairs make at
most A + (S - A) // tile items, A = min(E, S), since ceil(c / tile) <= 1 + (c - 1) / tile. That bound is the launch
grid, so nothing waits for the routing, and a CUDA graph replays with any routing. Items beyond have expert -1.

This file is the definition, in torch (a dozen small launches, right for prefill); `prepare.route` writes
the same items, in another order, in one program (right for decode).

Legend: S pairs, E experts, G items of the grid.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Table:
    """int32 tensors; item g multiplies pairs order[first[g] : first[g] + count[g]] with expert[g]."""

    order: Tensor  # [S] pairs, those of an expert together; pairs with a negative id have no place of their own
    expert: Tensor  # [G], -1 for an item that does not exist
    first: Tensor  # [G]
    count: Tensor  # [G], at most `tile`


def most_items(pairs: int, experts: int, tile: int) -> int:
    active = min(experts, pairs)
    return active + (pairs - active) // tile


def empty_table(pairs: int, experts: int, tile: int, device: torch.device) -> Table:
    """Four parts of one allocation, each aligned to 16 bytes: Triton compiles anew for every pattern of alignments."""
    sizes = [pairs] + [most_items(pairs, experts, tile)] * 3
    room = [(size + 3) // 4 * 4 for size in sizes]
    parts = torch.empty(sum(room), dtype=torch.int32, device=device).split(room)
    return Table(*(part[:size] for part, size in zip(parts, sizes, strict=True)))


def sort_pairs(chosen: Tensor, experts: int, tile: int) -> Table:
    """The table of `chosen` [T, k], items by expert."""
    flat_S = chosen.reshape(-1)
    expert_S, order_S = torch.sort(torch.where(flat_S < 0, experts, flat_S), stable=True)
    bound_E = torch.searchsorted(expert_S, torch.arange(experts + 1, device=chosen.device, dtype=expert_S.dtype))
    tiles_E = (bound_E.diff() + tile - 1) // tile
    end_E = tiles_E.cumsum(0)
    item_G = torch.arange(most_items(flat_S.numel(), experts, tile), device=chosen.device)
    expert_G = torch.searchsorted(end_E, item_G, right=True)
    e_G = expert_G.clamp(max=experts - 1)
    first_G = bound_E[e_G] + (item_G - (end_E - tiles_E)[e_G]) * tile
    count_G = (bound_E[e_G + 1] - first_G).clamp(max=tile)
    expert_G = torch.where(expert_G < experts, expert_G, -1)
    return Table(*(part.to(torch.int32) for part in (order_S, expert_G, first_G, count_G)))
