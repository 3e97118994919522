"""config.json without quantisation: transformers' keys, and for MiMo-V2 the hub's spelling beside them.

vLLM and SGLang read MiMo's hub keys (`hybrid_layer_pattern`, `moe_layer_freq`, ...), transformers its own
(`layer_types`, `mlp_layer_types`, ...). Both are written, with one meaning.
"""

from typing import Any

from convert.source import Source
from core.models.load import saved_config
from core.models.mimo_v2_config import FULL, SPARSE, WINDOW, MiMoV2Config


def base_config(source: Source) -> dict[str, Any]:
    raw = saved_config(source.config)
    if isinstance(source.config, MiMoV2Config):
        raw = hub_keys(source.config) | raw
    return raw


def hub_keys(config: MiMoV2Config) -> dict[str, Any]:
    """The geometry as Xiaomi's config.json spells it (sliding-window keys aside, whose two readings differ by one)."""
    rope = config.rope_parameters
    return {
        "hybrid_layer_pattern": [int(kind == WINDOW) for kind in config.layer_types],
        "moe_layer_freq": [int(kind == SPARSE) for kind in config.mlp_layer_types],
        "layernorm_epsilon": config.rms_norm_eps,
        "rope_theta": rope[FULL]["rope_theta"],
        "swa_rope_theta": rope[WINDOW]["rope_theta"],
        "partial_rotary_factor": rope[FULL]["partial_rotary_factor"],
        "swa_num_attention_heads": config.num_attention_heads,
        "swa_num_key_value_heads": config.swa_num_key_value_heads,
        "swa_head_dim": config.head_dim,
        "swa_v_head_dim": config.v_head_dim,
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "n_shared_experts": None,
    }
