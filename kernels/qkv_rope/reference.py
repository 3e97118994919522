"""Queries, keys and values in plain torch: the definition, and the path without a GPU.

Legend: T tokens, H query heads, K key-value heads, D head dim, V value dim, R half the rotated dims.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.linear import reference as linear_reference
from kernels.rms_norm import reference as norm_reference

if TYPE_CHECKING:
    from kernels.qkv_rope import Heads


def rotate(x_TxD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """The leading dims of each head turned by its token's angles, in FP32, rounded once."""
    half = cos_TR.shape[-1]
    cos, sin = cos_TR[:, None], sin_TR[:, None]
    left, right = x_TxD[..., :half].to(torch.float32), x_TxD[..., half : 2 * half].to(torch.float32)
    turned = torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
    return torch.cat((turned.to(x_TxD.dtype), x_TxD[..., 2 * half :]), dim=-1)


def qkv_rope(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    angles: tuple[Tensor, Tensor, Tensor],
    target: tuple[Tensor, Tensor, Tensor],
    heads: "Heads",
    q_norm: Tensor | None,
    k_norm: Tensor | None,
) -> Tensor:
    """angles: cos, sin and position; target: slot and the two caches."""
    cos, sin, position = angles
    qkv = linear_reference.linear(x, weight, bias, x.dtype)
    queries, keys = heads.heads * heads.head_dim, heads.kv_heads * heads.head_dim
    q_THD = qkv[:, :queries].unflatten(1, (heads.heads, heads.head_dim))
    k_TKD = qkv[:, queries : queries + keys].unflatten(1, (heads.kv_heads, heads.head_dim))
    v_TKV = qkv[:, queries + keys :].unflatten(1, (heads.kv_heads, heads.value_dim))
    if q_norm is not None:
        q_THD = norm_reference.rms_norm(q_THD, q_norm, heads.eps)
    if k_norm is not None:
        k_TKD = norm_reference.rms_norm(k_TKD, k_norm, heads.eps)
    cos_TR, sin_TR = cos[position.long()], sin[position.long()]
    write_kv(rotate(k_TKD, cos_TR, sin_TR), v_TKV * heads.value_scale, *target)
    return rotate(q_THD, cos_TR, sin_TR).contiguous()


def write_kv(k: Tensor, v: Tensor, slot: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    kept = slot >= 0
    where = slot[kept].long()
    k_cache.flatten(0, 1)[where] = k[kept]
    v_cache.flatten(0, 1)[where] = v[kept]
