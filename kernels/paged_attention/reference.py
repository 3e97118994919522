"""Paged attention in plain torch, one request after another: the definition of `kernel`. Any device; the CPU path.

Everything is FP32 between loading and the output's dtype. Reads the lengths on the host.

Legend: C queries of a request, S keys it sees, K KV heads, G query heads of each, D and V head dims.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kernels.paged_attention import Batch


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: "Batch",
    *,
    scale: float,
    window: int | None,
    sinks: Tensor | None,
    causal: bool,
) -> Tensor:
    """Arguments as kernels.paged_attention.paged_attention, checked there."""
    out = q.new_zeros(*q.shape[:2], v_cache.shape[-1])
    start, size = batch.start.tolist(), k_cache.shape[1]
    for request, length in enumerate(batch.length.tolist()):
        rows = slice(start[request], start[request + 1])
        first = length - (rows.stop - rows.start)  # position of the first query
        if first == length:
            continue
        low = 0 if window is None else max(0, first - window + 1)
        key_S = torch.arange(low, length, device=q.device)
        place_C = torch.arange(first, length, device=q.device)
        page_S = batch.page_table[request, key_S // size].long()
        k_SKD, v_SKV = (cache[page_S, key_S % size].float() for cache in (k_cache, v_cache))
        seen_CS = torch.ones(len(place_C), len(key_S), dtype=torch.bool, device=q.device)
        if causal:
            seen_CS &= key_S <= place_C[:, None]
        if window is not None:
            seen_CS &= key_S > place_C[:, None] - window
        out[rows] = attend(q[rows].float(), k_SKD, v_SKV, seen_CS, scale, sinks).to(out.dtype)
    return out


def attend(q_CHD: Tensor, k_SKD: Tensor, v_SKV: Tensor, seen_CS: Tensor, scale: float, sinks: Tensor | None) -> Tensor:
    """[C, H, V]: softmax over the keys seen, the sink in the denominator only."""
    q_CKGD = q_CHD.unflatten(1, (k_SKD.shape[1], -1))
    score_KGCS = torch.einsum("ckgd,skd->kgcs", q_CKGD, k_SKD) * scale
    score_KGCS = score_KGCS.masked_fill(~seen_CS, -torch.inf)
    if sinks is None:
        weight_KGCS = torch.softmax(score_KGCS, dim=-1)
    else:
        sink_KGC1 = sinks.to(score_KGCS.dtype).view(*score_KGCS.shape[:2], 1, 1).expand(-1, -1, len(seen_CS), -1)
        weight_KGCS = torch.softmax(torch.cat((score_KGCS, sink_KGC1), dim=-1), dim=-1)[..., :-1]
    return torch.einsum("kgcs,skv->ckgv", weight_KGCS, v_SKV).flatten(1, 2)
