"""`gguf`: one file for llama.cpp, with the experts as MXFP4 (type 39), and manifest.json beside it.

Codes are laid out anew (convert/formats/gguf_names.py), never quantised again. Experts of a layer are stacked per
projection, [E, N, K]; GPT-OSS's alternating gate and up rows are taken apart. What llama.cpp keeps in F32 (vectors,
biases, routers) is widened exactly; the rest stays BF16. All three architectures rotate halves in llama.cpp too, so q
and k rows are not permuted. MTP blocks and towers that no model class here computes are left out; the plan
counts them.

The head of the file (fields, names, offsets) is written first, from the plan; tensors stream behind it, expert by
expert, so memory stays near one fused expert tensor of a GPT-OSS layer, or a few experts of the others.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convert.formats.gguf_meta import arch_of, metadata
from convert.formats.gguf_names import BLOCK_BYTES, EXPERT, Arch, must_be_f32, to_blocks, to_gguf
from convert.formats.gguf_tokenizer import tokenizer_fields
from convert.packer import Packer
from convert.plan import Format, Job, Output, Plan
from convert.source import Item, Source
from convert.write import require_planned
from core.errors import UnsupportedError
from core.mxfp4 import BLOCK, Packed

FILE = "model.gguf"
KINDS = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float16: "F16"}
DTYPES = {kind: dtype for dtype, kind in KINDS.items()}


@dataclass(frozen=True)
class Piece(Output):
    """(A part of) one tensor of the file. `whole`: shape of the tensor in weights, row-major."""

    whole: tuple[int, ...] = ()


class Gguf(Format):
    name = "gguf"
    one_file = True

    def refuse(self, source: Source) -> None:
        arch = arch_of(source.config)
        tokenizer_fields(source.folder, source.config)
        for item in source.items:
            if EXPERT.fullmatch(item.name) is None and to_gguf(arch, item.name) is None:
                raise UnsupportedError(
                    f"--to gguf: llama.cpp's {arch.name} has no place for {item.name}; use --to bf16"
                )

    def jobs(self, source: Source) -> Iterator[Job]:
        arch = arch_of(source.config)
        groups: dict[str, list[Item]] = {}  # stacked tensor -> its experts; they follow one another in the file
        for item in source.items:
            match = EXPERT.fullmatch(item.name)
            name = f"blk.{match[1]}.ffn_{match[2]}_exps.weight" if match and item.expert >= 0 else item.name
            groups.setdefault(name, []).append(item)
        for name, items in groups.items():
            if items[0].expert >= 0:
                yield from stacked(name, items)
            elif EXPERT.fullmatch(name):
                yield fused(items[0])
            else:
                yield single(arch, items[0])

    def config(self, source: Source) -> dict[str, Any]:
        """Fields of the file; there is no config.json."""
        arch = arch_of(source.config)
        name = source.folder.resolve().name
        return metadata(source.config, arch, name) | tokenizer_fields(source.folder, source.config)

    def write(self, source: Source, plan: Plan, packer: Packer, target: Any, workers: int) -> None:
        """The file, under its final name in the target's hidden folder, synced."""
        from tqdm import tqdm

        from convert.write import MEMORY, made

        path = target.part / FILE
        padding = write_head(path, arch_of(source.config), self.config(source), plan)
        with (
            path.open("ab") as file,
            tqdm(total=plan.nbytes, unit="B", unit_scale=True, desc="export", dynamic_ncols=True) as bar,
        ):
            file.write(bytes(-file.tell() % padding))
            write_data(file, made(plan.jobs, packer, workers, MEMORY), padding, bar)
            file.flush()
            os.fsync(file.fileno())


def piece(name: str, dtype: torch.dtype, shape: tuple[int, ...], whole: tuple[int, ...] | None = None) -> Piece:
    """Output of `shape` weights; dtype uint8 means MXFP4."""
    if dtype is not torch.uint8:
        return Piece(name, dtype, shape, KINDS[dtype], whole or shape)
    return Piece(name, dtype, (*shape[:-1], shape[-1] // BLOCK * BLOCK_BYTES), "MXFP4", whole or shape)


def stored_dtype(item: Item, name: str, dims: int) -> torch.dtype:
    if item.quantised:
        return torch.uint8
    if item.dtype not in KINDS:
        raise UnsupportedError(f"--to gguf: {item.name} is {item.dtype}; BF16, F16, F32 and MXFP4 are written")
    return torch.float32 if must_be_f32(name, dims) else item.dtype


def how(item: Item) -> str:
    return "relay" if item.packed else "pack" if item.quantised else "copy"


def single(arch: Arch, item: Item) -> Job:
    name = str(to_gguf(arch, item.name))
    dtype = stored_dtype(item, name, len(item.shape))
    return Job((item,), (piece(name, dtype, item.shape),), how(item), partial(make_plain, item, dtype))


def stacked(name: str, items: list[Item]) -> Iterator[Job]:
    """One job an expert, in the order of the file."""
    if len({(i.quantised, i.dtype, i.shape) for i in items}) > 1:
        raise UnsupportedError(
            f"--to gguf: the experts of {name} are stored in different ways; it is one tensor in GGUF"
        )
    for item in items:
        dtype = stored_dtype(item, name, 3)
        out = piece(name, dtype, item.shape, (len(items), *item.shape))
        yield Job((item,), (out,), how(item), partial(make_plain, item, dtype))


def make_plain(item: Item, dtype: torch.dtype, packer: Packer) -> list[Tensor]:
    return [to_blocks(packer.packed(item)) if dtype is torch.uint8 else packer.value(item).to(dtype)]


def fused(item: Item) -> Job:
    """GPT-OSS's experts [E, K, N], or their biases [E, N]: K last, gate and up apart."""
    match = EXPERT.fullmatch(item.name)
    assert match is not None
    leaf = "bias" if match[3] else "weight"
    parts = ("gate", "up") if match[2] == "gate_up" else ("down",)
    names = [f"blk.{match[1]}.ffn_{part}_exps.{leaf}" for part in parts]
    experts, *inner = item.shape
    rows, *size = inner[::-1] if leaf == "weight" else inner
    dtype = stored_dtype(item, names[0], 2)
    outputs = tuple(piece(name, dtype, (experts, rows // len(parts), *size)) for name in names)
    return Job((item,), outputs, how(item), partial(make_fused, item, dtype, len(parts)))


def make_fused(item: Item, dtype: torch.dtype, parts: int, packer: Packer) -> list[Tensor]:
    if dtype is torch.uint8:
        packed = packer.packed(item)
        return [to_blocks(Packed(packed.codes[:, p::parts], packed.scales[:, p::parts])) for p in range(parts)]
    value = packer.value(item).to(dtype)
    value = value.transpose(-1, -2) if value.dim() == 3 else value
    return [value[:, p::parts].contiguous() for p in range(parts)]


def write_head(path: Path, arch: Arch, fields: dict[str, Any], plan: Plan) -> int:
    """Everything before the data; returns the alignment."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, arch.name)
    for key, value in fields.items():
        add(writer, key, value)
    sizes: dict[str, int] = {}
    for out in (o for job in plan.jobs for o in job.outputs):
        sizes[out.name] = sizes.get(out.name, 0) + out.nbytes
    infos = {o.name: o for job in plan.jobs for o in job.outputs}
    for name, out in infos.items():
        # told a float type, the writer takes the shape as it is: in weights, not bytes
        kind = gguf.GGMLQuantizationType[out.kind]
        writer.add_tensor_info(name, out.whole, np.dtype(np.float32), sizes[name], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return writer.data_alignment


def add(writer: Any, key: str, value: Any) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds.get(type(value), writer.add_array)(key, value)


def write_data(file: Any, tensors: Iterable[tuple[Job, list[Tensor]]], padding: int, bar: Any) -> None:
    """Tensors as they come; each begins at a multiple of `padding`."""
    before = ""
    for job, outputs in tensors:
        for output, tensor in zip(job.outputs, outputs, strict=True):
            require_planned(output, tensor)
            if output.name != before:
                file.write(bytes(-file.tell() % padding))
                before = output.name
            file.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            bar.update(output.nbytes)
    file.write(bytes(-file.tell() % padding))
