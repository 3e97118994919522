"""The engine of one process, and of DDP: whole parameters on every rank."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from core.train.batch import Batch
from core.train.config import OptimConfig
from core.train.engine import LossFn, Shard
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
        self, model: nn.Module, loss_fn: LossFn, config: OptimConfig, *, micro_batches: int, device: torch.device,
        rank: int = 0, world: int = 1,
    ) -> None:
        self.model = model.to(device)
        self.rank, self.world, self.device = rank, world, device
        self.micro_batches = micro_batches
        self.parameters = named_parameters(self.model)
        self.optimizer = MasterOptimizer(self.parameters, config)
        self.step_module: nn.Module = StepModule(self.model, loss_fn)
        if world > 1:
            ids = [device.index] if device.type == "cuda" else None
            self.step_module = DistributedDataParallel(self.step_module, device_ids=ids, gradient_as_bucket_view=True)

    def forward_backward(self, batch: Batch, scale: float, last: bool) -> dict[str, Tensor]:
        if isinstance(self.step_module, DistributedDataParallel):
            # DDP averages; the contract is a sum. Every micro-batch is reduced, because FP32 sums are kept outside.
            loss, stats = self.step_module(batch)
            (loss * (scale * self.world)).backward()
        else:
            loss, stats = self.step_module(batch)
            (loss * scale).backward()
        if self.micro_batches > 1:
            self.optimizer.accumulate()
        return stats | {"loss": loss.detach()}

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
        reader.check({n: m.shape for n, m in self.optimizer.masters.items()})
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
