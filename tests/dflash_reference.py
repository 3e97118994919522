"""The DFlash drafter once more, written from its description alone: one block, float64, a loop over the visible keys.

Shares no code with core; it reads tensors by their published names.

Legend: s tokens of context, B slots, F taps x hidden size, G hidden size, D head dim.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Facts:
    """windows: of each layer, None = all of the context. rotated: leading dims of a head that RoPE turns."""

    heads: int
    kv_heads: int
    windows: tuple[int | None, ...]
    block: int
    rotated: int
    theta: float
    eps: float
    causal: bool = False
    value_scale: float = 1.0


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean() + eps) * weight


def turn(x: Tensor, place: int, rotated: int, theta: float) -> Tensor:
    """Pairs (i, i + rotated / 2) turned by place / theta^(2 i / rotated)."""
    out, half = x.clone(), rotated // 2
    for i in range(half):
        angle = place / theta ** (2 * i / rotated)
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return out


def draft_block(weights: dict[str, Tensor], facts: Facts, features_sF: Tensor, anchor_embed: Tensor) -> Tensor:
    """Hidden states [B, G] of the block whose anchor stands behind s tokens of its document, at position s."""
    w = {name: tensor.detach().double() for name, tensor in weights.items()}
    fused = [norm(w["fc.weight"] @ f, w["hidden_norm.weight"], facts.eps) for f in features_sF.double()]
    x = [anchor_embed.double()] + [w["mask_embedding"]] * (facts.block - 1)
    for number, window in enumerate(facts.windows):
        names = {n.removeprefix(f"layers.{number}."): t for n, t in w.items() if n.startswith(f"layers.{number}.")}
        x = [a + b for a, b in zip(x, attend(names, facts, window, fused, x), strict=True)]
        for slot in range(facts.block):
            inner = norm(x[slot], names["post_attention_layernorm.weight"], facts.eps)
            gate, up = names["mlp.gate_proj.weight"] @ inner, names["mlp.up_proj.weight"] @ inner
            x[slot] = x[slot] + names["mlp.down_proj.weight"] @ (gate / (1 + torch.exp(-gate)) * up)
    return torch.stack([norm(v, w["norm.weight"], facts.eps) for v in x])


def attend(
    w: dict[str, Tensor], facts: Facts, window: int | None, fused: list[Tensor], x: list[Tensor]
) -> list[Tensor]:
    def heads(name: str, vector: Tensor, count: int) -> list[Tensor]:
        return list((w[f"self_attn.{name}_proj.weight"] @ vector).view(count, -1))

    def key_value(vector: Tensor, place: int) -> tuple[list[Tensor], list[Tensor]]:
        normed = [norm(k, w["self_attn.k_norm.weight"], facts.eps) for k in heads("k", vector, facts.kv_heads)]
        values = [v * facts.value_scale for v in heads("v", vector, facts.kv_heads)]
        return [turn(k, place, facts.rotated, facts.theta) for k in normed], values

    start = len(fused)  # the anchor's position
    inputs = [norm(v, w["input_layernorm.weight"], facts.eps) for v in x]
    known = [key_value(vector, place) for place, vector in enumerate(fused)]
    own = [key_value(vector, start + slot) for slot, vector in enumerate(inputs)]
    sinks = w.get("self_attn.attention_sink_bias")
    out = []
    for slot, vector in enumerate(inputs):
        seen = [known[j] for j in range(start) if window is None or start + slot - j < window]
        seen += [own[o] for o in range(facts.block) if o <= slot or not facts.causal]
        joined = []
        for head, q in enumerate(heads("q", vector, facts.heads)):
            q = turn(norm(q, w["self_attn.q_norm.weight"], facts.eps), start + slot, facts.rotated, facts.theta)
            group = head * facts.kv_heads // facts.heads
            share = [math.exp(float(q @ k[group]) / math.sqrt(len(q))) for k, _ in seen]
            total = sum(share) + (math.exp(float(sinks[head])) if sinks is not None else 0.0)
            joined.append(sum((s / total * v[group] for s, (_, v) in zip(share, seen, strict=True)), torch.zeros(())))
        out.append(w["self_attn.o_proj.weight"] @ torch.cat(joined))
    return out
