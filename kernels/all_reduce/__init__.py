"""All-reduce of a tensor-parallel group on one node, alone or fused with the residual and the RMSNorm after it.

For a few tokens latency is all: one kernel copies its part into memory that the other GPUs read, raises a flag, waits
for theirs, and reads every part itself ("one shot"). Parts are summed in the order of ranks, so all ranks hold the same
bits. On a CPU, or with backend="reference", the process group gathers the parts, and they are summed alike.
"""

import importlib
import os
from types import ModuleType

import torch
from torch import Tensor

from core.errors import ConfigError, UnsupportedError
from kernels.all_reduce import reference
from kernels.all_reduce.peers import Peers

__all__ = ["Peers", "all_reduce", "all_reduce_norm"]


def all_reduce(x: Tensor, peers: Peers, *, backend: str = "auto") -> Tensor:
    """[T, G] in x's dtype: the sum over ranks, in FP32 and in the order of ranks, rounded once.

    Args:
        x: FP32 or BF16 [T, G], contiguous, the same shape on every rank; on GPUs at most peers' tokens, its hidden size
            and its dtype.
        peers: see `Peers`. One rank: no communication.
        backend: "triton", "reference" (the process group and plain torch), or "auto": Triton on CUDA and under
            TRITON_INTERPRET=1. A backend that cannot work raises; nothing falls back.
    Raises:
        ConfigError: a shape, dtype or device that does not fit.
    """
    check(x, peers)
    return implementation(x, backend).all_reduce(x, peers)


def all_reduce_norm(
    x: Tensor, peers: Peers, *, residual: Tensor, weight: Tensor, eps: float, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """(y, summed), both [T, G] in the residual's dtype: summed = residual + sum over ranks of x, in FP32, rounded
    once; y = RMSNorm of the rounded sum, the quotient rounded before it is multiplied by `weight`.

    Args:
        x, peers, backend: as for `all_reduce`.
        residual: FP32 or BF16 [T, G], contiguous, the same on every rank. weight: [G] of the residual's dtype.
    Raises:
        ConfigError: a shape, dtype or device that does not fit.
    """
    check(x, peers)
    if residual.shape != x.shape or residual.device != x.device or not residual.is_contiguous():
        raise ConfigError(
            f"residual is {tuple(residual.shape)} on {residual.device}: "
            f"expected contiguous {tuple(x.shape)} on {x.device}"
        )
    if residual.dtype not in (torch.float32, torch.bfloat16):
        raise ConfigError(f"residual is {residual.dtype}: expected float32 or bfloat16")
    if weight.shape != x.shape[1:] or weight.dtype != residual.dtype or weight.device != x.device:
        raise ConfigError(
            f"weight is {weight.dtype} {tuple(weight.shape)} on {weight.device}: "
            f"expected {residual.dtype} {tuple(x.shape[1:])} on {x.device}"
        )
    return implementation(x, backend).all_reduce_norm(x, peers, residual, weight.contiguous(), eps)


def check(x: Tensor, peers: Peers) -> None:
    """ConfigError unless x is [T, G] and fits the peers."""
    if x.dim() != 2 or x.dtype not in (torch.float32, torch.bfloat16) or not x.is_contiguous():
        raise ConfigError(f"x is {x.dtype} {tuple(x.shape)}: expected contiguous float32 or bfloat16 [T, G]")
    if x.device != peers.device:
        raise ConfigError(f"x is on {x.device}, the peers on {peers.device}: make the peers for x's device")
    if peers.symmetric and (len(x) > peers.tokens or x.shape[1] != peers.hidden or x.dtype != peers.dtype):
        raise ConfigError(
            f"x is {x.dtype} {tuple(x.shape)}, the peers hold {peers.dtype} up to ({peers.tokens}, {peers.hidden}): "
            "make the peers for the largest call"
        )


def implementation(x: Tensor, backend: str) -> ModuleType:
    """The module that does the work: `kernel` (Triton) or `reference` (the process group and plain torch)."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if backend == "auto":
        backend = "triton" if x.is_cuda or interpreted else "reference"
    if backend == "reference":
        return reference
    if backend != "triton":
        raise UnsupportedError(f"backend {backend!r} is not one of auto, triton, reference")
    if not (x.is_cuda or interpreted):
        raise UnsupportedError("backend 'triton' needs a CUDA tensor, or TRITON_INTERPRET=1 for the interpreter")
    # Imported when first used: a machine without Triton can still use the reference.
    return importlib.import_module("kernels.all_reduce.kernel")
