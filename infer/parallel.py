"""One to eight processes of a node as one model: start, sums over ranks, agreement on input, and noticing a dead rank.

    torchrun --nproc-per-node 8 -m infer.generate ...

Every rank runs the same scheduler on the same requests, so no step needs a message but the sums and the logits.
Requests that arrive at rank 0 alone (the server) are broadcast before each step.

A rank that dies leaves the others waiting inside a collective, which cannot be interrupted from Python; so every rank
writes a heartbeat into the launcher's store, and a watcher thread ends the process in one line when another's stops.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from core.errors import ConfigError
from infer.shard import Shard
from kernels.all_reduce import Peers, all_reduce_norm
from kernels.rms_norm import rms_norm

BEAT = 1.0  # seconds between heartbeats
DEAD = 15.0  # without one for this long a rank counts as dead
DEAD_EXIT = 70


@dataclass
class Ranks:
    """A tensor-parallel group; of one rank without `group`."""

    shard: Shard = field(default_factory=Shard)
    backend: str = "auto"
    peers: Peers | None = None
    control: Any = None  # the group for objects: gloo, and patient, since an idle server says nothing for days
    watching: threading.Event | None = None

    @property
    def first(self) -> bool:
        return self.shard.rank == 0

    def sum_norm(self, part: Tensor, stream: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(norm(stream + sum of parts), stream + sum of parts), both [T, G]."""
        if self.peers is None:
            return rms_norm(part, weight, eps, residual=stream, backend=self.backend)
        return all_reduce_norm(part, self.peers, residual=stream, weight=weight, eps=eps, backend=self.backend)

    def gather_vocabulary(self, logits: Tensor, size: int) -> Tensor:
        """[..., V / world] of each rank -> [..., V] on every rank."""
        if self.shard.world == 1:
            return logits
        parts = [torch.empty_like(logits) for _ in range(self.shard.world)]
        dist.all_gather(parts, logits.contiguous())
        return torch.cat(parts, dim=-1)[..., :size]

    def agree(self, value: Any) -> Any:
        """Rank 0's value on every rank; any picklable object."""
        if self.shard.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def least(self, value: int) -> int:
        """The smallest of all ranks' values."""
        if self.shard.world == 1:
            return value
        parts: list[Any] = [None] * self.shard.world
        dist.all_gather_object(parts, value, group=self.control)
        return min(parts)


def start(device: torch.device, backend: str, tokens: int, hidden: int) -> Ranks:
    """Join the group that the launcher's environment describes; one rank where there is none.

    Args:
        tokens, hidden: most tokens of a step and the hidden size: the size of the exchange buffers.
    Raises:
        ConfigError: more than 8 ranks, or ranks on several nodes.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return Ranks(backend=backend)
    if world > 8 or int(os.environ.get("LOCAL_WORLD_SIZE", world)) != world:
        raise ConfigError(f"WORLD_SIZE={world}: the runtime takes 1 to 8 processes of one node")
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=10))
    rank = dist.get_rank()
    watching = watch(rank, world)
    control = dist.new_group(backend="gloo", timeout=timedelta(days=365))
    peers = Peers(dist.group.WORLD, tokens, hidden, device)
    return Ranks(Shard(rank, world), backend, peers, control, watching)


def device_of(name: str) -> torch.device:
    """`auto`: this rank's GPU, or the CPU without one.

    Raises:
        ConfigError: a GPU was asked for by name and there is none.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError("device=cuda: torch sees no GPU; use --device cpu, or install a CUDA build of torch")
        if local >= torch.cuda.device_count():
            raise ConfigError(
                f"process {local} has no GPU of its own: {torch.cuda.device_count()} in this machine; "
                "start fewer processes"
            )
        torch.cuda.set_device(local)
        return torch.device("cuda", local)
    if name != "cpu":
        raise ConfigError(f"device={name!r}: expected auto, cuda or cpu")
    return torch.device("cpu")


def watch(rank: int, world: int) -> threading.Event:
    """Beat, and end this process when another rank stops beating; until the event is set."""
    done = threading.Event()
    store = dist.distributed_c10d._get_default_store().clone()
    threading.Thread(target=beat, args=(store, rank, world, done, end), daemon=True, name="heartbeat").start()
    return done


def end(message: str) -> None:
    """Leave at once: the other threads may hang in a collective, and nothing else is possible."""
    print(message, file=sys.stderr, flush=True)
    os._exit(DEAD_EXIT)


def beat(store: Any, rank: int, world: int, done: threading.Event, dead: Callable[[str], None]) -> None:
    """Runs until `done`, or until another rank has been silent for DEAD seconds."""
    seen = {r: (b"", time.monotonic()) for r in range(world) if r != rank}
    count = 0
    while not done.wait(BEAT):
        try:
            store.set(f"beat/{rank}", str(count))
            count += 1
            for other, (last, since) in seen.items():
                value = store.get(f"beat/{other}") if store.check([f"beat/{other}"]) else b""
                if value != last:
                    seen[other] = (value, time.monotonic())
                elif time.monotonic() - since > DEAD and not done.is_set():
                    dead(f"rank {other} died: no sign of it for {DEAD:.0f} s; rank {rank} stops. Look at its output.")
                    return
        except (RuntimeError, OSError):  # the store lives in rank 0 or its launcher
            if not done.wait(BEAT):  # not because all are leaving
                dead(f"rank 0 died (its store is gone); rank {rank} stops. Look at its output.")
            return


@contextmanager
def together(ranks: Ranks) -> Iterator[None]:
    """The work of a group: at its end all ranks wait for each other and part.

    A rank that dies breaks the others' sums. Its name is worth more than their errors, so an error waits for the
    watcher, which ends this process, and goes on only if every rank is alive.
    """
    try:
        yield
    except Exception:
        if ranks.watching is not None:
            time.sleep(DEAD + 5 * BEAT)
        raise
    if ranks.watching is not None:
        dist.barrier()
        ranks.watching.set()
        dist.destroy_process_group()
