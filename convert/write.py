"""Writing a planned export: shards in order, tensors made ahead in threads, resumable, all or nothing.

The plan says every tensor's name, dtype and shape, so a shard's header is written first and its data streams behind it.
Shards collect in a hidden folder `.<out>.part`; a journal beside it says which are whole and what they decode to. When
all are there, configuration, index and manifest follow, and the folder is renamed to `out`. A killed export leaves
`out` absent; the same command continues behind the last whole shard. Another plan (source, options) starts anew.

Memory: a few tensors are in the making at a time, 1 GiB at most (or one tensor, when that is larger).
"""

import errno
import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from convert.packer import Packer
from convert.plan import Job, Output, Plan
from convert.source import Source
from core.checkpoint.index import DTYPE_NAMES, INDEX, SINGLE
from core.checkpoint.writer import sync, write_text
from core.errors import CheckpointError, Fp4FlashError

MEMORY = 2**30  # bytes of tensors in the making at one time
ALIGNMENT = 8  # safetensors pads its header to a multiple of it


@dataclass(frozen=True)
class Target:
    """`out` and the hidden places beside it."""

    out: Path

    @property
    def part(self) -> Path:
        return self.out.with_name(f".{self.out.name}.part")

    @property
    def journal(self) -> Path:
        return self.out.with_name(f".{self.out.name}.journal")

    def clear(self) -> None:
        """Forget what an earlier try left in the hidden places."""
        shutil.rmtree(self.part, ignore_errors=True)
        shutil.rmtree(self.journal, ignore_errors=True)

    def check(self) -> None:
        """CheckpointError if `out` holds something already.

        A journal without its shards is of an export killed after its last rename, and is removed.
        """
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            if not self.part.exists():
                shutil.rmtree(self.journal, ignore_errors=True)
            raise CheckpointError(f"--out {self.out} exists and is not empty; choose another folder or remove it")


def fingerprint(plan: Plan, source: Source, options: dict[str, Any]) -> str:
    """Of everything that decides the output's bytes: the plan, the options, and the source's files (size, time)."""
    files = sorted({e.file for e in source.checkpoint.entries.values()} | set(source.folder.glob("*.json")))
    stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    jobs = [[(o.name, str(o.dtype), o.shape) for o in j.outputs] + [j.how] for s in plan.shards for j in s]
    sizes = [len(s) for s in plan.shards]
    return hashlib.sha256(json.dumps([stats, jobs, sizes, options], default=str).encode()).hexdigest()


def shard_name(number: int, count: int) -> str:
    return SINGLE if count == 1 else f"model-{number + 1:05}-of-{count:05}.safetensors"


@contextmanager
def named_failures(target: Target) -> Iterator[None]:
    """A full or read-only disk in one line; what was written stays for the next try, unless the source is at fault."""
    try:
        yield
    except Fp4FlashError:
        target.clear()
        raise
    except OSError as error:
        why = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
        raise CheckpointError(
            f"could not write {target.out}: {why}; nothing is there yet, and finished shards are kept: free space or "
            "choose another --out, and run the command again"
        ) from error


def begin(target: Target, mark: str) -> None:
    """Keep the shards of an interrupted run of the same plan; else start with empty folders."""
    known = target.journal / "plan"
    if not (known.is_file() and known.read_text() == mark and target.part.is_dir()):
        target.clear()
        target.part.mkdir(parents=True)
        target.journal.mkdir()
        write_text(known, mark)


def write_shards(plan: Plan, packer: Packer, target: Target, workers: int, memory: int = MEMORY) -> None:
    """Write every shard that the journal does not list; fills packer's hashes for all of them."""
    count = len(plan.shards)
    with tqdm(total=plan.nbytes, unit="B", unit_scale=True, desc="export", dynamic_ncols=True) as bar:
        for number, shard in enumerate(plan.shards):
            record = target.journal / f"shard-{number + 1:05}.json"
            path = target.part / shard_name(number, count)
            saved = finished(record, path, shard)
            if saved is not None:
                recall(packer, saved)
                bar.update(sum(j.nbytes for j in shard))
                continue
            before = {k: set(v) for k, v in records(packer).items()}
            write_shard(path, shard, made(shard, packer, workers, memory), bar)
            new = {k: {n: h for n, h in v.items() if n not in before[k]} for k, v in records(packer).items()}
            write_text(record.with_suffix(".partial"), json.dumps(new))
            record.with_suffix(".partial").rename(record)


def finished(record: Path, path: Path, shard: Iterable[Job]) -> dict[str, dict[str, str]] | None:
    """What the journal says of a shard that is whole on the disk; None: it is to be written."""
    try:
        saved, size = json.loads(record.read_text()), path.stat().st_size
    except (OSError, ValueError):
        return None
    return saved if size == len(header(shard)) + sum(j.nbytes for j in shard) else None


def records(packer: Packer) -> dict[str, dict[str, str]]:
    return {"hashes": packer.hashes, "reencoded": packer.reencoded, "carried": packer.carried}


def recall(packer: Packer, saved: dict[str, dict[str, str]]) -> None:
    for kind, values in records(packer).items():
        values |= saved[kind]


def made(jobs: Iterable[Job], packer: Packer, workers: int, memory: int) -> Iterator[tuple[Job, list[Tensor]]]:
    """Each job with its tensors, in order, made ahead by `workers` threads within `memory` bytes."""
    waiting: deque[tuple[Job, Future[Any]]] = deque()
    busy = 0
    with ThreadPoolExecutor(workers) as pool:
        try:
            for job in jobs:
                while waiting and (busy + job.cost > memory or len(waiting) > 2 * workers):
                    first, future = waiting.popleft()
                    yield first, future.result()
                    busy -= first.cost
                waiting.append((job, pool.submit(job.make, packer)))
                busy += job.cost
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def require_planned(output: Output, tensor: Tensor) -> None:
    """CheckpointError unless the tensor is what the plan, and so the file's header, says."""
    if (tensor.dtype, tuple(tensor.shape)) != (output.dtype, output.shape):
        raise CheckpointError(
            f"{output.name} came out as {tensor.dtype} {tuple(tensor.shape)}, the plan says {output.dtype} "
            f"{output.shape}; config.json and weights are of different models"
        )


def write_shard(path: Path, shard: Iterable[Job], tensors: Iterator[tuple[Job, list[Tensor]]], bar: tqdm) -> None:
    """One safetensors file under a temporary name, synced, then renamed."""
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        file.write(header(shard))
        for job, outputs in tensors:
            for output, tensor in zip(job.outputs, outputs, strict=True):
                require_planned(output, tensor)
                if tensor.numel():
                    file.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
                bar.update(output.nbytes)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def header(shard: Iterable[Job]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for output in (o for job in shard for o in job.outputs):
        if output.name in entries:
            raise CheckpointError(f"{output.name} would be written twice; this is a bug in the format's key map")
        entries[output.name] = {
            "dtype": DTYPE_NAMES[output.dtype],
            "shape": list(output.shape),
            "data_offsets": [at, at + output.nbytes],
        }
        at += output.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // ALIGNMENT) * ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def write_index(plan: Plan, target: Target, metadata: dict[str, Any]) -> None:
    """model.safetensors.index.json, where there are several shards."""
    count = len(plan.shards)
    if count == 1:
        return
    weight_map = {
        output.name: shard_name(number, count)
        for number, shard in enumerate(plan.shards)
        for job in shard
        for output in job.outputs
    }
    text = json.dumps({"metadata": {"total_size": plan.nbytes} | metadata, "weight_map": weight_map}, indent=1)
    write_text(target.part / INDEX, text)


def finish(target: Target) -> None:
    """The hidden folder becomes `out`."""
    sync(target.part)
    if target.out.is_dir():
        target.out.rmdir()
    target.part.rename(target.out)
    sync(target.out.parent)
    shutil.rmtree(target.journal, ignore_errors=True)
