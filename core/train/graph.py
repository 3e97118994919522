"""The forward and backward of a batch as one CUDA graph.

A small model's step is thousands of kernels of a few microseconds, and launching them one by one takes longer than
running them. A graph records the launches once; a replay is one call. It reads and writes the same memory every time,
so batches are copied into the one it was recorded with, and gradients and statistics are read where it left them. What
it records must not ask the GPU for a value on the way.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from core.errors import UnsupportedError
from core.train.batch import Batch

Work = Callable[[Batch, Tensor], dict[str, Tensor]]
WARM_UP = 2  # runs before recording, in which kernels are compiled and libraries take their workspaces


@dataclass(frozen=True)
class Recorded:
    """A graph and its memory: what a replay reads (batch, scale), and what it leaves (stats, gradients)."""

    graph: torch.cuda.CUDAGraph
    batch: Batch
    scale: Tensor
    stats: dict[str, Tensor]
    gradients: list[Tensor | None]


class GraphedWork:
    """`work(batch, scale)`, which leaves gradients in `parameters`, recorded once for every shape of batch."""

    def __init__(self, work: Work, parameters: list[nn.Parameter]) -> None:
        self.work, self.parameters = work, parameters
        self.recorded: dict[tuple[torch.Size, ...], Recorded] = {}

    def __call__(self, batch: Batch, scale: float) -> dict[str, Tensor]:
        """As `work`; the gradients replace those of the call before.

        Raises:
            UnsupportedError: `work` needs a value from the GPU on the way, so it cannot be recorded.
        """
        shapes = tuple(t.shape for t in batch.tensors())
        if shapes not in self.recorded:
            self.recorded[shapes] = self.record(batch)
        found = self.recorded[shapes]
        for here, new in zip(found.batch.tensors(), batch.tensors(), strict=True):
            here.copy_(new, non_blocking=True)
        found.scale.fill_(scale)
        found.graph.replay()
        for parameter, gradient in zip(self.parameters, found.gradients, strict=True):
            parameter.grad = gradient
        return {name: value.clone() for name, value in found.stats.items()}

    def record(self, batch: Batch) -> Recorded:
        batch = type(batch)(*(t.clone() for t in batch.tensors()))
        scale = torch.ones((), device=batch.input_ids_BT.device)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self.work(batch, scale)
                self.drop_gradients()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                stats = self.work(batch, scale)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = str(error).splitlines()[0]
            raise UnsupportedError(
                f"graph=true, and this step cannot be recorded: {reason}; set graph=false"
            ) from error
        return Recorded(graph, batch, scale, stats, [p.grad for p in self.parameters])

    def drop_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None
