"""The DFlash drafter: one definition for the trainer, the exporters and the runtime.

A block is [anchor, mask x (B - 1)]; slot k predicts the token k places after the anchor. One pass over the block drafts
all of it. What the target computed reaches every layer as keys and values: outputs of the tapped target layers are
concatenated, projected (`fc`), normalised (`hidden_norm`) and go through each layer's own k_proj, k_norm and RoPE, and
v_proj; they never become queries and skip input_layernorm. Context keys lie strictly before the anchor, whose own
target state does not exist yet when drafting. Embedding and head are the target's. Method: arXiv 2602.06036.

Legend: R rows, T context tokens, N block tokens (anchors x B), F taps x hidden, G hidden, H heads, D head dim.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.errors import UnsupportedError
from core.models.dflash_config import SLIDING, DFlashConfig
from core.models.ops import EAGER, ModelOps, rms_norm

KeyValue = tuple[Tensor, Tensor]


def refuse_half(*dtypes: torch.dtype) -> None:
    """UnsupportedError for FP16, in which published drafters overflow."""
    if torch.float16 in dtypes:
        raise UnsupportedError("the drafter computes in float16, whose range it exceeds; use bfloat16 or float32")


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE (rotate-half) on the leading dims of x [R, H, N, D]; cos and sin [R, 1, N, rotated dims]."""
    size = cos.shape[-1]
    turned, rest = x[..., :size], x[..., size:]
    left, right = turned.chunk(2, dim=-1)
    return torch.cat((turned * cos + torch.cat((-right, left), dim=-1) * sin, rest), dim=-1)


def angles(position_RN: Tensor, size: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(cos, sin) [R, 1, N, size] of absolute positions, computed in FP32."""
    step = torch.arange(0, size, 2, dtype=torch.float32, device=position_RN.device) / size
    angle = position_RN[:, None, :, None].to(torch.float32) * (1.0 / theta**step)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


class Attention(nn.Module):
    def __init__(self, config: DFlashConfig, layer: int) -> None:
        super().__init__()
        size, dim = config.hidden_size, config.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.dim, self.scale, self.value_scale = dim, dim**-0.5, config.value_scale
        self.q_proj = nn.Linear(size, heads * dim, bias=False)
        self.k_proj = nn.Linear(size, kv_heads * dim, bias=False)
        self.v_proj = nn.Linear(size, kv_heads * dim, bias=False)
        self.o_proj = nn.Linear(heads * dim, size, bias=False)
        self.q_norm = RMSNorm(dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(dim, config.rms_norm_eps)
        has_sinks = config.sinks and config.layer_types[layer] == SLIDING
        self.attention_sink_bias = nn.Parameter(torch.zeros(heads)) if has_sinks else None

    def split(self, x: Tensor) -> Tensor:
        """[R, N, H * D] -> [R, H, N, D]."""
        return x.unflatten(-1, (-1, self.dim)).transpose(1, 2)

    def key_value(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> KeyValue:
        """Keys and values [R, KV heads, N, D] of block tokens or of fused context."""
        k = rotate(self.k_norm(self.split(self.k_proj(x))), *rotary)
        v = self.split(self.v_proj(x))
        return k, v if self.value_scale == 1.0 else v * self.value_scale

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], context: KeyValue, mask: Any, ops: ModelOps) -> Tensor:
        q = rotate(self.q_norm(self.split(self.q_proj(x))), *rotary)
        k, v = (torch.cat(pair, dim=2) for pair in zip(context, self.key_value(x, rotary), strict=True))
        out = ops.attention(q, k, v, scale=self.scale, mask=mask, sinks=self.attention_sink_bias)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, width, bias=False)
        self.up_proj = nn.Linear(size, width, bias=False)
        self.down_proj = nn.Linear(width, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: DFlashConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def key_value(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> KeyValue:
        """Of fused context, which skips input_layernorm."""
        return self.self_attn.key_value(x, rotary)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], context: KeyValue, mask: Any, ops: ModelOps) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, context, mask, ops)
        return x + self.mlp(self.post_attention_layernorm(x))


class Selector(nn.Module):
    """Pair scores of a greedy walk through the candidates of consecutive slots (after DFlash 2).

    The walk starts at the anchor. At slot k candidate c follows the token t chosen before it; its score is the slot's
    logit of c plus left(t, h_k) . right(c), where left reads the embedding of t and the slot's hidden state.
    """

    def __init__(self, config: DFlashConfig) -> None:
        super().__init__()
        size, rank = config.hidden_size, config.selector_rank
        self.token = nn.Linear(size, rank, bias=False)
        self.state = nn.Linear(size, rank, bias=False)
        self.candidate = nn.Linear(size, rank, bias=False)
        self.norm = RMSNorm(size, config.rms_norm_eps)

    def left(self, token_embed: Tensor, hidden: Tensor) -> Tensor:
        """[..., rank] of the token before a slot (its embedding) and the slot's hidden state."""
        return F.silu(self.token(self.norm(token_embed)) + self.state(hidden))

    def right(self, candidate_embed: Tensor) -> Tensor:
        """[..., rank] of candidates, from their embeddings."""
        return self.candidate(self.norm(candidate_embed))


class Drafter(nn.Module):
    def __init__(self, config: DFlashConfig) -> None:
        super().__init__()
        self.config = config
        self.fc = nn.Linear(len(config.taps) * config.hidden_size, config.hidden_size, bias=False)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        # a vector of the folder in either case; trained or the target's own row (config.learned_mask)
        self.mask_embedding = nn.Parameter(torch.zeros(config.hidden_size), requires_grad=config.learned_mask)
        self.selector = Selector(config) if config.selector_rank else None
        self.ops: ModelOps = EAGER

    def decoder_layers(self) -> list[Layer]:
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    def rotary(self, position_RN: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(cos, sin) [R, 1, N, rotated dims], computed in FP32."""
        return angles(position_RN, self.config.rotary_dims, self.config.rope_theta, dtype)

    def fuse(self, features_RTF: Tensor) -> Tensor:
        """Outputs of the tapped layers, concatenated -> context [R, T, G], shared by all layers."""
        return self.hidden_norm(self.fc(features_RTF))

    def context(self, features_RTF: Tensor, position_RT: Tensor) -> list[KeyValue]:
        """Keys and values of every layer for context tokens at their absolute positions.

        Raises:
            UnsupportedError: FP16, of the drafter or of the target's features.
        """
        refuse_half(self.fc.weight.dtype, features_RTF.dtype)
        fused = self.fuse(features_RTF)
        rotary = self.rotary(position_RT, fused.dtype)
        return [layer.key_value(fused, rotary) for layer in self.decoder_layers()]

    def block(self, anchor_embed: Tensor) -> Tensor:
        """Embeddings [..., G] of anchor tokens -> block inputs [..., B, G]."""
        masks = self.mask_embedding.expand(*anchor_embed.shape[:-1], self.config.drafts, -1)
        return torch.cat((anchor_embed.unsqueeze(-2), masks.to(anchor_embed.dtype)), dim=-2)

    def forward(self, x_RNG: Tensor, position_RN: Tensor, context: Sequence[KeyValue], masks: dict[str, Any]) -> Tensor:
        """Hidden states [R, N, G] after the final norm; the target's head turns them into logits.

        Args:
            x_RNG: block inputs, all blocks of a row behind one another. position_RN: absolute, anchor + slot.
            context: from `context`, for every layer.
            masks: by layer type, what `self.ops.attention` reads; keys are the context's, then the block tokens'.
        Raises:
            UnsupportedError: FP16.
        """
        refuse_half(x_RNG.dtype)
        rotary = self.rotary(position_RN, x_RNG.dtype)
        for kind, layer, kv in zip(self.config.layer_types, self.layers, context, strict=True):
            x_RNG = layer(x_RNG, rotary, kv, masks[kind], self.ops)
        return self.norm(x_RNG)


@torch.no_grad()
def init_drafter(drafter: Drafter, mask_row: Tensor, std: float = 0.02) -> None:
    """Fresh weights: matrices normal(0, std), norms one, sinks zero; outputs of residual branches scaled by depth.

    mask_row: the target's embedding of `mask_token_id`, or what a learned mask starts from; must not be near zero.
    """
    depth = (2 * drafter.config.num_hidden_layers) ** -0.5
    for name, parameter in drafter.named_parameters():
        if parameter.dim() == 2:
            last = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(parameter, std=std * depth if last else std)
    if drafter.selector is not None:
        nn.init.zeros_(drafter.selector.candidate.weight)  # the walk starts as independent slots
    drafter.mask_embedding.copy_(mask_row)
