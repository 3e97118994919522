"""Training throughput of fp4flash's MiMo-V2 over transformers' own class, in one run on one GPU.

    python -m benchmarks.throughput [--steps 60] [--rounds 3] [--json FILE]

Model: 77M parameters (hidden 384, 10 layers, 32 experts, top-4), 32 rows of 1,024 tokens. Both arms start from the
same weights and see the same batches under the same optimiser (FP32 masters, AdamW):
  transformers  MiMoV2FlashForCausalLM as it comes: grouped_mm experts, eager attention, its own loss over full logits
  fp4flash      our class: flex attention with sinks, compiled layers, chunked loss
  noise         transformers again, the batch cut into micro-batches: what summation order alone moves a BF16 loss curve
Rounds alternate the arms; the ratio is of medians. Needs a GPU; `--tiny` walks the code on a CPU without a claim.
"""

import argparse
import itertools
import time
from typing import Any

import torch
from transformers import MiMoV2FlashConfig, MiMoV2FlashForCausalLM

from benchmarks.common import publish, require_gpu, spread
from core.models.mimo_v2 import MiMoV2ForCausalLM
from core.models.mimo_v2_config import MiMoV2Config
from core.train.batch import Batch
from core.train.config import OptimConfig, ParallelConfig
from core.train.engines import build_engine
from qat.config import LossConfig
from qat.losses import make_loss


def geometry(tiny: bool) -> dict[str, Any]:
    layers = 3 if tiny else 10
    return {
        "vocab_size": 512 if tiny else 16384,
        "hidden_size": 64 if tiny else 384,
        "intermediate_size": 128 if tiny else 1536,
        "num_hidden_layers": layers,
        "num_attention_heads": 6,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "v_head_dim": 64,
        "moe_intermediate_size": 32 if tiny else 192,
        "n_routed_experts": 4 if tiny else 32,
        "num_experts_per_tok": 2 if tiny else 4,
        "layer_types": ["full_attention" if i % 5 == 0 else "sliding_attention" for i in range(layers)],
        "mlp_layer_types": ["dense"] + ["sparse"] * (layers - 1),
        "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
    }


def batches(vocab: int, rows: int, tokens: int, device: str, count: int) -> list[Batch]:
    """Learnable text: a random order-1 Markov chain over the vocabulary, the same for every arm."""
    generator = torch.Generator().manual_seed(1)
    following = torch.randint(0, vocab, (vocab, 4), generator=generator)
    made = []
    for _ in range(count):
        ids = torch.empty(rows, tokens + 1, dtype=torch.int64)
        ids[:, 0] = torch.randint(0, vocab, (rows,), generator=generator)
        choice = torch.randint(0, 4, (rows, tokens), generator=generator)
        for t in range(tokens):
            ids[:, t + 1] = following[ids[:, t], choice[:, t]]
        positions = torch.arange(tokens).expand(rows, tokens).contiguous()
        made.append(Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), positions).to(device))
    return made


def transformers_loss(model: Any, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What a user of transformers writes: logits of every token, mean cross-entropy, here as a sum."""
    logits = model(input_ids=batch.input_ids_BT, use_cache=False).logits.float()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels_BT.flatten(), reduction="sum")
    return loss, {"loss": loss.detach()}


class Arm:
    """One implementation under the common engine and optimiser."""

    def __init__(
        self, name: str, shape: dict[str, Any], weights: dict[str, torch.Tensor], device: str, rows: int
    ) -> None:
        self.name, self.rows = name, rows
        if name == "fp4flash":
            model: Any = MiMoV2ForCausalLM(
                MiMoV2Config(**shape, swa_num_key_value_heads=2 * shape["num_key_value_heads"], sliding_window=128)
            )
            loss_fn = make_loss(LossConfig(kl=0.0, ce=1.0), None)
        else:
            model = MiMoV2FlashForCausalLM(MiMoV2FlashConfig(**shape, sliding_window=128))
            loss_fn = transformers_loss
        model.load_state_dict(weights)
        model = model.to(device=device, dtype=torch.bfloat16).train()
        model.set_experts_implementation("fp4flash" if name == "fp4flash" else "grouped_mm")
        if name == "fp4flash" and device == "cuda":
            model.use_fast_attention()
            for layer in model.model.layers:
                layer.compile()
        self.engine = build_engine(
            model, loss_fn, OptimConfig(lr=1e-3), ParallelConfig(), micro_batches=1, device=torch.device(device)
        )

    def step(self, batch: Batch) -> torch.Tensor:
        stats: dict[str, torch.Tensor] = {}
        total = batch.labels_BT.numel()
        rows = self.rows if self.name == "noise" else batch.labels_BT.shape[0]
        starts = range(0, batch.labels_BT.shape[0], rows)
        for start in starts:
            part = self.engine.forward_backward(batch.rows(start, start + rows), 1.0 / total, last=start == starts[-1])
            stats = {k: stats.get(k, 0) + v for k, v in part.items()}
        self.engine.step(1.0)
        return stats["loss"] / total


def measure(arms: list[Arm], data: list[Batch], rounds: int, steps: int, device: str) -> dict[str, list[float]]:
    """Seconds a step, arms in turn, after warm-up."""
    taken: dict[str, list[float]] = {a.name: [] for a in arms}
    for arm in arms:
        for batch in data[:5]:
            arm.step(batch)
    for _, arm in itertools.product(range(rounds), arms):
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        for i in range(steps):
            arm.step(data[i % len(data)])
        if device == "cuda":
            torch.cuda.synchronize()
        taken[arm.name].append((time.perf_counter() - began) / steps)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--curve", type=int, default=80, help="steps of the loss-curve comparison")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json")
    options = parser.parse_args()
    if not options.tiny:
        require_gpu("benchmarks.throughput")
    device = "cpu" if options.tiny else "cuda"
    rows, tokens = (2, 64) if options.tiny else (32, 1024)
    shape = geometry(options.tiny)
    torch.manual_seed(0)
    seed_model = MiMoV2FlashForCausalLM(MiMoV2FlashConfig(**shape, sliding_window=128))
    weights = seed_model.state_dict()
    data = batches(shape["vocab_size"], rows, tokens, device, 16)

    curves: dict[str, list[float]] = {}
    for name in ("transformers", "fp4flash", "noise"):
        arm = Arm(name, shape, weights, device, rows=rows // 2)
        curves[name] = torch.stack([arm.step(data[i % len(data)]) for i in range(options.curve)]).tolist()
        del arm
    arms = [Arm(n, shape, weights, device, rows) for n in ("transformers", "fp4flash")]
    seconds = measure(arms, data, options.rounds, options.steps, device)
    per_step = rows * tokens
    gap = [abs(a - b) for a, b in zip(curves["transformers"], curves["fp4flash"], strict=True)]
    noise = [abs(a - b) for a, b in zip(curves["transformers"], curves["noise"], strict=True)]
    result = {
        "parameters": sum(p.numel() for p in seed_model.parameters()),
        "tokens_per_s": {n: spread([per_step / s for s in v]) for n, v in seconds.items()},
        "ratio": spread(seconds["transformers"])["median"] / spread(seconds["fp4flash"])["median"],
        "loss_gap_to_transformers": {"mean": sum(gap) / len(gap), "max": max(gap)},
        "loss_gap_of_bf16_noise": {"mean": sum(noise) / len(noise), "max": max(noise)},
        "final_loss": {n: c[-1] for n, c in curves.items()},
    }
    publish("throughput", result, options.json)


if __name__ == "__main__":
    main()
