"""How close the small kernels of a decode step come to their bytes.

    python -m benchmarks.small_ops [--shape NAME ...] [--rows N ...] [--json FILE]

kernels.rms_norm with its addition, kernels.linear as attention's output projection, router and head, kernels.qkv_rope
with its write into the cache, and kernels.router. One CUDA graph holds a call for each of several layers, every layer
with weights of its own, 256 MB of them or 64 layers: as in a model, only activations are in the L2 cache when a layer
begins. The floor of a call is the bytes it must move (weights, inputs and outputs once) over the copy bandwidth of the
same run (read + write, 4 GiB). Norm and routing move so little that what counts of them is microseconds.

Before any speed, every call must agree with its plain-torch definition, and rows alone must have the bits they have
together, or nothing is reported. Beside linear stands torch's own product, which does not promise the latter.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import gpu_seconds, publish, require_gpu, spread
from kernels.linear import linear
from kernels.qkv_rope import Heads, qkv_rope
from kernels.rms_norm import rms_norm
from kernels.router import Rule, route

COMMAND = "benchmarks.small_ops"
COLD = 256 * 2**20  # bytes of weights in a graph, several times the L2 cache
LAYERS = (4, 64)  # at least and at most
ROWS = (1, 8, 64)
PAGE, LENGTH = 32, 4096
EPS = 1e-5


@dataclass(frozen=True)
class Shape:
    """What one GPU has of a model; vocabulary: its rows of the head."""

    hidden: int
    heads: Heads
    experts: int
    rule: Rule
    vocabulary: int
    norm: bool = False  # of each head's query and key
    bias: bool = False


SHAPES = {
    "mimo_v2_5_pro_tp8": Shape(6144, Heads(16, 1, 192, 128, 64), 384, Rule("sigmoid_bias", 8), 19072),
    "mimo_v2_flash": Shape(4096, Heads(64, 4, 192, 128, 64, 0.707), 256, Rule("sigmoid_bias", 8), 152576),
    "qwen3_30b": Shape(2048, Heads(32, 4, 128, 128, 128), 128, Rule("softmax_topk", 8), 151936, norm=True),
    "gpt_oss_120b": Shape(2880, Heads(64, 8, 64, 64, 64), 128, Rule("topk_softmax", 4), 201088, bias=True),
}


@dataclass(frozen=True)
class Job:
    """One operation.

    layer: makes a layer's tensors that are not activations. call: (x, layer, backend) -> results, a row each.
    moved: bytes of a call. peer: the same from torch, or None.
    """

    what: str
    x: Tensor
    layer: Callable[[], tuple[Tensor, ...]]
    call: Callable[[Tensor, tuple[Tensor, ...], str], tuple[Tensor, ...]]
    moved: int
    peer: Callable[[Tensor, tuple[Tensor, ...]], object] | None = None


def brain(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device="cuda") * scale).to(torch.bfloat16)


def size(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def norm_job(shape: Shape, rows: int) -> Job:
    def call(x: Tensor, layer: tuple[Tensor, ...], backend: str) -> tuple[Tensor, ...]:
        return rms_norm(x, layer[0], EPS, residual=x, backend=backend)

    x = brain(rows, shape.hidden)
    return Job("rms_norm, with residual", x, lambda: (brain(shape.hidden),), call, 4 * size(x) + 2 * shape.hidden)


def linear_job(what: str, sizes: tuple[int, int], rows: int, out: torch.dtype) -> Job:
    inputs, outputs = sizes

    def call(x: Tensor, layer: tuple[Tensor, ...], backend: str) -> tuple[Tensor, ...]:
        return (linear(x, layer[0], out_dtype=out, backend=backend),)

    x = brain(rows, inputs)
    moved = size(x) + 2 * inputs * outputs + rows * outputs * out.itemsize
    return Job(
        f"linear, {what}", x, lambda: (brain(outputs, inputs, scale=inputs**-0.5),), call, moved,
        lambda x, layer: F.linear(x, layer[0]).to(out),
    )  # fmt: skip


def qkv_job(shape: Shape, rows: int) -> Job:
    heads, pages = shape.heads, -(-rows // PAGE)
    angle = torch.rand(LENGTH, heads.rotary_dims // 2, device="cuda") * 6
    cos, sin = angle.cos(), angle.sin()
    slot = torch.arange(rows, device="cuda")
    norm = brain(heads.head_dim) if shape.norm else None
    sizes = (heads.head_dim, heads.value_dim)

    def layer() -> tuple[Tensor, ...]:
        caches = [torch.zeros(pages, PAGE, heads.kv_heads, d, dtype=torch.bfloat16, device="cuda") for d in sizes]
        return (brain(heads.width, shape.hidden, scale=shape.hidden**-0.5), brain(heads.width), *caches)

    def call(x: Tensor, layer: tuple[Tensor, ...], backend: str) -> tuple[Tensor, ...]:
        weight, bias, k, v = layer
        here = slot[: len(x)]
        q = qkv_rope(
            x, weight, bias if shape.bias else None, cos, sin, here, here, k, v, heads, q_norm=norm, k_norm=norm,
            backend=backend,
        )  # fmt: skip
        return (q, *(cache.flatten(0, 1)[: len(x)] for cache in (k, v)))

    x = brain(rows, shape.hidden)
    return Job("qkv_rope", x, layer, call, size(x) + 2 * heads.width * (shape.hidden + rows))


def route_job(shape: Shape, rows: int) -> Job:
    """Logits in steps of 2^-8, so that scores are equal or far apart and every expert can be compared."""
    biased = shape.rule.kind == "sigmoid_bias"

    def layer() -> tuple[Tensor, ...]:
        return (torch.zeros(shape.experts, device="cuda"),) if biased else ()

    def call(logits: Tensor, layer: tuple[Tensor, ...], backend: str) -> tuple[Tensor, ...]:
        return route(logits, shape.rule, layer[0] if layer else None, backend=backend)

    logits = (torch.randn(rows, shape.experts, device="cuda") * 256).round() / 256
    return Job("router", logits, layer, call, size(logits, *layer()) + rows * shape.rule.top_k * 8)


def jobs(shape: Shape, rows: int) -> Iterator[Job]:
    inside = shape.heads.heads * shape.heads.value_dim
    yield norm_job(shape, rows)
    yield qkv_job(shape, rows)
    yield linear_job("attention's output", (inside, shape.hidden), rows, torch.bfloat16)
    yield linear_job("router's logits", (shape.hidden, shape.experts), rows, torch.float32)
    yield route_job(shape, rows)
    yield linear_job("head", (shape.hidden, shape.vocabulary), rows, torch.float32)


def fail(job: Job, why: str) -> None:
    sys.exit(f"{COMMAND}: {job.what}, {len(job.x)} rows, {why}; no speed is reported")


def check(job: Job) -> None:
    """Only FP32 sums may differ from the definition (tensor cores truncate), and nothing between one row and many."""
    layer = job.layer()
    found = [t.clone() for t in job.call(job.x, layer, "triton")]
    alone = [t.clone() for t in job.call(job.x[:1], layer, "triton")]
    if not all(torch.equal(one, many[:1]) for one, many in zip(alone, found, strict=True)):
        fail(job, "has other bits alone than among others")
    for ours, wanted in zip(found, job.call(job.x, layer, "reference"), strict=True):
        if ours.dtype == torch.int32:
            if not torch.equal(ours, wanted):
                fail(job, "chooses other experts than the definition")
            continue
        error = float((ours.double() - wanted.double()).norm() / wanted.double().norm())
        if not error < (2.0**-9 if ours.dtype == torch.bfloat16 else 2.0**-15):
            fail(job, f"has a relative error of {error:.2e}")


def captured(work: Callable[[], object]) -> Callable[[], None]:
    """`work` as the replay of one CUDA graph; called twice before, so that everything is compiled and allocated."""
    for _ in range(2):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def figures(job: Job, count: int, work: Callable[[], object], rate: float, repeats: int) -> dict[str, Any]:
    """Microseconds a call, its floor, and the share of the copy bandwidth."""
    seconds, floor = gpu_seconds(captured(work), repeats), job.moved / rate
    return {
        "us": {name: value * 1e6 / count for name, value in spread(seconds).items()},
        "floor_us": floor * 1e6,
        "share_of_copy": floor * count / statistics.median(seconds),
    }


def measure(job: Job, rate: float, repeats: int) -> Iterator[dict[str, Any]]:
    """Ours, and torch's where there is one."""
    check(job)
    least, most = LAYERS
    weight_bytes = max(1, size(*job.layer()))
    layers = [job.layer() for _ in range(min(most, max(least, -(-COLD // weight_bytes))))]

    def run(call: Callable[..., object]) -> None:
        for layer in layers:
            call(job.x, layer)

    given = {"ours": lambda x, layer: job.call(x, layer, "triton")} | ({"torch": job.peer} if job.peer else {})
    for who, call in given.items():
        yield {"what": job.what, "who": who} | figures(job, len(layers), partial(run, call), rate, repeats)


def ptxas_version() -> str:
    """Of the assembler that Triton uses for this GPU."""
    from triton.backends.nvidia.compiler import get_ptxas

    major, minor = torch.cuda.get_device_capability()
    return get_ptxas(major * 10 + minor).version


def copy_rate(repeats: int) -> float:
    """Bytes a second, read and written, of copying 4 GiB."""
    source = torch.zeros(2**32, dtype=torch.uint8, device="cuda")
    into = torch.empty_like(source)
    return 2 * source.nbytes / statistics.median(gpu_seconds(lambda: into.copy_(source), repeats))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", help="also write the result to this file")
    options = parser.parse_args()
    require_gpu(COMMAND)
    torch.manual_seed(0)
    rate, found = copy_rate(options.repeats), []
    print(f"copy {rate / 1e9:.0f} GB/s; ptxas {ptxas_version()}")
    for name in options.shape:
        for rows in options.rows:
            for job in jobs(SHAPES[name], rows):
                for row in measure(job, rate, options.repeats):
                    found.append({"shape": name, "rows": rows} | row)
                    print(
                        f"{name:18} {rows:3} rows {row['what']:28} {row['who']:5} {row['us']['median']:8.2f} us, "
                        f"floor {row['floor_us']:7.2f} us, {row['share_of_copy']:6.1%} of copy", flush=True,
                    )  # fmt: skip
    publish("small_ops", {"copy_GBps": rate / 1e9, "ptxas": ptxas_version(), "rows": found}, options.json)


if __name__ == "__main__":
    main()
