"""What one rank of a tensor-parallel group holds, and how ranks talk: heads, expert columns and vocabulary rows.

    attention     query heads in equal parts; key-value heads too, or each copied to several ranks where there are fewer
    feed-forward  the inner dimension in whole blocks of 32, padded with zeros where the last rank has fewer
    head          vocabulary rows, padded; logits are gathered
    the rest      (norms, router, embedding, drafter) on every rank

Sums over ranks are taken in rank order in FP32 (kernels.all_reduce), so every rank has the same bits.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from core.errors import ConfigError
from core.mxfp4 import BLOCK, Packed
from infer.geometry import Geometry


@dataclass(frozen=True)
class Shard:
    """Rank `rank` of `world`."""

    rank: int = 0
    world: int = 1

    def check(self, geometry: Geometry) -> None:
        """ConfigError where heads do not divide."""
        if geometry.heads % self.world:
            raise ConfigError(
                f"{self.world} processes do not divide num_attention_heads={geometry.heads}; run 1, 2, 4 or 8"
            )
        for kv in {layer.kv_heads for layer in geometry.layers}:
            if kv % self.world and self.world % kv:
                raise ConfigError(
                    f"{self.world} processes and num_key_value_heads={kv}: one must divide the other; run 1, 2, 4 or 8"
                )

    def heads(self, count: int) -> slice:
        size = count // self.world
        return slice(self.rank * size, (self.rank + 1) * size)

    def kv_heads(self, count: int) -> slice:
        if count >= self.world:
            return self.heads(count)
        head = self.rank * count // self.world
        return slice(head, head + 1)

    def inner(self, size: int) -> tuple[int, int, int]:
        """(first, last + 1, width): the rank's part of an inner dimension, and the width all ranks pad theirs to."""
        blocks = -(-size // BLOCK)
        width = -(-blocks // self.world) * BLOCK if self.world > 1 else size
        return min(self.rank * width, size), min((self.rank + 1) * width, size), width

    def vocabulary(self, size: int) -> tuple[int, int, int]:
        width = -(-size // self.world)
        return min(self.rank * width, size), min((self.rank + 1) * width, size), width


def padded(tensor: Tensor, dim: int, size: int) -> Tensor:
    """Zeros up to `size` along `dim`; contiguous."""
    missing = size - tensor.shape[dim]
    if missing:
        dim = dim % tensor.dim()
        tensor = F.pad(tensor, [0, 0] * (tensor.dim() - 1 - dim) + [0, missing])
    return tensor.contiguous()


def rows_of(tensor: Tensor, dim: int, shard: Shard) -> Tensor:
    """The rank's part of gate and of up, which lie behind one another along `dim`."""
    if shard.world == 1:
        return tensor
    first, last, width = shard.inner(tensor.shape[dim] // 2)
    halves = [padded(half.narrow(dim, first, last - first), dim, width) for half in tensor.chunk(2, dim)]
    return torch.cat(halves, dim)


def columns_of(tensor: Tensor, shard: Shard) -> Tensor:
    """The rank's part of the last dimension, an inner dimension."""
    if shard.world == 1:
        return tensor
    first, last, width = shard.inner(tensor.shape[-1])
    return padded(tensor[..., first:last], -1, width)


def packed_rows(packed: Packed, shard: Shard) -> Packed:
    return Packed(rows_of(packed.codes, 1, shard), rows_of(packed.scales, 1, shard))


def packed_columns(packed: Packed, shard: Shard) -> Packed:
    """Codes hold two values a byte, scales 32; both are cut at whole blocks."""
    if shard.world == 1:
        return packed
    first, last, width = shard.inner(packed.codes.shape[-1] * 2)
    codes = padded(packed.codes[..., first // 2 : last // 2], -1, width // 2)
    return Packed(codes, padded(packed.scales[..., first // BLOCK : last // BLOCK], -1, width // BLOCK))
