"""GGUF's fields back into config.json: the inverse of gguf_meta, for MiMo-V2, Qwen3-MoE, GPT-OSS and dense Llama."""

import math
from typing import Any

import numpy as np

from convert.formats.gguf_file import GgufFile
from convert.formats.gguf_meta import YARN
from convert.formats.gguf_names import ARCHES, Arch
from core.errors import CheckpointError, UnsupportedError
from core.models.mimo_v2_config import DENSE, FULL, SPARSE, WINDOW

WIDEST = 2**20
LONGEST = 2**31 - 1  # tokens
LIMITS = {
    "block_count": 2**14, "expert_count": 2**14, "expert_used_count": 2**14, "context_length": LONGEST,
    "attention.sliding_window": LONGEST, "rope.scaling.original_context_length": LONGEST,
}  # fmt: skip


def arch_in(file: GgufFile) -> Arch:
    """The architecture of a file.

    Raises:
        UnsupportedError: one that is not read here.
    """
    name = file.need("general.architecture")
    found = next((a for a in ARCHES if a.name == name), None)
    if found is None:
        raise UnsupportedError(
            f"{file.path} holds general.architecture={name!r}; {', '.join(a.name for a in ARCHES)} are read: fetch the "
            "model as safetensors instead"
        )
    return found


def layers_of(file: GgufFile, arch: Arch) -> int:
    """Decoder layers, without the MTP blocks that llama.cpp counts behind them."""
    extra = file.fields.get(f"{arch.name}.nextn_predict_layers", 0)
    layers = number(file, arch, "block_count") - (extra if type(extra) is int else 0)
    if not 1 <= layers <= len(file.tensors):
        raise CheckpointError(f"{file.path}: {layers} layers and {len(file.tensors)} tensors; the file is damaged")
    return layers


def number(file: GgufFile, arch: Arch, key: str) -> int:
    """A positive number; widths and counts are bounded so that no list or shape made of them can exhaust memory."""
    value = file.need(f"{arch.name}.{key}")
    limit = LIMITS.get(key, WIDEST)
    if type(value) is not int or not 0 < value <= limit:
        raise CheckpointError(f"{file.path}: {arch.name}.{key}={value!r}; expected 1 to {limit}, the file is damaged")
    return value


def per_layer(file: GgufFile, arch: Arch, key: str) -> list[int]:
    """A field that is one number for all layers, or a list of at least as many as there are layers."""
    value, layers = file.need(f"{arch.name}.{key}"), layers_of(file, arch)
    values = value if isinstance(value, list) else [value] * layers
    least = int(key == "attention.head_count_kv")
    if len(values) < layers or not all(type(v) in (int, bool) and least <= v <= WIDEST for v in values):
        raise CheckpointError(f"{file.path}: {arch.name}.{key} is no number for each of {layers} layers; it is damaged")
    return [int(v) for v in values[:layers]]


def real(value: Any) -> float:
    """The shortest decimal that is this FP32 number: 1e-05, not 9.99999974e-06."""
    return float(str(np.float32(value)))


def config_of(file: GgufFile, arch: Arch) -> dict[str, Any]:
    """config.json as transformers spells it.

    Raises:
        CheckpointError: a field is missing or impossible. UnsupportedError: a geometry that config.json cannot say.
    """
    if "rope_freqs.weight" in file.tensors:
        raise UnsupportedError(f"{file.path} holds rope_freqs.weight, rotary factors that config.json has no key for")
    heads, size = number(file, arch, "attention.head_count"), number(file, arch, "embedding_length")
    key = "attention.key_length"
    head_dim = number(file, arch, key) if f"{arch.name}.{key}" in file.fields else size // heads
    tokens = file.tensors.get("token_embd.weight")
    if tokens is None or head_dim < 1:
        raise CheckpointError(f"{file.path} lacks token_embd.weight or has heads of no width; it is incomplete")
    config = {
        "model_type": arch.model_types[0],
        "vocab_size": tokens.shape[0],
        "hidden_size": size,
        "intermediate_size": max(per_layer(file, arch, "feed_forward_length")),
        "num_hidden_layers": layers_of(file, arch),
        "num_attention_heads": heads,
        "num_key_value_heads": per_layer(file, arch, "attention.head_count_kv")[0],
        "head_dim": head_dim,
        "max_position_embeddings": number(file, arch, "context_length"),
        "rms_norm_eps": real(file.need(f"{arch.name}.attention.layer_norm_rms_epsilon")),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    for key, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        config[f"{key}_token_id"] = file.fields.get(f"tokenizer.ggml.{name}_token_id")
    more = {"mimo2": mimo, "qwen3moe": qwen, "gpt-oss": gpt_oss, "llama": llama}[arch.name]
    return config | more(file, arch, config)


def rope_of(file: GgufFile, arch: Arch, truncate: bool) -> dict[str, Any]:
    fields, stem = file.fields, f"{arch.name}.rope"
    plain = {"rope_theta": real(fields.get(f"{stem}.freq_base", 10000.0)), "rope_type": "default"}
    kind = fields.get(f"{stem}.scaling.type", "none")
    if kind == "none" or fields.get(f"{stem}.scaling.factor", 1.0) == 1.0:
        return plain
    if kind != "yarn":
        raise UnsupportedError(f"{file.path}: {stem}.scaling.type={kind}; none and yarn are read")
    original = number(file, arch, "rope.scaling.original_context_length")
    return plain | YARN | {
        "rope_type": "yarn", "factor": real(file.need(f"{stem}.scaling.factor")), "truncate": truncate,
        "original_max_position_embeddings": original,
    }  # fmt: skip


def mimo(file: GgufFile, arch: Arch, config: dict[str, Any]) -> dict[str, Any]:
    windows = per_layer(file, arch, "attention.sliding_window_pattern")
    kv_heads = per_layer(file, arch, "attention.head_count_kv")
    by_kind = {kind: {h for h, w in zip(kv_heads, windows, strict=True) if w == kind} for kind in (0, 1)}
    if any(len(found) > 1 for found in by_kind.values()):
        raise UnsupportedError(f"{file.path}: KV heads {kv_heads} vary within a layer type; config.json has one each")
    full = next(iter(by_kind[0]), config["num_key_value_heads"])
    rotated = number(file, arch, "rope.dimension_count")
    factor = rotated / config["head_dim"]
    if int(config["head_dim"] * factor) != rotated:
        factor = math.nextafter(factor, 2.0)
    theta = real(file.fields.get("mimo2.rope.freq_base", 10000.0))
    window_theta = real(file.fields.get("mimo2.rope.freq_base_swa", theta))
    moe = [f"blk.{i}.ffn_gate_inp.weight" in file.tensors for i in range(config["num_hidden_layers"])]
    scale = file.fields.get("mimo2.attention.value_scale")
    return {
        "num_key_value_heads": full,
        "swa_num_key_value_heads": next(iter(by_kind[1]), 2 * full),
        "v_head_dim": number(file, arch, "attention.value_length"),
        "sliding_window": number(file, arch, "attention.sliding_window"),
        "layer_types": [WINDOW if w else FULL for w in windows],
        "mlp_layer_types": [SPARSE if m else DENSE for m in moe],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": t, "partial_rotary_factor": factor}
            for kind, t in ((FULL, theta), (WINDOW, window_theta))
        },
        "n_routed_experts": number(file, arch, "expert_count"),
        "num_experts_per_tok": number(file, arch, "expert_used_count"),
        "moe_intermediate_size": number(file, arch, "expert_feed_forward_length"),
        "attention_value_scale": None if scale is None else real(scale),
    }


def qwen(file: GgufFile, arch: Arch, config: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG001
    return {
        "num_experts": number(file, arch, "expert_count"),
        "num_experts_per_tok": number(file, arch, "expert_used_count"),
        "moe_intermediate_size": number(file, arch, "expert_feed_forward_length"),
        "norm_topk_prob": True,  # llama.cpp always does
        "rope_parameters": rope_of(file, arch, truncate=True),
    }


def gpt_oss(file: GgufFile, arch: Arch, config: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG001
    return {
        "intermediate_size": number(file, arch, "expert_feed_forward_length"),
        "num_local_experts": number(file, arch, "expert_count"),
        "num_experts_per_tok": number(file, arch, "expert_used_count"),
        "sliding_window": number(file, arch, "attention.sliding_window"),
        "rope_parameters": rope_of(file, arch, truncate=False),
    }


def llama(file: GgufFile, arch: Arch, config: dict[str, Any]) -> dict[str, Any]:
    if file.fields.get("llama.expert_count"):
        raise UnsupportedError(f"{file.path} is a Mixtral-style MoE in the llama architecture; dense Llama is read")
    dim = file.fields.get("llama.rope.dimension_count", config["head_dim"])
    if dim != config["head_dim"]:
        raise UnsupportedError(
            f"{file.path}: llama.rope.dimension_count={dim} of {config['head_dim']}; all is rotated here"
        )
    return {
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "rope_parameters": rope_of(file, arch, truncate=True),
    }
