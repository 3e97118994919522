"""The forward pass of every family, one step at a time, in terms of `Ops`.

The residual stream is carried unnormalised: each sum over ranks adds to it and hands on its norm, which is one fused
operation (infer.parallel). Tapped layers' outputs are the stream after their feed-forward.

Legend: T tokens of the step, L rows with logits, G hidden size, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from infer.cache import KVCache, Step
from infer.geometry import Geometry, LayerSpec, rope_tables
from infer.ops import Ops
from infer.parallel import Ranks
from infer.weights import LayerWeights, Weights
from kernels.moe_mxfp4 import DenseWeights
from kernels.qkv_rope import Heads


@dataclass(frozen=True)
class Computed:
    """logits [L, V] FP32; features [T, taps * G] of the tapped layers, or None."""

    logits: Tensor
    features: Tensor | None


class Model:
    """Weights of one rank, ready to run.

    Args:
        length: positions that will be used at most (sizes the rotary tables).
        taps: layers whose outputs a drafter reads.
    """

    def __init__(
        self, geometry: Geometry, weights: Weights, ops: Ops, ranks: Ranks, *, length: int, taps: tuple[int, ...] = ()
    ) -> None:
        self.geometry, self.weights, self.ops, self.ranks, self.taps = geometry, weights, ops, ranks, taps
        self.device, self.dtype = weights.embedding.device, weights.embedding.dtype
        self.rope = rope_tables(geometry, length, self.device)
        shard = ranks.shard
        heads, g = shard.heads(geometry.heads), geometry
        self.heads = [
            Heads(
                heads.stop - heads.start, kv.stop - kv.start, g.head_dim, g.value_dim, g.rotary_dims, g.value_scale,
                g.eps,
            )
            for kv in (shard.kv_heads(spec.kv_heads) for spec in g.layers)
        ]  # fmt: skip

    def embedding(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weights.embedding)

    def head(self, x: Tensor) -> Tensor:
        """FP32 logits [..., V] of normalised hidden states, over the whole vocabulary on every rank."""
        logits = self.ops.linear(x, self.weights.head, out_dtype=torch.float32)
        return self.ranks.gather_vocabulary(logits, self.geometry.vocab_size)

    @torch.no_grad()
    def forward(self, step: Step, cache: KVCache, watch: Callable[[int, Tensor], None] | None = None) -> Computed:
        """Write the tokens' keys and values, return what was asked for.

        watch: called with (layer, its output [T, G]) after every layer, for validation.
        """
        g, eps = self.geometry, self.geometry.eps
        layers = self.weights.layers
        norms = [layer.input_norm for layer in layers[1:]] + [self.weights.norm]
        stream = self.embedding(step.ids)
        x = self.ops.rms_norm(stream, layers[0].input_norm, eps)
        tapped = []
        for index, (spec, layer) in enumerate(zip(g.layers, layers, strict=True)):
            part = self.attention(index, spec, layer, x, step, cache)
            x, stream = self.ranks.sum_norm(part, stream, layer.post_norm, eps)
            part = self.experts(layer, x) if spec.sparse else self.dense(layer, x)
            x, stream = self.ranks.sum_norm(part, stream, norms[index], eps)
            if index in self.taps:
                tapped.append(stream)
            if watch is not None:
                watch(index, stream)
        logits = self.head(x[step.logits_at])
        return Computed(logits, torch.cat(tapped, dim=-1) if tapped else None)

    def attention(
        self, index: int, spec: LayerSpec, layer: LayerWeights, x: Tensor, step: Step, cache: KVCache
    ) -> Tensor:
        """This rank's part of the attention output [T, G]."""
        group = step.groups[cache.layers[index].group]
        keys, values = cache.keys[index], cache.values[index]
        cos, sin = self.rope[spec.rope]
        q = self.ops.qkv_rope(
            x, layer.qkv, layer.qkv_bias, cos, sin, step.position, group.slot, keys, values, self.heads[index],
            q_norm=layer.q_norm, k_norm=layer.k_norm,
        )  # fmt: skip
        out = self.ops.attention(
            q, keys, values, group.batch, scale=self.geometry.head_dim**-0.5, window=spec.window, sinks=layer.sinks
        )
        return self.ops.linear(out.flatten(1), layer.out, layer.out_bias)

    def dense(self, layer: LayerWeights, x: Tensor) -> Tensor:
        gate, up = self.ops.linear(x, layer.gate_up).chunk(2, dim=-1)
        return self.ops.linear(F.silu(gate) * up, layer.down)

    def experts(self, layer: LayerWeights, x: Tensor) -> Tensor:
        g = self.geometry
        logits = self.ops.linear(x, layer.router, layer.router_bias, out_dtype=torch.float32)
        chosen, weight = self.ops.route(logits, g.rule, layer.correction)
        run = self.ops.experts_dense if isinstance(layer.experts, DenseWeights) else self.ops.experts
        return run(x, layer.experts, chosen, weight, g.activation)
