"""The key-value cache's tensors, and what one step's tokens mean to each group of layers.

Layers with the same window share page numbers (infer.pages); every layer has its own two tensors. The layout is
[pages, page size, key-value heads, head dim], the interface `batch` and `slot` of `GroupStep`: another precision or a
second tier of memory replaces this file and nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from infer.pages import Pool
from kernels.paged_attention import Batch


@dataclass(frozen=True)
class LayerShape:
    """Of one layer on one rank: KV heads, head dim of keys and of values, and the group whose pages it uses."""

    kv_heads: int
    head_dim: int
    value_dim: int
    group: int


@dataclass(frozen=True)
class GroupStep:
    """batch: page table, lengths and query starts for attention. slot [T]: where each token's key and value go."""

    batch: Batch
    slot: Tensor


@dataclass(frozen=True)
class Step:
    """Tokens of all requests of a step, one behind another. groups: by cache group.

    ids, position [T]; logits_at [L]: rows whose logits are wanted.
    """

    ids: Tensor
    position: Tensor
    groups: tuple[GroupStep, ...]
    logits_at: Tensor


class KVCache:
    """keys and values of every layer, zeroed (a page is read only where it was written, but zeros cannot be NaN).

    Each has one page more than its pool, number `pool.pages`: rows that only fill a captured graph write there.
    """

    def __init__(
        self, layers: Sequence[LayerShape], pools: Sequence[Pool], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.layers = tuple(layers)
        self.size = pools[0].size
        self.spare = tuple(pool.pages for pool in pools)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        for layer in layers:
            pool = pools[layer.group]
            shape = (pool.pages + 1, pool.size, layer.kv_heads)
            self.keys.append(torch.zeros(*shape, layer.head_dim, dtype=dtype, device=device))
            self.values.append(torch.zeros(*shape, layer.value_dim, dtype=dtype, device=device))

    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.keys, *self.values))


def bytes_per_token(layers: Sequence[LayerShape], group: int, dtype: torch.dtype) -> int:
    """Of one position in every layer of a group."""
    return sum(
        layer.kv_heads * (layer.head_dim + layer.value_dim) * dtype.itemsize for layer in layers if layer.group == group
    )


def group_step(
    pages: Sequence[Sequence[int]], first: Sequence[int], counts: Sequence[int], size: int, device: torch.device
) -> GroupStep:
    """Page table and slots of one group.

    Args:
        pages: of each request, enough for its last new token; pages out of sight may be negative.
        first, counts: position of each request's first new token, and how many it has.
    """
    width = max(len(p) for p in pages)
    table = torch.zeros(len(pages), width, dtype=torch.int32)
    for row, held in enumerate(pages):
        table[row, : len(held)] = torch.tensor(held, dtype=torch.int32).clamp(min=0)
    begin, count = torch.tensor(first), torch.tensor(counts)
    start = torch.zeros(len(pages) + 1, dtype=torch.int32)
    start[1:] = count.cumsum(0)
    row = torch.repeat_interleave(torch.arange(len(pages)), count)
    position = begin[row] + torch.arange(int(start[-1])) - start[row]
    slot = table[row, position // size].to(torch.int64) * size + position % size
    length = (begin + count).to(torch.int32)
    batch = Batch(
        table.to(device), length.to(device), start.to(device), longest_query=max(counts), longest_key=int(length.max())
    )
    return GroupStep(batch, slot.to(device))
