"""`convert.export --to hf` against reading and re-writing the same bytes with safetensors; and its peak memory.

    python -m benchmarks.export [--gb 4] [--shard-gb 1] [--rounds 3] [--workers 2] [--json FILE]

A synthetic MiMo-V2 checkpoint of the given size (random values on the MXFP4 grid) is written to a temporary folder and
read once, so that it lies in the page cache. Then, in turns, each in a process of its own: safetensors' load_file and
save_file of every shard; the export of the folder. Both sync what they wrote. Time is that of the work, imports aside.
Bars: at least 0.5 of the speed; peak memory (VmHWM above what the imports took) at most 2 shards.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.common import publish, spread
from benchmarks.load_memory import config
from convert.pack import fast_decode
from core.checkpoint.index import open_checkpoint
from core.models.build import build_meta
from core.models.load import save_model
from core.models.mimo_v2_config import MiMoV2Config
from core.mxfp4 import Packed

PROBE = """
import json, os, sys, time
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from convert.export import write
from convert.formats import FORMATS
from convert.plan import make_plan
from convert.source import open_source
def status(key):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(key))
source, out, kind, workers, shard = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
began = time.monotonic()
if kind == "export":
    opened = open_source(source)
    write(opened, FORMATS["hf"], make_plan(FORMATS["hf"], opened, shard), out, workers=workers)
else:
    out.mkdir()
    for file in sorted(Path(source).glob("*.safetensors")):
        save_file(load_file(file), out / file.name)
        handle = os.open(out / file.name, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
print(json.dumps({"seconds": time.monotonic() - began, "peak": status("VmHWM") - before}))
"""


def grid_weights(made: MiMoV2Config) -> Iterator[tuple[str, torch.Tensor]]:
    """Experts on the grid, with scales as they occur; everything else random."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in build_meta(made).state_dict().items():
        if ".experts." in name:
            rows = (*tensor.shape[:-1], tensor.shape[-1] // 32)
            codes = torch.randint(0, 256, (*rows, 16), dtype=torch.uint8, generator=generator)
            codes[..., 0] |= 0x07  # a 6 in every block, as the rules leave it
            scales = torch.randint(115, 122, rows, dtype=torch.uint8, generator=generator)
            yield name, fast_decode(Packed(codes.flatten(-2), scales))
        else:
            yield name, torch.randn(tensor.shape, generator=generator).to(tensor.dtype)


def measure(source: Path, out: Path, kind: str, options: argparse.Namespace) -> dict[str, float]:
    words = [sys.executable, "-c", PROBE, str(source), str(out), kind, str(options.workers)]
    done = subprocess.run([*words, str(int(options.shard_gb * 2**30))], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{kind} failed: {done.stderr.strip().splitlines()[-1]}")
    subprocess.run(["rm", "-r", str(out)], check=True)
    return json.loads(done.stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=4.0)
    parser.add_argument("--shard-gb", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "source"
        made = config(options.gb)
        save_model(grid_weights(made), made, source, shard_bytes=int(options.shard_gb * 2**30))
        checkpoint = open_checkpoint(source)
        size, shard = sum(e.nbytes for e in checkpoint.entries.values()), checkpoint.largest_shard
        for name in checkpoint.entries:
            checkpoint.read(name)
        found: dict[str, list[dict[str, float]]] = {"safetensors": [], "export": []}
        for number in range(options.rounds):
            for kind, values in found.items():
                values.append(measure(source, Path(place) / f"{kind}-{number}", kind, options))
    seconds = {kind: [v["seconds"] for v in values] for kind, values in found.items()}
    ratios = [a / b for a, b in zip(seconds["safetensors"], seconds["export"], strict=True)]
    result = {
        "gigabytes": size / 1e9,
        "seconds": {kind: spread(values) for kind, values in seconds.items()},
        "speed_over_safetensors": spread(ratios),
        "peak_over_shard": max(v["peak"] for v in found["export"]) / shard,
        "peak_over_shard_safetensors": max(v["peak"] for v in found["safetensors"]) / shard,
    }
    publish("export", result, options.json)
    return 0 if statistics.median(ratios) >= 0.5 and result["peak_over_shard"] <= 2 else 1


if __name__ == "__main__":
    sys.exit(main())
