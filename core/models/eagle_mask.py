"""What a step of an EAGLE chain sees in training, where many chains stand in packed rows.

One rule. Step k (from 0) of the chain anchored at A, at position p = A + k, sees

    context key j          iff  j is of the anchor's document, not its first token, j < A, and j > p - W where W is set
    own entry of step k'   iff  k' <= k

The context's entry at A itself is the chain's step 0. `dense` writes the rule out; `sparse` gives flex_attention the
blocks of 128 x 128 that hold a visible pair. Keys are the T context tokens, then A entries of each of the K steps;
those of later steps are there and invisible, so that every step has the same shapes and flex_attention compiles once.

Legend: R rows, T context tokens, A anchors of a row, K steps, Q blocks of 128 queries.
"""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from core.models.dflash_mask import TILE
from core.models.eagle_config import EagleConfig


def dense(config: EagleConfig, step: int, document_RT: Tensor, position_RT: Tensor, anchor_RA: Tensor) -> Tensor:
    """Boolean [R, 1, A, T + K * A]; anchors are indices along the row, in any order; below 0 sees its chain only."""
    device = document_RT.device
    rows, anchors = anchor_RA.shape
    key_T = torch.arange(document_RT.shape[1], device=device)
    near = (key_T < anchor_RA[..., None]) & (position_RT[:, None, :] > 0)
    if config.window:
        near = near & (key_T > anchor_RA[..., None] + step - config.window)
    near = near & (document_RT[:, None, :] == document_RT.gather(1, anchor_RA.clamp(min=0))[..., None])
    own = torch.eye(anchors, dtype=torch.bool, device=device)
    chain = [own if k <= step else torch.zeros_like(own) for k in range(config.drafts)]
    return torch.cat((near, torch.cat(chain, dim=1).expand(rows, -1, -1)), dim=-1)[:, None]


def sparse(config: EagleConfig, step: int, document_RT: Tensor, position_RT: Tensor, anchor_RA: Tensor) -> BlockMask:
    """The same for flex_attention, from the ends of the tiles alone; anchors must ascend (absent ones first)."""
    tokens, device = document_RT.shape[1], document_RT.device
    queries = anchor_RA.shape[1]
    keys = tokens + config.drafts * queries
    window = config.window or tokens + config.drafts
    anchor_RA = anchor_RA.to(torch.int32).contiguous()
    document_RT = document_RT.to(torch.int32).contiguous()
    inside_RT = (position_RT > 0).contiguous()
    low_RA = anchor_RA + (step - window)
    step_A = torch.full((queries,), step, dtype=torch.int32, device=device)  # a tensor: a number would be compiled in
    begin_Q = torch.arange(-(-queries // TILE), device=device) * TILE
    end_Q = (begin_Q + TILE).clamp(max=queries) - 1
    present_R = torch.where(anchor_RA < 0, tokens, anchor_RA).amin(1, keepdim=True)
    first_RQ = torch.maximum(anchor_RA[:, begin_Q], present_R)  # absent anchors reach nothing
    key_begin = torch.arange(-(-keys // TILE), device=device) * TILE
    key_end = key_begin + TILE - 1
    reached = key_end > (first_RQ + step - window)[..., None]
    touched = reached & (key_begin < anchor_RA[:, end_Q, None]) & (key_begin < tokens)
    group = tokens + torch.arange(step + 1, device=device)[:, None, None] * queries
    own = (key_end >= group + begin_Q[:, None]) & (key_begin <= group + end_Q[:, None])
    some = touched | own.any(0)

    def sees(r: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:  # noqa: ARG001
        anchor = anchor_RA[r, q]
        key = k.clamp(max=tokens - 1)
        same = (document_RT[r, key] == document_RT[r, anchor.clamp(min=0)]) & inside_RT[r, key]
        context = (k < tokens) & (k < anchor) & (k > low_RA[r, q]) & same
        entry = k - tokens
        return context | ((k >= tokens) & (entry % queries == q) & (entry // queries <= step_A[q]))

    count = some.sum(-1, dtype=torch.int32)[:, None]
    which = some.to(torch.int8).argsort(stable=True, dim=-1, descending=True).to(torch.int32)[:, None].contiguous()
    return BlockMask.from_kv_blocks(
        count, which, None, None, BLOCK_SIZE=TILE, mask_mod=sees, seq_lengths=(queries, keys)
    )
