"""How close the MXFP4 snap comes to a plain copy: python -m benchmarks.snap [--gib 4] [--sweep] [--json FILE]

Snapping runs once a step over every selected weight. The floor for it is memory: in place it reads 2 and writes 2 bytes
a weight, from FP32 masters it reads 4 and writes 2. The yardstick is torch's copy_ in the same run: BF16 to BF16 (the
same bytes), and FP32 to BF16 (what an optimiser's cast costs anyway). Every byte read or written is counted once.

Numerics come first: on fresh random data every result must equal core.mxfp4 bit for bit, or no speed is printed.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import kernels.mxfp4_snap as ops
from benchmarks.common import environment, require_gpu
from core import mxfp4
from core.mxfp4 import ScaleRule

if TYPE_CHECKING:
    from kernels.mxfp4_snap.kernel import Tile

WARM_UP, ROUNDS = 5, 30
SWEEP = [(rows, warps) for rows in (32, 64, 128, 256, 512) for warps in (1, 2, 4, 8, 16) if 8 <= rows // warps <= 64]


@dataclass(frozen=True)
class Row:
    """One measured operation: median and spread (10th to 90th percentile) over ROUNDS, bandwidth in 1e9 bytes/s."""

    name: str
    ms: float
    ms_p10: float
    ms_p90: float
    gb_s: float
    of_copy: float


def check_numerics(rule: ScaleRule, tiles: "list[Tile]") -> None:
    """Stop unless every launch shape gives core.mxfp4's bits on data whose exponents span the whole BF16 range."""
    from kernels.mxfp4_snap import kernel

    generator = torch.Generator(device="cuda").manual_seed(torch.seed() % 2**31)
    master = torch.randn(1000, 4096, device="cuda", generator=generator)
    master *= torch.exp2(torch.randint(-130, 122, (1000, 1), device="cuda", generator=generator).float())
    expected = mxfp4.snap(master.to(torch.bfloat16), rule).view(torch.int16)
    for tile in tiles:
        flag = ops.new_flag("cuda")
        in_place, out = master.to(torch.bfloat16), torch.empty_like(master, dtype=torch.bfloat16)
        kernel.snap_from(in_place, in_place, rule, flag, tile)
        kernel.snap_from(master, out, rule, flag, tile)
        same = torch.equal(in_place.view(torch.int16), expected) and torch.equal(out.view(torch.int16), expected)
        if not same or flag.item():
            sys.exit(f"benchmarks.snap: {tile} under {rule.value} differs from core.mxfp4; no speed is reported")


def time_ms(operation: Callable[[], object]) -> list[float]:
    """Milliseconds of each of ROUNDS calls, sorted. The queue never drains, so no launch latency is measured."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(ROUNDS)]
    for _ in range(WARM_UP):
        operation()
    for begin, end in events:
        begin.record()
        operation()
        end.record()
    torch.cuda.synchronize()
    return sorted(begin.elapsed_time(end) for begin, end in events)


def measure(name: str, operation: Callable[[], object], moved_bytes: int, copy: Row | None = None) -> Row:
    times = time_ms(operation)
    median = statistics.median(times)
    gb_s = moved_bytes / median / 1e6
    return Row(name, median, times[ROUNDS // 10], times[-1 - ROUNDS // 10], gb_s, gb_s / copy.gb_s if copy else 1.0)


def bench(weights: int, rule: ScaleRule, tiles: "list[Tile]") -> list[Row]:
    """Each copy and then its kernel with every launch shape, on `weights` values (6 bytes a weight at most)."""
    from kernels.mxfp4_snap import kernel

    flag = ops.new_flag("cuda")
    out = torch.empty(weights, dtype=torch.bfloat16, device="cuda").normal_(std=0.02)
    rows = []

    def against_copy(name: str, source: Tensor, into: Tensor, moved_bytes: int) -> None:
        copy = measure(
            f"copy {source.dtype} to {out.dtype}".replace("torch.", ""), lambda: out.copy_(source), moved_bytes
        )
        rows.append(copy)
        for tile in tiles:

            def snap(tile: "Tile" = tile) -> None:
                kernel.snap_from(source, into, rule, flag, tile)

            rows.append(measure(f"{name} {tile.rows} x {tile.num_warps}", snap, moved_bytes, copy))

    bf16 = out.clone()
    against_copy("snap_", bf16, bf16, 4 * weights)
    del bf16
    against_copy("snap_from", torch.empty_like(out, dtype=torch.float32).normal_(std=0.02), out, 6 * weights)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=4.0, help="GiB of BF16 (the FP32 masters take twice that)")
    parser.add_argument("--rule", choices=[rule.value for rule in ScaleRule], default="even")
    parser.add_argument("--sweep", action="store_true", help="try several launch shapes instead of the default one")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    args = parser.parse_args()
    require_gpu("benchmarks.snap")
    from kernels.mxfp4_snap.kernel import DEFAULT_TILE, Tile

    rule = ScaleRule(args.rule)
    tiles = [Tile(*shape) for shape in SWEEP] if args.sweep else [DEFAULT_TILE]
    check_numerics(rule, tiles)
    weights = int(args.gib * 2**30) // 2 // mxfp4.BLOCK * mxfp4.BLOCK
    rows, where = bench(weights, rule, tiles), environment()

    print(f"{where['device']}; {where['versions']}; {where['git']}")
    print(f"rule {rule.value}, {args.gib:g} GiB of BF16, median of {ROUNDS}; bit-equal to core.mxfp4 on fresh data")
    print(f"\n{'operation (blocks x warps)':28} {'ms':>8} {'p10':>8} {'p90':>8} {'GB/s':>7} {'of copy':>8}")
    for row in rows:
        print(f"{row.name:28} {row.ms:8.3f} {row.ms_p10:8.3f} {row.ms_p90:8.3f} {row.gb_s:7.0f} {row.of_copy:8.1%}")
    if args.json:
        result = {
            "benchmark": "snap",
            "rule": rule.value,
            "gib": args.gib,
            "rows": [asdict(row) for row in rows],
            **where,
        }
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
