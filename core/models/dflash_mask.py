"""What a block token of a drafter sees, in training (many anchors in packed rows) and in decoding.

One rule. Token o of the block anchored at A, at position p = A + o, sees

    context key j      iff  j is of the anchor's document,  j < A,  and in a sliding layer  j > p - W
    its own block's o' iff  o' <= o or the layer stack is not causal

The window moves with the query, so far slots see fewer context keys than near ones. `dense` writes the rule out and is
the reference; `sparse` gives flex_attention the blocks of 128 x 128 that hold a visible pair, computed from the anchors
without a tokens x tokens mask. Anchors ascend along a row, so 128 queries have neighbouring anchors and see W context
keys and the few between those anchors: the cost of an anchor does not grow with the length of the context.

Legend: R rows, T context tokens, A anchors of a row, B block size, N = A * B block tokens, Q blocks of 128 queries.
"""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from core.models.dflash_config import SLIDING, DFlashConfig
from core.models.ops import ordered

TILE = 128


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Boolean -> 0 where visible, the smallest number of `dtype` elsewhere."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


def in_block(config: DFlashConfig, device: torch.device) -> Tensor:
    """Boolean [B, B]: slot (first dim) sees slot (second dim) of its own block."""
    slot = torch.arange(config.block_size, device=device)
    return slot[:, None] >= slot[None, :] if config.causal else torch.ones_like(slot[:, None] + slot, dtype=torch.bool)


def dense(config: DFlashConfig, kind: str, document_RT: Tensor, anchor_RA: Tensor) -> Tensor:
    """Boolean [R, 1, N, T + N]; anchors are indices along the row, in any order; below 0 is no anchor (sees itself)."""
    tokens, device = document_RT.shape[1], document_RT.device
    rows, anchors = anchor_RA.shape
    place_RN = (anchor_RA[..., None] + torch.arange(config.block_size, device=device)).flatten(1)
    anchor_RN = anchor_RA.repeat_interleave(config.block_size, dim=1)
    key_T = torch.arange(tokens, device=device)
    near = key_T < anchor_RN[..., None]
    if kind == SLIDING:
        near = near & (key_T > place_RN[..., None] - config.window)
    document_RN = document_RT.gather(1, anchor_RN.clamp(min=0))
    near = near & (document_RT[:, None, :] == document_RN[..., None])
    own = torch.block_diag(*[in_block(config, device)] * anchors).expand(rows, -1, -1)
    return torch.cat((near, own), dim=-1)[:, None]


def sparse(config: DFlashConfig, kind: str, document_RT: Tensor, anchor_RA: Tensor) -> BlockMask:
    """The same for flex_attention; every query sees a run of context keys, `low` to `high`, and its own block.

    Documents are numbered along the row, so a run begins at the window's or the document's first key, whichever is
    later. Tiles inside every query's run are marked full: they need no mask at all.
    """
    tokens, device = document_RT.shape[1], document_RT.device
    size, causal, queries = config.block_size, config.causal, anchor_RA.shape[1] * config.block_size
    window = config.window if kind == SLIDING else tokens + size
    document_RT = document_RT.contiguous()
    begin_RA = torch.searchsorted(
        document_RT, document_RT.gather(1, anchor_RA.clamp(min=0))
    )  # of the anchor's document
    place_RAB = anchor_RA[..., None] + torch.arange(size, device=device)
    low_RAB = torch.maximum(begin_RA[..., None], place_RAB - window + 1)
    low_RN = torch.where(anchor_RA[..., None] < 0, tokens, low_RAB).flatten(1).to(torch.int32)
    high_RN = anchor_RA.repeat_interleave(size, dim=1).to(torch.int32)  # the run's last key is high - 1

    def sees(r: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:  # noqa: ARG001
        context = (k >= low_RN[r, q]) & (k < high_RN[r, q])
        begin = tokens + q // size * size
        return context | ((k >= begin) & (k <= tokens + q if causal else k < begin + size))

    part, full = tiles_of(low_RN, high_RN, tokens, size)
    part_count, part_which = ordered(part)
    full_count, full_which = ordered(full)
    return BlockMask.from_kv_blocks(
        part_count, part_which, full_count, full_which,
        BLOCK_SIZE=TILE, mask_mod=sees, seq_lengths=(queries, tokens + queries),
    )  # fmt: skip


def tiles_of(low_RN: Tensor, high_RN: Tensor, tokens: int, size: int) -> tuple[Tensor, Tensor]:
    """Boolean [R, Q, tiles of keys], from the ends of the runs: tiles with some visible pair, tiles with no other."""
    queries, device = low_RN.shape[1], low_RN.device
    query_tiles, key_tiles = -(-queries // TILE), -(-(tokens + queries) // TILE)
    query = torch.arange(query_tiles * TILE, device=device).view(-1, TILE)
    low_RQt, high_RQt = (t[:, query.clamp(max=queries - 1)] for t in (low_RN, high_RN))
    begin, end = (torch.arange(key_tiles, device=device) * TILE + last for last in (0, TILE - 1))
    some = (end >= low_RQt.amin(-1, keepdim=True)) & (begin < high_RQt.amax(-1, keepdim=True))
    full = (begin >= low_RQt.amax(-1, keepdim=True)) & (end < high_RQt.amin(-1, keepdim=True))
    # a tile of queries cut off by the row's end is masked pair by pair
    full = full & (query[:, -1:] < queries)
    # whole blocks, whose ends may lie in the next tile
    first, last = (tokens + query[:, place].clamp(max=queries - 1) // size * size for place in (0, -1))
    own = (end >= first[:, None]) & (begin < last[:, None] + size)
    return (some | own) & ~full, full


def decoding(config: DFlashConfig, kind: str, anchor_R: Tensor, slots: int) -> Tensor:
    """Boolean [R, 1, B, slots + B] for one block a row over a context cache whose slot number is the position."""
    device = anchor_R.device
    key = torch.arange(slots, device=device)
    place_RB = anchor_R[:, None] + torch.arange(config.block_size, device=device)
    near = (key < anchor_R[:, None, None]).expand(-1, config.block_size, -1)
    if kind == SLIDING:
        near = near & (key > place_RB[..., None] - config.window)
    return torch.cat((near, in_block(config, device).expand(len(anchor_R), -1, -1)), dim=-1)[:, None]
