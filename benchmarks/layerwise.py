"""One complete decoder layer, random weights, quantisation-trained on one device through the code of `qat.layerwise`.

    python -m benchmarks.layerwise --shape mimo_v2_5_pro --json layerwise.json

Reports time per step and for the layer, the model's time by extrapolation, peak memory and the layer's error before
(rounded) and after training. `--shape tiny` runs on a CPU in seconds.

The hidden states are random too, so the error shows that training works, not how much a real layer recovers
(benchmarks/smollm2.py measures that end to end).
"""

import argparse
import copy
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from core.models.experts import find_experts
from core.models.mimo_v2 import MiMoV2ForCausalLM
from core.models.mimo_v2_config import MiMoV2Config
from core.train.batch import Batch
from qat.config import LayerwiseConfig
from qat.layer_io import find_decoder
from qat.layer_train import Targets
from qat.layerwise import LayerReport, train_layerwise

VOCAB = 32_000  # of the stand-in embedding: token ids only pick random rows


def qwen3_30b() -> nn.Module:
    config = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=2048,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        tie_word_embeddings=True,
    )
    return Qwen3MoeForCausalLM(config)


def mimo(hidden: int, experts: int, width: int, heads: int, kv_heads: int, dims: tuple[int, int]) -> nn.Module:
    config = MiMoV2Config(
        vocab_size=VOCAB,
        hidden_size=hidden,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        swa_num_key_value_heads=kv_heads,
        head_dim=dims[0],
        v_head_dim=dims[1],
        moe_intermediate_size=width,
        n_routed_experts=experts,
        num_experts_per_tok=min(8, experts // 2),
        layer_types=["sliding_attention"],
        mlp_layer_types=["sparse"],
        sliding_window=128,
        attention_value_scale=0.612,
        tie_word_embeddings=True,
    )
    return MiMoV2ForCausalLM(config)


# shape -> (model with one layer, decoder layers of the real model that hold experts)
SHAPES = {
    "tiny": (lambda: mimo(64, 8, 32, 2, 1, (48, 32)), 1),
    "qwen3_30b": (qwen3_30b, 48),
    "mimo_v2_5_pro": (lambda: mimo(6144, 384, 2048, 128, 8, (192, 128)), 69),
}


class RandomSource:
    """`LayerSource` of one layer whose weights are drawn on the device, the same ones at every load."""

    num_layers = 1

    def __init__(self, model: nn.Module, device: torch.device, seed: int) -> None:
        name, self.shell = find_decoder(model)
        self.prefix, self.device, self.seed, self.init = f"{name}.layers.", device, seed, model._init_weights
        self.meta = self.shell.layers
        for child_name, child in self.shell.named_children():
            if child_name != "layers":
                child.to_empty(device=device)
        self.shell.layers = nn.ModuleList()
        for module in self.shell.modules():  # rotary frequencies are buffers that the model's initialiser computes
            self.init(module)
        self.shell.layers = self.meta
        draw_(self.shell.get_input_embeddings(), device, seed, std=1.0)

    def load(self, index: int) -> nn.Module:
        layer = copy.deepcopy(self.meta[index]).to_empty(device=self.device)
        draw_(layer, self.device, self.seed + 1)
        return layer

    def store(self, index: int, tensors: dict[str, torch.Tensor]) -> None:
        """The benchmark keeps nothing."""


@torch.no_grad()
def draw_(module: nn.Module, device: torch.device, seed: int, std: float | None = None) -> None:
    """Normal values on the device; by default the deviation is 1 / sqrt(inputs), so that outputs stay of size one."""
    generator = torch.Generator(device).manual_seed(seed)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.ndim >= 2:
            for part in tensor if tensor.ndim == 3 else (tensor,):
                part.normal_(0, std or tensor.shape[-1] ** -0.5, generator=generator)
        else:
            tensor.fill_(1.0 if "norm" in name else 0.0)


def run(shape: str, tokens: int, seq_len: int, cfg: LayerwiseConfig, device: torch.device, folder: Path) -> LayerReport:
    """Train the layer; folder holds hidden states and the result."""
    build, _ = SHAPES[shape]
    with torch.device("meta"):
        model = build().to(torch.bfloat16)
    model.set_experts_implementation("fp4flash")
    source = RandomSource(model.eval(), device, seed=0)
    generator = torch.Generator().manual_seed(0)
    rows = max(cfg.batch_size, tokens // seq_len)
    ids = torch.randint(0, VOCAB, (rows, seq_len), generator=generator)
    positions = torch.arange(seq_len).repeat(rows, 1)
    quantized = {e.name: e.reduction_dim for e in find_experts(model)}
    targets = Targets(quantized, list(quantized))
    batch = Batch(ids, ids.roll(-1, 1), positions)
    (report,) = train_layerwise(source, targets, [batch], cfg, folder).reports
    return report


def show(shape: str, report: LayerReport, device: torch.device, wall: float) -> dict[str, object]:
    layers = SHAPES[shape][1]
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    record = {"shape": shape, "device": gpu, "torch": torch.__version__, "wall_s": wall, **dataclasses.asdict(report)}
    record["model_hours"] = report.seconds * layers / 3600
    print(f"{shape}: {report.quantized_params / 1e9:.2f}B quantised parameters in the layer, on {gpu}")
    print(f"  {report.step_ms:,.1f} ms a step, {report.tokens_per_s:,.0f} tokens/s, {report.slices} slices")
    print(f"  {report.seconds:,.1f} s for the layer ({report.steps} steps in all, streams included)")
    print(f"  x {layers} layers = {record['model_hours']:.2f} hours for the model")
    print(f"  peak device memory {report.peak_bytes / 1e9:,.2f} GB")
    print(f"  relative error of the layer's output: rounded {report.loss_ptq:.6f}, trained {report.loss:.6f}")
    return record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--tokens", type=int, default=65536, help="calibration tokens")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=8, help="rows of --seq-len tokens in a step")
    parser.add_argument("--steps", type=int, default=50, help="steps for each slice")
    parser.add_argument("--slices", type=int, default=0, help="0 = the fewest that fit")
    parser.add_argument("--lr", type=float, default=2.5e-3)
    parser.add_argument("--hidden", choices=("disk", "recompute"), default="recompute")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cfg = LayerwiseConfig(
        steps=args.steps,
        batch_size=args.batch_size,
        tokens=args.tokens,
        hidden=args.hidden,
        slices=args.slices,
        lr=args.lr,
    )
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = run(args.shape, args.tokens, args.seq_len, cfg, device, Path(folder))
    record = show(args.shape, report, device, time.perf_counter() - began)
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
