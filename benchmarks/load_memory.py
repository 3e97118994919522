"""Peak host memory while loading a sharded checkpoint, above the loaded model, over the size of the largest shard.

    python -m benchmarks.load_memory [--gb 0.5] [--shard-mb 128] [--json FILE]

A synthetic MiMo-V2 checkpoint of the given size (random weights, per-expert hub names, so every fused tensor has to be
assembled) is written to a temporary folder and loaded in a fresh process, which reports its peak resident memory
(VmHWM). Bar: at most 1.2 shards. For comparison the same folder through `AutoModelForCausalLM.from_pretrained`,
which maps the files: part of its figure are file pages that the kernel could take back.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.common import publish
from core.checkpoint.index import open_checkpoint
from core.models.build import build_meta
from core.models.load import save_model
from core.models.mimo_v2_config import MiMoV2Config

PROBE = """
import json, resource, sys
import torch, transformers
from core.models.load import load_model
transformers.AutoModelForCausalLM
def resident():
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("VmRSS"))
warm = load_model(sys.argv[1])  # libraries imported, allocator warm: what follows is the loading itself
del warm
before = resident()
open("/proc/self/clear_refs", "w").write("5")  # VmHWM starts anew
if sys.argv[3] == "fp4flash":
    model = load_model(sys.argv[2]).model
else:
    model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype=torch.bfloat16)
peak = next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("VmHWM"))
size = sum(t.numel() * t.element_size() for t in {id(t): t for t in model.state_dict().values()}.values())
print(json.dumps({"before": before, "peak": peak, "model": size, "after": resident()}))
"""


def config(gigabytes: float) -> MiMoV2Config:
    """Layers of 32 experts (about 100 MB each in BF16) until the size is reached."""
    layers = max(2, round(gigabytes * 10))
    return MiMoV2Config(
        vocab_size=4096, hidden_size=1024, intermediate_size=2048, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=1, head_dim=64, v_head_dim=64, moe_intermediate_size=512, n_routed_experts=32,
        num_experts_per_tok=4,
    )  # fmt: skip


def random_weights(made: MiMoV2Config) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in build_meta(made).state_dict().items():
        yield name, torch.randn(tensor.shape, dtype=torch.float32).to(tensor.dtype)


def probe(warm: Path, folder: Path, loader: str) -> dict[str, int]:
    command = [sys.executable, "-c", PROBE, str(warm), str(folder), loader]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=0.5)
    parser.add_argument("--shard-mb", type=int, default=128)
    parser.add_argument("--json")
    options = parser.parse_args()
    result = {}
    with tempfile.TemporaryDirectory() as scratch:
        warm, folder = Path(scratch) / "warm", Path(scratch) / "model"
        for path, size in ((warm, 0.0), (folder, options.gb)):
            made = config(size)
            save_model(random_weights(made), made, path, shard_bytes=options.shard_mb * 2**20)
        shard = open_checkpoint(folder).largest_shard
        for loader in ("fp4flash", "transformers"):
            seen = probe(warm, folder, loader)
            above = seen["peak"] - seen["before"] - seen["model"]
            result[loader] = seen | {"above_model": above, "ratio": above / shard}
    publish("load_memory", {"largest_shard": shard, "bar": 1.2, **result}, options.json)


if __name__ == "__main__":
    main()
