"""From a folder of MXFP4 weights in the page cache to the first token, over reading its bytes into GPU memory.

    python -m benchmarks.start [--gb 20] [--dir DIR] [--device cuda] [--json FILE]

A synthetic Qwen3-30B-shaped model (layers of 128 experts of 2,048 x 768, about 0.36 GB each, as many as --gb asks for;
random codes) is written as an `hf` export, unless --dir has one, and read once. Then fresh processes measure:

floor    every tensor of every shard to the device, by safetensors. The yardstick of the bar
start    imports; build_engine (weights, pages); the first token of 16 of prompt. Twice: the first fills Triton's cache

Bar: loading and the first token, kernels compiled before, at most 1.5 times the floor. Imports are shown and belong to
neither. Random codes say nothing sensible; the first token must only be one. On a CPU safetensors maps files unread:
--device cpu only tries the command.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3MoeConfig

from benchmarks.common import publish
from core.checkpoint.writer import ShardWriter
from core.mxfp4 import BLOCK

BAR = 1.5
EXPERTS, HIDDEN, INTERMEDIATE, VOCABULARY = 128, 2048, 768, 4096
SHARD_BYTES = 2 << 30
SCHEME = {
    "quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized", "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "format": "mxfp4-pack-quantized", "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": BLOCK,
                        "dynamic": False, "scale_dtype": "torch.uint8"},
        }
    },
}  # fmt: skip

FLOOR = """
import json, sys, time
from pathlib import Path
import torch
from safetensors.torch import load_file
folder, device = Path(sys.argv[1]), sys.argv[2]
torch.zeros(1, device=device)
begun, kept = time.perf_counter(), []
for path in sorted(folder.glob("*.safetensors")):
    kept.append(load_file(path, device=device))
if device == "cuda":
    torch.cuda.synchronize()
print(json.dumps({"floor_s": time.perf_counter() - begun}))
"""

START = """
import time
begun = time.perf_counter()
import json, sys
from pathlib import Path
import torch
from infer.build import build_engine
from infer.options import EngineOptions
from infer.request import Request, SamplingParams
folder, device = Path(sys.argv[1]), sys.argv[2]
torch.zeros(1, device=device)
imported = time.perf_counter()
engine = build_engine(EngineOptions(folder, device=device, rows=4, kv_tokens=4096))
if device == "cuda":
    torch.cuda.synchronize()
loaded = time.perf_counter()
engine.add(Request("first", list(range(16)), SamplingParams(max_tokens=1, ignore_eos=True)))
said = []
while engine.busy:
    said += [token for output in engine.step() for token in output.ids]
assert len(said) == 1, said
print(json.dumps({"imports_s": imported - begun, "load_s": loaded - imported,
                  "first_token_s": time.perf_counter() - loaded}))
"""


def layer_bytes() -> float:
    return 3 * EXPERTS * HIDDEN * INTERMEDIATE * (4 + 8 / BLOCK) / 8


def write_model(folder: Path, gigabytes: float) -> None:
    """An `hf` export of random codes; scales near 2^-9, so that values stay small."""
    layers = max(1, round(gigabytes * 1e9 / layer_bytes()))
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=6144, moe_intermediate_size=INTERMEDIATE,
        num_experts=EXPERTS, num_experts_per_tok=8, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=4, head_dim=128, decoder_sparse_step=1, max_position_embeddings=4096, dtype="bfloat16",
        architectures=["Qwen3MoeForCausalLM"],
    )  # fmt: skip
    writer = ShardWriter(folder, SHARD_BYTES)
    noise = torch.Generator().manual_seed(0)

    def dense(name: str, *shape: int) -> None:
        value = torch.randn(shape, generator=noise) * 0.02 if len(shape) > 1 else torch.ones(shape)
        writer.add(name, value.to(torch.bfloat16))

    codes = torch.randint(0, 256, (HIDDEN * INTERMEDIATE // 2,), dtype=torch.uint8, generator=noise)
    scales = torch.randint(116, 119, (HIDDEN * INTERMEDIATE // BLOCK,), dtype=torch.uint8, generator=noise)
    dense("model.embed_tokens.weight", VOCABULARY, HIDDEN)
    for layer in range(layers):
        stem = f"model.layers.{layer}"
        for part, rows, columns in (("q", 4096, HIDDEN), ("k", 512, HIDDEN), ("v", 512, HIDDEN), ("o", HIDDEN, 4096)):
            dense(f"{stem}.self_attn.{part}_proj.weight", rows, columns)
        for norm, size in (("self_attn.q_norm", 128), ("self_attn.k_norm", 128), ("input_layernorm", HIDDEN),
                           ("post_attention_layernorm", HIDDEN)):  # fmt: skip
            dense(f"{stem}.{norm}.weight", size)
        dense(f"{stem}.mlp.gate.weight", EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            for part in ("gate", "up", "down"):
                n, k = (HIDDEN, INTERMEDIATE) if part == "down" else (INTERMEDIATE, HIDDEN)
                name = f"{stem}.mlp.experts.{expert}.{part}_proj"
                writer.add(f"{name}.weight_packed", codes.view(n, k // 2))
                writer.add(f"{name}.weight_scale", scales.view(n, k // BLOCK))
    dense("model.norm.weight", HIDDEN)
    dense("lm_head.weight", VOCABULARY, HIDDEN)
    writer.finish()
    text = config.to_dict() | {"quantization_config": SCHEME}  # last: a folder that has it is whole
    (folder / "config.json").write_text(json.dumps(text, indent=1, default=str))


def child(script: str, folder: Path, device: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder), device], text=True, stdout=subprocess.PIPE, check=False
    )
    if done.returncode:
        sys.exit(f"benchmarks.start: a measuring process ended with {done.returncode}; no figure is reported")
    return json.loads(done.stdout.strip().splitlines()[-1])


def warm(folder: Path) -> int:
    """Read every shard once; returns their bytes."""
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while piece := file.read(64 << 20):
                total += len(piece)
    return total


def measure(folder: Path, device: str) -> dict[str, Any]:
    size = warm(folder)
    floor = min(child(FLOOR, folder, device)["floor_s"] for _ in range(2))
    first, again = (child(START, folder, device) for _ in range(2))
    ratio = (again["load_s"] + again["first_token_s"]) / floor
    found = {"bytes": size, "floor_s": floor, "first_start": first, "start": again, "ratio": ratio, "bar": BAR}
    print(f"{size / 1e9:.1f} GB; floor {floor:.2f} s ({size / 1e9 / floor:.1f} GB/s)")
    for name, one in (("first start", first), ("start", again)):
        print(f"{name:12}imports {one['imports_s']:.1f} s, load {one['load_s']:.2f} s, "
              f"first token {one['first_token_s']:.2f} s")  # fmt: skip
    verdict = f"bar {BAR}: {'met' if ratio <= BAR else 'missed'}" if device == "cuda" else "no verdict on a CPU"
    print(f"load and first token over the floor: {ratio:.2f}, {verdict}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=20.0)
    parser.add_argument("--dir", type=Path, help="where the model is, or is written to and left")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--json", help="also write the result to this file")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.start: needs a CUDA GPU and torch sees none; --device cpu tries the command", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.dir or Path(scratch)
        if not (folder / "config.json").exists():
            try:
                folder.mkdir(parents=True, exist_ok=True)
                write_model(folder, options.gb)
            except OSError as error:
                print(f"benchmarks.start: cannot write the model into {folder}: {error.strerror}", file=sys.stderr)
                return 2
        found = measure(folder, options.device)
    publish("start", found, options.json)
    return 0 if options.device == "cpu" or found["ratio"] <= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
