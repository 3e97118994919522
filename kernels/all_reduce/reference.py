"""THE definition of the all-reduce, in plain torch: parts are summed in the order of ranks, in FP32, rounded once.

Whatever moves the data, every rank adds the same numbers in the same order, so all ranks hold the same bits and the
schedulers that run beside each other on every rank cannot part.

Legend: W ranks, T tokens, G hidden size.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.all_reduce.peers import Peers


def gather(x: Tensor, peers: Peers) -> Tensor:
    """[W, T, G]: every rank's x, by the group's own all-gather."""
    if peers.world == 1:
        return x[None]
    parts_WTG = torch.empty(peers.world, *x.shape, dtype=x.dtype, device=x.device)
    dist.all_gather(list(parts_WTG.unbind(0)), x, group=peers.group)
    return parts_WTG


def total(parts_WTG: Tensor) -> Tensor:
    """FP32 [T, G] = ((part 0 + part 1) + part 2) + ..."""
    summed = parts_WTG[0].to(torch.float32)
    for part in parts_WTG[1:]:
        summed = summed + part.to(torch.float32)
    return summed


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * (x / rms(x)); the mean square in FP32, the quotient rounded before the weight multiplies."""
    x32 = x.to(torch.float32)
    x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return weight * x32.to(x.dtype)


def all_reduce(x: Tensor, peers: Peers) -> Tensor:
    return total(gather(x, peers)).to(x.dtype)


def all_reduce_norm(x: Tensor, peers: Peers, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    summed = (residual.to(torch.float32) + total(gather(x, peers))).to(residual.dtype)
    return norm(summed, weight, eps), summed
