"""How close paged attention comes to the bytes of the keys and values it reads.

    python -m benchmarks.paged_attention [--case NAME ...] [--sweep] [--json FILE]

One CUDA graph holds a call for each of several layers, every layer with a cache of its own on shuffled pages, together
at least 256 MB (as far as LAYERS reach), so that keys come from memory and not from the L2 cache. The floor of a call
is the bytes of keys and values that its queries see over the copy bandwidth measured in the same run (read + write,
4 GiB). Bar: 70 % of that bandwidth for 8 queries of 16 heads on one KV head at 32K keys. A window is too small for its
bytes to matter, and prefill is bound by products; both are reported in microseconds.

Before any speed, kernels.paged_attention must agree with its plain-torch definition, or nothing is reported.
"""

import argparse
import statistics
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import gpu_seconds, publish, require_gpu, spread
from benchmarks.moe_mxfp4 import captured, copy_bandwidth, ptxas_version
from kernels.paged_attention import Batch, reference

LAYERS, COLD = 12, 256e6
SWEEP = [(16, 2), (32, 2), (32, 4), (64, 4), (64, 8), (128, 4), (128, 8)]
STAGES = (2, 3, 4, 5)


@dataclass(frozen=True)
class Case:
    """One layer as one GPU sees it, and the step: requests with as many queries and keys each."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    queries: int
    keys: int
    requests: int = 1
    window: int | None = None
    page: int = 64
    bar: float = 0.0

    def nbytes(self) -> int:
        """Of the keys and values that the queries see."""
        seen = self.keys if self.window is None else min(self.keys, self.window + self.queries - 1)
        return 2 * self.requests * seen * self.kv_heads * (self.head_dim + self.value_dim)


MIMO = {"heads": 16, "kv_heads": 1, "head_dim": 192, "value_dim": 128}
CASES = {
    "mimo, 8 queries, 32K": Case(**MIMO, queries=8, keys=32768, bar=0.7),
    "mimo, 1 query, 32K": Case(**MIMO, queries=1, keys=32768),
    "mimo, 8 queries, 128K": Case(**MIMO, queries=8, keys=131072),
    "mimo, 8 queries, 2K": Case(**MIMO, queries=8, keys=2048),
    "mimo, 8 queries, window 128": Case(**MIMO, queries=8, keys=32768, window=128),
    "gpt-oss, 8 queries, 32K": Case(64, 8, 64, 64, queries=8, keys=32768),
    "qwen3, 8 queries, 32K": Case(32, 4, 128, 128, queries=8, keys=32768),
    "qwen3, 16 requests, 8K": Case(32, 4, 128, 128, queries=1, keys=8192, requests=16),
    "qwen3, 64 requests, 8K": Case(32, 4, 128, 128, queries=1, keys=8192, requests=64),
    "qwen3, prefill of 512, 8K": Case(32, 4, 128, 128, queries=512, keys=8192),
}


@dataclass(frozen=True)
class Call:
    """What one layer is given."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    batch: Batch
    options: dict[str, Any]


def make_call(case: Case) -> Call:
    width = -(-case.keys // case.page)
    shape = (case.requests * width, case.page, case.kv_heads)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, dtype=torch.bfloat16, device="cuda")

    table = torch.randperm(case.requests * width, device="cuda").view(case.requests, width).to(torch.int32)
    length = torch.full((case.requests,), case.keys, dtype=torch.int32, device="cuda")
    start = torch.arange(case.requests + 1, dtype=torch.int32, device="cuda") * case.queries
    batch = Batch(table, length, start, longest_query=case.queries, longest_key=case.keys)
    q = normal(case.requests * case.queries, case.heads, case.head_dim)
    options = {"scale": case.head_dim**-0.5, "window": case.window, "sinks": None, "causal": True}
    return Call(q, normal(*shape, case.head_dim), normal(*shape, case.value_dim), batch, options)


def run(call: Call, shape: Any) -> Tensor:
    from kernels.paged_attention import launch

    return launch.paged_attention(call.q, call.k_cache, call.v_cache, call.batch, **call.options, shape=shape)


def measure(name: str, calls: list[Call], copy_bytes_s: float, shape: Any, repeats: int) -> dict[str, Any]:
    """Microseconds a call, its floor, and the share of the copy bandwidth; stops if the numbers are wrong."""
    call, case = calls[0], CASES[name]
    wanted = reference.paged_attention(call.q, call.k_cache, call.v_cache, call.batch, **call.options).double()
    error = float((run(call, shape).double() - wanted).norm() / wanted.norm())
    if not error < 2.0**-8:
        sys.exit(f"benchmarks.paged_attention: relative error {error:.2e} in {name}, {shape}; no speed is reported")
    seconds = gpu_seconds(captured(lambda: [run(call, shape) for call in calls]), repeats)
    took, floor = statistics.median(seconds) / len(calls), case.nbytes() / copy_bytes_s
    row = {
        "case": name,
        "shape": str(shape or "usual"),
        "us_a_call": {key: value * 1e6 / len(calls) for key, value in spread(seconds).items()},
        "floor_us": floor * 1e6,
        "share_of_copy": floor / took,
    }
    print(f"{name:28} {took * 1e6:8.1f} us, floor {floor * 1e6:7.1f} us, {floor / took:6.1%} of copy", row["shape"])
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--sweep", action="store_true", help="several launch shapes instead of the usual one")
    parser.add_argument("--json", help="also write the result to this file")
    options = parser.parse_args()
    require_gpu("benchmarks.paged_attention")
    from kernels.paged_attention.launch import Shape

    rate = copy_bandwidth(options.repeats)
    print(f"copy {rate / 1e9:.0f} GB/s; ptxas {ptxas_version()}")
    shapes = [Shape(*size, stages) for size in SWEEP for stages in STAGES] if options.sweep else [None]
    rows = []
    for name in options.case:
        layers = min(LAYERS, max(2, -int(-COLD // CASES[name].nbytes())))
        calls = [make_call(CASES[name]) for _ in range(layers)]
        rows += [measure(name, calls, rate, shape, options.repeats) for shape in shapes]
    publish("paged_attention", {"copy_GBps": rate / 1e9, "ptxas": ptxas_version(), "rows": rows}, options.json)
    best = {name: max(r["share_of_copy"] for r in rows if r["case"] == name) for name in options.case}
    return 0 if all(best[name] >= CASES[name].bar for name in options.case) else 1


if __name__ == "__main__":
    raise SystemExit(main())
