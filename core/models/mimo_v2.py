"""MiMo-V2: hybrid window/full attention with sinks, sigmoid-routed experts without shared ones.

Our own class beside transformers' `MiMoV2FlashForCausalLM`, for three reasons: window layers may have any number of
KV heads (V2.5-Pro: 8 and 8, not twice the full layers'), packed documents are kept apart without T x T masks per
layer, and fast operations arrive by value (`core.models.ops.ModelOps`). Parameter names are transformers', so state
dicts are interchangeable, and experts are dispatched by `config._experts_implementation` like any v5 model's.

A layer: x + attention(norm(x)), then x + mlp(norm(x)). RoPE rotates the first int(head_dim * factor) dims of a head
(rotate-half), theta by layer type. Values are scaled by a constant. Router: sigmoid scores in FP32; the top k of
score + correction bias are chosen, weighted by their unbiased scores normalised to sum 1.

Legend: B rows, T tokens, H heads, D head dim, G hidden size, E experts, K experts a token.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast

from core.models import moe_ops  # noqa: F401  (registers the experts implementation "fp4flash")
from core.models.mimo_v2_config import SPARSE, WINDOW, MiMoV2Config
from core.models.ops import BY_NAME, EAGER, FLEX, ModelOps, default_ops, rms_norm
from core.train.batch import document_ids


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, ops: ModelOps | None = None) -> Tensor:
        return (ops.rms_norm if ops else rms_norm)(x, self.weight, self.eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on the leading dims of x [B, H, T, D]; cos and sin [B, 1, T, rotated dims]."""
    size = cos.shape[-1]
    turned, rest = x[..., :size], x[..., size:]
    left, right = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-right, left), dim=-1) * sin
    return torch.cat((turned, rest), dim=-1)


class Attention(nn.Module):
    def __init__(self, config: MiMoV2Config, layer: int) -> None:
        super().__init__()
        heads, kv_heads, bias = config.num_attention_heads, config.kv_heads(layer), config.attention_bias
        self.head_dim, self.v_head_dim = config.head_dim, config.v_head_dim
        self.layer_idx = layer
        self.scale = config.head_dim**-0.5
        self.value_scale = 1.0 if config.attention_value_scale is None else config.attention_value_scale
        self.q_proj = nn.Linear(config.hidden_size, heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * self.v_head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * self.v_head_dim, config.hidden_size, bias=False)
        self.sinks = nn.Parameter(torch.empty(heads)) if config.layer_types[layer] == WINDOW else None

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Any, ops: ModelOps, cache: Any) -> Tensor:
        shape = (*x.shape[:-1], -1)
        q = self.q_proj(x).view(*shape, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(*shape, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(*shape, self.v_head_dim).transpose(1, 2) * self.value_scale
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        out = ops.attention(q, k, v, scale=self.scale, mask=mask, sinks=self.sinks)
        return self.o_proj(out.transpose(1, 2).reshape(shape))


class Router(nn.Module):
    """(logits [BT, E], weights [BT, K], indices [BT, K]) in FP32; the correction bias stays FP32 under any cast."""

    def __init__(self, config: MiMoV2Config) -> None:
        super().__init__()
        self.top_k, self.scaling, self.normalise = (
            config.num_experts_per_tok,
            config.routed_scaling_factor,
            config.norm_topk_prob,
        )
        self.groups, self.top_groups = config.n_group, config.topk_group
        self.weight = nn.Parameter(torch.zeros(config.n_routed_experts, config.hidden_size))
        self.e_score_correction_bias = nn.Buffer(torch.zeros(config.n_routed_experts))

    def _apply(self, fn: Any, recurse: bool = True) -> "Router":
        before = self.e_score_correction_bias
        super()._apply(fn, recurse)
        after = self.e_score_correction_bias
        if after.dtype != torch.float32:
            self.e_score_correction_bias = (
                torch.empty_like(after, dtype=torch.float32)
                if before.is_meta
                else before.to(after.device, torch.float32)
            )
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(x.flatten(0, -2).to(torch.float32), self.weight.to(torch.float32))
        scores = logits.sigmoid()
        ranked = scores + self.e_score_correction_bias
        if self.groups > 1:
            by_group = ranked.unflatten(-1, (self.groups, -1))
            best = by_group.topk(2, dim=-1)[0].sum(-1).topk(self.top_groups, dim=-1, sorted=False)[1]
            kept = torch.zeros_like(by_group[..., 0]).scatter_(1, best, 1).bool()
            ranked = by_group.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(-2)
        chosen = ranked.topk(self.top_k, dim=-1, sorted=False)[1]
        weights = scores.gather(1, chosen)
        if self.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return logits, weights * self.scaling, chosen


@use_experts_implementation
class Experts(nn.Module):
    """Every expert's weights in two tensors; the forward below is the plain one (`experts: eager`)."""

    def __init__(self, config: MiMoV2Config) -> None:
        super().__init__()
        experts, size, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.num_experts, self.hidden_dim, self.intermediate_dim = experts, size, width
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, size))
        self.down_proj = nn.Parameter(torch.empty(experts, size, width))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            token, slot = torch.where(top_k_index == expert)
            gate, up = F.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            part = F.linear(self.act_fn(gate) * up, self.down_proj[expert]) * top_k_weights[token, slot, None]
            out.index_add_(0, token, part.to(out.dtype))
        return out


class MoE(nn.Module):
    def __init__(self, config: MiMoV2Config) -> None:
        super().__init__()
        self.experts = Experts(config)
        self.gate = Router(config)

    def forward(self, x: Tensor) -> Tensor:
        _, weights, chosen = self.gate(x)
        return self.experts(x.reshape(-1, x.shape[-1]), chosen, weights).view(x.shape)


class MLP(nn.Module):
    def __init__(self, config: MiMoV2Config) -> None:
        super().__init__()
        size, width = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(size, width, bias=False)
        self.up_proj = nn.Linear(size, width, bias=False)
        self.down_proj = nn.Linear(width, size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(GradientCheckpointingLayer):
    """Everything but the hidden states arrives by keyword and is the same for all layers of one type."""

    def __init__(self, config: MiMoV2Config, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MoE(config) if config.mlp_layer_types[layer] == SPARSE else MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        rotary: tuple[Tensor, Tensor],
        mask: Any,
        ops: ModelOps,
        past_key_values: Any = None,
    ) -> Tensor:
        x = hidden_states
        x = x + self.self_attn(self.input_layernorm(x, ops), rotary, mask, ops, past_key_values)
        return x + self.mlp(self.post_attention_layernorm(x, ops))


class MiMoV2PreTrainedModel(PreTrainedModel):
    config: MiMoV2Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = False  # config._attn_implementation stays "eager", the form of generation's masks; see ModelOps
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, Router):
            nn.init.normal_(module.weight, std=std)
            nn.init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, Experts):
            for weight in module.parameters(recurse=False):
                nn.init.normal_(weight, std=std)
        elif isinstance(module, Attention) and module.sinks is not None:
            nn.init.normal_(module.sinks, std=std)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)


class MiMoV2Model(MiMoV2PreTrainedModel):
    """Embeddings, layers, final norm. `ops` None: the fastest plain-torch form for the device the input is on."""

    def __init__(self, config: MiMoV2Config) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ops: ModelOps | None = None
        self.gradient_checkpointing = False
        self._frequencies: dict[tuple[str, torch.device], Tensor] = {}
        self.post_init()

    def frequencies(self, kind: str, device: torch.device) -> Tensor:
        """Inverse frequencies of RoPE, FP32. Not a buffer: casts and meta loading would damage it."""
        if (kind, device) not in self._frequencies:
            given = self.config.rope_parameters[kind]
            size = int(self.config.head_dim * given["partial_rotary_factor"])
            step = torch.arange(0, size, 2, dtype=torch.float, device="cpu") / size
            self._frequencies[kind, device] = (1.0 / given["rope_theta"] ** step).to(device)
        return self._frequencies[kind, device]

    def rotary(self, kind: str, position_ids_BT: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(cos, sin) [B, 1, T, rotated dims] for one layer type."""
        angle = position_ids_BT[:, None, :, None].to(torch.float32) * self.frequencies(kind, position_ids_BT.device)
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos().to(dtype), angle.sin().to(dtype)

    def masks(
        self, x: Tensor, position_ids: Tensor, attention_mask: Any, cache: Any
    ) -> tuple[ModelOps, dict[str, Any]]:
        """(operations, mask by layer type). With a cache or a padding mask: transformers' masks and eager attention.

        `attention_mask` may already be a dict of additive masks by layer type, as in transformers.
        """
        if isinstance(attention_mask, dict):
            return EAGER, attention_mask
        kinds = sorted(set(self.config.layer_types))
        if cache is not None or attention_mask is not None:
            given = {
                "config": self.config,
                "inputs_embeds": x,
                "attention_mask": attention_mask,
                "past_key_values": cache,
                "position_ids": position_ids,
            }
            make = {k: create_sliding_window_causal_mask if k == WINDOW else create_causal_mask for k in kinds}
            return EAGER, {k: make[k](**given) for k in kinds}
        ops = self.ops or default_ops(x.device)
        documents_BT = document_ids(position_ids).expand(x.shape[0], -1)
        window = self.config.sliding_window
        return ops, {k: ops.mask(documents_BT, window if k == WINDOW else None, x.dtype) for k in kinds}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool = False,
        **kwargs: Any,  # noqa: ARG002  (what generate() hands to every model)
    ) -> MoeModelOutputWithPast:
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(past, past + x.shape[1], device=x.device)[None]
        ops, masks = self.masks(x, position_ids, attention_mask, past_key_values)
        rotary = {kind: self.rotary(kind, position_ids, x.dtype) for kind in masks}
        hidden = [x] if output_hidden_states else None
        for kind, layer in zip(self.config.layer_types, self.layers, strict=True):
            x = layer(x, rotary=rotary[kind], mask=masks[kind], ops=ops, past_key_values=past_key_values)
            if hidden is not None:
                hidden.append(x)
        x = self.norm(x, ops)
        return MoeModelOutputWithPast(
            last_hidden_state=x, past_key_values=past_key_values, hidden_states=tuple(hidden) if hidden else None
        )


class MiMoV2ForCausalLM(MiMoV2PreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MiMoV2Config, ops: ModelOps | None = None) -> None:
        super().__init__(config)
        self.model = MiMoV2Model(config)
        self.model.ops = ops
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def set_attention(self, name: str) -> None:
        """eager | sdpa | flex_attention | auto (by device)."""
        self.model.ops = None if name == "auto" else BY_NAME[name]

    def use_fast_attention(self) -> None:
        self.model.ops = FLEX

    def forward(
        self,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        out = self.model(input_ids=input_ids, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept])
        loss = (
            None
            if labels is None
            else self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        )
        return MoeCausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=out.past_key_values, hidden_states=out.hidden_states
        )


# transformers' own registries: AutoTokenizer, AutoConfig and AutoModelForCausalLM read folders of this type in-process
AutoConfig.register(MiMoV2Config.model_type, MiMoV2Config, exist_ok=True)
AutoModelForCausalLM.register(MiMoV2Config, MiMoV2ForCausalLM, exist_ok=True)
