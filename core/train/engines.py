"""Choosing an engine from `parallel=...`, and joining the process group a launcher made."""

import os

import torch
from torch import nn

from core.errors import ConfigError, UnsupportedError
from core.train.config import OptimConfig, OptimName, ParallelConfig, ParallelMode
from core.train.engine import Engine, LossFn
from core.train.local import LocalEngine

ALONE = {  # a world of one, at any free port
    "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0",
}  # fmt: skip
REFUSED = {
    ParallelMode.fsdp2: "parallel=fsdp2 is not supported: FSDP2 shards along dimension 0 as DTensors and its "
    "mixed-precision copies are rebuilt in every forward, so a snapped working copy would not survive; "
    "use parallel=zero3",
    ParallelMode.ep: "parallel=ep (expert parallelism) is not supported for training; use parallel=zero3, which also "
    "divides the experts' memory over the ranks",
}


def start_processes(parallel: ParallelConfig, device: torch.device) -> tuple[int, int]:
    """(rank, world size); joins the process group under torchrun or accelerate launch.

    Raises:
        ConfigError: several processes were launched with parallel=none, or one with a mode that needs a launcher.
        UnsupportedError: a mode that is refused by name.
    """
    if parallel.mode in REFUSED:
        raise UnsupportedError(REFUSED[parallel.mode])
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and parallel.mode is ParallelMode.none:
        raise ConfigError(f"{world} processes were launched with parallel=none; set parallel=ddp, zero2 or zero3")
    if parallel.mode is ParallelMode.none:
        return 0, 1
    if not torch.distributed.is_initialized():
        for key, value in ALONE.items():
            os.environ.setdefault(key, value)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def check_graph(graph: bool, parallel: ParallelConfig, device: torch.device) -> None:
    """ConfigError for a CUDA graph without a GPU, or across processes, whose exchange it does not record."""
    if graph and (device.type != "cuda" or parallel.mode is not ParallelMode.none):
        raise ConfigError(
            f"graph=true needs a GPU and parallel=none, not {device.type} and {parallel.mode.value}; set graph=false"
        )


def build_engine(
    model: nn.Module,
    loss_fn: LossFn,
    optim: OptimConfig,
    parallel: ParallelConfig,
    *,
    micro_batches: int,
    device: torch.device,
    graph: bool = False,
) -> Engine:
    """The engine of `parallel.mode` around a model whose requires_grad flags say what is trained.

    Args:
        micro_batches: forward passes a step; more than one keeps FP32 gradient sums.
        graph: replay a forward and backward as one CUDA graph; see `check_graph`.
    Raises:
        UnsupportedError: Muon under ZeRO, whose ranks hold flat slices and never a whole matrix.
    """
    if parallel.mode is ParallelMode.none:  # also inside a launched job: rank 0 may train something on its own
        return LocalEngine(model, loss_fn, optim, micro_batches=micro_batches, device=device, graph=graph)
    if optim.name is OptimName.muon and parallel.mode in {ParallelMode.zero2, ParallelMode.zero3}:
        raise UnsupportedError(
            f"optim=muon needs whole matrices and parallel={parallel.mode.value} holds flat slices; "
            "use optim=adamw or parallel=ddp"
        )
    rank, world = start_processes(parallel, device)
    if parallel.mode is ParallelMode.ddp:
        return LocalEngine(model, loss_fn, optim, micro_batches=micro_batches, device=device, rank=rank, world=world)
    from core.train.zero import ZeroEngine

    return ZeroEngine(model, loss_fn, optim, parallel, micro_batches=micro_batches, device=device)
