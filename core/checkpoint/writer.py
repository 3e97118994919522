"""Writing a checkpoint: sharded, streamed, and all or nothing.

Everything goes into a hidden folder beside the target: shards as they fill up, each synced to disk, then the index.
Only then is the hidden folder renamed into place. A killed or failed save therefore leaves the previous checkpoint
as it was, and never a folder that looks complete and is not.

A safetensors header stands before the data and is not known until the shard ends, so room is kept for it and the
rest filled with spaces, which the format allows.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from core.checkpoint.index import DTYPE_NAMES, INDEX, SINGLE
from core.errors import CheckpointError

HEADER_ROOM = 128 * 1024  # bytes; a shard also ends when its header is full (about 1,000 tensors)
SHARD_BYTES = 4 * 2**30


class ShardWriter:
    """`add` tensors one at a time, then `finish`."""

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self.shards: list[list[str]] = []
        self.total = 0
        self.seen: set[str] = set()
        self.file: BinaryIO | None = None
        self.header: dict[str, Any] = {}
        self.header_size = self.offset = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Append one tensor (any device, any layout; stored as it is, contiguous)."""
        if name in self.seen:
            raise CheckpointError(f"{name} was written twice into {self.folder}; this is a bug in the key map")
        self.seen.add(name)
        tensor = tensor.detach().cpu().contiguous()
        size = tensor.numel() * tensor.element_size()
        entry = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape)}
        room = len(json.dumps({name: entry})) + 64
        if self.file and (self.offset + size > self.shard_bytes or self.header_size + room > HEADER_ROOM - 64):
            self.close_shard()
        file = self.file or self.open_shard()
        entry["data_offsets"] = [self.offset, self.offset + size]
        self.header[name] = entry
        self.header_size += room
        if size:
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        self.offset += size
        self.total += size

    def path(self, number: int) -> Path:
        return self.folder / f"shard-{number}.part"

    def open_shard(self) -> BinaryIO:
        self.file = self.path(len(self.shards)).open("wb")
        self.file.seek(HEADER_ROOM)
        self.header, self.header_size, self.offset = {"__metadata__": {"format": "pt"}}, 64, 0
        return self.file

    def close_shard(self) -> None:
        if not self.file:
            return
        text = json.dumps(self.header, separators=(",", ":")).encode()
        self.file.seek(0)
        self.file.write((HEADER_ROOM - 8).to_bytes(8, "little") + text.ljust(HEADER_ROOM - 8))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.file = None
        self.shards.append([n for n in self.header if n != "__metadata__"])

    def finish(self) -> None:
        """Final names, then the index."""
        self.close_shard()
        count = len(self.shards)
        if count == 1:
            self.path(0).rename(self.folder / SINGLE)
            return
        weight_map = {}
        for number, names in enumerate(self.shards):
            final = f"model-{number + 1:05}-of-{count:05}.safetensors"
            self.path(number).rename(self.folder / final)
            weight_map |= dict.fromkeys(names, final)
        write_text(
            self.folder / INDEX,
            json.dumps({"metadata": {"total_size": self.total}, "weight_map": weight_map}, indent=1),
        )


def write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A hidden folder that becomes `out` when the block ends without an error; else it is removed and `out` stays.

    Raises:
        CheckpointError: the disk is full or not writable.
    """
    part, old = (out.with_name(f".{out.name}.{end}") for end in ("part", "old"))
    try:
        if old.exists() and not out.exists():
            old.rename(out)  # a save was killed between the two renames below
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        sync(part)
        shutil.rmtree(old, ignore_errors=True)
        if out.exists():
            out.rename(old)
        part.rename(out)
        sync(out.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        if old.exists() and not out.exists():
            old.rename(out)
        why = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
        kept = "the previous checkpoint there is unchanged; " if out.exists() else ""
        raise CheckpointError(
            f"could not save to {out}: {why}; {kept}free some space or choose another folder"
        ) from error
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
