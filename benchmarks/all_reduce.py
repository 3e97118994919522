"""Time of kernels.all_reduce over the GPUs of a node, fused with residual and norm, and of NCCL's for the same bytes.

    torchrun --nproc-per-node 8 -m benchmarks.all_reduce [--hidden 6144] [--tokens 1 8 16 64] [--json FILE]

One CUDA graph holds a hundred calls, so what counts is microseconds a call on the slowest rank. The floor is the bytes
of the other ranks' parts over the bandwidth at which every rank copied 256 MiB from its neighbour at the same time in
the same run; at a few tokens the exchange of flags takes longer than the bytes.

Numerics come first: sums must have the reference's bits on every rank, or no time is printed.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.common import gpu_seconds, publish, require_gpu, spread
from kernels.all_reduce import Peers, all_reduce, all_reduce_norm

COMMAND = "benchmarks.all_reduce"
CALLS, REPEATS, EPS = 100, 20, 1e-6
COPIED = 2**27  # BF16 values


def slowest(seconds: list[float]) -> list[float]:
    """Each repeat on the rank that took longest."""
    all_of_them = torch.tensor(seconds, dtype=torch.float64, device="cuda")
    dist.all_reduce(all_of_them, dist.ReduceOp.MAX)
    return all_of_them.tolist()


def micros(work: Callable[[], object]) -> dict[str, float]:
    """Microseconds a call of `work`, CALLS of them in one graph."""
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            work()
    dist.barrier()
    return spread([s / CALLS * 1e6 for s in slowest(gpu_seconds(graph.replay, REPEATS))])


def link_rate(group: dist.ProcessGroup, device: torch.device) -> float:
    """Bytes a second that each rank reads from the next one while all of them do."""
    import torch.distributed._symmetric_memory as symmetric_memory

    own = symmetric_memory.empty(COPIED, dtype=torch.bfloat16, device=device)
    handle = symmetric_memory.rendezvous(own, group)
    neighbour = handle.get_buffer((handle.rank + 1) % handle.world_size, (COPIED,), torch.bfloat16)
    into = torch.empty(COPIED, dtype=torch.bfloat16, device=device)
    dist.barrier()
    rate = into.nbytes / statistics.median(slowest(gpu_seconds(lambda: into.copy_(neighbour), REPEATS)))
    dist.barrier()  # nobody frees what another still reads
    return rate


def check(norm: Callable[..., tuple[Tensor, Tensor]], x: Tensor, peers: Peers) -> None:
    """Stop unless sums are the reference's bits, and norms within two roundings of its."""
    found, expected = norm(x, backend="triton"), norm(x, backend="reference")
    same = torch.equal(found[1], expected[1]) and torch.allclose(found[0], expected[0], rtol=2**-6, atol=1e-6)
    plain = torch.equal(all_reduce(x, peers), all_reduce(x, peers, backend="reference"))
    bad = torch.tensor(float(not (same and plain)), device="cuda")
    dist.all_reduce(bad)
    if bad.item():
        sys.exit(f"{COMMAND}: {len(x)} tokens differ from the reference on {bad.item():.0f} ranks; no time is reported")


def measure(tokens: int, peers: Peers, rate: float) -> list[dict[str, object]]:
    """Rows of one number of tokens."""
    x = torch.randn(tokens, peers.hidden, device=peers.device).to(torch.bfloat16)
    residual, weight, zeros = torch.ones_like(x), torch.ones_like(x[0]), torch.zeros_like(x)
    norm = partial(all_reduce_norm, peers=peers, residual=residual, weight=weight, eps=EPS)
    check(norm, x, peers)
    floor = (peers.world - 1) * x.nbytes / rate * 1e6
    works: dict[str, Callable[[], object]] = {
        "all_reduce_norm": lambda: norm(x),
        "all_reduce": lambda: all_reduce(x, peers),
        "NCCL, sum alone": lambda: dist.all_reduce(zeros),
    }
    rows = []
    for what, work in works.items():
        us = micros(work)
        rows.append({"tokens": tokens, "what": what, "us": us, "floor_us": floor, "over_floor": us["median"] / floor})
        if peers.rank == 0:
            numbers = f"{us['median']:8.1f} {us['min']:8.1f} {us['max']:8.1f} {us['median'] / floor:10.1f}x"
            print(f"{tokens:6}  {what:18} {numbers}", flush=True)
    return rows


def ptxas_version() -> str:
    """Of the assembler that Triton uses for this GPU."""
    from triton.backends.nvidia.compiler import get_ptxas

    major, minor = torch.cuda.get_device_capability()
    return get_ptxas(major * 10 + minor).version


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=6144)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 16, 64])
    parser.add_argument("--json", help="also write the result to this file")
    args = parser.parse_args()
    require_gpu(COMMAND)
    if not dist.is_torchelastic_launched():
        sys.exit(f"{COMMAND}: needs a process for each GPU: torchrun --nproc-per-node N -m {COMMAND}")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    group, rank = dist.group.WORLD, dist.get_rank()
    assert group is not None
    if group.size() < 2:
        sys.exit(f"{COMMAND}: one rank exchanges nothing; start at least two processes")
    torch.manual_seed(rank)
    peers = Peers(group, max(args.tokens), args.hidden, device)
    rate = link_rate(group, peers.device)
    if rank == 0:
        print(f"{group.size()} GPUs, {rate / 1e9:.0f} GB/s from a neighbour; ptxas {ptxas_version()}")
        print(f"{'tokens':>6}  {'what':18} {'us':>8} {'min':>8} {'max':>8} {'over floor':>11}")
    rows = [row for tokens in args.tokens for row in measure(tokens, peers, rate)]
    if rank == 0:
        about = {"world": group.size(), "hidden": args.hidden, "link_gb_s": rate / 1e9, "ptxas": ptxas_version()}
        publish("all_reduce", {**about, "rows": rows}, args.json)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
