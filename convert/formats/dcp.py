"""`dcp`: torch.distributed.checkpoint of the BF16 values under canonical names, for resuming in another trainer.

Written from a baked BF16 copy that is memory-mapped, so no more than the page cache is used; it needs that copy's space
on disk for the time. DCP's `.metadata` is a pickle: reading goes through an unpickler that knows the few classes a
metadata file is made of and refuses every other name, so a stranger's file cannot run code.
"""

import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from core.checkpoint.index import DTYPE_NAMES, INDEX, inside
from core.checkpoint.writer import ShardWriter
from core.errors import CheckpointError

METADATA = ".metadata"
ALLOWED = {
    ("pathlib", "PosixPath"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "Metadata"),
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
    ("torch.distributed.checkpoint.metadata", "StorageMeta"),
    ("torch.distributed.checkpoint.metadata", "TensorProperties"),
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
}  # fmt: skip
ALLOWED |= {("torch", str(dtype).removeprefix("torch.")) for dtype in DTYPE_NAMES}


def write_dcp(baked: Path, out: Path) -> None:
    """Save every tensor of the BF16 checkpoint `baked` into `out` as one DCP checkpoint; its small files too."""
    state: dict[str, Tensor] = {}
    for file in sorted(baked.glob("*.safetensors")):
        state |= load_file(file)
    try:
        dcp.save(state, checkpoint_id=str(out), no_dist=True)
    except CheckpointException as error:  # what happened is inside, by rank: a full disk stays an OSError
        raise next(iter(error.failures.values()))[0] from error
    copy_small_files(baked, out)


class Restricted(pickle.Unpickler):
    """Only the classes of a DCP metadata file."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's metadata")
        return super().find_class(module, name)


class SafeReader(FileSystemReader):
    """FileSystemReader whose metadata was read by `read_metadata` below."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(str(folder))
        self.known = metadata

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        return self.known


def read_metadata(folder: Path) -> Metadata:
    """The checked metadata of a DCP folder.

    Raises:
        CheckpointError: damaged, holding foreign classes, or speaking of more bytes or other files than are there.
    """
    path = folder / METADATA
    try:
        with path.open("rb") as file:
            metadata = Restricted(file).load()
    except (
        OSError,
        pickle.UnpicklingError,
        EOFError,
        AttributeError,
        ValueError,
        TypeError,
        KeyError,
        IndexError,
    ) as error:
        raise CheckpointError(f"{path} is not readable DCP metadata ({error}); save the checkpoint again") from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise CheckpointError(f"{path} is not DCP metadata; save the checkpoint again")
    for info in metadata.storage_data.values():
        file = folder / info.relative_path
        if Path(info.relative_path).name != info.relative_path or not file.is_file():
            raise CheckpointError(f"{path} speaks of {info.relative_path!r}, which is no file of the folder")
        if info.offset < 0 or info.length < 0 or info.offset + info.length > file.stat().st_size:
            raise CheckpointError(f"{file} is shorter than {METADATA} says; it is truncated, copy it again")
    return metadata


def read_dcp(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor), one at a time; sizes are checked against the files before anything is allocated."""
    metadata = read_metadata(folder)
    stored = sum(f.stat().st_size for f in folder.iterdir() if f.is_file())
    for name, entry in sorted(metadata.state_dict_metadata.items()):
        if not isinstance(entry, TensorStorageMetadata) or entry.properties.dtype not in DTYPE_NAMES:
            raise CheckpointError(f"{folder}: {name} is not a plain tensor; save model weights only")
        if entry.size.numel() * entry.properties.dtype.itemsize > stored:
            raise CheckpointError(f"{folder}: {name} {tuple(entry.size)} is larger than the files; they are damaged")
        state = {name: torch.empty(entry.size, dtype=entry.properties.dtype)}
        try:
            dcp.load(state, storage_reader=SafeReader(folder, metadata), no_dist=True)
        except Exception as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"{folder}: {name} cannot be read ({first}); copy the checkpoint again") from error
        yield name, state[name]


def unpacked(folder: Path, out: Path) -> Path:
    """A DCP folder as a safetensors folder `out`, with the small files beside its weights."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json beside .metadata; copy the model's there")
    out.mkdir()
    writer = ShardWriter(out)
    for name, tensor in read_dcp(folder):
        writer.add(name, tensor)
    writer.finish()
    copy_small_files(folder, out)
    return out


def copy_small_files(source: Path, out: Path) -> None:
    """config.json, manifest.json, tokenizer, licence, card: everything but weights and their index."""
    for file in source.iterdir():
        small = file.suffix in (".json", ".jinja", ".txt", ".model", ".md") or file.name in ("LICENSE", "NOTICE")
        if small and file.name != INDEX:
            shutil.copyfile(inside(source, file.name), out / file.name)
