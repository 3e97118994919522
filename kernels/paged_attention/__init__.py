"""Attention of one step's queries over a paged key-value cache: decoding, verification and prefill chunks in one batch.

The queries of all requests lie one behind another. Those of a request are its last positions, so a request that decodes
has one, one that verifies drafts a few, and one that reads its prompt as many as the chunk. Keys and values lie in
pages, found through a table of each request.

A query's bits depend on its own keys and nothing else: not on other requests, on the number of queries beside it, on
where pages lie, nor on padding. `kernel` says how.
"""

import importlib
import os
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from core.errors import FormatError, UnsupportedError
from kernels.paged_attention import reference

__all__ = ["Batch", "paged_attention"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Batch:
    """Where the queries and keys of R requests lie; shared by all layers that share page numbers.

    page_table: int32 [R, P], the physical page of each logical page. Entries that no query sees are never used.
    length: int32 [R], keys of each request, those of this step's tokens included (written before the call).
    start: int32 [R + 1]; rows start[r] .. start[r + 1] - 1 of q are request r's last positions. None at all is allowed.
    longest_query, longest_key: bounds, known to the host, of the queries and keys of any request. They size the launch;
        queries and keys beyond them are not computed, so they must hold (checked where tensors are on the CPU).
    """

    page_table: Tensor
    length: Tensor
    start: Tensor
    longest_query: int
    longest_key: int


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: Batch,
    *,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
    causal: bool = True,
    backend: str = "auto",
) -> Tensor:
    """softmax(scale * q k) v over the keys each query sees.

    The query at position p sees key j iff j < length, j <= p if `causal`, and j > p - window if there is a window.
    Pages that no query sees may hold anything, NaN too.

    Args:
        q: [T, H, D], BF16, FP16 or FP32. Rows from start[R] on belong to nobody; their output is zero.
        k_cache: [pages, page size, KH, D]; query head h reads KV head h // (H // KH).
        v_cache: [pages, page size, KH, V]. D and V are multiples of 8 and may differ.
        batch: see `Batch`.
        window: positions a query sees, its own included; None for all.
        sinks: [H], one logit a head (not scaled) that takes part in the softmax's denominator and has no value.
        causal: False for a drafter's block, whose slots see each other.
        backend: "triton", "reference" (plain torch), or "auto": Triton on CUDA and under TRITON_INTERPRET=1.
    Returns:
        [T, H, V] in q's dtype. Softmax and sums are FP32; Triton rounds the weights to v's dtype before the product.
    Raises:
        FormatError: shapes, dtypes, devices, window or scale.
    """
    check(q, k_cache, v_cache, scale, window, sinks)
    check_batch(batch, q)
    if batch.longest_query == 0 or q.numel() == 0 or len(batch.length) == 0:
        return q.new_zeros(*q.shape[:2], v_cache.shape[-1])
    module = implementation(q, backend)
    with torch.no_grad():
        return module.paged_attention(
            q, k_cache, v_cache, batch, scale=scale, window=window, sinks=sinks, causal=causal
        )


def check(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, sinks: Tensor | None) -> None:
    """FormatError unless the tensors can be attended over."""
    if q.dim() != 3 or k.dim() != 4 or v.dim() != 4:
        raise FormatError(f"q {tuple(q.shape)}, k_cache {tuple(k.shape)}, v_cache {tuple(v.shape)}: want 3, 4, 4 dims")
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise FormatError(f"q is {q.dtype}, k_cache {k.dtype}, v_cache {v.dtype}: want one of {DTYPES} for all three")
    if k.shape[:3] != v.shape[:3] or k.shape[3] != q.shape[2]:
        raise FormatError(
            f"k_cache {tuple(k.shape)} and v_cache {tuple(v.shape)} differ before the last dimension, "
            f"or k_cache's last is not q's {q.shape[2]}"
        )
    if not k.shape[1] or (32 % k.shape[1] and k.shape[1] % 32):
        raise FormatError(f"k_cache has pages of {k.shape[1]} keys: want a divisor or a multiple of 32")
    if k.shape[2] == 0 or q.shape[1] % k.shape[2]:
        raise FormatError(f"q has {q.shape[1]} heads, k_cache {k.shape[2]}: want a multiple")
    if q.shape[2] % 8 or v.shape[3] % 8 or not q.shape[2] or not v.shape[3]:
        raise FormatError(f"head dims {q.shape[2]} of keys and {v.shape[3]} of values: want multiples of 8")
    if any(t.stride(-1) != 1 for t in (q, k, v)):
        raise FormatError("q, k_cache and v_cache must be contiguous along the head dim: pass .contiguous()")
    if any(t.device != q.device for t in (k, v)):
        raise FormatError(f"q is on {q.device}, k_cache on {k.device}, v_cache on {v.device}: want one device")
    if window is not None and window < 1:
        raise FormatError(f"window={window}: a query sees at least itself; want 1 or more, or None")
    if not scale > 0:
        raise FormatError(f"scale={scale}: want a positive number")
    if sinks is not None and (sinks.shape != q.shape[1:2] or not sinks.is_floating_point() or sinks.device != q.device):
        raise FormatError(
            f"sinks {sinks.dtype} {tuple(sinks.shape)} on {sinks.device}: want floats [{q.shape[1]}] on {q.device}"
        )


def check_batch(batch: Batch, q: Tensor) -> None:
    """FormatError unless the batch's tensors fit each other; what they hold is looked at on a CPU only."""
    table, length, start = batch.page_table, batch.length, batch.start
    for name, tensor in (("page_table", table), ("length", length), ("start", start)):
        if tensor.dtype != torch.int32 or tensor.device != q.device or not tensor.is_contiguous():
            raise FormatError(
                f"batch.{name} is {tensor.dtype} on {tensor.device}: want contiguous torch.int32 on {q.device}"
            )
    if table.dim() != 2 or length.shape != table.shape[:1] or start.shape != (table.shape[0] + 1,):
        raise FormatError(
            f"batch: page_table {tuple(table.shape)}, length {tuple(length.shape)}, start {tuple(start.shape)}: "
            "want [R, P], [R], [R + 1]"
        )
    if q.device.type != "cpu" or len(length) == 0:
        return
    longest_query, longest_key = int(start.diff().max()), int(length.max())
    if longest_query > batch.longest_query or longest_key > batch.longest_key:
        raise FormatError(
            f"batch: longest_query={batch.longest_query} and longest_key={batch.longest_key} must be at least "
            f"{longest_query} and {longest_key}, which start and length hold"
        )
    if int(start[0]) != 0 or int(start[-1]) > len(q) or int(start.diff().min()) < 0:
        raise FormatError(f"batch.start={start.tolist()}: want ascending rows of q from 0 to at most {len(q)}")
    if bool((length < start.diff()).any()):
        raise FormatError(
            f"batch.length={length.tolist()}: want at least the step's own {start.diff().tolist()} tokens"
        )


def implementation(q: Tensor, backend: str) -> ModuleType:
    """The module that does the work: `launch` (Triton) or `reference` (plain torch)."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if backend == "auto":
        backend = "triton" if q.is_cuda or interpreted else "reference"
    if backend == "reference":
        return reference
    if backend != "triton":
        raise UnsupportedError(f"backend {backend!r} is not one of auto, triton, reference")
    if not (q.is_cuda or interpreted):
        raise UnsupportedError("backend 'triton' needs a CUDA tensor, or TRITON_INTERPRET=1 for the interpreter")
    # Imported when first used: a machine without Triton can still use the reference.
    return importlib.import_module("kernels.paged_attention.launch")
