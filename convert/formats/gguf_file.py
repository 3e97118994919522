"""Opening a GGUF file: every length, count, type and offset is checked against the file's size before it is believed.

A GGUF file is: the magic `GGUF`, a version (2 or 3), the numbers of tensors and of metadata fields (64 bits each), the
fields {name, type, value}, the tensors {name, dimensions innermost first, type, offset}, padding up to
`general.alignment`, the data. Everything is little-endian. Files come from strangers: nothing is allocated on the
file's word alone.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from core.errors import CheckpointError

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MAX_DIMS = 4
SMALLEST_FIELD, SMALLEST_TENSOR = (
    13,
    32,
)  # bytes: an empty name with one byte of value; an empty name with one dimension


@dataclass(frozen=True)
class GgufTensor:
    """`shape` row-major, as torch has it (the file has it reversed); `start`: byte offset in the file."""

    name: str
    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class GgufFile:
    path: Path
    fields: dict[str, Any]
    tensors: dict[str, GgufTensor]

    def need(self, key: str) -> Any:
        """A field that must be there.

        Raises:
            CheckpointError: it is not.
        """
        if key not in self.fields:
            raise CheckpointError(
                f"{self.path} lacks the field {key}; it is incomplete or not a model, convert it again"
            )
        return self.fields[key]

    def raw(self, tensor: GgufTensor, row: int | None = None) -> Tensor:
        """uint8 [..., bytes of a row] of the whole tensor, or of index `row` of its first dimension."""
        shape = tensor.shape if row is None else tensor.shape[1:]
        size = tensor.nbytes if row is None else tensor.nbytes // tensor.shape[0]
        data = np.fromfile(self.path, np.uint8, size, offset=tensor.start + (row or 0) * size)
        if data.size != size:
            raise CheckpointError(f"{self.path} ends inside {tensor.name}; the file is truncated, download it again")
        return torch.from_numpy(data).reshape(*shape[:-1], -1)


class Cursor:
    """Reads forwards, never past the end."""

    def __init__(self, path: Path, data: Any) -> None:
        self.path, self.data, self.at = path, data, 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise CheckpointError(
                f"{self.path}: something at byte {self.at} says it has {size} bytes, the file has {len(self.data)}; "
                "it is truncated or damaged, download it again"
            )
        self.at += size
        return self.data[self.at - size : self.at]

    def scalar(self, kind: int) -> Any:
        code = "<" + SCALARS[kind]
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def count(self, each: int, what: str) -> int:
        """A 64-bit number of things that take at least `each` bytes."""
        number = self.scalar(10)
        if number * each > len(self.data) - self.at:
            raise CheckpointError(f"{self.path} says it has {number} {what}, more than its size allows; it is damaged")
        return number

    def string(self) -> str:
        raw = self.take(self.count(1, "bytes in a string"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path}: a string before byte {self.at} is not UTF-8; it is damaged") from error

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.scalar(kind)
        if kind == STRING:
            return self.string()
        inner = self.scalar(4) if kind == ARRAY else kind
        if inner == STRING:
            return [self.string() for _ in range(self.count(8, "strings"))]
        if kind != ARRAY or inner not in SCALARS:
            raise CheckpointError(
                f"{self.path}: a field before byte {self.at} has the unknown type {inner}; it is damaged"
            )
        width = struct.calcsize("<" + SCALARS[inner])
        number = self.count(width, "array elements")
        return list(struct.unpack(f"<{number}{SCALARS[inner]}", self.take(number * width)))


def open_gguf(path: Path | str) -> GgufFile:
    """Fields and tensors of a GGUF file, verified.

    Raises:
        CheckpointError: not GGUF, of an unknown version or type, damaged or truncated; one line.
    """
    path = Path(path)
    if not path.is_file() or path.stat().st_size < 24:
        raise CheckpointError(f"{path} is no GGUF file (missing, or shorter than a header); check the path")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = Cursor(path, data)
        if cursor.take(4) != b"GGUF":
            raise CheckpointError(f"{path} is no GGUF file (its first four bytes are not 'GGUF'); check the path")
        version = cursor.scalar(4)
        if version not in (2, 3):
            raise CheckpointError(f"{path} is GGUF version {version}; versions 2 and 3, little-endian, are read")
        tensors, fields = cursor.count(SMALLEST_TENSOR, "tensors"), cursor.count(SMALLEST_FIELD, "fields")
        meta = {cursor.string(): cursor.value(cursor.scalar(4)) for _ in range(fields)}
        infos = [tensor_info(cursor) for _ in range(tensors)]
        return GgufFile(path, meta, placed(path, infos, aligned(cursor.at, alignment(path, meta)), len(data), meta))


def tensor_info(cursor: Cursor) -> GgufTensor:
    name, dims = cursor.string(), cursor.scalar(4)
    if not 1 <= dims <= MAX_DIMS:
        raise CheckpointError(
            f"{cursor.path}: {name} has {dims} dimensions; 1 to {MAX_DIMS} are possible, it is damaged"
        )
    shape = tuple(cursor.scalar(10) for _ in range(dims))[::-1]
    number, offset = cursor.scalar(4), cursor.scalar(10)
    if number not in {int(k) for k in gguf.GGML_QUANT_SIZES}:
        raise CheckpointError(f"{cursor.path}: {name} has the unknown type {number}; a newer gguf package may know it")
    kind = gguf.GGMLQuantizationType(number)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    if 0 in shape or shape[-1] % block:
        raise CheckpointError(
            f"{cursor.path}: {name} {shape} is not made of {kind.name} blocks of {block}; it is damaged"
        )
    return GgufTensor(name, kind, shape, offset, math.prod(shape) // block * size)


def alignment(path: Path, meta: dict[str, Any]) -> int:
    found = meta.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if type(found) is not int or not 8 <= found <= 2**20 or found & (found - 1):
        raise CheckpointError(f"{path}: general.alignment={found!r} is no power of two from 8 to 2^20; it is damaged")
    return found


def aligned(position: int, to: int) -> int:
    return -(-position // to) * to


def placed(path: Path, infos: list[GgufTensor], data: int, size: int, meta: dict[str, Any]) -> dict[str, GgufTensor]:
    """Tensors by name with absolute offsets; each inside the file, none over another."""
    found: dict[str, GgufTensor] = {}
    end = data
    for info in sorted(infos, key=lambda i: i.start):
        start = data + info.start
        if info.name in found or start < end or info.start % alignment(path, meta) or start + info.nbytes > size:
            raise CheckpointError(
                f"{path}: {info.name} of {info.nbytes} bytes at {start} is there twice, overlaps another or lies "
                f"outside the {size} bytes of the file; it is truncated or damaged, download it again"
            )
        found[info.name] = GgufTensor(info.name, info.kind, info.shape, start, info.nbytes)
        end = start + info.nbytes
    return found
