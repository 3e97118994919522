"""What QAT costs: step time and peak memory of the same trainer with quant=mxfp4 over quant=none, on one GPU.

    python -m benchmarks.qat_step [--steps 20] [--rounds 5] [--json FILE]

A MiMo-V2-shaped MoE of more than 1B parameters, experts trained, KL to the BF16 teacher, FP32 masters. Both arms are
the real engine, loss and hook; rounds alternate. Memory is the peak of each arm's own process part, allocator reset
between. Needs a GPU; `--tiny` walks the code on a CPU without a claim.
"""

import argparse
import time
from typing import Any

import torch

from benchmarks.common import publish, require_gpu, spread
from benchmarks.throughput import batches
from core.models.mimo_v2 import MiMoV2ForCausalLM
from core.models.mimo_v2_config import MiMoV2Config
from core.train.batch import Batch
from core.train.config import OptimConfig, ParallelConfig
from core.train.engines import build_engine
from core.train.loop import NoHook
from qat.config import LossConfig, Method, QuantConfig
from qat.losses import make_loss
from qat.select import select, set_trainable
from qat.snap import Quantiser
from qat.teacher import make_teacher


def geometry(tiny: bool) -> dict[str, Any]:
    layers = 3 if tiny else 12
    return {
        "vocab_size": 512 if tiny else 32768,
        "hidden_size": 64 if tiny else 1024,
        "intermediate_size": 128 if tiny else 4096,
        "num_hidden_layers": layers,
        "num_attention_heads": 4 if tiny else 16,
        "num_key_value_heads": 1 if tiny else 2,
        "swa_num_key_value_heads": 2 if tiny else 4,
        "head_dim": 32 if tiny else 64,
        "v_head_dim": 32 if tiny else 64,
        "moe_intermediate_size": 32 if tiny else 512,
        "n_routed_experts": 4 if tiny else 64,
        "num_experts_per_tok": 2 if tiny else 8,
        "sliding_window": 128,
        "layer_types": ["full_attention" if i % 6 == 0 else "sliding_attention" for i in range(layers)],
        "mlp_layer_types": ["dense"] + ["sparse"] * (layers - 1),
        "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
    }


class Arm:
    """The trainer's parts as qat.pipeline assembles them, with or without the quantiser."""

    def __init__(self, quantised: bool, tiny: bool, device: str) -> None:
        torch.manual_seed(0)
        with torch.device(device):
            model = MiMoV2ForCausalLM(MiMoV2Config(**geometry(tiny))).to(torch.bfloat16)
        model.set_experts_implementation("fp4flash")
        if device == "cuda":
            model.use_fast_attention()
        config = QuantConfig(check_grid_every=1000)
        selection = select(model, config)
        set_trainable(model, ["quantized"], selection)
        slot: list[Any] = []
        teacher = make_teacher(LossConfig(), model, slot)
        model.train()
        self.engine = build_engine(
            model,
            make_loss(LossConfig(), teacher),
            OptimConfig(lr=1e-4),
            ParallelConfig(),
            micro_batches=1,
            device=torch.device(device),
        )
        slot.append(self.engine)
        self.hook: Any = Quantiser(self.engine, selection, config, Method.snap) if quantised else NoHook()
        self.hook.after_step(0)
        self.done = 0
        self.parameters = sum(p.numel() for p in model.parameters())

    def step(self, batch: Batch) -> None:
        self.engine.forward_backward(batch, 1.0 / batch.labels_BT.numel(), last=True)
        self.engine.step(1.0)
        self.done += 1
        self.hook.after_step(self.done)
        if self.done % 10 == 0:
            self.hook.metrics(self.done)


def timed(arm: Arm, data: list[Batch], steps: int, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for i in range(steps):
        arm.step(data[i % len(data)])
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / steps


def peak_bytes(quantised: bool, tiny: bool, data: list[Batch], device: str) -> int:
    """Peak allocated bytes of one arm alone, over a few steps."""
    if device != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    arm = Arm(quantised, tiny, device)
    for batch in data[:4]:
        arm.step(batch)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json")
    options = parser.parse_args()
    if not options.tiny:
        require_gpu("benchmarks.qat_step")
    device = "cpu" if options.tiny else "cuda"
    rows, tokens = (2, 64) if options.tiny else (16, 1024)
    data = batches(geometry(options.tiny)["vocab_size"], rows, tokens, device, 8)
    peaks = {n: peak_bytes(n == "mxfp4", options.tiny, data, device) for n in ("none", "mxfp4")}
    arms = {n: Arm(n == "mxfp4", options.tiny, device) for n in ("none", "mxfp4")}
    for arm in arms.values():
        timed(arm, data, 5, device)
    seconds: dict[str, list[float]] = {n: [] for n in arms}
    for _ in range(options.rounds):
        for name, arm in arms.items():
            seconds[name].append(timed(arm, data, options.steps, device))
    ratios = [q / n for q, n in zip(seconds["mxfp4"], seconds["none"], strict=True)]
    result = {
        "parameters": arms["mxfp4"].parameters,
        "seconds_per_step": {n: spread(v) for n, v in seconds.items()},
        "time_ratio": spread(ratios),
        "peak_bytes": peaks,
        "memory_ratio": peaks["mxfp4"] / peaks["none"] if peaks["none"] else None,
    }
    publish("qat_step", result, options.json)


if __name__ == "__main__":
    main()
