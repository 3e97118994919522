"""The seam between the step loop and how parameters are held: one process, DDP, or DeepSpeed ZeRO.

An engine owns FP32 masters of the trained parameters and their BF16 working copies, which the forward uses.
After `step` every working copy equals bf16(master); the loop may then overwrite selected ones in place with their
snapped values (`working_shards`) and the next `step` starts from the masters again, so nothing is lost.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from core.train.batch import Batch

LossFn = Callable[[nn.Module, Batch], tuple[Tensor, dict[str, Tensor]]]
"""(model, batch) -> (loss summed over the batch's targets, summed statistics); the engine divides."""


@dataclass(frozen=True)
class Shard:
    """The part of one parameter that this rank holds, as writable flat storage.

    name: parameter name in the model (no wrapper prefixes); shape: of the whole parameter.
    start: offset of `flat[0]` in the flattened parameter; a whole parameter has start 0 and flat.numel() == numel.
    """

    name: str
    shape: torch.Size
    start: int
    flat: Tensor

    @property
    def whole(self) -> bool:
        return self.start == 0 and self.flat.numel() == self.shape.numel()


class Engine(Protocol):
    model: nn.Module
    rank: int
    world: int
    device: torch.device

    def forward_backward(self, batch: Batch, scale: float, last: bool) -> dict[str, Tensor]:
        """Accumulate gradients of `scale * loss_sum`, summed over ranks; `last` marks the step's final micro-batch.

        Returns this rank's detached statistics with `loss` (the unscaled sum) among them.
        """
        ...

    def step(self, lr_factor: float) -> float | Tensor:
        """Clip, update the masters at `lr_factor` x the configured rates, rewrite working copies, drop gradients.

        Returns the global gradient norm before clipping; a 0-dim tensor where a number would need a synchronisation.
        """
        ...

    def working_shards(self, names: Collection[str]) -> Iterator[Shard]:
        """BF16 storage behind the named parameters on this rank, whether trained or frozen."""
        ...

    def master_shards(self, names: Collection[str]) -> Iterator[Shard]:
        """FP32 masters of the named trained parameters on this rank."""
        ...

    def save(self, folder: Path) -> None:
        """Write masters and optimiser state; readable by any engine at any world size. Collective."""
        ...

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote and rewrite the working copies. Collective."""
        ...

    def full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, whole BF16 working tensor on CPU) of every parameter and buffer, one at a time. Collective;
        only rank 0 may use the tensors."""
        ...

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Element-wise sum of `values` over ranks, the same on every rank."""
        ...

    def close(self) -> None: ...
