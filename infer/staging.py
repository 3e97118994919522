"""Many tensors of a checkpoint onto a device as fast as reading goes: long runs of bytes through little pinned memory.

The experts of a layer are some hundred tensors that lie next to each other in the files. Read one by one, each costs an
opened file and Python's attention; from memory that is not pinned, the host waits for every copy. So what lies together
is read together, in slices by several threads, into one of two pinned blocks, and copied from there tensor by tensor
while the other block is read into.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from core.checkpoint.index import Entry
from core.errors import CheckpointError

BLOCK_BYTES = 256 << 20
SLICE_BYTES = 8 << 20  # of a run, for one thread
GAP_BYTES = 1 << 20  # that are read although nobody wants them
READERS = 8


@dataclass(frozen=True)
class Piece:
    """A tensor of a file, and where it goes: contiguous memory of as many bytes."""

    entry: Entry
    out: Tensor

    @property
    def stop(self) -> int:
        return self.entry.start + self.entry.nbytes


def runs_of(pieces: Sequence[Piece], block_bytes: int) -> Iterator[list[Piece]]:
    """Pieces that lie together in a file, at most `block_bytes` from first to last byte (or one that is larger)."""
    run: list[Piece] = []
    for piece in sorted(pieces, key=lambda p: (str(p.entry.file), p.entry.start)):
        near = run and piece.entry.file == run[0].entry.file and piece.entry.start - run[-1].stop <= GAP_BYTES
        if run and not (near and piece.stop - run[0].entry.start <= block_bytes):
            yield run
            run = []
        run.append(piece)
    if run:
        yield run


class Staging:
    """Fills tensors on `device` from files.

    Args:
        reuse: read into two blocks and copy; None: where the device is not the host itself.
    """

    def __init__(self, device: torch.device, *, reuse: bool | None = None, block_bytes: int = BLOCK_BYTES) -> None:
        self.device, self.reuse = device, device.type == "cuda" if reuse is None else reuse
        self.block_bytes = block_bytes
        self.blocks: list[Tensor] = [torch.empty(0, dtype=torch.uint8)] * 2
        self.sent: list[torch.cuda.Event | None] = [None, None]
        self.turn = 0

    def fill(self, pieces: Sequence[Piece]) -> None:
        """Every `out` has the bytes of its entry, for whatever the device does next.

        Raises:
            CheckpointError: sizes that differ, or a file that ends early.
        """
        for piece in pieces:
            if piece.out.nbytes != piece.entry.nbytes:
                raise CheckpointError(
                    f"{piece.entry.name} in {piece.entry.file} is {piece.entry.dtype} {piece.entry.shape}, the model "
                    f"needs {piece.out.dtype} {tuple(piece.out.shape)}; config.json and weights are of different models"
                )
        with ThreadPoolExecutor(READERS) as readers:
            for run in runs_of([p for p in pieces if p.out.nbytes], self.block_bytes):
                self.through(run, readers) if self.reuse else straight(run, readers)

    def through(self, run: Sequence[Piece], readers: ThreadPoolExecutor) -> None:
        begin = run[0].entry.start
        block = self.block(run[-1].stop - begin)
        read(run[0].entry.file, begin, block, readers)
        for piece in run:
            at = piece.entry.start - begin
            flat(piece.out).copy_(block[at : at + piece.out.nbytes], non_blocking=True)
        if self.device.type == "cuda":
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.device))
            self.sent[self.turn] = event

    def block(self, size: int) -> Tensor:
        """uint8 [size] of the block whose turn it is, when its last content has left; it grows to what is asked for."""
        self.turn = 1 - self.turn
        event = self.sent[self.turn]
        if event is not None:
            event.synchronize()
        if self.blocks[self.turn].numel() < size:
            pinned = self.device.type == "cuda"
            room = max(size, min(self.block_bytes, BLOCK_BYTES))
            self.blocks[self.turn] = torch.empty(room, dtype=torch.uint8, pin_memory=pinned)
        return self.blocks[self.turn][:size]


def flat(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8).reshape(-1) if tensor.dim() else tensor.reshape(1).view(torch.uint8)


def straight(run: Sequence[Piece], readers: ThreadPoolExecutor) -> None:
    for piece in run:
        read(piece.entry.file, piece.entry.start, flat(piece.out), readers)


def read(path: Path, begin: int, out: Tensor, readers: ThreadPoolExecutor) -> None:
    """Bytes of a file from `begin` on into host memory uint8 [N].

    Raises:
        CheckpointError: the file ends before, or cannot be read.
    """
    memory = memoryview(out.numpy())

    def part(at: int) -> None:
        end = min(at + SLICE_BYTES, len(memory))
        while at < end:
            count = os.preadv(file, [memory[at:end]], begin + at)
            if not count:
                raise CheckpointError(f"{path} ends inside its tensors; the file is truncated, download it again")
            at += count

    try:
        file = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    try:
        list(readers.map(part, range(0, len(memory), SLICE_BYTES)))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    finally:
        os.close(file)
