"""The engine of one process, and of DDP: whole parameters on every rank.

Memory of a trained BF16 parameter: 2 bytes working copy, 2 gradient, 12 master and AdamW; with more than one
micro-batch 4 bytes for the FP32 gradient sum, which is then also what the ranks exchange, once a step.
"""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from core.train.batch import Batch
from core.train.config import OptimConfig
from core.train.engine import LossFn, Shard
from core.train.graph import GraphedWork
from core.train.optim import MasterOptimizer
from core.train.state import StateReader, save_pieces, write_index


class StepModule(nn.Module):
    """Model and loss as one module, so that wrappers that hook the forward (DDP, ZeRO) see the whole step."""

    def __init__(self, model: nn.Module, loss_fn: LossFn) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss_fn(self.model, batch)


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by their plain names, whatever torch.compile wrapped."""
    return {n.replace("_orig_mod.", ""): p for n, p in model.named_parameters()}


class LocalEngine:
    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        config: OptimConfig,
        *,
        micro_batches: int,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
        graph: bool = False,
    ) -> None:
        """graph: one CUDA graph for a forward and backward (core.train.graph); needs a GPU, and is not for DDP."""
        self.model = model.to(device)
        self.rank, self.world, self.device = rank, world, device
        self.micro_batches = micro_batches
        self.parameters = named_parameters(self.model)
        if world > 1:
            for tensor in (*self.model.parameters(), *self.model.buffers()):
                torch.distributed.broadcast(tensor.data, src=0)
        self.optimizer = MasterOptimizer(self.parameters, config)
        self.step_module: nn.Module = StepModule(self.model, loss_fn)
        if world > 1 and micro_batches == 1:  # else nothing to overlap: the sums are exchanged after the last backward
            ids = [device.index] if device.type == "cuda" else None
            self.step_module = DistributedDataParallel(
                self.step_module, device_ids=ids, gradient_as_bucket_view=True, init_sync=False
            )

        trained = [p for p in self.parameters.values() if p.requires_grad]
        self.work: Any = GraphedWork(self.eager_work, trained) if graph else self.eager_work

    def eager_work(self, batch: Batch, scale: float | Tensor) -> dict[str, Tensor]:
        loss, stats = self.step_module(batch)
        (loss * scale).backward()
        return stats | {"loss": loss.detach()}

    def forward_backward(self, batch: Batch, scale: float, last: bool) -> dict[str, Tensor]:
        if isinstance(self.step_module, DistributedDataParallel):
            scale *= self.world  # DDP averages over the ranks; the contract is a sum
        stats = self.work(batch, scale)
        if self.micro_batches > 1:
            self.optimizer.accumulate()
            if last and self.world > 1:
                self.sum_gradients()
        return stats

    def sum_gradients(self) -> None:
        """FP32 gradient sums over the ranks."""
        works = [torch.distributed.all_reduce(g, async_op=True) for g in self.optimizer.gradient_sums()]
        for work in works:
            if work is not None:
                work.wait()

    def step(self, lr_factor: float) -> Tensor:
        return self.optimizer.step(lr_factor)

    def working_shards(self, names: Collection[str]) -> Iterator[Shard]:
        for name in names:
            parameter = self.parameters[name]
            yield Shard(name, parameter.shape, 0, parameter.data.view(-1))

    def master_shards(self, names: Collection[str]) -> Iterator[Shard]:
        for name in names:
            master = self.optimizer.masters[name]
            yield Shard(name, master.shape, 0, master.view(-1))

    def save(self, folder: Path) -> None:
        if self.rank == 0:
            pieces = ((n, kind, 0, t) for n, kind, t in self.optimizer.state_tensors())
            part = save_pieces(folder, pieces, 0, 1)
            shapes = {n: list(m.shape) for n, m in self.optimizer.masters.items()}
            write_index(folder, [part], shapes, self.optimizer.steps_done())

    def load(self, folder: Path) -> None:
        reader = StateReader(folder)
        reader.check({n: m.shape for n, m in self.optimizer.masters.items()}, self.optimizer.kinds())
        for name, master in self.optimizer.masters.items():
            for kind in reader.kinds(name):
                self.optimizer.restore(name, kind, reader.read(name, kind, 0, master.numel()), reader.steps)
        self.optimizer.write_working()

    def full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.model.state_dict().items():
            yield name.replace("_orig_mod.", ""), tensor.detach().cpu()

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        if self.world > 1:
            values = values.to(self.device)
            torch.distributed.all_reduce(values)
        return values

    def close(self) -> None:
        """Nothing to release."""


def gather_objects(value: Any, world: int) -> list[Any]:
    """Every rank's value, on every rank."""
    if world == 1:
        return [value]
    found: list[Any] = [None] * world
    torch.distributed.all_gather_object(found, value)
    return found
