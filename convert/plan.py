"""What an export will write, before it reads a weight: every output tensor with its source, dtype and bytes."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convert.packer import Packer
from convert.source import Item, Source
from core.checkpoint.index import DTYPE_NAMES, Entry

SHARD_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Output:
    """One tensor of the written files."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    kind: str = ""  # what the file calls its dtype, where that is not safetensors' name

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Job:
    """Outputs that are made together; `make` returns them in order. `how`: one word for the plan."""

    inputs: tuple[Item | Entry, ...]
    outputs: tuple[Output, ...]
    how: str
    make: Callable[[Packer], Sequence[Tensor]]

    @property
    def nbytes(self) -> int:
        return sum(o.nbytes for o in self.outputs)

    @property
    def cost(self) -> int:
        """Bytes in memory while it is made: the decoded inputs and the outputs."""
        return sum(i.nbytes for i in self.inputs) + self.nbytes


class Format:
    """One dialect of safetensors checkpoints."""

    name: str
    one_file: bool = False  # writes itself, through a method `write`, and has no place for carried tensors

    def refuse(self, source: Source) -> None:
        """Raise UnsupportedError, with the reason, for a model that the dialect cannot express."""

    def jobs(self, source: Source) -> Iterator[Job]:
        """What becomes of every canonical tensor, in the order of the files."""
        raise NotImplementedError

    def config(self, source: Source) -> dict[str, Any]:
        """config.json."""
        raise NotImplementedError

    def index_metadata(self, source: Source) -> dict[str, Any]:  # noqa: ARG002
        """More keys for the index's metadata."""
        return {}


@dataclass(frozen=True)
class Plan:
    jobs: tuple[Job, ...]
    shards: tuple[tuple[Job, ...], ...]

    @property
    def nbytes(self) -> int:
        return sum(j.nbytes for j in self.jobs)


def copy_job(item: Item) -> Job:
    """The decoded value under its canonical name."""
    return Job((item,), (Output(item.name, item.dtype, item.shape),), "copy", lambda packer: [packer.value(item)])


def carried_job(entry: Entry) -> Job:
    """Bytes that no model class here computes (MTP, vision, audio), as they are."""
    output = Output(entry.name, entry.dtype, entry.shape)
    return Job((entry,), (output,), "carry", lambda packer: [packer.carry(entry)])


def make_plan(format: Format, source: Source, shard_bytes: int = SHARD_BYTES) -> Plan:
    """Jobs in the source's order, cut into shards of at most `shard_bytes` (one job may exceed it alone)."""
    format.refuse(source)
    jobs = tuple(format.jobs(source))
    if format.one_file:
        return Plan(jobs, (jobs,))
    jobs += tuple(carried_job(entry) for entry in source.carried)
    shards: list[list[Job]] = [[]]
    room = shard_bytes
    for job in jobs:
        if shards[-1] and job.nbytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(job)
        room -= job.nbytes
    return Plan(jobs, tuple(tuple(s) for s in shards))


def table(plan: Plan) -> str:
    """Every tensor: source -> destination, dtype, shape, bytes."""
    lines = []
    for number, shard in enumerate(plan.shards, 1):
        lines.append(f"shard {number} of {len(plan.shards)}, {sum(j.nbytes for j in shard) / 1e9:.3f} GB")
        for job in shard:
            came = ", ".join(i.name for i in job.inputs)
            for out in job.outputs:
                shape = "x".join(map(str, out.shape)) or "scalar"
                lines.append(
                    f"  {job.how:<7} {came} -> {out.name}  {out.kind or DTYPE_NAMES[out.dtype]} {shape}  {out.nbytes:,}"
                )
    return "\n".join(lines)
