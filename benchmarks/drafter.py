"""What training a drafter costs on one GPU: against a plain implementation, per anchor, and for capturing features.

    python -m benchmarks.drafter [--parts throughput,memory,anchor,capture] [--repeats 5] [--json FILE]

Target: SmolLM2-135M's geometry with random weights (30 layers of 576, 49,152 tokens); drafter: 5 layers, block 8,
window 512, random text. A step is the target's forward with its taps, the drafter forward and backward, and the update.

throughput  512 anchors x 4,096 tokens, 2 rows: ours (as +experiment=smollm2_dflash trains: flex_attention, compiled
            layers, one CUDA graph) over the straightforward step (eager; dense mask through torch's fused attention,
            one cross-entropy over all logits), same weights and optimiser, alternating. Bar: 3 x.
memory      4,096 anchors x 4,096 tokens, one row: peak memory of our step. Bar: it runs.
anchor      time per anchor of drafter forward and backward at 16 x 1K, 4 x 4K and 1 x 16K tokens, one anchor in four
            tokens each; the last over the first. Bar: 1.1 x.
capture     the target's forward with taps over the same without. Bar: 1.05 x.
"""

import argparse
import copy
import statistics
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import gpu_seconds, publish, require_gpu
from core.generate.target import Target
from core.models.dflash import Drafter, init_drafter
from core.models.dflash_config import DFlashConfig, spread_taps
from core.models.ops import FLEX, ModelOps
from core.train.batch import IGNORE
from core.train.config import OptimConfig
from core.train.local import LocalEngine
from draft_training.anchors import DraftBatch, draw_anchors, gathered
from draft_training.build import compile_layers
from draft_training.config import LossConfig
from draft_training.losses import decay, make_loss
from draft_training.replay import hidden_at

BARS = {"throughput": 3.0, "anchor": 1.1, "capture": 1.05}
LAYERS, WIDTH, VOCAB = 30, 576, 49152


def make_target(device: str) -> Target:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=1536, num_hidden_layers=LAYERS, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64, tie_word_embeddings=True, max_position_embeddings=32768,
    )  # fmt: skip
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)
    return Target(model, spread_taps(LAYERS, 5))


def flex_target(target: Target) -> Target:
    """The same weights under flex_attention, as +experiment=smollm2_dflash loads its target."""
    model = copy.deepcopy(target.model)
    model.set_attn_implementation("flex_attention")
    return Target(model, target.taps)


def make_drafter(target: Target, ops: ModelOps) -> Drafter:
    torch.manual_seed(0)
    config = DFlashConfig(
        hidden_size=WIDTH, intermediate_size=1536, num_hidden_layers=5, num_attention_heads=9, num_key_value_heads=3,
        head_dim=64, vocab_size=VOCAB, num_target_layers=LAYERS, taps=target.taps, mask_token_id=0, window=512,
    )  # fmt: skip
    drafter = Drafter(config).to(target.device, torch.bfloat16)
    init_drafter(drafter, torch.randn(WIDTH) * 0.02)
    drafter.ops = ops
    return drafter.train()


def make_batch(rows: int, tokens: int, anchors: int, device: str) -> DraftBatch:
    """One document a row."""
    import numpy as np

    ids = torch.randint(0, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(0))
    labels = torch.roll(ids, -1, 1)
    labels[:, -1] = IGNORE
    position = torch.arange(tokens).expand(rows, -1)
    rng = np.random.default_rng(0)
    drawn = np.stack([draw_anchors(labels[r].numpy(), position[r].numpy(), anchors, rng) for r in range(rows)])
    return DraftBatch(ids, labels, position, torch.from_numpy(drawn), torch.full((rows,), 7)).to(device)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor, sinks: Tensor | None) -> Tensor:
    """What one writes first: the whole mask, torch's fused attention."""
    assert sinks is None
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)


def plain_loss(target: Target, config: LossConfig) -> Any:
    """The straightforward step: all logits in FP32, weighted cross-entropy."""

    def loss_fn(drafter: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        ids, position, anchors = batch.input_ids_BT, batch.position_ids_BT, batch.anchors_RA
        _, features = target.packed(ids, position)
        hidden = hidden_at(drafter, target, ids, position, features, anchors)[:, :, 1:].flatten(0, 2)
        labels = gathered(batch.labels_BT, position, anchors, 7).flatten()
        each = F.cross_entropy(target.head(hidden).float(), labels, reduction="none", ignore_index=IGNORE)
        return (each.view(-1, 7) * decay(7, config.gamma, each.device)).sum(), {}

    return loss_fn


def our_step(target: Target, batch: DraftBatch) -> Any:
    target = flex_target(target)
    drafter = make_drafter(target, FLEX)
    compile_layers(drafter, target)
    return step_of(target, make_loss(target, LossConfig()), drafter, batch, graph=True)


def step_of(target: Target, loss: Any, drafter: Drafter, batch: DraftBatch, graph: bool = False) -> Any:
    optim = OptimConfig(lr=1e-4)
    engine = LocalEngine(drafter, loss, optim, micro_batches=1, device=target.device, graph=graph)
    targets = batch.num_targets

    def step() -> None:
        engine.forward_backward(batch, 1.0 / targets, last=True)
        engine.step(1.0)

    return step


def throughput(target: Target, repeats: int) -> dict[str, Any]:
    batch = make_batch(2, 4096, 512, str(target.device))
    plain = make_drafter(target, ModelOps(attention=dense_attention))
    works = {
        "ours": our_step(target, batch),
        "plain": step_of(target, plain_loss(target, LossConfig()), plain, batch),
    }
    taken: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        gpu_seconds(work, 1)
    for _ in range(repeats):
        for name, work in works.items():
            taken[name] += gpu_seconds(work, 1, warmup=0)
    median = {name: statistics.median(values) for name, values in taken.items()}
    anchors = 2 * 512
    return {"seconds": taken, "anchors_per_s": {n: anchors / s for n, s in median.items()},
            "ratio": median["plain"] / median["ours"]}  # fmt: skip


def memory(target: Target, repeats: int) -> dict[str, Any]:
    batch = make_batch(1, 4096, 4095, str(target.device))
    step = our_step(target, batch)
    torch.cuda.reset_peak_memory_stats()
    seconds = gpu_seconds(step, repeats, warmup=2)
    return {"peak_GB": torch.cuda.max_memory_allocated() / 1e9, "seconds": seconds, "anchors": 4095}


def anchor(target: Target, repeats: int) -> dict[str, Any]:
    found = {}
    for rows, tokens in ((16, 1024), (4, 4096), (1, 16384)):
        batch = make_batch(rows, tokens, tokens // 4, str(target.device))
        drafter = make_drafter(target, FLEX)
        features = torch.randn(rows, tokens, 5 * WIDTH, device=target.device, dtype=torch.bfloat16)

        def work(drafter: Drafter = drafter, batch: DraftBatch = batch, features: Tensor = features) -> None:
            hidden = hidden_at(drafter, target, batch.input_ids_BT, batch.position_ids_BT, features, batch.anchors_RA)
            hidden.float().square().mean().backward()

        seconds = gpu_seconds(work, repeats)
        found[f"{rows} x {tokens}"] = {"us_per_anchor": statistics.median(seconds) / 4096 * 1e6, "seconds": seconds}
    values = [row["us_per_anchor"] for row in found.values()]
    return {"contexts": found, "ratio": values[-1] / values[0]}


def capture(target: Target, repeats: int) -> dict[str, Any]:
    batch = make_batch(8, 4096, 8, str(target.device))
    bare = Target(target.model, ())
    ids, position = batch.input_ids_BT, batch.position_ids_BT
    taken: dict[str, list[float]] = {"with": [], "bare": []}
    for one in (target, bare):
        gpu_seconds(lambda one=one: one.packed(ids, position), 1)
    for _ in range(repeats):
        taken["with"] += gpu_seconds(lambda: target.packed(ids, position), 1, warmup=0)
        taken["bare"] += gpu_seconds(lambda: bare.packed(ids, position), 1, warmup=0)
    return {"seconds": taken, "ratio": statistics.median(taken["with"]) / statistics.median(taken["bare"])}


def line_of(name: str, found: dict[str, Any]) -> str:
    """A part in one line."""
    bar = f"; bar {BARS[name]:g}" if name in BARS else ""
    match name:
        case "throughput":
            speed = found["anchors_per_s"]
            text = f"{speed['ours']:,.0f} anchors/s, plain {speed['plain']:,.0f}: {found['ratio']:.2f} x"
        case "memory":
            seconds = statistics.median(found["seconds"])
            text = f"{found['anchors']:,} anchors, peak {found['peak_GB']:.1f} GB, {seconds * 1e3:.1f} ms a step"
        case "anchor":
            each = (f"{context} tokens {row['us_per_anchor']:.2f} us" for context, row in found["contexts"].items())
            text = f"an anchor at {', '.join(each)}: {found['ratio']:.3f} x"
        case _:
            took = {one: statistics.median(seconds) * 1e3 for one, seconds in found["seconds"].items()}
            text = f"{took['with']:.1f} ms with taps, {took['bare']:.1f} ms without: {found['ratio']:.3f} x"
    return f"{name:11}{text}{bar}"


PARTS = {"throughput": throughput, "memory": memory, "anchor": anchor, "capture": capture}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json")
    options = parser.parse_args()
    wanted = options.parts.split(",")
    unknown = sorted(set(wanted) - set(PARTS))
    if unknown:
        parser.error(f"--parts: {unknown[0]} is not one of {', '.join(PARTS)}")
    require_gpu("benchmarks.drafter")
    target = make_target("cuda")
    result = {name: PARTS[name](target, options.repeats) for name in wanted}
    publish("drafter", result, options.json)
    for name, found in result.items():
        print(line_of(name, found))
    missed = [n for n in wanted if n in BARS and (result[n]["ratio"] < BARS[n]) == (n == "throughput")]
    for name in missed:
        print(f"bar missed: {name} {result[name]['ratio']:.3f}, wanted {BARS[name]}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
