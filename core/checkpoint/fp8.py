"""Reading weights that a checkpoint stores in fewer bits: block FP8, MXFP4, and GPT-OSS's MXFP4.

FP8 (E4M3, "block" 128x128): weight [R, C] with `weight_scale_inv` [ceil(R/128), ceil(C/128)]; value = code * scale.

MiMo's fused QKV is the exception. The tensor is a stack of `num_key_value_heads` chunks (the same count in window
layers), each [Q | K | V], and the scale grid restarts at every chunk: V2.5-Pro has 8 chunks of 3,392 rows, and
8 * ceil(3392/128) = 216 scale rows, not ceil(27136/128) = 212. A block may straddle K and V. So dequantise chunk by
chunk, then take Q, K and V out.

Everything here returns BF16 (what the models hold); the product is formed in FP32 and rounded once.
"""

import torch
from torch import Tensor

from core.errors import CheckpointError
from core.mxfp4 import Packed, decode

FP8_BLOCK = 128


def grid_shape(rows: int, columns: int) -> tuple[int, int]:
    return -(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)


def dequantise_fp8(weight_RC: Tensor, scale: Tensor, name: str) -> Tensor:
    """BF16 [R, C] of block-FP8 codes; `scale` is [ceil(R/128), ceil(C/128)] in any float dtype."""
    rows, columns = weight_RC.shape
    if tuple(scale.shape) != grid_shape(rows, columns):
        raise CheckpointError(
            f"{name}: scale grid {tuple(scale.shape)} does not cover a weight of {rows}x{columns} in 128x128 blocks, "
            f"expected {grid_shape(rows, columns)}; the checkpoint is damaged or of another block size"
        )
    out = torch.empty(rows, columns, dtype=torch.bfloat16)
    wide = scale.to(torch.float32).repeat_interleave(FP8_BLOCK, dim=1)[:, :columns]
    for block, start in enumerate(range(0, rows, FP8_BLOCK)):
        out[start : start + FP8_BLOCK] = weight_RC[start : start + FP8_BLOCK].to(torch.float32) * wide[block]
    return out


def dequantise_mxfp4(codes: Tensor, scales: Tensor) -> Tensor:
    """BF16 [..., K] of codes [..., K/2] and E8M0 scales [..., K/32], low nibble first."""
    return decode(Packed(codes, scales))


def split_fused_qkv(
    fused: Tensor, scale: Tensor | None, chunks: int, rows: tuple[int, int, int], name: str
) -> tuple[Tensor, ...]:
    """(Q, K, V) of a fused tensor of `chunks` chunks; `rows` are the totals of Q, K and V over all chunks.

    Args:
        fused: [sum(rows), C], FP8 with `scale` or plain with scale None.
        scale: [chunks * ceil(chunk rows / 128), ceil(C/128)].
    """
    if fused.shape[0] != sum(rows) or any(r % chunks for r in rows):
        raise CheckpointError(
            f"{name} has {fused.shape[0]} rows; Q, K, V of {rows} rows in {chunks} chunks were expected"
        )
    parts = [r // chunks for r in rows]
    height = sum(parts)
    pieces = fused.split(height)
    if scale is not None:
        tall = grid_shape(height, fused.shape[1])[0]
        if scale.shape[0] != tall * chunks:
            raise CheckpointError(
                f"{name}: {scale.shape[0]} scale rows, expected {tall * chunks} ({chunks} chunks of {tall}); "
                "a re-export with another layout cannot be told apart safely, use the original checkpoint"
            )
        pieces = [dequantise_fp8(p, s, name) for p, s in zip(pieces, scale.split(tall), strict=True)]
    triples = [piece.split(parts) for piece in pieces]
    return tuple(torch.cat([t[i] for t in triples]) for i in range(3))


def dequantise_gpt_oss(blocks: Tensor, scales: Tensor) -> Tensor:
    """BF16 [E, K, N] of GPT-OSS's `*_blocks` [E, N, K/32, 16] and `*_scales` [E, N, K/32]; the model keeps K first."""
    out = torch.empty(blocks.shape[0], blocks.shape[2] * 32, blocks.shape[1], dtype=torch.bfloat16)
    for expert in range(blocks.shape[0]):
        out[expert] = decode(Packed(blocks[expert].flatten(-2), scales[expert])).transpose(0, 1)
    return out
