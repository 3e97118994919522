"""The DFlash drafter inside the runtime: context keys in pages of its own, and one pass over a block a round.

The drafter of core.models.dflash, in terms of `Ops`. Its context is what the target computed (the tapped layers'
outputs); its keys and values stand at the tokens' positions, in pages that follow the target's through the same page
book, so a cached prefix serves both. A block's own keys go to the positions from the anchor on, where the next context
overwrites them: nothing is copied back and nothing is rolled back.

Drafts are chosen without chance (greedy slots, or the selector's greedy walk), which leaves any target distribution
unchanged (kernels.accept). Weights are on every rank; embedding and head are the target's.

Legend: T tokens, R rows, B block size, F taps x hidden, G hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from core.errors import ConfigError, UnsupportedError
from core.generate.dflash import Walked, walk
from core.generate.sampling import Sampling
from core.models.dflash import Drafter, Layer
from core.models.dflash_config import SLIDING, DFlashConfig
from core.models.dflash_io import read_pairing
from core.models.drafters import folder_of, load_any
from infer.cache import GroupStep, KVCache, LayerShape
from infer.geometry import Geometry, plain
from infer.model import Model
from kernels.paged_attention import Batch
from kernels.qkv_rope import Heads

GREEDY = Sampling()


@dataclass(frozen=True)
class DraftLayer:
    """qkv rows: query heads, key heads, value heads; kv: the last two."""

    input_norm: Tensor
    qkv: Tensor
    kv: Tensor
    q_norm: Tensor
    k_norm: Tensor
    out: Tensor
    sinks: Tensor | None
    post_norm: Tensor
    gate_up: Tensor
    down: Tensor
    window: int | None


@dataclass(frozen=True)
class Tables:
    """Page tables [R, P] of the rows that draft, by cache group; `longest`: most positions a block can end at."""

    pages: tuple[Tensor, ...]
    longest: int


def open_drafter(
    folder: Path | str, geometry: Geometry, fingerprint: str, *, dtype: torch.dtype, device: torch.device, force: bool
) -> Drafter:
    """A drafter folder (or the run folder that holds one), refused where it is another target's.

    Raises:
        ConfigError: vocabulary, width or layers of another target, or another target's fingerprint (without `force`).
        UnsupportedError: a drafter that is not DFlash. CheckpointError: a damaged folder.
    """
    folder = folder_of(folder)
    drafter = load_any(folder, dtype=dtype, device=device)
    if not isinstance(drafter, Drafter):
        raise UnsupportedError(
            f"--drafter {folder}: the runtime runs DFlash drafters; measure others with draft_training.acceptance"
        )
    config, g = drafter.config, geometry
    sizes = (config.vocab_size, config.hidden_size, config.num_target_layers)
    own = (g.vocab_size, g.hidden_size, len(g.layers))
    if sizes != own:
        raise ConfigError(
            f"--drafter {folder} was made for a target of vocabulary {sizes[0]}, width {sizes[1]} and {sizes[2]} "
            f"layers; this one has {own[0]}, {own[1]} and {own[2]}"
        )
    named = read_pairing(folder).get("target", {}).get("fingerprint")
    if named and named != fingerprint and not force:
        raise ConfigError(
            f"--drafter {folder} was trained for target {named[:12]}, and --model is {fingerprint[:12]}: few drafts "
            "would be accepted; take its own target, or add --force-drafter"
        )
    return drafter


def windows_of(config: DFlashConfig) -> tuple[int | None, ...]:
    """By layer."""
    return tuple(config.window if kind == SLIDING else None for kind in config.layer_types)


def shapes_of(config: DFlashConfig, groups: Sequence[int | None]) -> list[LayerShape]:
    """What the drafter's layers need in the cache; groups: windows of the page book's pools."""
    return [
        LayerShape(config.num_key_value_heads, config.head_dim, config.head_dim, groups.index(window))
        for window in windows_of(config)
    ]


class BlockDrafter:
    """A drafter, ready to run beside `model`; its cache layers begin at `first`."""

    def __init__(self, drafter: Drafter, model: Model, *, first: int, length: int) -> None:
        self.drafter, self.model, self.first = drafter, model, first
        self.config = config = drafter.config
        self.taps, self.block, self.drafts = config.taps, config.block_size, config.drafts
        angle = torch.arange(length, dtype=torch.float32)[:, None] * plain(config.rotary_dims, config.rope_theta)
        self.cos, self.sin = angle.cos().to(model.device), angle.sin().to(model.device)
        pairs = zip(drafter.decoder_layers(), windows_of(config), strict=True)
        self.layers = [stacked(layer, window) for layer, window in pairs]
        sizes = (config.num_key_value_heads, config.head_dim, config.head_dim, config.rotary_dims)
        self.block_heads = Heads(config.num_attention_heads, *sizes, config.value_scale, config.rms_norm_eps)
        self.context_heads = Heads(0, *sizes, config.value_scale, config.rms_norm_eps)

    @torch.no_grad()
    def extend(self, features: Tensor, position: Tensor, groups: Sequence[GroupStep], cache: KVCache) -> None:
        """Context keys and values of tokens that the target has just computed, features [T, F]."""
        ops, config = self.model.ops, self.config
        x = ops.rms_norm(
            ops.linear(features, self.drafter.fc.weight), self.drafter.hidden_norm.weight, config.rms_norm_eps
        )
        for index, layer in enumerate(self.layers, self.first):
            ops.qkv_rope(
                x, layer.kv, None, self.cos, self.sin, position, groups[cache.layers[index].group].slot,
                cache.keys[index], cache.values[index], self.context_heads, q_norm=None, k_norm=layer.k_norm,
            )  # fmt: skip

    @torch.no_grad()
    def propose(self, anchor: Tensor, position: Tensor, tables: Tables, cache: KVCache) -> Walked:
        """Drafts that follow `anchor` [R] at `position` [R]."""
        ops, eps, model = self.model.ops, self.config.rms_norm_eps, self.model
        rows = len(anchor)
        stream = self.drafter.block(model.embedding(anchor)).flatten(0, 1)
        place = (position[:, None] + torch.arange(self.block, device=position.device)).flatten()
        steps = [block_step(table, place, position, self.block, cache.size, tables.longest) for table in tables.pages]
        x = ops.rms_norm(stream, self.layers[0].input_norm, eps)
        norms = [layer.input_norm for layer in self.layers[1:]] + [self.drafter.norm.weight]
        for index, (layer, norm) in enumerate(zip(self.layers, norms, strict=True), self.first):
            step, keys, values = steps[cache.layers[index].group], cache.keys[index], cache.values[index]
            q = ops.qkv_rope(
                x, layer.qkv, None, self.cos, self.sin, place, step.slot, keys, values, self.block_heads,
                q_norm=layer.q_norm, k_norm=layer.k_norm,
            )  # fmt: skip
            out = ops.attention(
                q, keys, values, step.batch, scale=self.config.head_dim**-0.5, window=layer.window, sinks=layer.sinks,
                causal=self.config.causal,
            )  # fmt: skip
            x, stream = ops.rms_norm(ops.linear(out.flatten(1), layer.out), layer.post_norm, eps, residual=stream)
            gate, up = ops.linear(x, layer.gate_up).chunk(2, dim=-1)
            x, stream = ops.rms_norm(ops.linear(F.silu(gate) * up, layer.down), norm, eps, residual=stream)
        hidden = x.unflatten(0, (rows, self.block))[:, 1:]
        return walk(self.drafter, model, hidden, anchor, GREEDY, None)


def block_step(table: Tensor, place: Tensor, position: Tensor, block: int, size: int, longest: int) -> GroupStep:
    """Slots and attention batch of blocks at positions that only the device knows."""
    rows = len(table)
    row = torch.arange(rows, device=table.device).repeat_interleave(block, output_size=rows * block)
    slot = table[row, place // size].to(torch.int64) * size + place % size
    start = torch.arange(0, (rows + 1) * block, block, dtype=torch.int32, device=table.device)
    batch = Batch(table, (position + block).to(torch.int32), start, longest_query=block, longest_key=longest)
    return GroupStep(batch, slot)


def stacked(layer: Layer, window: int | None) -> DraftLayer:
    attention, mlp = layer.self_attn, layer.mlp
    kv = torch.cat((attention.k_proj.weight, attention.v_proj.weight))
    sinks = attention.attention_sink_bias
    return DraftLayer(
        input_norm=layer.input_layernorm.weight, qkv=torch.cat((attention.q_proj.weight, kv)), kv=kv,
        q_norm=attention.q_norm.weight, k_norm=attention.k_norm.weight, out=attention.o_proj.weight,
        sinks=None if sinks is None else sinks.float(), post_norm=layer.post_attention_layernorm.weight,
        gate_up=torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)), down=mlp.down_proj.weight, window=window,
    )  # fmt: skip
