"""Values and codes of a source's tensors for the formats to lay out, each hashed once on the way.

A tensor is encoded at most once. What the source stores as codes is handed on; what a training run left on the grid is
encoded and compared with itself, so that a tensor that was never snapped cannot slip through as if it had been.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from convert.pack import fast_decode, fast_encode, same_bits
from convert.source import Item, Source
from core.checkpoint.index import Entry
from core.errors import FormatError
from core.mxfp4 import Packed, ScaleRule

Encoder = Callable[[Tensor, ScaleRule, str], Packed]


def sha256(tensor: Tensor) -> str:
    """Of the values' bytes, little-endian, row-major."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data if flat.numel() else b"").hexdigest()


@dataclass
class Packer:
    """`ptq`: the rule to round an untrained model by; None: quantised tensors must lie on the grid already."""

    source: Source
    rule: ScaleRule
    ptq: bool = False
    encoder: Encoder = fast_encode
    hashes: dict[str, str] = field(default_factory=dict)  # canonical name -> hash of what the output decodes to
    reencoded: dict[str, str] = field(default_factory=dict)  # canonical name -> hash before a lossy encoding
    carried: dict[str, str] = field(default_factory=dict)  # key -> hash of bytes handed through

    def packed(self, item: Item) -> Packed:
        """Codes and scales along the last dimension of the item, or of its transpose where item.transposed."""
        packed, value = self.both(item)
        self.record(item, value)
        return packed

    def value(self, item: Item) -> Tensor:
        """The decoded value in item.dtype."""
        value = self.both(item)[1] if item.quantised else self.source.read(item)
        self.record(item, value)
        return value

    def both(self, item: Item) -> tuple[Packed, Tensor]:
        if item.packed:
            packed = self.source.read_packed(item)
            return packed, restored(item, fast_decode(packed))
        weight = self.source.read(item)
        along = weight.transpose(-1, -2).contiguous() if item.transposed else weight
        packed = self.encoder(along, self.rule, item.name)
        decoded = fast_decode(Packed(packed.codes.cpu(), packed.scales.cpu()))
        if not self.ptq and not same_bits(decoded, along):
            raise FormatError(
                f"{item.name} is not on the MXFP4 grid: no QAT run snapped it; to round it here add --ptq even"
            )
        return packed, restored(item, decoded)

    def replaced(self, item: Item, value: Tensor) -> None:
        """The output decodes to `value`, no longer to what `value(item)` gave."""
        self.reencoded[item.name] = self.hashes[item.name]
        self.record(item, value)

    def carry(self, entry: Entry) -> Tensor:
        tensor = self.source.checkpoint.read(entry.name)
        self.carried[entry.name] = sha256(tensor)
        return tensor

    def record(self, item: Item, value: Tensor) -> None:
        self.hashes[item.name] = sha256(value)


def restored(item: Item, decoded: Tensor) -> Tensor:
    return decoded.transpose(-1, -2).contiguous() if item.transposed else decoded


def value_of(source: Source, item: Item) -> Tensor:
    """The decoded value as the source has it, item.shape in item.dtype."""
    return restored(item, fast_decode(source.read_packed(item))) if item.packed else source.read(item)
