"""What vLLM's and SGLang's loaders read, as tables, held against our files.

Both engines are too large for our CI. A loader asks for parameters by name, dtype and shape and picks its class by keys
of config.json; those facts stand here with the file (and commit or pull request) in which they were read.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from core.models.mimo_v2_config import MiMoV2Config
from tests.convert_cases import CONFIGS, bytes_of, checkpoint, exported

PROJECTIONS = {"gate_proj": "wide", "up_proj": "wide", "down_proj": "tall"}


Table = dict[str, tuple[str, tuple[int, ...]]]  # name: (dtype, shape)


def expert_table(experts: str, hidden: int, width: int, count: int, codes: str) -> Table:
    """Names, dtypes and shapes of one layer's routed experts; per expert and projection, codes and scales apart.

    The loaders' buffers are w13 [E, 2*width, hidden/2] and w2 [E, hidden, width/2] for codes, /32 in the last
    dimension for scales, all uint8; w13 is gate over up.
    """
    found = {}
    for expert in range(count):
        for projection, shape in PROJECTIONS.items():
            rows, columns = (width, hidden) if shape == "wide" else (hidden, width)
            stem = f"{experts}.{expert}.{projection}.weight"
            found[f"{stem}{codes}"] = ("torch.uint8", (rows, columns // 2))
            found[f"{stem}_scale"] = ("torch.uint8", (rows, columns // 32))
    return found


def experts_of(folder: Path, layer: int) -> Table:
    stem = f"model.layers.{layer}.mlp.experts."
    return {n: (dtype, shape) for n, (dtype, shape, _) in bytes_of(folder).items() if n.startswith(stem)}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


# vLLM, vllm/model_executor/layers/quantization/compressed_tensors/:
#   compressed_tensors.py (_is_mxfp4) and compressed_tensors_moe/compressed_tensors_moe.py @ 8a95a688: the scheme is
#   chosen by these five keys of the group that targets Linear; gate, up and down of expert 0 must agree and none may
#   be ignored. compressed_tensors_moe_w4a4_mxfp4.py @ cd5f1c27: buffers w13_weight_packed, w2_weight_packed,
#   w13_weight_scale, w2_weight_scale, uint8, groups of 32, and no input scale.
# SGLang, python/sglang/srt/layers/quantization/compressed_tensors/schemes/, CompressedTensorsW4A16Mxfp4MoE (mid 2026):
#   the same buffers; an input_global_scale in the file without input_activations in the config is a KeyError; Marlin
#   needs hidden % 128 == 0 and width % 64 == 0.
MXFP4_KEYS = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True}
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@pytest.mark.parametrize("family", ["mimo", "mimo pro", "qwen3_moe", "deepseek_v3"])
def test_compressed_tensors_experts_are_where_the_loaders_look(family: str, tmp_path: Path) -> None:
    folder = exported(checkpoint(tmp_path / "model", family), "hf", tmp_path / "hf")
    config = CONFIGS[family]()
    table = expert_table("model.layers.1.mlp.experts", config.hidden_size, config.moe_intermediate_size, 4, "_packed")
    assert experts_of(folder, 1) == table
    assert not any("global_scale" in n or "zero_point" in n or n.endswith("input_scale") for n in bytes_of(folder))


@pytest.mark.parametrize("family", ["mimo", "qwen3_moe", "deepseek_v3"])
def test_compressed_tensors_config_selects_the_mxfp4_scheme(family: str, tmp_path: Path) -> None:
    folder = exported(checkpoint(tmp_path / "model", family, carried=family == "mimo"), "hf", tmp_path / "hf")
    quantisation = config_of(folder)["quantization_config"]
    assert quantisation["quant_method"] == "compressed-tensors"
    assert quantisation["format"] == "mxfp4-pack-quantized"
    (group,) = quantisation["config_groups"].values()
    assert group["targets"] == ["Linear"] and group["format"] == "mxfp4-pack-quantized"
    assert {k: group["weights"][k] for k in MXFP4_KEYS} == MXFP4_KEYS
    assert group["weights"]["dynamic"] is False and group["input_activations"] is None
    ignore = quantisation["ignore"]
    assert not any(n.startswith("re:") for n in ignore), "exact names are what every loader matches the same way"
    assert_ignores_exactly_what_is_not_packed(folder, ignore, "_packed")


def assert_ignores_exactly_what_is_not_packed(folder: Path, ignore: list[str], codes: str) -> None:
    """Every Linear that is not packed, none that is; members of a fused module all or none (both engines demand it)."""
    tensors = bytes_of(folder)
    packed = {n.removesuffix(f".weight{codes}") for n in tensors if n.removesuffix(codes) + "_scale" in tensors}
    matrices = {n.removesuffix(".weight") for n, (_, s, _) in tensors.items() if n.endswith(".weight") and len(s) == 2}
    assert set(ignore) == matrices - packed and packed and not packed & set(ignore)
    for members in FUSED.values():
        for stem in {n.rsplit(".", 1)[0] for n in matrices if n.endswith(members) and ".experts." not in n}:
            listed = [f"{stem}.{m}" in ignore for m in members if f"{stem}.{m}" in matrices]
            assert all(listed) or not any(listed), stem


# vLLM, vllm/model_executor/layers/quantization/quark/quark.py @ de382261: `export` must be there with kv_cache_group (a
#   list) and pack_method; exclude, layer_quant_config, layer_type_quant_config, global_quant_config are read without a
#   default; output_tensors and bias must be empty; MX is per_group, 32, e8m0, dtype fp4. quark_moe.py (2026):
#   QuarkOCP_MX_MoEMethod takes input_config None; buffers w13_weight, w2_weight uint8 and w13_weight_scale,
#   w2_weight_scale uint8 of groups of 32.
QUARK_WEIGHT = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0", "is_dynamic": False}


@pytest.mark.parametrize("family", ["mimo", "qwen3_moe"])
def test_quark(family: str, tmp_path: Path) -> None:
    folder = exported(checkpoint(tmp_path / "model", family), "quark", tmp_path / "quark")
    config = CONFIGS[family]()
    table = expert_table("model.layers.1.mlp.experts", config.hidden_size, config.moe_intermediate_size, 4, "")
    assert experts_of(folder, 1) == table
    quantisation = config_of(folder)["quantization_config"]
    assert quantisation["quant_method"] == "quark"
    assert quantisation["export"]["kv_cache_group"] == [] and quantisation["export"]["pack_method"] == "reorder"
    assert quantisation["export"]["weight_format"] == "real_quantized"
    assert quantisation["layer_quant_config"] == {} == quantisation["layer_type_quant_config"]
    chosen = quantisation["global_quant_config"]
    assert {k: chosen["weight"][k] for k in QUARK_WEIGHT} == QUARK_WEIGHT and chosen["weight"]["ch_axis"] == -1
    assert chosen["input_tensors"] is chosen["output_tensors"] is chosen["bias"] is None
    assert_ignores_exactly_what_is_not_packed(folder, quantisation["exclude"], "")


# MiMo store_dtype=mxfp4. vLLM #57784 (MiMoV2Mxfp4Config, swiglu limit set there) and models/mimo_v2.py @ 055e47c2
#   (under vllm/model_executor): hub keys of the config (hybrid_layer_pattern, moe_layer_freq, layernorm_epsilon),
#   qkv_proj.weight F8_E4M3 with qkv_proj.weight_scale_inv, scale rows divided evenly among chunks; attention_sink_bias
#   by name; names with "mtp" skipped. SGLang #40448, #27638: the same names; experts' weight and weight_scale uint8.
#   The chunks are num_key_value_heads, in window layers too: published scale rows 216, 108, 116.
MIMO_KEYS = {
    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
    "store_dtype": "mxfp4", "mxfp4_block_size": 32,
}  # fmt: skip


@pytest.mark.parametrize("family", ["mimo", "mimo pro"])
def test_mimo_tensors(family: str, tmp_path: Path) -> None:
    folder = exported(checkpoint(tmp_path / "model", family), "mimo", tmp_path / "mimo")
    config = CONFIGS[family]()
    assert isinstance(config, MiMoV2Config)
    hidden, heads, chunks = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    table = expert_table("model.layers.1.mlp.experts", hidden, config.moe_intermediate_size, 4, "")
    assert experts_of(folder, 1) == table
    found = {n: (dtype, shape) for n, (dtype, shape, _) in bytes_of(folder).items()}
    for layer in range(config.num_hidden_layers):
        rows = heads * config.head_dim + config.kv_heads(layer) * (config.head_dim + config.v_head_dim)
        scale_rows = chunks * -(-rows // chunks // 128)
        stem = f"model.layers.{layer}.self_attn"
        assert found[f"{stem}.qkv_proj.weight"] == ("torch.float8_e4m3fn", (rows, hidden))
        assert found[f"{stem}.qkv_proj.weight_scale_inv"] == ("torch.float32", (scale_rows, -(-hidden // 128)))
        assert found[f"{stem}.o_proj.weight"] == ("torch.bfloat16", (hidden, heads * config.v_head_dim))
        sink = f"{stem}.attention_sink_bias"
        assert (sink in found) == (config.layer_types[layer] == "sliding_attention")
    width = config.intermediate_size
    assert found["model.layers.0.mlp.down_proj.weight"] == ("torch.float8_e4m3fn", (hidden, width))
    assert found["model.layers.0.mlp.down_proj.weight_scale_inv"] == ("torch.float32", (1, 1))
    assert found["model.layers.1.mlp.gate.e_score_correction_bias"] == ("torch.float32", (4,))
    assert not any(re.search(r"\.[qkv]_proj\.", n) or "sinks" in n for n in found)


@pytest.mark.parametrize("family", ["mimo", "mimo pro"])
def test_mimo_config_and_index(family: str, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "model", family)
    folder = exported(source, "mimo", tmp_path / "mimo", "--shard-gb", str(40_000 / 2**30))
    config, made = config_of(folder), CONFIGS[family]()
    quantisation = config["quantization_config"]
    assert {k: quantisation[k] for k in MIMO_KEYS} == MIMO_KEYS
    layers = made.num_hidden_layers
    kept = [f"model.layers.{i}.self_attn.o_proj" for i in range(layers)] + ["model.decoder.self_attn.o_proj"]
    assert quantisation["ignored_layers"] == kept
    assert (config["model_type"], config["architectures"]) == ("mimo_v2", ["MiMoV2ForCausalLM"])
    assert config["attention_projection_layout"] == "fused_qkv"
    assert config["hybrid_layer_pattern"] == [int(k == "sliding_attention") for k in made.layer_types]
    assert config["moe_layer_freq"] == [0] + [1] * (layers - 1)
    assert config["layernorm_epsilon"] == made.rms_norm_eps
    windows = {config[k] for k in ("sliding_window", "sliding_window_size", "attention_chunk_size")}
    assert windows == {made.sliding_window}
    assert config["swa_num_key_value_heads"] == made.swa_num_key_value_heads
    index = json.loads((folder / "model.safetensors.index.json").read_text())["metadata"]
    assert (index["save_format"], index["tp_size"]) == ("mxfp4", made.num_key_value_heads)


# GPT-OSS: transformers src/transformers/integrations/mxfp4.py (5.23) and vLLM vllm/model_executor/models/gpt_oss.py:
#   *_blocks [E, rows, groups, 16], *_scales [E, rows, groups], biases BF16, rows of gate and up alternating.
def test_gpt_oss_layout(tmp_path: Path) -> None:
    folder = exported(checkpoint(tmp_path / "model", "gpt_oss wide"), "gpt-oss", tmp_path / "out")
    found = {
        n.split(".experts.")[1]: (d, s) for n, (d, s, _) in bytes_of(folder).items() if "layers.0.mlp.experts" in n
    }
    assert found == {
        "gate_up_proj_blocks": ("torch.uint8", (3, 320, 3, 16)),
        "gate_up_proj_scales": ("torch.uint8", (3, 320, 3)),
        "gate_up_proj_bias": ("torch.bfloat16", (3, 320)),
        "down_proj_blocks": ("torch.uint8", (3, 96, 5, 16)),
        "down_proj_scales": ("torch.uint8", (3, 96, 5)),
        "down_proj_bias": ("torch.bfloat16", (3, 96)),
    }
    quantisation = config_of(folder)["quantization_config"]
    assert quantisation["quant_method"] == "mxfp4"
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    assert quantisation["modules_to_not_convert"] == kept
