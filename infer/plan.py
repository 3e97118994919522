"""`--dry-run`: what a model, its drafter and its cache take on each GPU, from config.json alone."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from core.models.build import read_config
from core.models.dflash_io import read_drafter_config
from core.mxfp4 import BITS_PER_WEIGHT
from infer.build import PoolPlan, kv_bytes, step_tokens, target_shapes
from infer.drafting import shapes_of, windows_of
from infer.geometry import Geometry, LayerSpec, geometry_of
from infer.options import DTYPES, EngineOptions
from infer.parallel import device_of
from infer.shard import Shard

GB = 1e9


@dataclass(frozen=True)
class Sizes:
    """Bytes of one rank."""

    experts: int
    others: int

    @property
    def total(self) -> int:
        return self.experts + self.others


def weights_of(geometry: Geometry, shard: Shard, itemsize: int, *, packed: bool, tied: bool) -> Sizes:
    """What `infer.weights` holds.

    Args:
        packed: experts in MXFP4, else in `itemsize` bytes. tied: the head is the embedding.
    """
    g = geometry
    experts = others = 0
    others += g.vocab_size * g.hidden_size + g.hidden_size
    others += 0 if tied and shard.world == 1 else shard.vocabulary(g.vocab_size)[2] * g.hidden_size
    wide = 0  # values that stay FP32
    for spec in g.layers:
        attention, sinks = attention_of(g, spec, shard)
        others += attention + 2 * g.hidden_size
        wide += sinks
        if spec.sparse:
            inner = shard.inner(g.moe_intermediate_size)[2]
            experts += 3 * g.experts * inner * g.hidden_size
            others += g.experts * g.hidden_size
            wide += g.experts if g.rule.kind == "sigmoid_bias" else 0
            if g.interleaved:  # the family with biases
                others += g.experts * (1 + 2 * inner) + (g.experts * g.hidden_size if shard.rank == 0 else 0)
        else:
            others += 3 * shard.inner(g.intermediate_size)[2] * g.hidden_size
    each = BITS_PER_WEIGHT / 8 if packed else itemsize
    return Sizes(int(experts * each), others * itemsize + wide * 4)


def attention_of(g: Geometry, spec: LayerSpec, shard: Shard) -> tuple[int, int]:
    """Values of one layer's attention, and of its sinks."""
    heads, kv = (s.stop - s.start for s in (shard.heads(g.heads), shard.kv_heads(spec.kv_heads)))
    width = (heads + kv) * g.head_dim + kv * g.value_dim
    found = width * g.hidden_size + heads * g.value_dim * g.hidden_size
    found += 2 * g.head_dim if g.qk_norm else 0
    if g.interleaved:
        found += width + (g.hidden_size if shard.rank == 0 else 0)
    return found, heads if spec.sinks else 0


def plan_text(options: EngineOptions) -> str:
    """A table for the rank that this process is.

    Raises:
        ConfigError, UnsupportedError: as loading would.
    """
    config = read_config(options.model)
    g, device, dtype = geometry_of(config), device_of(options.device), DTYPES[options.dtype]
    shard = Shard(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    shard.check(g)
    drafter = read_drafter_config(options.drafter) if options.drafter else None
    groups = tuple(dict.fromkeys((*g.windows, *(windows_of(drafter) if drafter else ()))))
    layers = target_shapes(g, shard, groups) + (shapes_of(drafter, groups) if drafter else [])
    drafts = drafter.drafts if drafter else 0
    tokens = max(step_tokens(options, device), options.rows * (1 + drafts))
    plan = PoolPlan(groups, layers, dtype, options.page_size, options.rows, tokens, 2 * drafts + 1 if drafts else 0)
    tied = bool(getattr(config, "tie_word_embeddings", False))
    packed, plain = (weights_of(g, shard, dtype.itemsize, packed=p, tied=tied) for p in (True, False))
    lines = [
        f"Model      {g.family}, {len(g.layers)} layers, {g.experts} experts; rank {shard.rank} of {shard.world}, "
        f"{options.dtype} on {device.type}",
        f"Weights    {packed.total / GB:.2f} GB: experts {packed.experts / GB:.2f} in MXFP4, others "
        f"{packed.others / GB:.2f} (experts that are off the grid stay plain: {plain.total / GB:.2f} GB in all)",
        *kv_lines(plan, options, g, device, packed.total),
        f"A step     at most {options.rows} requests and {tokens:,} tokens"
        + (f"; {drafts} drafts a round from layers {list(drafter.taps)}" if drafter else ""),
    ]
    return "\n".join(lines)


def kv_lines(plan: PoolPlan, options: EngineOptions, g: Geometry, device: torch.device, weights: int) -> Sequence[str]:
    most = min(g.max_length, options.max_length or g.max_length)
    one = plan.nbytes(most + plan.ahead)
    lines = [f"KV cache   {one / GB:.2f} GB for one request of {most:,} tokens (windows: {windows(plan.groups)})"]
    if options.kv_tokens:
        lines.append(f"           {plan.nbytes(options.kv_tokens) / GB:.2f} GB for --kv-tokens {options.kv_tokens:,}")
    elif device.type == "cuda":
        free = kv_bytes(options, device) - weights
        lines.append(f"           {max(0, free) / GB:.2f} GB are left for it on this GPU after the weights")
    return lines


def windows(groups: Sequence[int | None]) -> str:
    return ", ".join("all positions" if w is None else f"{w:,}" for w in groups)
