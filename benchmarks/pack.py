"""Packing BF16 into MXFP4 codes and scales on a GPU, against copying, in one run.

    python -m benchmarks.pack [--gib 4] [--repeats 20] [--sweep] [--json FILE]      --sweep: all launch shapes
    python -m benchmarks.pack --cpu [--gib 0.0625]     convert/pack.py against core.mxfp4, on one thread

Bytes: the BF16 read plus codes and scales written (2 + 0.53125 bytes a value), over the copy bandwidth measured in the
same run (read + write). Bar: at least 80 %. The result is checked against core.mxfp4 on a slice first. An export takes
it as `convert.export.write(..., encoder=...)`.
"""

import argparse
import statistics
import time

import torch

from benchmarks.common import gpu_seconds, publish, require_gpu, spread
from convert.pack import fast_decode, fast_encode
from core.mxfp4 import BITS_PER_WEIGHT, ScaleRule, decode
from core.mxfp4 import encode as definition
from kernels.mxfp4_snap import encode

BYTES = 2 + BITS_PER_WEIGHT / 8  # moved for a value


def on_cpu(gib: float, repeats: int) -> dict[str, object]:
    """BF16 bytes a second on one thread: the definition, the fast packer, and their ratio in the same run."""
    torch.set_num_threads(1)
    weight = torch.randn(int(gib * 2**30 / 2 / 4096), 4096).to(torch.bfloat16)
    packed = fast_encode(weight)
    works = {
        "definition_encode": lambda: definition(weight),
        "encode": lambda: fast_encode(weight),
        "definition_decode": lambda: decode(packed),
        "decode": lambda: fast_decode(packed),
    }
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - began)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "MBps": {name: spread([weight.nbytes / 1e6 / s for s in values]) for name, values in seconds.items()},
        "encode_speedup": median["definition_encode"] / median["encode"],
        "decode_speedup": median["definition_decode"] / median["decode"],
    }


def sweep(weight: torch.Tensor, rate: float, repeats: int) -> dict[str, float]:
    """Share of the copy rate by launch shape, rows x warps; each result is checked against the definition first."""
    from kernels.mxfp4_snap import new_flag
    from kernels.mxfp4_snap.kernel import Tile
    from kernels.mxfp4_snap.kernel import encode as launch

    flag, found = new_flag(weight.device), {}
    wanted = definition(weight[:4096].cpu())
    for rows in (32, 64, 128, 256, 512):
        for warps in (2, 4, 8):
            tile = Tile(rows, warps)
            packed = launch(weight[:4096], ScaleRule.even, flag, tile)
            assert torch.equal(packed.codes.cpu(), wanted.codes) and torch.equal(packed.scales.cpu(), wanted.scales)
            taken = gpu_seconds(lambda tile=tile: launch(weight, ScaleRule.even, flag, tile), repeats)
            found[f"{rows} x {warps}"] = weight.numel() * BYTES / statistics.median(taken) / rate
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json")
    options = parser.parse_args()
    if options.cpu:
        publish("pack_cpu", on_cpu(options.gib or 0.0625, options.repeats), options.json)
        return 0
    require_gpu("benchmarks.pack")
    rows, columns = int((options.gib or 4.0) * 2**30 / 2 / 4096), 4096
    weight = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
    other = torch.empty_like(weight)
    packed, wanted = encode(weight[:4096], ScaleRule.even), definition(weight[:4096].cpu())
    assert torch.equal(packed.codes.cpu(), wanted.codes) and torch.equal(packed.scales.cpu(), wanted.scales)
    copy = gpu_seconds(lambda: other.copy_(weight), options.repeats)
    pack = gpu_seconds(lambda: encode(weight, ScaleRule.even), options.repeats)
    copied = 2 * weight.nbytes / statistics.median(copy)
    moved = weight.numel() * BYTES / statistics.median(pack)
    result = {"copy_s": spread(copy), "pack_s": spread(pack), "copy_GBps": copied / 1e9, "pack_GBps": moved / 1e9}
    if options.sweep:
        result["sweep"] = sweep(weight, copied, options.repeats)
    publish("pack", result | {"share_of_copy": moved / copied}, options.json)
    return 0 if moved >= 0.8 * copied else 1


if __name__ == "__main__":
    raise SystemExit(main())
