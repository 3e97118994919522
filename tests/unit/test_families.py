"""Load, save, and transformers' own loader: the same logits, for every family that claims support."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    LlamaConfig,
    MiMoV2FlashConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

from core.checkpoint.index import open_checkpoint
from core.errors import CheckpointError, ConfigError, UnsupportedError
from core.models.build import preset_names, read_config
from core.models.experts import find_experts
from core.models.load import load_model, meta_model, save_model
from core.models.mimo_v2 import MiMoV2ForCausalLM
from core.models.mimo_v2_config import MiMoV2Config

SIZE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 1,
}  # fmt: skip
MIMO = SIZE | {
    "moe_intermediate_size": 32, "head_dim": 24, "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"],
}  # fmt: skip
FAMILIES: dict[str, PreTrainedConfig] = {
    "mimo_v2": MiMoV2FlashConfig(**MIMO),
    "qwen3_moe": Qwen3MoeConfig(**SIZE, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, head_dim=16),
    "gpt_oss": GptOssConfig(**SIZE, num_local_experts=4, num_experts_per_tok=2, head_dim=16),
    "deepseek_v3": DeepseekV3Config(
        **SIZE | {"num_key_value_heads": 4}, moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2,
        n_group=2, topk_group=1, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=16,
    ),
    "llama tied": LlamaConfig(**SIZE, tie_word_embeddings=True),
}  # fmt: skip
IDS = torch.randint(0, 64, (2, 11), generator=torch.Generator().manual_seed(0))


def make(config: PreTrainedConfig) -> torch.nn.Module:
    torch.manual_seed(0)
    model = (
        MiMoV2ForCausalLM(config)
        if isinstance(config, MiMoV2Config)
        else AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    )
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "norm" not in name:
                tensor.normal_(std=0.2)
    return model.eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("family", list(FAMILIES))
def test_round_trip(family: str, tmp_path: Path) -> None:
    model = make(FAMILIES[family])
    model.save_pretrained(tmp_path / "hub", max_shard_size="60KB")
    loaded = load_model(tmp_path / "hub", dtype=torch.float32, attention="eager", experts="grouped_mm")
    model.set_attn_implementation("eager")
    assert torch.equal(logits(loaded.model), logits(model))
    # what an engine yields: parameters and every buffer, rotary frequencies included
    everything = [*loaded.model.named_parameters(), *loaded.model.named_buffers()]
    save_model(everything, loaded, tmp_path / "ours", shard_bytes=60_000)
    assert (tmp_path / "ours" / "model.safetensors.index.json").exists()
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, attn_implementation="eager", experts_implementation="grouped_mm"
    ) if find_experts(model) else AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, attn_implementation="eager"
    )  # fmt: skip
    assert torch.equal(logits(again), logits(model))
    assert set(open_checkpoint(tmp_path / "ours").entries) == set(open_checkpoint(tmp_path / "hub").entries)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_packed_documents_do_not_see_each_other(family: str, tmp_path: Path) -> None:
    """Nobody has to say use_cache=False: transformers drops the packing mask when a cache is made."""
    make(FAMILIES[family]).save_pretrained(tmp_path)
    loaded = load_model(tmp_path, dtype=torch.float32)
    model = loaded.model
    assert loaded.config.use_cache
    assert model.generate(IDS, max_new_tokens=2, return_dict_in_generate=True).past_key_values is not None
    positions = torch.cat([torch.arange(4), torch.arange(7)]).expand(2, -1)
    with torch.no_grad():
        together = model.model(input_ids=IDS, position_ids=positions).last_hidden_state
        apart = torch.cat([model.model(input_ids=part).last_hidden_state for part in IDS.split([4, 7], 1)], 1)
    assert (together - apart).abs().max() < 1e-5


def test_expert_layouts() -> None:
    found = {name: find_experts(make(config)) for name, config in FAMILIES.items()}
    assert {e.reduction_dim for e in found["gpt_oss"]} == {-2}
    assert {e.reduction_dim for n in ("mimo_v2", "qwen3_moe", "deepseek_v3") for e in found[n]} == {-1}
    assert [(e.name, e.layer) for e in found["mimo_v2"]] == [
        ("model.layers.1.mlp.experts.gate_up_proj", 1),
        ("model.layers.1.mlp.experts.down_proj", 1),
    ]
    assert not found["llama tied"]


def test_pro_geometry_round_trip_and_carried_tensors(tmp_path: Path) -> None:
    """8/8-like KV heads keep our own type; MTP and vision bytes come out as they went in."""
    config = MiMoV2Config(**MIMO, swa_num_key_value_heads=1)
    model = make(config)
    save_model(model.state_dict().items(), config, tmp_path / "a")
    extra = {
        "model.mtp.layers.0.eh_proj.weight": torch.randn(32, 64).to(torch.float8_e4m3fn),
        "model.mtp.layers.0.eh_proj.weight_scale_inv": torch.rand(1, 1),
        "visual.patch.weight": torch.randn(3, 5, 7, dtype=torch.bfloat16),
        "audio_encoder.x": torch.arange(5, dtype=torch.int64),
        "speech_embeddings.0.weight": torch.randn(4, 4, dtype=torch.float16),
    }
    file = tmp_path / "a" / "model.safetensors"
    save_file(load_file(file) | extra, file, metadata={"format": "pt"})
    loaded = load_model(tmp_path / "a", dtype=torch.float32)
    assert {p.name: p.nbytes for p in loaded.passthrough} == {k: v.numel() * v.element_size() for k, v in extra.items()}
    save_model(loaded.model.state_dict().items(), loaded, tmp_path / "b")
    written = load_file(tmp_path / "b" / "model.safetensors")
    for name, tensor in extra.items():
        assert written[name].dtype == tensor.dtype
        assert torch.equal(written[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert json.loads((tmp_path / "b" / "config.json").read_text())["model_type"] == "mimo_v2"
    assert torch.equal(logits(load_model(tmp_path / "b", dtype=torch.float32).model), logits(loaded.model))


def test_bf16_load_keeps_the_correction_bias_in_fp32(tmp_path: Path) -> None:
    model = make(FAMILIES["mimo_v2"])
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path).model
    ours, theirs = loaded.state_dict(), model.state_dict()
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert torch.equal(ours[name], theirs[name])
    assert all(t.dtype == torch.bfloat16 for n, t in ours.items() if n != name)
    assert all(torch.equal(t, theirs[n].to(t.dtype)) for n, t in ours.items())


@pytest.mark.parametrize("window", [{}, {"sliding_window": 7}, {"sliding_window_size": 6}])
def test_reads_the_window_that_transformers_means(window: dict[str, int], tmp_path: Path) -> None:
    """Its default of 129 is not in the file it writes; 6 becomes 7 there, and both stay in the file."""
    config = MiMoV2FlashConfig(**{k: v for k, v in MIMO.items() if k != "sliding_window"}, **window)
    config.save_pretrained(tmp_path)
    assert read_config(tmp_path).sliding_window == config.sliding_window


def change(folder: Path, edit: Any) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
EDITS = {
    "unknown key": (lambda t: t.update({"model.layers.0.surprise": torch.zeros(1)}), "model.layers.0.surprise"),
    "missing tensor": (lambda t: t.pop("model.norm.weight"), "model.norm.weight"),
    "missing expert": (lambda t: t.pop(EXPERT), EXPERT),
    "one expert too many": (
        lambda t: t.update({"model.layers.1.mlp.experts.4.up_proj.weight": t[EXPERT].clone()}),
        "experts.4.up_proj",
    ),
    "wrong shape": (lambda t: t.update({EXPERT: torch.zeros(31, 32)}), EXPERT),
    "wrong shape of a plain tensor": (lambda t: t.update({"lm_head.weight": torch.zeros(64, 31)}), "lm_head.weight"),
    "NaN": (lambda t: t[EXPERT].fill_(float("nan")), EXPERT),
    "integer weights": (lambda t: t.update({EXPERT: torch.zeros(32, 32, dtype=torch.uint8)}), EXPERT),
}


@pytest.mark.parametrize("case", list(EDITS))
def test_strictness_one_line_that_names_the_tensor(case: str, tmp_path: Path) -> None:
    make(FAMILIES["mimo_v2"]).save_pretrained(tmp_path)
    edit, name = EDITS[case]
    change(tmp_path, edit)
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_saving_must_be_complete_and_leaves_the_old_folder(tmp_path: Path) -> None:
    config = FAMILIES["mimo_v2"]
    model = make(config)
    model.save_pretrained(tmp_path / "hub")
    loaded = load_model(tmp_path / "hub", dtype=torch.float32)
    out = tmp_path / "out"
    save_model(loaded.model.state_dict().items(), loaded, out)
    before = (out / "model.safetensors").read_bytes()
    tensors = list(loaded.model.state_dict().items())
    for broken in (tensors[:-1], [*tensors, ("stranger", torch.zeros(1))], [("model.norm.weight", torch.zeros(3))]):
        with pytest.raises(CheckpointError):
            save_model(iter(broken), loaded, out)
        assert (out / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hub", "out"]


def test_other_ranks_consume_and_write_nothing(tmp_path: Path) -> None:
    seen = iter([("a", torch.zeros(1))])
    save_model(seen, FAMILIES["llama tied"], tmp_path / "out", rank=1)
    assert next(seen, None) is None
    assert not (tmp_path / "out").exists()


def test_messages_for_paths_and_names(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json; download"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "martian"}')
    with pytest.raises(UnsupportedError, match="martian"):
        load_model(tmp_path)
    make(FAMILIES["mimo_v2"]).save_pretrained(tmp_path)
    for wrong in ({"attention": "fast"}, {"experts": "fast"}):
        with pytest.raises(ConfigError, match="fast"):
            load_model(tmp_path, **wrong)
    with pytest.raises(ConfigError, match="mimo_v2_5_pro"):
        meta_model("mimo_v9")


@pytest.mark.parametrize(
    ("name", "billions", "expert_tensors"),
    [
        ("mimo_v2_flash", 308.8, 94), ("mimo_v2_5", 308.8, 94), ("mimo_v2_6_flash", 308.8, 94),
        ("mimo_v2_5_pro", 1021.3, 138), ("qwen3_30b_a3b", 30.5, 96), ("gpt_oss_20b", 20.9, 48),
    ],
)  # fmt: skip
def test_published_geometries(name: str, billions: float, expert_tensors: int) -> None:
    """Parameter counts as published (Pro: 1,023.2 B with its three MTP blocks of 0.64 B each)."""
    model, _ = meta_model(name)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.06)
    assert len(find_experts(model)) == expert_tensors
    assert name in preset_names()
