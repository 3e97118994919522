"""Host memory that weights pass through on their way to a GPU: pinned, little, and used again.

Fresh memory costs a page fault for every 4 KB, and from memory that is not pinned the host waits for each copy. So
there are two pinned blocks: one is read into while the other is on its way.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

BLOCK_BYTES = 256 << 20
ALIGNMENT = 64


class Staging:
    """Fills tensors on `device` from the host.

    Args:
        reuse: read into blocks of this class and copy; None: where the device is not the host itself.
        block_bytes: of what callers had better fill at a time.
    """

    def __init__(self, device: torch.device, *, reuse: bool | None = None, block_bytes: int = BLOCK_BYTES) -> None:
        self.block_bytes = block_bytes
        self.device, self.reuse = device, device.type == "cuda" if reuse is None else reuse
        self.blocks: list[Tensor] = [torch.empty(0, dtype=torch.uint8)] * 2
        self.sent: list[torch.cuda.Event | None] = [None, None]
        self.turn = 0

    def fill(self, out: Sequence[Tensor], read: Callable[[Sequence[Tensor]], None]) -> None:
        """`read` writes host tensors of the shapes and dtypes of `out`; `out` has their content for whatever the
        device does next. The host tensors are not to be kept."""
        if not self.reuse:
            read(out)
            return
        host = self.like(out)
        read(host)
        for there, here in zip(out, host, strict=True):
            there.copy_(here, non_blocking=True)
        if self.device.type == "cuda":
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.device))
            self.sent[self.turn] = event

    def like(self, out: Sequence[Tensor]) -> list[Tensor]:
        """Views of the block whose turn it is, when its last content has left; it grows to what is asked for."""
        self.turn = 1 - self.turn
        event = self.sent[self.turn]
        if event is not None:
            event.synchronize()
        ends = [0]
        for tensor in out:
            ends.append(ends[-1] + -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT)
        if self.blocks[self.turn].numel() < ends[-1]:
            pinned = self.device.type == "cuda"
            self.blocks[self.turn] = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=pinned)
        block = self.blocks[self.turn]
        return [block[at : at + t.nbytes].view(t.dtype).view(t.shape) for at, t in zip(ends[:-1], out, strict=True)]
