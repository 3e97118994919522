"""Opening a checkpoint folder: every file is checked against its own header before one byte of weight is read.

A safetensors file is: 8 bytes of header length (little-endian), a JSON header {name: {dtype, shape, data_offsets}},
the data.
Files come from strangers, so sizes, offsets, dtypes and shapes are verified here and nothing is allocated on their
word alone; names in an index may not lead out of the folder; nothing is ever unpickled.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER = 100 * 2**20  # the safetensors library's own limit

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: `start` is the byte offset in `file`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Checkpoint:
    """All tensors of a folder by name, and what config.json says."""

    folder: Path
    entries: dict[str, Entry]
    config: dict[str, Any] = field(default_factory=dict)

    def read(self, name: str) -> Tensor:
        """One tensor, freshly allocated on the CPU (not memory-mapped: pages of a mapped file count as ours)."""
        entry = self.entries[name]
        return read_bytes(entry, 0, entry.nbytes).view(entry.dtype).reshape(entry.shape)

    def read_into(self, name: str, out: Tensor) -> None:
        """One tensor into `out`: contiguous memory of the CPU with its shape and dtype.

        Raises:
            CheckpointError: another shape or dtype.
        """
        entry = self.entries[name]
        if tuple(out.shape) != entry.shape or out.dtype.itemsize != entry.dtype.itemsize:
            raise CheckpointError(
                f"{name} in {entry.file} is {entry.dtype} {entry.shape}, the model needs {out.dtype} "
                f"{tuple(out.shape)}; config.json and weights are of different models"
            )
        if out.numel():
            with entry.file.open("rb", buffering=0) as file:
                file.seek(entry.start)
                read_exactly(file, out.view(torch.uint8).reshape(-1).numpy().data, entry)

    def read_row(self, name: str, row: int) -> Tensor:
        """Index `row` of the first dimension alone, e.g. one expert of a fused tensor."""
        entry = self.entries[name]
        size = entry.nbytes // entry.shape[0]
        return read_bytes(entry, row * size, size).view(entry.dtype).reshape(entry.shape[1:])

    @property
    def largest_shard(self) -> int:
        return max(file.stat().st_size for file in {e.file for e in self.entries.values()})


def read_bytes(entry: Entry, offset: int, size: int) -> Tensor:
    """uint8 [size] from `offset` inside a tensor."""
    raw = torch.empty(size, dtype=torch.uint8)
    if size:
        with entry.file.open("rb", buffering=0) as file:
            file.seek(entry.start + offset)
            read_exactly(file, raw.numpy().data, entry)
    return raw


def read_exactly(file: Any, target: memoryview, entry: Entry) -> None:
    done = 0
    while done < len(target):
        count = file.readinto(target[done : done + 2**30])  # Linux reads at most 2 GiB at a time
        if not count:
            raise CheckpointError(f"{entry.file}: ends inside {entry.name}; the file is truncated, download it again")
        done += count


def open_checkpoint(folder: Path | str) -> Checkpoint:
    """Headers of all shards, verified.

    Raises:
        CheckpointError: the folder or a shard is missing, damaged or truncated, or the index disagrees with the shards.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    if (folder / INDEX).exists():
        return Checkpoint(folder, sharded(folder), config)
    if (folder / SINGLE).exists():
        return Checkpoint(folder, read_header(inside(folder, SINGLE)), config)
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a folder; download the checkpoint there, or set model.path to where it is"
        )
    other = sorted(p.name for p in folder.glob("*.safetensors"))
    if other:
        raise CheckpointError(
            f"{folder} has {len(other)} safetensors files but no {INDEX}; the download is incomplete, repeat it"
        )
    raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}; download the weights (safetensors) into it")


def sharded(folder: Path) -> dict[str, Entry]:
    index = read_json(folder / INDEX)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()) or not weight_map:
        raise CheckpointError(f"{folder / INDEX} has no usable weight_map; download it again")
    entries: dict[str, Entry] = {}
    for file_name in sorted(set(weight_map.values())):
        path = folder / file_name
        odd = "\\" in file_name or not file_name.isprintable()
        if Path(file_name).is_absolute() or ".." in Path(file_name).parts or odd:
            raise CheckpointError(
                f"{folder / INDEX} points outside the folder ({file_name!r}); do not use this checkpoint"
            )
        if not path.is_file():
            raise CheckpointError(f"{path} is named in {INDEX} but missing; the download is incomplete, repeat it")
        found = read_header(inside(folder, file_name))
        for name in found:
            if weight_map.get(name) != file_name:
                where = weight_map.get(name, "nowhere")
                raise CheckpointError(f"{path} holds {name}, which {INDEX} places {where}; download both again")
        entries |= found
    missing = next((name for name in weight_map if name not in entries), None)
    if missing is not None:
        raise CheckpointError(
            f"{folder / weight_map[missing]} lacks {missing!r}, which {INDEX} places there; download it again"
        )
    return entries


def inside(folder: Path, name: str) -> Path:
    """`folder / name`, whose symlinks stay in the folder.

    The hub's cache is the one layout whose links leave it: snapshots/<revision>/<name> -> ../../blobs/<hash>. Any other
    link out is refused: a downloaded folder could name a private file, and an export would carry that along.

    Raises:
        CheckpointError
    """
    path, home = (folder / name).resolve(), folder.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if not (path.is_relative_to(home) or path.is_relative_to(blobs)):
        raise CheckpointError(f"{folder / name} is a link that leads out of the folder, to {path}; copy the file there")
    return folder / name


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({type(error).__name__}); download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, expected an object; download it again")
    return value


def read_header(path: Path) -> dict[str, Entry]:
    """Entries of one safetensors file, each checked against the file's size and its own dtype and shape."""
    size = path.stat().st_size
    damaged = f"{path} is not a complete safetensors file"
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise CheckpointError(f"{damaged} (header of {length} bytes in a file of {size}); download it again")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{damaged} (its header is no JSON); download it again") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{damaged} (its header is no object); download it again")
    header.pop("__metadata__", None)
    entries = {name: parse(name, value, path, 8 + length) for name, value in header.items()}
    position = 8 + length
    for entry in sorted(entries.values(), key=lambda e: (e.start, e.nbytes)):
        if entry.start != position:
            raise CheckpointError(f"{damaged} ({entry.name} overlaps a neighbour or leaves a gap); download it again")
        position += entry.nbytes
    if position != size:
        raise CheckpointError(f"{damaged} ({size} bytes, its header needs {position}); download it again")
    return entries


def parse(name: str, value: Any, path: Path, base: int) -> Entry:
    if not name.isprintable():
        raise CheckpointError(f"{path}: the tensor name {name!r} is not text; download it again")
    try:
        dtype, shape, (start, stop) = DTYPES[value["dtype"]], tuple(value["shape"]), value["data_offsets"]
        sound = all(type(n) is int and n >= 0 for n in (*shape, start, stop))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: the header entry of {name} is malformed or of an unknown dtype; download it again"
        ) from error
    entry = Entry(name, dtype, shape, path, base + start) if sound else None
    if entry is None or stop - start != entry.nbytes:
        raise CheckpointError(f"{path}: size, dtype and shape of {name} disagree; download it again")
    return entry
