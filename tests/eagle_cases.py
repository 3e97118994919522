"""EAGLE drafters for tests, and one written a second time: one chain of one row, step by step, whole matrices, FP32.

Shared with the product: nothing but the tensors of its state dict.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from core.models.eagle import EagleDrafter, init_eagle
from core.models.eagle_config import EagleConfig

VOCAB, TAPS = 60, (0, 2)


def eagle_of(std: float = 0.3, seed: int = 6, **config: Any) -> EagleDrafter:
    torch.manual_seed(seed)
    base: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "vocab_size": VOCAB, "num_target_layers": 4, "taps": TAPS, "drafts": 4, "window": 0, "rope_theta": 100.0,
    }  # fmt: skip
    drafter = EagleDrafter(EagleConfig(**base | config))
    init_eagle(drafter, std=std)
    for name, parameter in drafter.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    return drafter.eval()


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x * x).mean(-1, keepdim=True).add(1e-6).sqrt() * weight


def turned(x: Tensor, position: int, theta: float) -> Tensor:
    """x [heads, D]: the pairs (i, i + D/2) as complex numbers, turned by position * theta^(-2i/D)."""
    half = x.shape[-1] // 2
    angle = position * theta ** (-torch.arange(half, dtype=torch.float64) * 2 / x.shape[-1])
    pair = torch.complex(x[:, :half].double(), x[:, half:].double()) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((pair.real, pair.imag), dim=-1).to(x.dtype)


class Slow:
    """Keys and values as lists by position."""

    def __init__(self, drafter: EagleDrafter, embedding: Tensor) -> None:
        self.w = {n: t.detach() for n, t in drafter.state_dict().items()}
        self.c, self.embedding = drafter.config, embedding.detach()

    def entry(self, token: int, before: Tensor, position: int) -> tuple[Tensor, Tensor, Tensor]:
        """(x [2G], key and value [KV heads, D]) of a token and the hidden state of the token before it."""
        w, dim = self.w, self.c.head_dim
        x = torch.cat((normed(self.embedding[token], w["midlayer.input_layernorm.weight"]),
                       normed(before, w["midlayer.hidden_norm.weight"])))  # fmt: skip
        key = normed((w["midlayer.self_attn.k_proj.weight"] @ x).view(-1, dim), w["midlayer.self_attn.k_norm.weight"])
        return x, turned(key, position, self.c.rope_theta), (w["midlayer.self_attn.v_proj.weight"] @ x).view(-1, dim)

    def step(self, x: Tensor, before: Tensor, position: int, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        w, dim, c = self.w, self.c.head_dim, self.c
        q = normed((w["midlayer.self_attn.q_proj.weight"] @ x).view(-1, dim), w["midlayer.self_attn.q_norm.weight"])
        q = turned(q, position, c.rope_theta)
        group, heads = c.num_attention_heads // c.num_key_value_heads, []
        for head in range(c.num_attention_heads):
            k, v = (torch.stack([t[head // group] for t in found]) for found in (keys, values))
            heads.append(((k @ q[head]) * dim**-0.5).softmax(-1) @ v)
        hidden = before + w["midlayer.self_attn.o_proj.weight"] @ torch.cat(heads)
        y = normed(hidden, w["midlayer.post_attention_layernorm.weight"])
        gate, up = w["midlayer.mlp.gate_proj.weight"] @ y, w["midlayer.mlp.up_proj.weight"] @ y
        return hidden + w["midlayer.mlp.down_proj.weight"] @ (F.silu(gate) * up)

    def chain(self, ids: list[int], features: Tensor, head: Tensor, fed: list[int] | None = None) -> list[Tensor]:
        """Logits of every step after the anchor ids[-1]; features [len(ids) - 1, F] of the tokens before it.

        fed: the tokens of steps 2, 3, ...; else each step's best.
        """
        g, at = [self.w["fc.weight"] @ f for f in features], len(ids) - 1
        entries = {t: self.entry(ids[t], g[t - 1], t) for t in range(1, at)}
        hidden, token, logits = g[at - 1], ids[at], []
        for step in range(self.c.drafts):
            place = at + step
            entries[place] = self.entry(token, hidden, place)
            seen = [t for t in sorted(entries) if not self.c.window or t > place - self.c.window]
            keys, values = ([entries[t][part] for t in seen] for part in (1, 2))
            hidden = self.step(entries[place][0], hidden, place, keys, values)
            logits.append(head @ normed(hidden, self.w["norm.weight"]))
            token = fed[step] if fed and step < len(fed) else int(logits[-1].argmax())
        return logits
