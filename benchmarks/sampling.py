"""Time of kernels.sampling and kernels.accept: python -m benchmarks.sampling [--rows 1 8] [--vocabulary 151936]

Both are a few short kernels inside a CUDA graph, so what counts is microseconds a call. Beside each: its ratio to the
floor, which is the logits (and one slot of q) read once at the bandwidth that a large copy reached in the same run. And
what torch's softmax, sort and exponential noise take for the same rows in a graph of their own.

Numerics come first: every token must be the CPU reference's, or no time is printed.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.common import gpu_seconds, publish, require_gpu, spread
from kernels.accept import accept
from kernels.sampling import Params, sample

COMMAND = "benchmarks.sampling"
REPLAYS = 100
SETTINGS = [
    ("greedy", (0.0, 1.0, 0), True), ("greedy, cut=False", (0.0, 1.0, 0), False),
    ("temperature", (0.8, 1.0, 0), True), ("temperature, cut=False", (0.8, 1.0, 0), False),
    ("top_p", (0.8, 0.95, 0), True), ("top_p and top_k", (0.8, 0.95, 50), True),
]  # fmt: skip


def params_of(setting: tuple[float, float, int], rows: int, device: str, cut: bool) -> Params:
    temperature, top_p, top_k = setting
    return Params(
        torch.full((rows,), temperature, device=device),
        torch.full((rows,), top_p, device=device),
        torch.full((rows,), top_k, dtype=torch.int32, device=device),
        torch.arange(rows, device=device),
        cut,
    )


def graphed(work: Callable[[], object]) -> Callable[[], None]:
    """`work` REPLAYS times in one graph, so that no launch from the host is timed."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPLAYS):
            work()
    return graph.replay


def micros(work: Callable[[], object]) -> dict[str, float]:
    return spread([seconds / REPLAYS * 1e6 for seconds in gpu_seconds(graphed(work), 20)])


def copy_rate() -> float:
    """Bytes a second, read and written, of copying 2 GiB."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    out = torch.empty_like(source)
    return 2 * source.numel() / statistics.median(gpu_seconds(lambda: out.copy_(source), 20))


def torch_sample(logits: Tensor) -> Tensor:
    """What the same cut takes with torch's own operations; exponential noise, since multinomial synchronises."""
    ranked, order = (logits / 0.8).softmax(-1).sort(-1, descending=True)
    ranked = ranked.masked_fill(ranked.cumsum(-1) - ranked >= 0.95, 0)
    return order.gather(-1, (ranked / torch.empty_like(ranked).exponential_()).argmax(-1, keepdim=True))


@dataclass(frozen=True)
class Job:
    """what: printed. work: on the GPU, returns tokens. expected: the reference's. moved: bytes that have to be read."""

    rows: int
    what: str
    work: Callable[[], Tensor]
    expected: Tensor
    moved: int


def jobs(rows: int, vocabulary: int, drafts: int) -> Iterator[Job]:
    generator = torch.Generator().manual_seed(rows)
    logits = torch.randn(rows, drafts + 1, vocabulary, generator=generator) * 3
    one, q = logits[:, 0].contiguous(), logits[:, :-1].softmax(-1).contiguous()
    draft, position = logits[:, :-1].argmax(-1), torch.arange(rows) * (drafts + 1)
    drafted = torch.full((rows,), drafts, dtype=torch.int32)
    on = [t.cuda() for t in (one, q, draft, logits, position, drafted)]
    size = one.numel() * one.element_size()
    for name, setting, cut in SETTINGS:
        here, there = params_of(setting, rows, "cpu", cut), params_of(setting, rows, "cuda", cut)
        expected = sample(one, here, position, backend="reference")
        yield Job(rows, f"sample, {name}", partial(sample, on[0], there, on[4]), expected, size)
        for given in (False, True):

            def work(given: bool = given, p: Params = there) -> Tensor:
                return accept(on[2], on[1] if given else None, on[3], p, on[4], on[5])[1]

            given_q = q if given else None
            expected = accept(draft, given_q, logits, here, position, drafted, backend="reference")[1]
            moved = size * (drafts + 1) + (size if given else 0)  # of q, one slot is read
            yield Job(rows, f"accept {'with q' if given else 'without q'}, {name}", work, expected, moved)


def ptxas_version() -> str:
    """Of the assembler that Triton uses for this GPU."""
    from triton.backends.nvidia.compiler import get_ptxas

    major, minor = torch.cuda.get_device_capability()
    return get_ptxas(major * 10 + minor).version


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--drafts", type=int, default=7)
    parser.add_argument("--json", help="also write the result to this file")
    args = parser.parse_args()
    require_gpu(COMMAND)
    rate, found = copy_rate(), []
    print(f"{'rows':>4}  {'what':44} {'us':>8} {'min':>8} {'max':>8} {'over floor':>10}")
    for rows in args.rows:
        for job in jobs(rows, args.vocabulary, args.drafts):
            if not torch.equal(job.work().cpu(), job.expected):
                sys.exit(f"{COMMAND}: {job.what}, {rows} rows, differs from the reference; no time is reported")
            us, floor = micros(job.work), job.moved / rate * 1e6
            found.append({"rows": rows, "what": job.what, "us": us, "floor_us": floor})
            numbers = f"{us['median']:8.1f} {us['min']:8.1f} {us['max']:8.1f} {us['median'] / floor:9.1f}x"
            print(f"{rows:4}  {job.what:44} {numbers}", flush=True)
        logits = torch.randn(rows, args.vocabulary, device="cuda")
        us = micros(partial(torch_sample, logits))
        found.append({"rows": rows, "what": "torch, top_p", "us": us})
        print(f"{rows:4}  {'torch, top_p':44} {us['median']:8.1f} {us['min']:8.1f} {us['max']:8.1f}", flush=True)
    result = {"vocabulary": args.vocabulary, "drafts": args.drafts, "copy_gb_s": rate / 1e9, "rows": found}
    publish("sampling", {**result, "ptxas": ptxas_version()}, args.json)


if __name__ == "__main__":
    main()
