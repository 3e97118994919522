"""Assertions on kernels.all_reduce for one process of a group.

    python -m tests.all_reduce_cases RANK WORLD FOLDER cpu|interpreter|cuda

Every process knows every rank's parts, so each checks its own results against a plain sum; what must be equal on all
ranks it leaves in FOLDER for the test that started it.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from core.models.ops import rms_norm
from kernels.all_reduce import Peers, all_reduce, all_reduce_norm

ROOT = Path(__file__).resolve().parents[1]
EPS = 1e-6
HIDDEN, TOKENS = 96, 70  # more tokens than programs
ROWS = (1, 3, 70, 0, 2, 65)


class Mapped(Peers):
    """Peers whose memory lies in files that every process maps: the kernel's meeting without a GPU."""

    def __init__(self, group: dist.ProcessGroup, tokens: int, hidden: int, dtype: torch.dtype, folder: Path) -> None:
        super().__init__(group, tokens, hidden, torch.device("cpu"), dtype)
        self.folder, self.symmetric = folder / str(dtype), True
        self.folder.mkdir(exist_ok=True)
        self.share()

    def mapped(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = torch.Size(shape).numel()
        views = [
            torch.from_file(str(self.folder / f"{name}-{rank}"), shared=True, size=size, dtype=dtype)
            for rank in range(self.world)
        ]
        self.held.append(views)
        return torch.tensor([view.data_ptr() for view in views])


def parts_of(world: int, rows: int, hidden: int, dtype: torch.dtype, seed: int) -> list[Tensor]:
    """Small, large, and nearly minus the large by turns: another order of the sum gives other bits."""
    generator = torch.Generator().manual_seed(seed)
    large = torch.randn(rows, hidden, generator=generator) * 1e6
    near = (torch.zeros_like(large), large, -large)
    return [(torch.randn(rows, hidden, generator=generator) + near[rank % 3]).to(dtype) for rank in range(world)]


def ordered_sum(parts: list[Tensor], start: Tensor | None = None) -> Tensor:
    """FP32: start + ((part 0 + part 1) + part 2) + ..."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total if start is None else start.float() + total


def extras(rows: int, hidden: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    """(residual [rows, hidden], weight [hidden])."""
    generator = torch.Generator().manual_seed(seed + 10_000)
    residual = torch.randn(rows, hidden, generator=generator).to(dtype)
    return residual, (1 + torch.randn(hidden, generator=generator) / 4).to(dtype)


def close(found: Tensor, expected: Tensor) -> bool:
    """Within two roundings of the dtype: the order of the norm's sum is the kernel's own."""
    tolerance = 4 * torch.finfo(expected.dtype).eps
    return torch.allclose(found.float(), expected.float(), rtol=tolerance, atol=1e-7)


def assert_call(peers: Peers, rows: int, seed: int, backend: str) -> Tensor:
    """Both operations on parts of that seed; what every rank must have in the same bits."""
    dtype, hidden, device = peers.dtype, peers.hidden, peers.device
    parts = parts_of(peers.world, rows, hidden, dtype, seed)
    residual, weight = extras(rows, hidden, dtype, seed)
    x = parts[peers.rank].to(device)
    reduced = all_reduce(x, peers, backend=backend).cpu()
    assert torch.equal(reduced, ordered_sum(parts).to(dtype)), (backend, rows, seed)
    norm = partial(all_reduce_norm, peers=peers, weight=weight.to(device), eps=EPS, backend=backend)
    y, summed = norm(x, residual=residual.to(device))
    expected = ordered_sum(parts, residual).to(dtype)
    assert torch.equal(summed.cpu(), expected), (backend, rows, seed)
    assert close(y.cpu(), rms_norm(expected, weight, EPS)), (backend, rows, seed)
    if rows > 2:
        alone, _ = norm(x[2:3], residual=residual[2:3].to(device))
        assert torch.equal(alone, y[2:3]), "a token's bits depend on those beside it"
    return torch.cat((reduced, y.cpu(), summed.cpu())).float()


def assert_order_shows() -> None:
    """Three parts added backwards have other bits, or these tests would prove nothing."""
    parts = parts_of(3, 4, HIDDEN, torch.bfloat16, 0)
    assert not torch.equal(ordered_sum(parts), ordered_sum(parts[::-1]))


def run_cpu(rank: int, group: dist.ProcessGroup, folder: Path, backends: list[str]) -> list[Tensor]:
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        peers = Peers(group, TOKENS, HIDDEN, torch.device("cpu"), dtype)
        for backend in backends:
            found += [assert_call(peers, rows, seed, backend) for seed, rows in enumerate(ROWS)]
        if "triton" in backends:
            mapped = Mapped(group, TOKENS, HIDDEN, dtype, folder)
            for seed, rows in enumerate(ROWS + (1,) * 10):
                if seed % 3 == rank:
                    time.sleep(0.02)  # now one process is late, now another
                found.append(assert_call(mapped, rows, seed, "triton"))
    return found


def run_cuda(group: dist.ProcessGroup, device: torch.device) -> list[Tensor]:
    found = []
    for dtype, hidden in ((torch.bfloat16, 6144), (torch.bfloat16, 2880), (torch.float32, HIDDEN)):
        peers = Peers(group, TOKENS, hidden, device, dtype)
        for backend in ("triton", "reference"):
            found += [assert_call(peers, rows, seed, backend) for seed, rows in enumerate(ROWS)]
    peers = Peers(group, TOKENS, 6144, device)
    found.append(late_ranks(peers))
    found.append(thousand_replays(peers))
    return found


def late_ranks(peers: Peers) -> Tensor:
    """300 calls with parts of their own, each rank late by turns: a half must not be written before it was read."""
    wrong = torch.zeros((), dtype=torch.int64, device=peers.device)
    for seed in range(300):
        rows = 1 + seed % 5
        parts = parts_of(peers.world, rows, peers.hidden, peers.dtype, seed)
        x, expected = parts[peers.rank].to(peers.device), ordered_sum(parts).to(peers.dtype).to(peers.device)
        if seed % peers.world == peers.rank:
            torch.cuda._sleep(200_000)
        wrong += (all_reduce(x, peers) != expected).sum()
    assert wrong.item() == 0
    return wrong.cpu()[None].float()


def thousand_replays(peers: Peers) -> Tensor:
    """A graph of three calls with different parts, so that calls beside each other differ and halves alternate."""
    rows, calls = 8, 3
    given = [parts_of(peers.world, rows, peers.hidden, peers.dtype, seed) for seed in range(calls)]
    xs = [parts[peers.rank].to(peers.device) for parts in given]
    residual, weight = (t.to(peers.device) for t in extras(rows, peers.hidden, peers.dtype, 0))

    def work() -> list[Tensor]:
        out = []
        for x in xs:
            out += all_reduce_norm(x, peers, residual=residual, weight=weight, eps=EPS)
        return out

    first = [t.clone() for t in work()]
    for parts, summed in zip(given, first[1::2], strict=True):
        assert torch.equal(summed.cpu(), ordered_sum(parts, residual.cpu()).to(peers.dtype))
    assert_replays(work, first)
    return torch.cat(first).float().cpu()


def assert_replays(work: Callable[[], list[Tensor]], expected: list[Tensor]) -> None:
    """1,000 replays of `work` as a CUDA graph give the expected bits, and the host is never waited for."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = work()
    different = torch.zeros((), dtype=torch.int64, device=out[0].device)
    for _ in range(1000):
        for tensor in out:
            tensor.fill_(-7)
        graph.replay()
        for tensor, wanted in zip(out, expected, strict=True):
            different += (tensor != wanted).sum()
    assert different.item() == 0


def assert_group(world: int, folder: Path, device: str, environment: dict[str, str]) -> None:
    """Run this file as `world` processes; all must end well and leave the same bits."""
    command = [sys.executable, "-m", "tests.all_reduce_cases"]
    logs = [folder / f"{rank}.log" for rank in range(world)]
    processes = []
    for rank, log in enumerate(logs):
        words = [*command, str(rank), str(world), str(folder), device]
        processes.append(
            subprocess.Popen(words, cwd=ROOT, env=environment, stdout=log.open("w"), stderr=subprocess.STDOUT)
        )
    until = time.monotonic() + 300
    # One that waits for a dead rank waits forever: all end with the first that fails.
    while (
        any(p.poll() is None for p in processes) and not any(p.poll() for p in processes) and time.monotonic() < until
    ):
        time.sleep(0.05)
    for process in processes:
        process.kill()
    failed = any(process.wait() for process in processes)
    assert not failed, "\n".join(log.read_text()[-3000:] for log in logs)
    found = [torch.load(folder / f"{rank}.pt") for rank in range(world)]
    assert found[0]
    for other in found[1:]:
        assert len(other) == len(found[0])
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def main() -> None:
    rank, world, folder, kind = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    store = dist.FileStore(str(folder / "store"), world)
    torch.set_num_threads(1)
    if kind == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", store=store, rank=rank, world_size=world)
    group = dist.group.WORLD
    assert group is not None
    if kind == "cuda":
        found = run_cuda(group, torch.device("cuda", rank))
    else:
        found = run_cpu(rank, group, folder, ["reference"] + ["triton"] * (kind == "interpreter"))
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
