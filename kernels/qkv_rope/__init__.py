"""From normalised hidden states to attention's inputs: queries, and keys and values in their places in the cache.

Projection, RMSNorm of each head's query and key (Qwen3), rotation, scaling of values, and the write into the paged
cache, in place. A token's bits depend on its hidden state, position and the weights, and on no other token.

Rounding points, with x's dtype between them: after the projection (and bias); inside the norm as in kernels.rms_norm;
after the rotation, which is FP32 with FP32 cosines and sines and rounds once; after the scaling of values. The models'
own modules round cosines, both products and their sum to BF16, so a rotated BF16 value of ours is nearer to the exact
one and may differ from theirs by two units in the last place. In FP32 they agree up to the order of sums.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from core.errors import ConfigError, FormatError, UnsupportedError
from kernels.dispatch import check_activations, check_tensor, implementation, rows

__all__ = ["Heads", "qkv_rope", "write_kv"]

INDEX = (torch.int32, torch.int64)


@dataclass(frozen=True)
class Heads:
    """Geometry of one attention layer (on one rank).

    heads, kv_heads: of queries (0: keys and values only, as of a drafter's context); of keys and values.
    head_dim, value_dim: of queries and keys; of values.
    rotary_dims: leading dims of a head that are rotated, even, 0 to head_dim.
    value_scale: factor on every value. eps: of the heads' norms.
    Raises:
        ConfigError: a size below its least, or rotary_dims as above.
    """

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    rotary_dims: int
    value_scale: float = 1.0
    eps: float = 1e-6

    def __post_init__(self) -> None:
        for name, least in (("heads", 0), ("kv_heads", 1), ("head_dim", 1), ("value_dim", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)}: expected {least} or more")
        if not 0 <= self.rotary_dims <= self.head_dim or self.rotary_dims % 2:
            raise ConfigError(f"rotary_dims={self.rotary_dims}: expected an even number of 0 to {self.head_dim}")

    @property
    def width(self) -> int:
        """Outputs of the projection."""
        return (self.heads + self.kv_heads) * self.head_dim + self.kv_heads * self.value_dim


def qkv_rope(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    position: Tensor,
    slot: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    heads: Heads,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    rotary_pairs: str = "half",
    backend: str = "auto",
) -> Tensor:
    """Write k and v of every token into the caches and return q.

    Args:
        x: BF16 or FP32 [T, G], normalised; T may be 0.
        weight: [heads.width, G], rows of all query heads, then key heads, then value heads.
        bias: [heads.width] or None.
        cos, sin: FP32 [S, rotary_dims / 2], row = position; with whatever factor belongs on them (YaRN's).
        position: int32 or int64 [T], 0 to S - 1. On a GPU, where looking would wait, another one makes q and k NaN.
        slot: int32 or int64 [T], page * page size + offset; a negative one writes nothing (padding). Two tokens with
            one slot leave either's key there. On a GPU, a slot beyond the cache writes nothing.
        k_cache, v_cache: x's dtype [pages, page size, KH, D] and [pages, page size, KH, V], contiguous.
        heads: see `Heads`.
        q_norm, k_norm: [D], weights of the RMSNorm of each head's query and key, or None.
        rotary_pairs: "half": dims i and i + rotary_dims / 2 turn together. No other is known.
        backend: "triton", "reference" (plain torch), or "auto": Triton on CUDA and under TRITON_INTERPRET=1.
    Returns:
        q [T, H, D] in x's dtype.
    Raises:
        FormatError: shapes, dtypes, devices; on CPU tensors also a position or slot out of range.
        UnsupportedError: rotary_pairs, backend.
    """
    if rotary_pairs != "half":
        raise UnsupportedError(f"rotary_pairs={rotary_pairs!r}: only 'half' is computed; reorder the rows of q and k")
    check_activations(x)
    if x.dim() != 2:
        raise FormatError(f"x has the shape {tuple(x.shape)}: expected [T, G]")
    given = [
        ("weight", weight, (heads.width, x.shape[1])), ("bias", bias, (heads.width,)),
        ("q_norm", q_norm, (heads.head_dim,)), ("k_norm", k_norm, (heads.head_dim,)),
        ("k_cache", k_cache, (None, None, heads.kv_heads, heads.head_dim)),
        ("v_cache", v_cache, (*k_cache.shape[:3], heads.value_dim)),
    ]  # fmt: skip
    for name, tensor, shape in given:
        if tensor is not None:
            check_tensor(name, tensor, shape, x.dtype, x.device)
    for name, table in (("cos", cos), ("sin", sin)):
        check_tensor(name, table, (len(cos), heads.rotary_dims // 2), torch.float32, x.device)
    check_index("position", position, len(x), 0, len(cos), x)
    check_index("slot", slot, len(x), None, k_cache.shape[0] * k_cache.shape[1], x)
    work = implementation(__name__, x, backend)
    return work.qkv_rope(rows(x), weight, bias, (cos, sin, position), (slot, k_cache, v_cache), heads, q_norm, k_norm)


def write_kv(k: Tensor, v: Tensor, slot: Tensor, k_cache: Tensor, v_cache: Tensor, *, backend: str = "auto") -> None:
    """Copy finished keys and values to their slots: a drafter's context, whose keys were made elsewhere.

    Args:
        k, v: [T, KH, D] and [T, KH, V], BF16 or FP32; T may be 0.
        slot, k_cache, v_cache, backend: as for `qkv_rope`.
    Raises:
        FormatError: shapes, dtypes, devices; on CPU tensors also a slot beyond the cache.
    """
    check_activations(k)
    if k.dim() != 3:
        raise FormatError(f"k has the shape {tuple(k.shape)}: expected [T, KH, D]")
    k, v = k.contiguous(), v.contiguous()
    check_tensor("v", v, (*k.shape[:2], None), k.dtype, k.device)
    check_tensor("k_cache", k_cache, (None, None, *k.shape[1:]), k.dtype, k.device)
    check_tensor("v_cache", v_cache, (*k_cache.shape[:3], v.shape[2]), k.dtype, k.device)
    check_index("slot", slot, len(k), None, k_cache.shape[0] * k_cache.shape[1], k)
    implementation(__name__, k, backend).write_kv(k, v, slot, k_cache, v_cache)


def check_index(name: str, index: Tensor, count: int, least: int | None, end: int, like: Tensor) -> None:
    """FormatError unless int32 or int64 [count] on `like`'s device; values, least to end - 1, are seen on CPUs only."""
    if index.dtype not in INDEX or index.shape != (count,) or index.device != like.device or not index.is_contiguous():
        raise FormatError(
            f"{name} is {index.dtype} {tuple(index.shape)} on {index.device}: "
            f"expected contiguous int32 or int64 ({count},) on {like.device}"
        )
    if index.device.type == "cpu" and count:
        low, high = int(index.min()), int(index.max())
        if high >= end or (least is not None and low < least):
            allowed = f"{least} to {end - 1}" if least is not None else f"negative, or at most {end - 1}"
            raise FormatError(f"{name} has values of {low} to {high}: expected {allowed}")
