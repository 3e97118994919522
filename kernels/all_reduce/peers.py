"""The ranks of one node that exchange partial sums, and on GPUs the memory that they all can read.

On CUDA each rank owns two halves of a data buffer and a table of flags in symmetric memory (torch.distributed's
_symmetric_memory: plain peer mappings over NVLink; NVLink multicast is switched off, it is neither needed nor wanted).
The kernel learns all ranks' addresses from two small tensors. On a CPU there is only the process group.
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor

from core.errors import ConfigError, UnsupportedError

BLOCKS = 64  # programs of a call; token t belongs to program t % BLOCKS in every call
MOST_RANKS = 16


class Peers:
    """Made once, by every rank of the group at the same time; used on one stream, with the same calls on every rank.

    world: ranks. rank: this one. symmetric: whether they read each other's memory; then
    data, flags: int64 [W], the address of each rank's data buffer [2, tokens, hidden] and flags int32 [BLOCKS, W];
    epochs: int32 [BLOCKS], the calls that each program made.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        tokens: int,
        hidden: int,
        device: torch.device,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """
        Args:
            group: of one node; None: a single process, and no communication.
            tokens, hidden, dtype: the largest call and its values; they size the buffers on CUDA.
        Raises:
            ConfigError: sizes below 1, or more ranks than MOST_RANKS.
            UnsupportedError: the GPUs cannot read each other's memory; there is no silent other way.
        """
        if tokens < 1 or hidden < 1:
            raise ConfigError(f"tokens={tokens}, hidden={hidden}: expected at least 1 of each")
        self.group, self.device, self.dtype = group, torch.device(device), dtype
        self.tokens, self.hidden = tokens, hidden
        self.rank = dist.get_rank(group) if group is not None else 0
        self.world = dist.get_world_size(group) if group is not None else 1
        if self.world > MOST_RANKS:
            raise ConfigError(f"a group of {self.world} ranks: expected at most {MOST_RANKS}, of one node")
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.symmetric = self.device.type == "cuda" and self.world > 1
        if self.symmetric:
            self.share()

    def share(self) -> None:
        """Allocate what the ranks share, and wait until it is ready everywhere."""
        self.held: list[object] = []  # keeps the memory and the mappings alive
        self.epochs = torch.zeros(BLOCKS, dtype=torch.int32, device=self.device)
        self.data = self.mapped("data", (2, self.tokens, self.hidden), self.dtype)
        self.flags = self.mapped("flags", (BLOCKS, self.world), torch.int32)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        dist.barrier(self.group)  # nobody raises a flag before every rank has cleared its own

    def mapped(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Zeros of this rank that all ranks can read and write; int64 [W], every rank's addresses as seen from here."""
        os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"  # read when memory is first shared
        import torch.distributed._symmetric_memory as symmetric_memory

        try:
            own = symmetric_memory.empty(*shape, dtype=dtype, device=self.device)
            handle = symmetric_memory.rendezvous(own, self.group)
            views = [handle.get_buffer(rank, shape, dtype) for rank in range(self.world)]
        except RuntimeError as error:
            raise UnsupportedError(
                f"{self.device} cannot share {name} with the group's other GPUs ({str(error).splitlines()[0]}): "
                "run on GPUs of one node with peer access, or in one process"
            ) from error
        own.zero_()
        self.held += [own, handle, views]
        return torch.tensor([view.data_ptr() for view in views], dtype=torch.int64, device=self.device)
