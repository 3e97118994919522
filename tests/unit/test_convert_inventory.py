"""The published MiMo-V2 checkpoints: their names, dtypes and layouts at small size, and their shapes at full size.

Sources of the layouts: tensor censuses of V2.5-Pro (FP8) and V2.6-Flash (MXFP4) as published, and the hub's converters
for V2-Flash. Full size is planned on the meta device: no weight exists.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from convert import export, load
from convert.formats import FORMATS
from convert.plan import make_plan
from convert.source import Source, canonical, open_source
from core.checkpoint.index import Checkpoint, Entry
from core.checkpoint.keymap import family_of, to_checkpoint
from core.models.build import PRESETS, build_meta, config_from, meta_model
from core.models.load import plan_reader
from core.mxfp4 import encode, snap
from tests.convert_cases import bytes_of, exported, manifest_of, raw_bytes, tensors_of

F8, F32, BF16, U8 = torch.float8_e4m3fn, torch.float32, torch.bfloat16, torch.uint8
# head_dim 72 and v_head_dim 48: a chunk is 264 rows in full layers, ragged, and a block straddles K and V
SMALL = {
    "vocab_size": 64, "hidden_size": 160, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 8,
    "swa_num_attention_heads": 8, "num_key_value_heads": 4, "swa_num_key_value_heads": 8, "head_dim": 72,
    "swa_head_dim": 72, "v_head_dim": 48, "swa_v_head_dim": 48, "moe_intermediate_size": 96, "n_routed_experts": 3,
    "num_experts_per_tok": 2, "sliding_window": 8, "sliding_window_size": 8, "attention_chunk_size": 8,
    "hybrid_layer_pattern": [0, 1, 0], "moe_layer_freq": [0, 1, 1],
}  # fmt: skip
# preset: (fused QKV, MXFP4 experts, router dtype, changes)
RELEASES: dict[str, tuple[bool, bool, torch.dtype, dict[str, Any]]] = {
    "mimo_v2_flash": (False, False, torch.float32, {}),
    "mimo_v2_5": (True, False, torch.float32, {}),
    "mimo_v2_6_flash": (True, True, torch.bfloat16, {}),
    "mimo_v2_5_pro": (True, False, torch.float32, {"swa_num_key_value_heads": 4}),
}


def fp8(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scales, BF16 values): 128x128 blocks, written as products of repeated scales."""
    tall, wide = -(-weight.shape[0] // 128), -(-weight.shape[1] // 128)
    scale = torch.rand(tall, wide) / 100 + 0.001
    whole = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: weight.shape[0], : weight.shape[1]]
    codes = (weight / whole).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes, scale, (codes.float() * whole).to(torch.bfloat16)


class Release:
    """A synthetic release: `stored` is the file, `values` what its canonical tensors decode to."""

    def __init__(self, preset: str) -> None:
        self.fused, self.packed, self.router, changes = RELEASES[preset]
        self.raw = json.loads((PRESETS / f"{preset}.json").read_text()) | SMALL | changes
        self.config = config_from(self.raw)
        self.stored: dict[str, Tensor] = {}
        self.values: dict[str, Tensor] = {}
        torch.manual_seed(0)
        family = family_of("mimo_v2")
        for name, tensor in build_meta(self.config).state_dict().items():
            for key, piece in to_checkpoint(family, name, tensor):
                self.add(key, torch.randn(piece.shape) * 0.1)
        mtp = "model.mtp.layers.0."
        self.quantise(f"{mtp}self_attn.qkv_proj.weight", torch.randn(264, 160), carried=True)
        self.stored[f"{mtp}eh_proj.weight"] = torch.randn(160, 320).bfloat16()
        self.stored[f"{mtp}enorm.weight"] = torch.ones(160).bfloat16()

    def add(self, key: str, weight: Tensor) -> None:
        if key.endswith("_proj.weight") and ".self_attn." in key and "o_proj" not in key:
            if not self.fused:
                self.quantise(key, weight)
                return
            self.values[key] = weight
            if key.endswith("v_proj.weight"):
                self.fuse(key.removesuffix("v_proj.weight"))
        elif ".experts." in key and self.packed:
            self.values[key] = snap(weight.bfloat16())
            code = encode(weight)
            self.stored[key], self.stored[f"{key}_scale"] = code.codes, code.scales
        elif ".mlp." in key and "_proj" in key:
            self.quantise(key, weight)
        else:
            wide = key.endswith("e_score_correction_bias")
            dtype = torch.float32 if wide else self.router if key.endswith("mlp.gate.weight") else torch.bfloat16
            self.stored[key] = self.values[key] = weight.to(dtype)

    def quantise(self, key: str, weight: Tensor, carried: bool = False) -> None:
        self.stored[key], self.stored[f"{key}_scale_inv"], value = fp8(weight)
        if not carried:
            self.values[key] = value

    def fuse(self, stem: str) -> None:
        """num_key_value_heads chunks [Q | K | V], window layers too, each with a grid of its own."""
        chunks, names = self.config.num_key_value_heads, [f"{stem}{p}_proj.weight" for p in "qkv"]
        parts = [self.values[n].chunk(chunks) for n in names]
        encoded = [fp8(torch.cat([p[c] for p in parts])) for c in range(chunks)]
        self.stored[f"{stem}qkv_proj.weight"] = torch.cat([e[0].view(torch.uint8) for e in encoded]).view(F8)
        self.stored[f"{stem}qkv_proj.weight_scale_inv"] = torch.cat([e[1] for e in encoded])
        rows = [p[0].shape[0] for p in parts]
        for number, name in enumerate(names):
            self.values[name] = torch.cat([e[2].split(rows)[number] for e in encoded])

    def save(self, folder: Path) -> Path:
        folder.mkdir()
        quantisation = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
        quantisation |= {"store_dtype": "mxfp4", "mxfp4_block_size": 32} if self.packed else {}
        (folder / "config.json").write_text(json.dumps(self.raw | {"quantization_config": quantisation}))
        save_file({k: v.contiguous() for k, v in self.stored.items()}, folder / "model.safetensors")
        return folder


@pytest.mark.parametrize("preset", list(RELEASES))
def test_a_release_opens_and_bakes(preset: str, tmp_path: Path) -> None:
    release = Release(preset)
    folder = release.save(tmp_path / "release")
    source = open_source(folder)
    assert {i.name for i in source.items} == set(release.values)
    experts = {n for n in release.values if ".experts." in n}
    assert {i.name for i in source.items if i.packed} == (experts if release.packed else set())
    assert all(i.name.startswith("model.mtp.") for i in source.carried) and len(source.carried) == 4
    assert load.main(["--from", str(folder), "--out", str(tmp_path / "bf16")]) == 0
    found = tensors_of(tmp_path / "bf16")
    for name, value in release.values.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
    for entry in source.carried:
        assert raw_bytes(found[entry.name]) == raw_bytes(release.stored[entry.name])


@pytest.mark.parametrize("preset", list(RELEASES))
def test_a_release_becomes_compressed_tensors(preset: str, tmp_path: Path) -> None:
    """MXFP4 experts as they are; FP8 experts only by --ptq, from their BF16 values."""
    release = Release(preset)
    folder = exported(
        release.save(tmp_path / "release"), "hf", tmp_path / "hf", *(() if release.packed else ("--ptq", "even"))
    )
    found = tensors_of(folder)
    for name, value in release.values.items():
        if ".experts." not in name:
            assert torch.equal(found[name], value), name
            continue
        code = encode(value)
        assert torch.equal(found[f"{name}_packed"], code.codes) and torch.equal(found[f"{name}_scale"], code.scales)
    router = "model.layers.1.mlp.gate.weight"
    assert found[router].dtype == release.router


def test_the_mxfp4_release_goes_through_mimo_untouched(tmp_path: Path) -> None:
    folder = Release("mimo_v2_6_flash").save(tmp_path / "release")
    again = exported(folder, "mimo", tmp_path / "mimo")
    assert bytes_of(again) == bytes_of(folder)
    assert manifest_of(again)["reencoded"] == {}


def test_a_fused_tensor_of_another_chunking_is_refused(tmp_path: Path, capsys: Any) -> None:
    release = Release("mimo_v2_5_pro")
    key = "model.layers.1.self_attn.qkv_proj.weight_scale_inv"
    release.stored[key] = release.stored[key][:-1]
    folder = release.save(tmp_path / "release")
    words = ["--to", "hf", "--from", str(folder), "--out", str(tmp_path / "out"), "--ptq", "even"]
    assert export.main(words) == 2
    assert "scale rows" in capsys.readouterr().err


def planned(preset: str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Outputs of the mimo plan for a model of full size, whose BF16 tensors are only said to exist."""
    model, config = meta_model(preset)
    family = family_of(config.model_type)
    entries = {
        key: Entry(key, piece.dtype, tuple(piece.shape), Path("nowhere"), 0)
        for name, tensor in model.state_dict().items()
        for key, piece in to_checkpoint(family, name, tensor)
    }
    checkpoint = Checkpoint(Path("nowhere"), entries, {"model_type": config.model_type})
    reader = plan_reader(model, checkpoint, config.model_type)
    items = tuple(canonical(model, reader, config.model_type, None, {}))
    plan = make_plan(FORMATS["mimo"], Source(Path("nowhere"), checkpoint, config, reader, items, (), None))
    return {o.name: (o.dtype, o.shape) for job in plan.jobs for o in job.outputs}


FLASH = {
    "model.embed_tokens.weight": (BF16, (152576, 4096)),
    "lm_head.weight": (BF16, (152576, 4096)),
    "model.norm.weight": (BF16, (4096,)),
    "model.layers.0.self_attn.qkv_proj.weight": (F8, (13568, 4096)),
    "model.layers.0.self_attn.qkv_proj.weight_scale_inv": (F32, (108, 32)),
    "model.layers.1.self_attn.qkv_proj.weight": (F8, (14848, 4096)),
    "model.layers.1.self_attn.qkv_proj.weight_scale_inv": (F32, (116, 32)),
    "model.layers.1.self_attn.o_proj.weight": (BF16, (4096, 8192)),
    "model.layers.1.self_attn.attention_sink_bias": (BF16, (64,)),
    "model.layers.0.mlp.gate_proj.weight": (F8, (16384, 4096)),
    "model.layers.0.mlp.gate_proj.weight_scale_inv": (F32, (128, 32)),
    "model.layers.0.mlp.down_proj.weight": (F8, (4096, 16384)),
    "model.layers.0.mlp.down_proj.weight_scale_inv": (F32, (32, 128)),
    "model.layers.47.mlp.gate.weight": (BF16, (256, 4096)),
    "model.layers.47.mlp.experts.255.up_proj.weight": (U8, (2048, 2048)),
    "model.layers.47.mlp.experts.255.up_proj.weight_scale": (U8, (2048, 128)),
    "model.layers.47.mlp.experts.255.down_proj.weight": (U8, (4096, 1024)),
    "model.layers.47.mlp.experts.255.down_proj.weight_scale": (U8, (4096, 64)),
}
PRO = {
    "model.embed_tokens.weight": (BF16, (152576, 6144)),
    "model.layers.0.self_attn.qkv_proj.weight": (F8, (27136, 6144)),
    "model.layers.0.self_attn.qkv_proj.weight_scale_inv": (F32, (216, 48)),
    "model.layers.1.self_attn.qkv_proj.weight": (F8, (27136, 6144)),
    "model.layers.1.self_attn.qkv_proj.weight_scale_inv": (F32, (216, 48)),
    "model.layers.1.self_attn.o_proj.weight": (BF16, (6144, 16384)),
    "model.layers.1.self_attn.attention_sink_bias": (BF16, (128,)),
    "model.layers.0.mlp.up_proj.weight_scale_inv": (F32, (128, 48)),
    "model.layers.0.mlp.down_proj.weight_scale_inv": (F32, (48, 128)),
    "model.layers.69.mlp.experts.383.gate_proj.weight": (U8, (2048, 3072)),
    "model.layers.69.mlp.experts.383.gate_proj.weight_scale": (U8, (2048, 192)),
    "model.layers.69.mlp.experts.383.down_proj.weight": (U8, (6144, 1024)),
}


@pytest.mark.parametrize(
    ("preset", "table", "tensors", "expert_gb"),
    [("mimo_v2_6_flash", FLASH, 47 * 256 * 6, 160.9), ("mimo_v2_5", FLASH, 47 * 256 * 6, 160.9),
     ("mimo_v2_flash", FLASH, 47 * 256 * 6, 160.9), ("mimo_v2_5_pro", PRO, 69 * 384 * 6, 531.4)],
)  # fmt: skip
def test_full_size_plans_have_the_published_shapes(
    preset: str, table: dict[str, Any], tensors: int, expert_gb: float
) -> None:
    found = planned(preset)
    assert {n: found.get(n) for n in table} == table
    experts = [(d, s) for n, (d, s) in found.items() if ".experts." in n]
    assert len(experts) == tensors and {d for d, _ in experts} == {U8}
    assert sum(torch.Size(s).numel() for _, s in experts) / 1e9 == pytest.approx(expert_gb, abs=0.06)
    assert not any(f".{p}_proj." in n and ".self_attn." in n for n in found for p in "qkv")
