"""What the runtime needs to know of a model, typed, from its configuration: one form for all families.

A layer is norm, attention, norm, feed-forward. The families differ in what is listed here and in nothing else:

             attention                                             router                        expert activation
MiMo-V2      window and full layers, sinks in window layers,       sigmoid, correction bias      silu(gate) * up
             values scaled, part of a head rotated, D != V
Qwen3-MoE    RMSNorm on each head's query and key                  softmax, then top-k           silu(gate) * up
GPT-OSS      window and full layers in turn, sinks, biases, YaRN   top-k, then softmax; bias     clamped, (up + 1), bias
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from core.errors import UnsupportedError
from core.models.mimo_v2_config import SPARSE, WINDOW, MiMoV2Config
from kernels.moe_mxfp4 import Activation
from kernels.router import Rule

SILU = "silu"
ROPES = ("default", "linear", "llama3", "yarn")  # frequencies that do not depend on the length of the text


@dataclass(frozen=True)
class LayerSpec:
    """window: keys a query sees, itself included; None: all. rope: key of `Geometry.frequencies`."""

    kv_heads: int
    window: int | None
    sinks: bool
    sparse: bool
    rope: str


@dataclass(frozen=True)
class Geometry:
    """Sizes in numbers of values. frequencies: FP32 [rotary_dims / 2] and the factor on cos and sin, by rope key.

    router: name of the module that holds the router's weight, below `mlp`. norm_topk etc. are inside `rule`.
    """

    family: str
    vocab_size: int
    hidden_size: int
    heads: int
    head_dim: int
    value_dim: int
    rotary_dims: int
    value_scale: float
    qk_norm: bool
    eps: float
    max_length: int
    layers: tuple[LayerSpec, ...]
    frequencies: dict[str, tuple[Tensor, float]]
    router: str
    rule: Rule
    activation: Activation
    interleaved: bool = False  # gate and up rows alternate in the files
    intermediate_size: int = 0  # of dense layers
    moe_intermediate_size: int = 0
    experts: int = 0

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The distinct windows, in order of first use: each has its own pages (infer.pages)."""
        return tuple(dict.fromkeys(layer.window for layer in self.layers))


def geometry_of(config: PreTrainedConfig) -> Geometry:
    """Raises UnsupportedError for a family or a variant that the runtime does not compute."""
    model_type = config.model_type
    if model_type not in FAMILIES:
        raise UnsupportedError(
            f"config.json: model_type={model_type!r} is no family of the runtime, which runs "
            f"{', '.join(FAMILIES)}; other models are loaded by transformers"
        )
    return FAMILIES[model_type](config)


def mimo(config: MiMoV2Config) -> Geometry:
    silu_only(config)
    if config.attention_bias:
        raise UnsupportedError("config.json: attention_bias=true; the runtime has MiMo-V2 without, as published")
    window = config.sliding_window
    layers = tuple(
        LayerSpec(config.kv_heads(i), window if kind == WINDOW else None, kind == WINDOW, mlp == SPARSE, kind)
        for i, (kind, mlp) in enumerate(zip(config.layer_types, config.mlp_layer_types, strict=True))
    )
    given: dict[str, Any] = config.rope_parameters
    sizes = {int(config.head_dim * given[k]["partial_rotary_factor"]) for k in given}
    if len(sizes) != 1 or min(sizes) % 2:
        raise UnsupportedError(
            f"config.json: partial_rotary_factor rotates {sorted(sizes)} dims of a head; the runtime rotates one even "
            "number of dims in all layers"
        )
    (rotary,) = sizes
    return Geometry(
        **common(config), family="mimo_v2", value_dim=config.v_head_dim, rotary_dims=rotary,
        value_scale=config.attention_value_scale or 1.0, qk_norm=False, layers=layers,
        frequencies={k: (plain(rotary, given[k]["rope_theta"]), 1.0) for k in given},
        router="gate",
        rule=Rule(
            "sigmoid_bias", config.num_experts_per_tok, groups=config.n_group, top_groups=config.topk_group,
            normalise=config.norm_topk_prob, scaling=float(config.routed_scaling_factor),
        ),
        activation=Activation(SILU), intermediate_size=config.intermediate_size,
        moe_intermediate_size=config.moe_intermediate_size, experts=config.n_routed_experts,
    )  # fmt: skip


def qwen3_moe(config: Any) -> Geometry:
    silu_only(config)
    if config.attention_bias:
        raise UnsupportedError("config.json: attention_bias=true; the runtime has Qwen3-MoE without, as published")
    sparse = [
        i not in config.mlp_only_layers and config.num_experts > 0 and (i + 1) % config.decoder_sparse_step == 0
        for i in range(config.num_hidden_layers)
    ]
    kv, window = config.num_key_value_heads, config.sliding_window
    return Geometry(
        **common(config), family="qwen3_moe", value_dim=head_dim(config), rotary_dims=head_dim(config),
        value_scale=1.0, qk_norm=True, layers=tuple(LayerSpec(kv, window, False, s, "all") for s in sparse),
        frequencies={"all": rope(config)}, router="gate",
        rule=Rule("softmax_topk", config.num_experts_per_tok, normalise=config.norm_topk_prob),
        activation=Activation(SILU), intermediate_size=config.intermediate_size,
        moe_intermediate_size=config.moe_intermediate_size, experts=config.num_experts,
    )  # fmt: skip


def gpt_oss(config: Any) -> Geometry:
    kv, window = config.num_key_value_heads, config.sliding_window
    layers = tuple(LayerSpec(kv, window if kind == WINDOW else None, True, True, "all") for kind in config.layer_types)
    return Geometry(
        **common(config), family="gpt_oss", value_dim=head_dim(config), rotary_dims=head_dim(config),
        value_scale=1.0, qk_norm=False, layers=layers, frequencies={"all": rope(config)}, router="router",
        rule=Rule("topk_softmax", config.num_experts_per_tok),
        activation=Activation("clamped", alpha=config.swiglu_alpha, limit=config.swiglu_limit), interleaved=True,
        moe_intermediate_size=config.intermediate_size, experts=config.num_local_experts,
    )  # fmt: skip


FAMILIES: dict[str, Callable[[Any], Geometry]] = {
    "mimo_v2": mimo,
    "mimo_v2_flash": mimo,
    "qwen3_moe": qwen3_moe,
    "gpt_oss": gpt_oss,
}


def common(config: Any) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "heads": config.num_attention_heads,
        "head_dim": head_dim(config),
        "eps": config.rms_norm_eps,
        "max_length": config.max_position_embeddings,
    }


def head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def silu_only(config: Any) -> None:
    if config.hidden_act != SILU:
        raise UnsupportedError(f"config.json: hidden_act={config.hidden_act!r}; the runtime computes silu")


def plain(dims: int, theta: float) -> Tensor:
    """FP32 [dims / 2]: theta^(-2i / dims)."""
    return 1.0 / theta ** (torch.arange(0, dims, 2, dtype=torch.float32, device="cpu") / dims)


def rope(config: Any) -> tuple[Tensor, float]:
    """Frequencies and factor of a config with one set of rope parameters, by transformers' own functions."""
    given: dict[str, Any] = config.rope_parameters
    kind = given.get("rope_type", "default")
    if kind not in ROPES:
        raise UnsupportedError(f"config.json: rope_type={kind!r}; the runtime has {', '.join(ROPES)}")
    if kind == "default":
        return plain(head_dim(config), given["rope_theta"]), 1.0
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return frequencies.to(torch.float32), float(factor)


def rope_tables(geometry: Geometry, length: int, device: torch.device) -> dict[str, tuple[Tensor, Tensor]]:
    """(cos, sin) FP32 [length, rotary_dims / 2] by rope key; row = position."""
    tables = {}
    for key, (frequencies, factor) in geometry.frequencies.items():
        angle = torch.arange(length, dtype=torch.float32)[:, None] * frequencies
        tables[key] = (angle.cos() * factor).to(device), (angle.sin() * factor).to(device)
    return tables
