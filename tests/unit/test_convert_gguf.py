"""GGUF out and back: read by the gguf package, bit for bit; the same codes after a round trip; refusals; bad files."""

import copy
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor
from transformers import GptOssConfig, Qwen3MoeConfig

from convert.export import main as export
from convert.formats.gguf_file import open_gguf
from convert.formats.gguf_meta import arch_of, metadata
from convert.formats.gguf_names import WRITTEN, from_blocks, from_gguf, to_blocks
from convert.formats.gguf_read import gguf_to_checkpoint
from convert.load import main as load
from convert.source import open_source
from convert.verify import main as verify
from core.models.build import config_from
from core.models.experts import find_experts
from core.models.load import load_model, save_model
from core.models.mimo_v2_config import MiMoV2Config
from core.mxfp4 import Packed, ScaleRule, decode, encode, snap, unpack_codes
from tests.unit.test_families import FAMILIES, MIMO, SIZE, logits, make

MODELS: dict[str, Any] = {
    "mimo2": FAMILIES["mimo_v2"],
    "mimo2 pro": MiMoV2Config(**MIMO, swa_num_key_value_heads=1, attention_value_scale=None),
    "qwen3moe": Qwen3MoeConfig(
        **SIZE, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2, head_dim=16, norm_topk_prob=True
    ),
    "gpt-oss": FAMILIES["gpt_oss"],
}
# what the loaders of llama.cpp read with `required`, and what decides the result when it is absent
NEEDED = {
    "all": [
        "vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length", "expert_count",
        "expert_used_count", "expert_feed_forward_length", "rope.freq_base", "rope.dimension_count",
        "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
        "attention.layer_norm_rms_epsilon",
    ],
    "mimo2": [
        "attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa", "attention.value_scale"
    ],
    "gpt-oss": ["attention.sliding_window", "rope.scaling.type", "rope.scaling.factor"],
    "qwen3moe": [],
}  # fmt: skip


def saved(
    config: Any, folder: Path, quantised: bool = True, tokenizer: Any = None, dtype: torch.dtype = torch.bfloat16
) -> Path:
    """A checkpoint with BF16 values stored as `dtype`, its experts on the grid."""
    model = make(copy.deepcopy(config))
    dims = {e.name: e.reduction_dim for e in find_experts(model)} if quantised else {}

    def tensors() -> Any:
        for name, tensor in model.state_dict().items():
            value = tensor if name.endswith("correction_bias") else tensor.bfloat16()
            yield name, snap(value, ScaleRule.even, dims[name]) if name in dims else value.to(dtype)

    save_model(tensors(), model.config, folder, tokenizer=tokenizer)
    return folder


@pytest.fixture(scope="module", params=list(MODELS))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    root = tmp_path_factory.mktemp("gguf")
    model = saved(MODELS[request.param], root / "model")
    assert export(["--to", "gguf", "--from", str(model), "--out", str(root / "out")]) == 0
    return request.param, model, root / "out"


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(
        one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)
    )  # fmt: skip


def plus_zero(value: Tensor) -> Tensor:
    """Code 8 is -0; ggml's table of magnitudes is of integers, so it decodes to +0 there. All else stays."""
    return value + 0.0


def expected(model: Path) -> dict[str, Tensor]:
    """GGUF name -> values, by rules written down here a second time."""
    state = {k: v for k, v in load_model(model).model.state_dict().items() if "inv_freq" not in k}
    found = {}
    renames = [
        ("model.layers.", "blk."), ("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"),
        ("lm_head", "output"), ("self_attn.q_proj", "attn_q"), ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"), ("self_attn.o_proj", "attn_output"), ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"), ("self_attn.sinks", "attn_sinks.weight"),
        ("input_layernorm", "attn_norm"), ("mlp.gate.e_score_correction_bias", "exp_probs_b.bias"),
        ("mlp.gate.", "ffn_gate_inp."), ("mlp.router.", "ffn_gate_inp."), ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"), ("mlp.down_proj", "ffn_down"),
    ]  # fmt: skip
    gpt_oss = any("router" in name for name in state)
    renames.append(("post_attention_layernorm", "post_attention_norm" if gpt_oss else "ffn_norm"))
    for name, value in state.items():
        stem, _, leaf = name.partition(".mlp.experts.")
        if leaf:
            leaf, end = leaf.removesuffix("_bias"), "bias" if leaf.endswith("_bias") else "weight"
            value = value.transpose(1, 2) if gpt_oss and end == "weight" else value
            parts = {"down": value}
            if leaf == "gate_up_proj":
                half = value.shape[1] // 2
                parts = {"gate": value[:, :half], "up": value[:, half:]}
                if gpt_oss:
                    parts = {"gate": value[:, ::2], "up": value[:, 1::2]}
            for part, tensor in parts.items():
                found[f"{stem.replace('model.layers.', 'blk.')}.ffn_{part}_exps.{end}"] = tensor
            continue
        for ours, theirs in renames:
            name = name.replace(ours, theirs)
        found[name] = value
    return found


def test_the_gguf_package_reads_every_name_type_and_value(exported: tuple[str, Path, Path]) -> None:
    _, model, out = exported
    assert sorted(f.name for f in out.iterdir()) == ["manifest.json", "model.gguf"]
    reader = gguf.GGUFReader(out / "model.gguf")
    wanted = expected(model)
    assert {t.name for t in reader.tensors} == set(wanted)
    for tensor in reader.tensors:
        value = wanted[tensor.name]
        assert tuple(reversed(tensor.shape.tolist())) == tuple(value.shape), tensor.name
        name = tensor.name
        kind = "BF16"
        if value.dim() == 1 or name.endswith(".bias") or "_norm" in name or "gate_inp" in name:
            kind = "F32"
        elif "_exps" in name:
            kind = "MXFP4"
        assert tensor.tensor_type.name == kind, name
        decoded = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        value = plus_zero(value) if kind == "MXFP4" else value
        assert same(decoded.to(value.dtype), value.contiguous()), name
        assert same(decoded, value.float().contiguous()), name


def test_fields(exported: tuple[str, Path, Path]) -> None:
    name, _, out = exported
    arch = name.split()[0]
    reader = gguf.GGUFReader(out / "model.gguf")
    assert reader.fields["general.architecture"].contents() == arch
    fields = {k.removeprefix(f"{arch}."): f.contents() for k, f in reader.fields.items() if k.startswith(f"{arch}.")}
    needed = [*NEEDED["all"], *NEEDED[arch]]
    assert [k for k in needed if k not in fields] == (["attention.value_scale"] if name == "mimo2 pro" else [])
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_MXFP4_MOE
    assert fields["block_count"] == 2 and fields["expert_used_count"] == 2 and fields["vocab_size"] == 64
    if arch == "mimo2":
        assert fields["attention.head_count_kv"] == [1, 2 if name == "mimo2" else 1]
        assert fields["attention.sliding_window_pattern"] == [0, 1]
        assert (fields["rope.dimension_count"], fields["attention.value_length"]) == (8, 16)
        assert (fields["rope.freq_base"], fields["rope.freq_base_swa"]) == (5e6, 1e4)
        assert fields["attention.sliding_window"] == 5
        assert fields["expert_gating_func"] == gguf.ExpertGatingFuncType.SIGMOID


@cache
def package_keys(arch: str) -> set[str]:
    groups = (gguf.Keys.LLM, gguf.Keys.Attention, gguf.Keys.Rope, gguf.Keys.General)
    values = [v for group in groups for v in vars(group).values() if isinstance(v, str)]
    return {v.replace("{arch}", arch) for v in values}


@pytest.mark.parametrize("name", list(MODELS))
def test_keys_and_names_are_the_packages(name: str) -> None:
    """`attention.value_scale` is newer than the package; llama.cpp's table has it under this name."""
    config = config_from(MODELS[name].to_dict())
    arch = arch_of(config)
    unknown = set(metadata(config, arch, "m")) - package_keys(arch.name)
    assert unknown <= {"mimo2.attention.value_scale"}
    member = next(m for m, text in gguf.MODEL_ARCH_NAMES.items() if text == arch.name)
    known = {gguf.TENSOR_NAMES[t] for t in gguf.MODEL_TENSORS[member]}
    ours = {f"blk.{{bid}}.{n}" for n in arch.modules.values()}
    ours |= {f"blk.{{bid}}.{n.rpartition('.')[0]}" for n in arch.leaves.values()}
    ours |= {f"blk.{{bid}}.ffn_{p}_exps" for p in ("gate", "up", "down")} | {"token_embd", "output_norm", "output"}
    assert ours == known


def test_round_trip_keeps_every_byte(exported: tuple[str, Path, Path], tmp_path: Path) -> None:
    _, model, out = exported
    back = gguf_to_checkpoint(out / "model.gguf", tmp_path / "model")
    assert export(["--to", "gguf", "--from", str(back), "--out", str(tmp_path / "again")]) == 0
    one, other = open_gguf(out / "model.gguf"), open_gguf(tmp_path / "again" / "model.gguf")
    assert one.fields == other.fields
    for name, tensor in one.tensors.items():
        assert torch.equal(one.raw(tensor), other.raw(other.tensors[name])), name
    first, second = (json.loads((f / "manifest.json").read_text()) for f in (out, tmp_path / "again"))
    assert first["model_hash"] == second["model_hash"]
    assert same(
        logits(load_model(back, dtype=torch.float32).model), logits(load_model(model, dtype=torch.float32).model)
    )


def test_import_hands_on_codes_and_scales(exported: tuple[str, Path, Path], tmp_path: Path) -> None:
    _, model, out = exported
    source = open_source(gguf_to_checkpoint(out / "model.gguf", tmp_path / "model"), [])
    values = {i.name: i for i in open_source(model).items}
    assert source.quantised
    for item in source.quantised:
        assert item.packed
        weight = open_source(model).read(values[item.name])
        want = encode(weight.transpose(-1, -2) if item.transposed else weight)
        found = source.read_packed(item)
        assert torch.equal(found.codes, want.codes) and torch.equal(found.scales, want.scales), item.name


def test_commands_read_it(exported: tuple[str, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    _, model, out = exported
    assert verify([str(out), "--source", str(model)]) == 0
    assert "--to gguf" in capsys.readouterr().out
    assert load(["--from", str(out), "--out", str(tmp_path / "bf16")]) == 0
    assert verify([str(tmp_path / "bf16"), "--source", str(model)]) == 0


def test_one_changed_nibble_is_found(exported: tuple[str, Path, Path], tmp_path: Path) -> None:
    _, _, out = exported
    shutil.copytree(out, tmp_path / "out")
    tensor = open_gguf(out / "model.gguf").tensors["blk.1.ffn_down_exps.weight"]
    with (tmp_path / "out" / "model.gguf").open("r+b") as file:
        file.seek(tensor.start + 5)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 0x10]))
    assert verify([str(tmp_path / "out")]) == 1


def test_dry_run_writes_nothing(
    exported: tuple[str, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    _, model, _ = exported
    assert export(["--to", "gguf", "--from", str(model), "--out", str(tmp_path / "x"), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "-> blk.1.ffn_down_exps.weight  MXFP4" in text and "-> output_norm.weight  F32 32  128" in text
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_when_it_fails(
    exported: tuple[str, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model, _ = exported

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("convert.formats.gguf.write_data", full)
    assert export(["--to", "gguf", "--from", str(model), "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert export(["--to", "gguf", "--from", str(model), "--out", str(tmp_path / "out")]) == 0
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_split_halves() -> None:
    """Element j and element j + 16 share byte j, for every code at every place."""
    codes = torch.randint(0, 256, (3, 5, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    scales = torch.randint(0, 253, (3, 5, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    blocks = to_blocks(Packed(codes, scales))
    elements = unpack_codes(codes).unflatten(-1, (3, 32))
    wanted = torch.cat((scales[..., None], elements[..., :16] | elements[..., 16:] << 4), -1).flatten(-2)
    assert torch.equal(blocks, wanted)
    back = from_blocks(blocks)
    assert torch.equal(back.codes, codes) and torch.equal(back.scales, scales)
    values = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType.MXFP4)
    assert same(torch.from_numpy(values), plus_zero(decode(Packed(codes, scales), torch.float32)))


def test_every_name_comes_back() -> None:
    for arch in WRITTEN:
        for ours in arch.modules.values():
            assert from_gguf(arch, f"blk.7.{ours}.weight")
        assert from_gguf(arch, "blk.7.attn_rot_embd.weight") is None


REFUSED = {
    "deepseek_v3": (FAMILIES["deepseek_v3"], "model_type=deepseek_v3"),
    "llama": (FAMILIES["llama tied"], "model_type=llama"),
    "router not normalised": (FAMILIES["qwen3_moe"], "norm_topk_prob=False"),
    "YaRN not rounded": (
        Qwen3MoeConfig(**SIZE, norm_topk_prob=True, num_experts=4, num_experts_per_tok=2, head_dim=16,
                       moe_intermediate_size=32,
                       rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "truncate": False,
                                        "original_max_position_embeddings": 64}),
        "truncate=False",
    ),
    "window order": (
        GptOssConfig(**SIZE, num_local_experts=4, num_experts_per_tok=2, head_dim=16,
                     layer_types=["full_attention", "sliding_attention"]),
        "layer_types",
    ),
    "clamp": (
        GptOssConfig(**SIZE, num_local_experts=4, num_experts_per_tok=2, head_dim=16, swiglu_limit=3.0),
        "swiglu_limit=3.0",
    ),
    "scaled experts": (MiMoV2Config(**MIMO, routed_scaling_factor=2.5), "routed_scaling_factor=2.5"),
    "tied head": (MiMoV2Config(**MIMO, tie_word_embeddings=True), "tie_word_embeddings"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(REFUSED))
def test_refused_by_name(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config, why = REFUSED[name]
    saved(config, tmp_path / "model")
    assert export(["--to", "gguf", "--from", str(tmp_path / "model"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert why in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
