"""Hyperparameters as GGUF's fields: what llama.cpp's loader of each architecture reads.

llama.cpp computes some things of an architecture one way only, whatever a field says (the router's normalisation,
GPT-OSS's clamp, which layers have a window). `refuse` names every model that would therefore come out different, but
for YaRN's ramp in GPT-OSS: all its releases say truncate=False, and llama.cpp runs them with rounded ends nevertheless.

A field's Python type is its GGUF type: int u32, float f32, bool, str, list of int i32, list of str.
"""

from typing import Any

from transformers import PreTrainedConfig

from convert.formats.gguf_names import WRITTEN, Arch
from core.errors import UnsupportedError
from core.models.mimo_v2_config import FULL, WINDOW, MiMoV2Config

SOFTMAX, SIGMOID = 1, 2  # expert_gating_func
MXFP4_MOE = 38  # LLAMA_FTYPE_MOSTLY_MXFP4_MOE of llama.h, the enum that the loader reads; ggml.h counts otherwise (25)
YARN = {"beta_fast": 32.0, "beta_slow": 1.0}  # llama.cpp's constants
GPT_OSS = {"swiglu_limit": 7.0, "swiglu_alpha": 1.702, "attention_bias": True, "hidden_act": "silu"}
QWEN = {
    "norm_topk_prob": True, "attention_bias": False, "use_sliding_window": False, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "hidden_act": "silu",
}  # fmt: skip
MIMO = {
    "norm_topk_prob": True,
    "attention_bias": False,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "hidden_act": "silu",
}
ONLY_VALUE = {"gpt-oss": GPT_OSS, "qwen3moe": QWEN, "mimo2": MIMO}


def arch_of(config: PreTrainedConfig) -> Arch:
    """The architecture that `config` is written as.

    Raises:
        UnsupportedError: there is none, or llama.cpp would compute this geometry differently.
    """
    found = next((a for a in WRITTEN if config.model_type in a.model_types), None)
    if found is None:
        raise UnsupportedError(
            f"--to gguf writes {', '.join(t for a in WRITTEN for t in a.model_types)}; model_type={config.model_type} "
            "has no tested GGUF layout here; use --to bf16 and llama.cpp's own converter"
        )
    refuse(config, found)
    return found


def refuse(config: Any, arch: Arch) -> None:
    for key, only in ONLY_VALUE[arch.name].items():
        value = getattr(config, key, only)
        if value != only:
            raise UnsupportedError(
                f"--to gguf: {key}={value}, llama.cpp computes {arch.name} with {only} only; use --to bf16"
            )
    if arch.needs_head and config.tie_word_embeddings:
        raise UnsupportedError(
            f"--to gguf: tie_word_embeddings=True, llama.cpp's loader of {arch.name} wants output.weight; use --to bf16"
        )
    if arch.name == "gpt-oss":
        alternating = [FULL if i % 2 else WINDOW for i in range(config.num_hidden_layers)]
        if list(config.layer_types) != alternating:
            raise UnsupportedError(
                "--to gguf: layer_types; llama.cpp's gpt-oss has windows on layers 0, 2, 4, ... only"
            )
    if arch.name == "qwen3moe" and config.rope_parameters.get("truncate") is False:
        raise UnsupportedError(
            "--to gguf: rope_parameters.truncate=False, llama.cpp rounds the ends of YaRN's ramp; use --to bf16"
        )
    if arch.name == "mimo2":
        rotary = {rotated(config, kind) for kind in (FULL, WINDOW)}
        if len(rotary) > 1:
            raise UnsupportedError(
                f"--to gguf: {sorted(rotary)} rotated dimensions by layer type; llama.cpp's mimo2 has one number"
            )
    else:
        rope_fields(config.rope_parameters)


def rotated(config: MiMoV2Config, kind: str) -> int:
    """Leading dimensions of a head that are rotated."""
    return int(config.head_dim * config.rope_parameters[kind]["partial_rotary_factor"])


def rope_fields(rope: dict[str, Any]) -> dict[str, Any]:
    """`rope.*` of a model with one rotary embedding, plain or YaRN."""
    fields = {"rope.freq_base": float(rope["rope_theta"])}
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return fields
    odd = {k: rope[k] for k in ("attention_factor", "mscale", "mscale_all_dim") if rope.get(k) is not None}
    odd |= {k: rope[k] for k, only in YARN.items() if rope.get(k) not in (None, only)}
    if kind != "yarn" or odd:
        raise UnsupportedError(
            f"--to gguf: rope_type={kind} {odd or ''}; plain rotary embeddings and YaRN with its default constants are "
            "written; use --to bf16"
        )
    return fields | {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(rope["factor"]),
        "rope.scaling.original_context_length": int(rope["original_max_position_embeddings"]),
    }


def metadata(config: Any, arch: Arch, name: str) -> dict[str, Any]:
    """Every field but the tokenizer's.

    Args:
        name: of the model, for general.name.
    """
    fields: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": config.head_dim,
        "expert_used_count": config.num_experts_per_tok,
    }
    fields |= {"mimo2": mimo, "qwen3moe": qwen, "gpt-oss": gpt_oss}[arch.name](config)
    general = {
        "general.type": "model",
        "general.name": name,
        "general.file_type": MXFP4_MOE,
        "general.quantization_version": 2,
    }
    return general | {f"{arch.name}.{key}": value for key, value in fields.items()}


def mimo(config: MiMoV2Config) -> dict[str, Any]:
    layers = range(config.num_hidden_layers)
    fields: dict[str, Any] = {
        "attention.head_count_kv": [config.kv_heads(i) for i in layers],
        "attention.value_length": config.v_head_dim,
        "attention.sliding_window": config.sliding_window,  # visible keys with the query's own, as llama.cpp counts
        "attention.sliding_window_pattern": [int(config.layer_types[i] == WINDOW) for i in layers],
        "rope.dimension_count": rotated(config, FULL),
        "rope.freq_base": float(config.rope_parameters[FULL]["rope_theta"]),
        "rope.freq_base_swa": float(config.rope_parameters[WINDOW]["rope_theta"]),
        "expert_count": config.n_routed_experts,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_weights_norm": True,
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_gating_func": SIGMOID,
    }
    if config.attention_value_scale is not None:
        fields["attention.value_scale"] = float(config.attention_value_scale)
    return fields


def qwen(config: Any) -> dict[str, Any]:
    return rope_fields(config.rope_parameters) | {
        "expert_count": config.num_experts,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_weights_norm": True,
        "expert_gating_func": SOFTMAX,
    }


def gpt_oss(config: Any) -> dict[str, Any]:
    return rope_fields(config.rope_parameters) | {
        "attention.sliding_window": config.sliding_window,
        "expert_count": config.num_local_experts,
        "expert_feed_forward_length": config.intermediate_size,
    }
