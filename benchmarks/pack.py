"""Packing BF16 into MXFP4 codes and scales on a GPU, against copying, in one run.

    python -m benchmarks.pack [--gib 4] [--repeats 20] [--json FILE]

Bytes: the BF16 read plus codes and scales written (2 + 0.53125 bytes a value), over the copy bandwidth measured in the
same run (read + write). Bar: at least 80 %. The result is checked against core.mxfp4 on a slice first. An export takes
it as `convert.export.write(..., encoder=...)`.
"""

import argparse
import statistics

import torch

from benchmarks.common import gpu_seconds, publish, require_gpu, spread
from core.mxfp4 import BITS_PER_WEIGHT, ScaleRule
from core.mxfp4 import encode as definition
from kernels.mxfp4_snap import encode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=4.0)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json")
    options = parser.parse_args()
    require_gpu("benchmarks.pack")
    rows, columns = int(options.gib * 2**30 / 2 / 4096), 4096
    weight = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
    other = torch.empty_like(weight)
    packed, wanted = encode(weight[:4096], ScaleRule.even), definition(weight[:4096].cpu())
    assert torch.equal(packed.codes.cpu(), wanted.codes) and torch.equal(packed.scales.cpu(), wanted.scales)
    copy = gpu_seconds(lambda: other.copy_(weight), options.repeats)
    pack = gpu_seconds(lambda: encode(weight, ScaleRule.even), options.repeats)
    copied = 2 * weight.nbytes / statistics.median(copy)
    moved = weight.numel() * (2 + BITS_PER_WEIGHT / 8) / statistics.median(pack)
    result = {"copy_s": spread(copy), "pack_s": spread(pack), "copy_GBps": copied / 1e9, "pack_GBps": moved / 1e9}
    publish("pack", result | {"share_of_copy": moved / copied}, options.json)
    return 0 if moved >= 0.8 * copied else 1


if __name__ == "__main__":
    raise SystemExit(main())
