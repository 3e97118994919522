"""An autoregressive drafter in the style of EAGLE-3: the baseline that a block drafter has to beat.

One decoder layer, chained K times. The entry at position t reads the embedding of token t and a hidden state of the
token before it, each normalised, side by side (width 2G), and predicts token t + 1. Which hidden state:

    true position   outputs of the tapped target layers at t - 1, concatenated and projected by `fc`
    step k > 1      the drafter's own output at step k - 1, before the final norm

so step 1 stands at the anchor, whose token is known while its target state does not exist yet. The residual stream
starts from the hidden state, not from the embedding. Position 0 has nothing before it: it has no entry and no key.
Embedding and head are the target's. Method and tensor names: EAGLE-3, arXiv 2503.01840; heads are normalised as in our
DFlash layers, and drafts come from the whole vocabulary.

Legend: R rows, N tokens, T context tokens, F taps x hidden, G hidden, H heads, D head dim.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from core.models.dflash import MLP, KeyValue, RMSNorm, angles, refuse_half, rotate
from core.models.eagle_config import EagleConfig
from core.models.ops import EAGER, ModelOps

Store = Callable[[Tensor, Tensor], KeyValue]


class EagleAttention(nn.Module):
    """Reads 2G, writes G."""

    def __init__(self, config: EagleConfig) -> None:
        super().__init__()
        size, dim = config.hidden_size, config.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.dim, self.scale = dim, dim**-0.5
        self.q_proj = nn.Linear(2 * size, heads * dim, bias=False)
        self.k_proj = nn.Linear(2 * size, kv_heads * dim, bias=False)
        self.v_proj = nn.Linear(2 * size, kv_heads * dim, bias=False)
        self.o_proj = nn.Linear(heads * dim, size, bias=False)
        self.q_norm = RMSNorm(dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(dim, config.rms_norm_eps)

    def split(self, x: Tensor) -> Tensor:
        """[R, N, H * D] -> [R, H, N, D]."""
        return x.unflatten(-1, (-1, self.dim)).transpose(1, 2)

    def key_value(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> KeyValue:
        """[R, KV heads, N, D] of entries x [R, N, 2G]."""
        return rotate(self.k_norm(self.split(self.k_proj(x))), *rotary), self.split(self.v_proj(x))

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], keys: KeyValue, mask: Any, ops: ModelOps) -> Tensor:
        q = rotate(self.q_norm(self.split(self.q_proj(x))), *rotary)
        out = ops.attention(q, *keys, scale=self.scale, mask=mask, sinks=None)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class EagleLayer(nn.Module):
    def __init__(self, config: EagleConfig) -> None:
        super().__init__()
        self.self_attn = EagleAttention(config)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def join(self, embed: Tensor, hidden: Tensor) -> Tensor:
        """Entries [..., 2G] from embeddings and the hidden states of the tokens before, both [..., G]."""
        return torch.cat((self.input_layernorm(embed), self.hidden_norm(hidden)), dim=-1)

    def forward(
        self, x: Tensor, hidden: Tensor, rotary: tuple[Tensor, Tensor], keys: KeyValue, mask: Any, ops: ModelOps
    ) -> Tensor:
        hidden = hidden + self.self_attn(x, rotary, keys, mask, ops)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class EagleDrafter(nn.Module):
    def __init__(self, config: EagleConfig) -> None:
        super().__init__()
        self.config = config
        self.fc = nn.Linear(len(config.taps) * config.hidden_size, config.hidden_size, bias=False)
        self.midlayer = EagleLayer(config)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ops: ModelOps = EAGER

    def decoder_layers(self) -> list[EagleLayer]:
        return [self.midlayer]

    def rotary(self, position_RN: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return angles(position_RN, self.config.head_dim, self.config.rope_theta, dtype)

    def fuse(self, features_RTF: Tensor) -> Tensor:
        """Outputs of the tapped layers, concatenated -> hidden states [R, T, G].

        Raises:
            UnsupportedError: FP16, of the drafter or of the target's features.
        """
        refuse_half(self.fc.weight.dtype, features_RTF.dtype)
        return self.fc(features_RTF)

    def key_value(self, embed_RNG: Tensor, hidden_RNG: Tensor, position_RN: Tensor) -> KeyValue:
        """Keys and values of entries at absolute positions; `hidden` is of the token before each."""
        rotary = self.rotary(position_RN, embed_RNG.dtype)
        return self.midlayer.self_attn.key_value(self.midlayer.join(embed_RNG, hidden_RNG), rotary)

    def forward(self, embed_RNG: Tensor, hidden_RNG: Tensor, position_RN: Tensor, store: Store, mask: Any) -> Tensor:
        """One step of the chain: hidden states [R, N, G], for the next step; `norm` and the head turn them into logits.

        Args:
            store: takes the new entries' keys and values, gives all that `mask` is about, theirs included.
            mask: what `self.ops.attention` reads.
        """
        x = self.midlayer.join(embed_RNG, hidden_RNG)
        rotary = self.rotary(position_RN, x.dtype)
        keys = store(*self.midlayer.self_attn.key_value(x, rotary))
        return self.midlayer(x, hidden_RNG, rotary, keys, mask, self.ops)


@torch.no_grad()
def init_eagle(drafter: EagleDrafter, std: float = 0.02) -> None:
    """Fresh weights as `init_drafter` draws them: matrices normal(0, std), norms one, branch outputs by depth."""
    for name, parameter in drafter.named_parameters():
        if parameter.dim() == 2:
            last = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(parameter, std=std * 2**-0.5 if last else std)
