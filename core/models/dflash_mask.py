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
    """The same for flex_attention, from the ends of the tiles alone; anchors must ascend (absent ones first)."""
    tokens, device = document_RT.shape[1], document_RT.device
    size, window = config.block_size, config.window if kind == SLIDING else tokens + config.block_size
    anchor_RA = anchor_RA.to(torch.int32).contiguous()
    document_RT = document_RT.to(torch.int32).contiguous()
    queries = anchor_RA.shape[1] * size
    query_tiles, key_tiles = -(-queries // TILE), -(-(tokens + queries) // TILE)
    begin_Q = torch.arange(query_tiles, device=device) * TILE
    end_Q = (begin_Q + TILE).clamp(max=queries) - 1
    first_RQ, last_RQ = anchor_RA[:, begin_Q // size], anchor_RA[:, end_Q // size]
    present_R = torch.where(anchor_RA < 0, tokens, anchor_RA).amin(1, keepdim=True)
    first_RQ = torch.maximum(first_RQ, present_R)  # absent anchors reach nothing
    key_begin = torch.arange(key_tiles, device=device) * TILE
    key_end = key_begin + TILE - 1
    # context: some query's window reaches the tile, and the tile starts before the last anchor
    low_RQ = first_RQ - window + 1
    touched = (key_end >= low_RQ[..., None]) & (key_begin < last_RQ[..., None]) & (key_begin < tokens)
    # blocks: tiles that hold the queries' own blocks (whole blocks, whose ends may lie in the next tile)
    own_first, own_last = tokens + begin_Q // size * size, tokens + (end_Q // size + 1) * size - 1
    own = (key_end[None, :] >= own_first[:, None]) & (key_begin[None, :] <= own_last[:, None])
    some = touched | own
    causal = config.causal

    def sees(r: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:  # noqa: ARG001
        anchor = anchor_RA[r, q // size]
        slot = q % size
        key = k.clamp(max=tokens - 1)
        same = document_RT[r, key] == document_RT[r, anchor.clamp(min=0)]
        context = (k < tokens) & (k < anchor) & (k > anchor + slot - window) & same
        behind = (k - tokens) % size <= slot if causal else k >= tokens
        return context | ((k >= tokens) & ((k - tokens) // size == q // size) & behind)

    count = some.sum(-1, dtype=torch.int32)[:, None]
    which = some.to(torch.int8).argsort(stable=True, dim=-1, descending=True).to(torch.int32)[:, None].contiguous()
    return BlockMask.from_kv_blocks(
        count, which, None, None, BLOCK_SIZE=TILE, mask_mod=sees, seq_lengths=(queries, tokens + queries)
    )


def decoding(config: DFlashConfig, kind: str, anchor_R: Tensor, slots: int) -> Tensor:
    """Boolean [R, 1, B, slots + B] for one block a row over a context cache whose slot number is the position."""
    device = anchor_R.device
    key = torch.arange(slots, device=device)
    place_RB = anchor_R[:, None] + torch.arange(config.block_size, device=device)
    near = (key < anchor_R[:, None, None]).expand(-1, config.block_size, -1)
    if kind == SLIDING:
        near = near & (key > place_RB[..., None] - config.window)
    return torch.cat((near, in_block(config, device).expand(len(anchor_R), -1, -1)), dim=-1)[:, None]
