"""The operations a model can be given in a faster form: attention, RMSNorm, experts.

A model holds one frozen `ModelOps` and calls what is in it; the defaults are plain torch. `core` never imports
`kernels`, so a Triton version of anything here arrives from outside, by value.

Attention comes in three forms with one meaning: softmax over the visible keys, plus one learnt logit per head, the
sink, that takes part in the denominator and carries no value (window layers of MiMo-V2).

eager           scores in FP32, [B, H, T, T] written out: the reference.
sdpa            torch's fused attention. The sink becomes a real key: one more head dim holds the sink's logit in the
                query and 1 in that key, 0 in all others, so score = q.k + 0 for tokens and the sink for the extra key.
flex_attention  block-sparse Triton from `torch.nn.attention.flex_attention` (CUDA; forward only on CPU). A window layer
                touches two blocks of keys for each block of queries. The sink needs no extra key: with lse the
                log-sum-exp of the visible scores, softmax-with-sink = softmax * sigmoid(lse - sink).

What a token sees is decided once per forward and layer type by `masks`: keys of its own document (documents are
numbered along a row), not later than itself, and in a window layer among the last `window` positions.

Legend: B rows, T tokens, H query heads, K key-value heads, D head dim, V value head dim, Q blocks of 128 tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

FLEX_BLOCK = 128
SDPA_CHUNK = 256  # queries in one call of torch's fused attention, at least
NO_DECODING = {"FORCE_USE_FLEX_ATTENTION": True}  # rows under 128 tokens: the decoding kernel lacks head dims like 192
Mask = Any  # a Tensor, chunks of one, or a BlockMask: whatever the attention beside it reads


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight, the mean square in FP32."""
    x32 = x.to(torch.float32)
    x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return weight * x32.to(x.dtype)


def visible(documents_BT: Tensor, window: int | None) -> Tensor:
    """Boolean [B, 1, T, T]: query (third dim) sees key (last dim)."""
    tokens = documents_BT.shape[1]
    index = torch.arange(tokens, device=documents_BT.device)
    distance = index[:, None] - index[None, :]
    near = distance >= 0
    if window is not None:
        near = near & (distance < window)
    same = documents_BT[:, :, None] == documents_BT[:, None, :]
    return (near & same)[:, None]


def eager_mask(documents_BT: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    """Additive [B, 1, T, T]: 0 where visible, the smallest number of `dtype` elsewhere."""
    seen = visible(documents_BT, window)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


def eager_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None, sinks: Tensor | None
) -> Tensor:
    """q [B, H, T, D], k [B, K, S, D], v [B, K, S, V], additive mask or None, sinks [H] -> [B, H, T, V]."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    score = torch.matmul(q, k.transpose(2, 3)) * scale
    if mask is not None:
        score = score + mask
    score = score.to(torch.float32)
    if sinks is not None:
        column = sinks.to(torch.float32).view(1, -1, 1, 1).expand(*score.shape[:3], 1)
        score = torch.cat((score, column), dim=-1)
    prob = torch.softmax(score - score.amax(-1, keepdim=True), dim=-1)
    if sinks is not None:
        prob = prob[..., :-1]
    return torch.matmul(prob.to(v.dtype), v)


@dataclass(frozen=True)
class QueryChunk:
    """Queries `start:stop` of every row read keys `low:stop` under `mask`, additive [B, 1, stop-start, keys]."""

    start: int
    stop: int
    low: int
    mask: Tensor


def sdpa_mask(documents_BT: Tensor, window: int | None, dtype: torch.dtype) -> tuple[QueryChunk, ...]:
    """Row by chunks of queries, so that keys after a chunk or before its window cost nothing.

    In a window layer every chunk has one key more than it has tokens: the sink, last, which everyone sees.
    """
    seen = visible(documents_BT, window)
    tokens = seen.shape[-1]
    size = max(SDPA_CHUNK, -(-tokens // 4) if window is None else window)
    chunks = []
    for start in range(0, tokens, size):
        stop, low = min(start + size, tokens), 0 if window is None else max(0, start - window + 1)
        part = seen[:, :, start:stop, low:stop]
        if window is not None:
            part = F.pad(part, (0, 1), value=True)
        mask = torch.zeros(part.shape, dtype=dtype, device=part.device).masked_fill_(~part, torch.finfo(dtype).min)
        chunks.append(QueryChunk(start, stop, low, mask))
    return tuple(chunks)


def sdpa_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: tuple[QueryChunk, ...], sinks: Tensor | None
) -> Tensor:
    """As `eager_attention`, through torch's fused kernels; head dims are padded to one multiple of 8."""
    value_dim = v.shape[-1]
    width = -(-max(q.shape[-1] + (0 if sinks is None else 2), value_dim) // 8) * 8
    if sinks is not None:
        # the logit is split in two so that BF16 queries carry it to 16 bits: high part + remainder
        logit = (sinks.to(torch.float32) / scale).view(1, -1, 1, 1).expand(*q.shape[:3], 1)
        high = logit.to(q.dtype)
        q = torch.cat((q, high, (logit - high.to(torch.float32)).to(q.dtype)), dim=-1)
        sink_key = torch.zeros(width, dtype=k.dtype, device=k.device)
        sink_key[k.shape[-1] : k.shape[-1] + 2] = 1
        sink_key = sink_key.expand(*k.shape[:2], 1, width)
    q, k, v = (F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] != width else x for x in (q, k, v))
    out = []
    for chunk in mask:
        keys, values = k[:, :, chunk.low : chunk.stop], v[:, :, chunk.low : chunk.stop]
        if sinks is not None:
            keys, values = torch.cat((keys, sink_key), dim=2), F.pad(values, (0, 0, 0, 1))
        queries = q[:, :, chunk.start : chunk.stop]
        out.append(
            F.scaled_dot_product_attention(
                queries, keys, values, attn_mask=chunk.mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )
        )
    return torch.cat(out, dim=2)[..., :value_dim]


def ordered(blocks_BQQ: Tensor) -> tuple[Tensor, Tensor]:
    """True entries of each row in BlockMask's layout: how many [B, 1, Q], and which, first ones first [B, 1, Q, Q]."""
    count = blocks_BQQ.sum(-1, dtype=torch.int32)
    which = blocks_BQQ.to(torch.int8).argsort(stable=True, dim=-1, descending=True).to(torch.int32)
    return count[:, None], which[:, None].contiguous()


def flex_mask(documents_BT: Tensor, window: int | None, dtype: torch.dtype) -> BlockMask:  # noqa: ARG001
    """Which 128x128 blocks hold a visible pair, and which hold nothing else, from the ends of the blocks alone.

    Documents are numbered along the row, so two blocks share one iff the key block's last token is not before the
    query block's first in document order. Nothing of size T x T is built.
    """
    tokens = documents_BT.shape[1]
    device = documents_BT.device
    documents_BT = documents_BT.to(torch.int32).contiguous()
    begin_Q = torch.arange(0, tokens, FLEX_BLOCK, device=device)
    end_Q = (begin_Q + FLEX_BLOCK).clamp(max=tokens) - 1
    first_BQ, last_BQ = documents_BT[:, begin_Q], documents_BT[:, end_Q]
    some = (begin_Q[None, :] <= end_Q[:, None]) & (last_BQ[:, None, :] >= first_BQ[:, :, None])
    whole = (end_Q[None, :] <= begin_Q[:, None]) & (first_BQ[:, None, :] == last_BQ[:, :, None])
    if window is not None:
        some = some & (begin_Q[:, None] - end_Q[None, :] < window)
        whole = whole & (end_Q[:, None] - begin_Q[None, :] < window)

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:  # noqa: ARG001
        return (q >= k) & (documents_BT[b, q] == documents_BT[b, k])

    width = tokens if window is None else window

    def sees_near(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:  # noqa: ARG001
        return (q >= k) & (q - k < width) & (documents_BT[b, q] == documents_BT[b, k])

    complete_Q = begin_Q + FLEX_BLOCK <= tokens  # a block cut off by the row's end is masked pair by pair
    whole = whole & complete_Q[:, None] & complete_Q[None, :]
    part_count, part = ordered(some & ~whole)
    whole_count, full = ordered(whole)
    return BlockMask.from_kv_blocks(
        part_count,
        part,
        whole_count,
        full,
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=sees if window is None else sees_near,
        seq_lengths=(tokens, tokens),
    )


_compiled_flex: list[Callable[..., Any]] = []


def compiled_flex() -> Callable[..., Any]:
    """flex_attention compiled once: uncompiled it writes the scores out. Inside a compiled layer it is inlined."""
    if not _compiled_flex:
        _compiled_flex.append(torch.compile(flex_attention, dynamic=False))
    return _compiled_flex[0]


def flex_sink_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: BlockMask, sinks: Tensor | None
) -> Tensor:
    """As `eager_attention`, block-sparse. Head dims: any from 16 up; value dim may differ."""
    function: Any = flex_attention if torch.compiler.is_compiling() else compiled_flex()
    common = {"block_mask": mask, "scale": scale, "enable_gqa": q.shape[1] != k.shape[1], "kernel_options": NO_DECODING}
    if sinks is None:
        return function(q, k, v, **common)
    out, aux = function(q, k, v, **common, return_aux=AuxRequest(lse=True))
    lse = aux.lse
    keep = torch.sigmoid(lse - sinks.to(torch.float32).view(1, -1, 1))
    return (out * keep.unsqueeze(-1)).to(out.dtype)


@dataclass(frozen=True)
class ModelOps:
    """What a model computes its layers with.

    attention(q, k, v, *, scale, mask, sinks) -> [B, H, T, V]; mask(documents_BT, window, dtype) builds what it reads.
    rms_norm(x, weight, eps) -> x's shape and dtype.
    """

    attention: Callable[..., Tensor] = eager_attention
    mask: Callable[[Tensor, int | None, torch.dtype], Mask] = eager_mask
    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = rms_norm


EAGER = ModelOps()
SDPA = ModelOps(attention=sdpa_attention, mask=sdpa_mask)
FLEX = ModelOps(attention=flex_sink_attention, mask=flex_mask)
BY_NAME = {"eager": EAGER, "sdpa": SDPA, "flex_attention": FLEX}


def default_ops(device: torch.device) -> ModelOps:
    """flex_attention on CUDA, torch's fused attention on a CPU."""
    return FLEX if device.type == "cuda" else SDPA
