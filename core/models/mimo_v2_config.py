"""Configuration of the MiMo-V2 family: V2-Flash, V2.5, V2.5-Pro, V2.6, and the embedded nano model.

Two spellings of the same facts are in use, and both are read here:

    hub (Xiaomi's config.json)                    native (transformers' `mimo_v2_flash`), and ours
    hybrid_layer_pattern  0 = full, 1 = window    layer_types  full_attention / sliding_attention
    moe_layer_freq        0 = dense, 1 = MoE      mlp_layer_types  dense / sparse
    layernorm_epsilon                             rms_norm_eps
    rope_theta, swa_rope_theta,                   rope_parameters  per layer type
      partial_rotary_factor
    swa_num_key_value_heads                       (always 2 x num_key_value_heads in transformers: wrong for Pro)
    routed_scaling_factor null                    1.0
    sliding_window = sliding_window_size = W      sliding_window

A file that uses both spellings with different values is refused: one of them would be silently wrong.

**The window.** `sliding_window` here is the number of keys a query sees, itself included: key j is visible to query i
when i - sliding_window < j <= i. transformers' native key of that name means the same. The hub's 128 means 128 visible
keys too (the 129th is out); transformers, given a hub file, reads `sliding_window_size` 128 as 129 keys. A native
file that transformers wrote (sliding_window 129 beside sliding_window_size 128) keeps its 129 here.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from core.errors import ConfigError, UnsupportedError

FULL, WINDOW = "full_attention", "sliding_attention"
DENSE, SPARSE = "dense", "sparse"
DEFAULT_THETA = {FULL: 5_000_000.0, WINDOW: 10_000.0}
DEFAULT_ROTARY = 0.334

# Hub keys that restate another key. A different value would be another geometry, which the class does not compute.
SAME_AS = {
    "swa_num_attention_heads": "num_attention_heads",
    "swa_head_dim": "head_dim",
    "swa_v_head_dim": "v_head_dim",
}
# Hub keys whose only value the class computes.
ONLY_VALUE = {
    "add_swa_attention_sink_bias": (True,),
    "add_full_attention_sink_bias": (False,),
    "n_shared_experts": (None, 0),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "rope_scaling": (None,),
    "moe_router_dtype": (None, "bfloat16", "float32"),
}


@strict
class MiMoV2Config(PreTrainedConfig):
    """Geometry of one MiMo-V2 model; None means "not given" for fields that have a second spelling
    (typed Any: after construction they hold the type beside them).

    swa_num_key_value_heads: KV heads of window layers; not given = twice the full layers' (V2-Flash). Pro has 8 and 8.
    sliding_window: visible keys of a window layer, the query's own included.
    attention_value_scale: constant on every value vector. None = 1.
    partial_rotary_factor (inside rope_parameters): int(head_dim * factor) leading dims of a head are rotated.
    """

    model_type = "mimo_v2"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
    attribute_map = {"num_local_experts": "n_routed_experts"}  # noqa: RUF012

    vocab_size: int = 152576
    hidden_size: int = 4096
    intermediate_size: int = 16384
    num_hidden_layers: int = 48
    num_attention_heads: int = 64
    num_key_value_heads: int = 4
    swa_num_key_value_heads: Any = None  # int
    head_dim: int = 192
    v_head_dim: int = 128
    hidden_act: str = "silu"
    max_position_embeddings: int = 131072
    initializer_range: float = 0.02
    rms_norm_eps: Any = None  # float
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: Any = None  # dict by layer type
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    moe_intermediate_size: int = 2048
    num_experts_per_tok: int = 8
    n_routed_experts: int = 256
    routed_scaling_factor: Any = None  # float
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    sliding_window: int | None = None
    layer_types: Any = None  # list[str]
    mlp_layer_types: Any = None  # list[str]
    attention_value_scale: float | int | None = 0.707

    def __post_init__(self, **kwargs: Any) -> None:
        layers = self.num_hidden_layers
        kinds = flags(kwargs.pop("hybrid_layer_pattern", None), (FULL, WINDOW), "hybrid_layer_pattern")
        pattern = [FULL if i == 0 or (i + 1) % 6 == 0 else WINDOW for i in range(layers)]
        self.layer_types = agree("layer_types", self.layer_types, "hybrid_layer_pattern", kinds, pattern)
        mlps = flags(kwargs.pop("moe_layer_freq", None), (DENSE, SPARSE), "moe_layer_freq")
        first_dense = [DENSE] + [SPARSE] * (layers - 1)
        self.mlp_layer_types = agree("mlp_layer_types", self.mlp_layer_types, "moe_layer_freq", mlps, first_dense)
        epsilon = kwargs.pop("layernorm_epsilon", None)
        self.rms_norm_eps = agree("rms_norm_eps", self.rms_norm_eps, "layernorm_epsilon", epsilon, 1e-5)
        self.sliding_window = window(self.sliding_window, kwargs.pop("sliding_window_size", None))
        chunk = kwargs.pop("attention_chunk_size", None)
        if chunk is not None and chunk not in (self.sliding_window, self.sliding_window - 1):
            raise ConfigError(
                f"config.json: attention_chunk_size={chunk} disagrees with sliding_window={self.sliding_window}"
            )
        self.swa_num_key_value_heads = self.swa_num_key_value_heads or 2 * self.num_key_value_heads
        self.routed_scaling_factor = 1.0 if self.routed_scaling_factor is None else float(self.routed_scaling_factor)
        if self.attention_value_scale is not None:
            self.attention_value_scale = float(self.attention_value_scale)  # transformers' class takes no int
        self.rope_parameters = rope(self.rope_parameters, kwargs)
        self.refuse(kwargs)
        super().__post_init__(**kwargs)

    def refuse(self, extra: dict[str, Any]) -> None:
        """UnsupportedError for a geometry that the class would compute wrongly; drops the keys it checked."""
        for key, base in SAME_AS.items():
            value = extra.pop(key, None)
            if value is not None and value != getattr(self, base):
                raise UnsupportedError(
                    f"config.json: {key}={value} differs from {base}={getattr(self, base)}; MiMoV2 has one for both"
                )
        for key, allowed in ONLY_VALUE.items():
            value = extra.pop(key, None) if key == "rope_scaling" else extra.get(key)
            if value is not None and value not in allowed:
                raise UnsupportedError(f"config.json: {key}={value!r}; fp4flash's MiMo-V2 computes {allowed[0]!r} only")
        for key, values in (("layer_types", {FULL, WINDOW}), ("mlp_layer_types", {DENSE, SPARSE})):
            given = getattr(self, key)
            if len(given) != self.num_hidden_layers or not set(given) <= values:
                raise ConfigError(
                    f"config.json: {key} has {len(given)} entries {sorted(set(given))}; "
                    f"expected {self.num_hidden_layers} of {sorted(values)}"
                )
        heads = {FULL: "num_key_value_heads", WINDOW: "swa_num_key_value_heads"}
        for key in (heads[kind] for kind in sorted(set(self.layer_types))):  # of layers that exist
            if self.num_attention_heads % getattr(self, key):
                raise ConfigError(
                    f"config.json: {key}={getattr(self, key)} does not divide "
                    f"num_attention_heads={self.num_attention_heads}"
                )
        if self.attention_dropout:
            raise UnsupportedError(
                f"config.json: attention_dropout={self.attention_dropout}; fp4flash trains without dropout, set 0"
            )

    def convert_rope_params_to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """Nothing to convert: `rope` already did."""
        return kwargs

    def kv_heads(self, layer: int) -> int:
        return self.swa_num_key_value_heads if self.layer_types[layer] == WINDOW else self.num_key_value_heads

    @property
    def fits_transformers(self) -> bool:
        """Whether transformers' `mimo_v2_flash` class computes this geometry (window KV heads = 2 x full)."""
        return self.swa_num_key_value_heads == 2 * self.num_key_value_heads


def flags(bits: list[int] | None, names: tuple[str, str], key: str) -> list[str] | None:
    if bits is None:
        return None
    if not set(bits) <= {0, 1}:
        raise ConfigError(f"config.json: {key} holds {sorted(set(bits))}; expected 0 and 1 only")
    return [names[b] for b in bits]


def agree(name: str, value: Any, alias: str, other: Any, default: Any) -> Any:
    """The one value that two spellings give, or the default when neither is there."""
    if value is not None and other is not None and value != other:
        raise ConfigError(f"config.json: {name}={value!r} and {alias}={other!r} disagree; keep the right one")
    return value if value is not None else other if other is not None else default


def window(native: int | None, size: int | None) -> int:
    """Visible keys, the query included; see the head of this file."""
    if native is None:
        return 128 if size is None else size
    if size is not None and native not in (size, size + 1):
        raise ConfigError(
            f"config.json: sliding_window={native} and sliding_window_size={size} disagree; keep the right one"
        )
    return native


def rope(native: dict | None, extra: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """rope_parameters per layer type; reads and removes the hub's keys from `extra`."""
    hub = {FULL: extra.pop("rope_theta", None), WINDOW: extra.pop("swa_rope_theta", None)}
    factor = extra.pop("partial_rotary_factor", None)
    native = native or {}
    result = {}
    for kind in (FULL, WINDOW):
        given = dict(native.get(kind) or {})
        if given.get("rope_type", "default") != "default":
            raise UnsupportedError(
                f"config.json: rope_parameters.{kind}.rope_type={given['rope_type']}; MiMo-V2 uses default"
            )
        theta = agree(
            f"rope_parameters.{kind}.rope_theta",
            given.get("rope_theta"),
            "the hub's theta",
            hub[kind],
            DEFAULT_THETA[kind],
        )
        part = agree(
            f"rope_parameters.{kind}.partial_rotary_factor",
            given.get("partial_rotary_factor"),
            "partial_rotary_factor",
            factor,
            DEFAULT_ROTARY,
        )
        result[kind] = {"rope_type": "default", "rope_theta": float(theta), "partial_rotary_factor": part}
    return result
