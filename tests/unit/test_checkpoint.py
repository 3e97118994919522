"""Checkpoint files: damage is found before weights are read, packed formats decode right, saves are all or nothing."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GptOssConfig

from core.checkpoint.fp8 import dequantise_fp8, grid_shape, split_fused_qkv
from core.checkpoint.index import INDEX, SINGLE, open_checkpoint
from core.checkpoint.writer import HEADER_ROOM, ShardWriter, replacing
from core.errors import CheckpointError
from core.models.load import build_meta, load_model, plan_reader, save_model
from core.models.mimo_v2 import MiMoV2ForCausalLM
from core.models.mimo_v2_config import MiMoV2Config
from core.mxfp4 import encode, snap


def write(folder: Path, shards: dict[str, dict[str, Tensor]]) -> None:
    weight_map = {}
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def two_shards(folder: Path) -> None:
    write(
        folder, {"a.safetensors": {"x": torch.randn(4, 5)}, "b.safetensors": {"y": torch.zeros(3), "z": torch.ones(0)}}
    )


def truncate(folder: Path) -> None:
    data = (folder / "a.safetensors").read_bytes()
    (folder / "a.safetensors").write_bytes(data[:-7])


def grow(folder: Path) -> None:
    with (folder / "a.safetensors").open("ab") as file:
        file.write(b"more")


def header(folder: Path, edit: Any) -> None:
    path = folder / "a.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    parsed = json.loads(data[8 : 8 + size])
    edit(parsed)
    text = json.dumps(parsed).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def index(folder: Path, edit: Any) -> None:
    parsed = json.loads((folder / INDEX).read_text())
    edit(parsed)
    (folder / INDEX).write_text(json.dumps(parsed))


DAMAGE = {
    "truncated": truncate,
    "grown": grow,
    "empty file": lambda f: (f / "a.safetensors").write_bytes(b""),
    "huge header": lambda f: (f / "a.safetensors").write_bytes(b"\xff" * 100),
    "header is no JSON": lambda f: (f / "a.safetensors").write_bytes((4).to_bytes(8, "little") + b"oops"),
    "shape lies": lambda f: header(f, lambda h: h["x"].update(shape=[4, 6])),
    "negative shape": lambda f: header(f, lambda h: h["x"].update(shape=[-4, -5])),
    "enormous shape": lambda f: header(f, lambda h: h["x"].update(shape=[2**40, 5])),
    "unknown dtype": lambda f: header(f, lambda h: h["x"].update(dtype="F3")),
    "offsets overlap": lambda f: header(f, lambda h: h.update(w=dict(h["x"]))),
    "offsets reach out": lambda f: header(f, lambda h: h["x"].update(data_offsets=[40, 120])),
    "shard missing": lambda f: (f / "b.safetensors").unlink(),
    "index lacks a key": lambda f: index(f, lambda i: i["weight_map"].pop("y")),
    "index has a key too many": lambda f: index(f, lambda i: i["weight_map"].update(w="a.safetensors")),
    "index points outside": lambda f: index(f, lambda i: i["weight_map"].update(x="../a.safetensors")),
    "index points to the root": lambda f: index(f, lambda i: i["weight_map"].update(x="/etc/passwd")),
    "index is no JSON": lambda f: (f / INDEX).write_text("{"),
    "index is empty": lambda f: index(f, lambda i: i.clear()),
    "index missing": lambda f: (f / INDEX).unlink(),
}


@pytest.mark.parametrize("case", list(DAMAGE))
def test_damage_is_one_line_with_a_remedy(case: str, tmp_path: Path) -> None:
    two_shards(tmp_path)
    assert set(open_checkpoint(tmp_path).entries) == {"x", "y", "z"}
    DAMAGE[case](tmp_path)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    text = str(caught.value)
    assert "\n" not in text
    assert str(tmp_path) in text
    assert any(word in text for word in ("download", "do not use"))


def test_reads_what_safetensors_wrote(tmp_path: Path) -> None:
    tensors = {
        "bf16": torch.randn(3, 7).bfloat16(), "f8": torch.randn(4, 4).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(3.0),
        "none": torch.zeros(0, 5), "i64": torch.arange(9), "bool": torch.tensor([True, False]),
    }  # fmt: skip
    save_file(tensors, tmp_path / SINGLE)
    checkpoint = open_checkpoint(tmp_path)
    for name, tensor in tensors.items():
        found = checkpoint.read(name)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found.float(), tensor.float())


def test_missing_folder_says_what_to_do(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match="download"):
            open_checkpoint(folder)


def fp8(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scale grid, what they mean) by an independent loop over blocks, ragged edges included."""
    rows, columns = grid_shape(*weight.shape)
    codes, scale, value = (
        torch.empty(weight.shape, dtype=torch.float8_e4m3fn),
        torch.empty(rows, columns),
        weight.clone(),
    )
    for i in range(rows):
        for j in range(columns):
            block = (slice(i * 128, (i + 1) * 128), slice(j * 128, (j + 1) * 128))
            scale[i, j] = weight[block].abs().max() / 448
            codes[block] = (weight[block] / scale[i, j]).to(torch.float8_e4m3fn)
            value[block] = codes[block].float() * scale[i, j]
    return codes, scale, value.bfloat16()


def test_fp8_blocks_with_ragged_edges() -> None:
    codes, scale, value = fp8(torch.randn(200, 300))
    assert scale.shape == (2, 3)
    assert torch.equal(dequantise_fp8(codes, scale, "w"), value)
    with pytest.raises(CheckpointError, match="scale grid"):
        dequantise_fp8(codes, scale[:1], "w")


@pytest.mark.parametrize(
    ("chunks", "rows", "tall"), [(8, (3072, 192, 128), 216), (4, (3072, 192, 128), 108), (4, (3072, 384, 256), 116)]
)
def test_published_scale_grids_of_fused_qkv(chunks: int, rows: tuple[int, int, int], tall: int) -> None:
    """Pro 216, full layers of the 48-layer models 108, their window layers 116 (not 212, 106, 116)."""
    assert chunks * grid_shape(sum(rows), 1)[0] == tall
    fused, scale = torch.zeros(chunks * sum(rows), 128).to(torch.float8_e4m3fn), torch.ones(tall, 1)
    parts = split_fused_qkv(fused, scale, chunks, tuple(r * chunks for r in rows), "qkv")
    assert [len(p) for p in parts] == [r * chunks for r in rows]
    with pytest.raises(CheckpointError, match="scale rows"):
        split_fused_qkv(fused, scale[:-1], chunks, tuple(r * chunks for r in rows), "qkv")


MIMO: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 160, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "swa_num_key_value_heads": 2, "head_dim": 72, "v_head_dim": 48,
    "moe_intermediate_size": 96,
    "n_routed_experts": 3, "num_experts_per_tok": 2, "sliding_window": 5,
    "layer_types": ["full_attention", "sliding_attention"],
}  # fmt: skip


def packed_mimo(folder: Path) -> dict[str, Tensor]:
    """Write a V2.5/2.6-like release: fused FP8 QKV in chunks, FP8 dense layer, MXFP4 experts. Returns the values."""
    config = MiMoV2Config(**MIMO)
    torch.manual_seed(0)
    model = MiMoV2ForCausalLM(config)
    values = {
        n: torch.randn_like(t) if n.endswith(("sinks", "bias")) else t.bfloat16() for n, t in model.state_dict().items()
    }
    stored: dict[str, Tensor] = {"model.mtp.layers.0.enorm.weight": torch.ones(160).bfloat16()}

    def put(key: str, weight: Tensor) -> Tensor:
        stored[key], stored[key + "_scale_inv"], value = fp8(weight.float())
        return value

    for layer in range(2):
        stem = f"model.layers.{layer}.self_attn."
        names = [f"{stem}{p}_proj.weight" for p in "qkv"]
        halves = [torch.cat([values[n].chunk(2)[c] for n in names]) for c in range(2)]
        stored_halves = [fp8(h.float()) for h in halves]
        rows = [len(values[n]) // 2 for n in names]
        for i, name in enumerate(names):
            values[name] = torch.cat([h[2].split(rows)[i] for h in stored_halves])
        stored[stem + "qkv_proj.weight"] = torch.cat([h[0] for h in stored_halves])
        stored[stem + "qkv_proj.weight_scale_inv"] = torch.cat([h[1] for h in stored_halves])
        assert halves[0].shape[0] % 128  # the last block of a chunk is ragged
    for name in list(values):
        if ".experts." in name:
            values[name] = snap(values[name])
            part = ("gate_proj", "up_proj") if "gate_up" in name else ("down_proj",)
            for e, weight in enumerate(values[name]):
                for which, piece in zip(part, weight.chunk(len(part)), strict=True):
                    key = f"{name.rsplit('.', 1)[0]}.{e}.{which}.weight"
                    code = encode(piece)
                    stored[key], stored[key + "_scale"] = code.codes, code.scales
        elif "layers.0.mlp" in name:
            values[name] = put(name, values[name])
        elif not any(f".{p}_proj" in name for p in "qkv"):
            stored[name.replace("self_attn.sinks", "self_attn.attention_sink_bias")] = values[name]
    raw = config.to_dict() | {"quantization_config": {"quant_method": "fp8", "store_dtype": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(raw))
    save_file({k: v.contiguous() for k, v in stored.items()}, folder / SINGLE)
    return values


def test_packed_mimo_release_loads_to_the_bit(tmp_path: Path) -> None:
    values = packed_mimo(tmp_path)
    loaded = load_model(tmp_path)
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, values[name].to(tensor.dtype)), name
    assert [p.name for p in loaded.passthrough] == ["model.mtp.layers.0.enorm.weight"]
    save_model(loaded.model.state_dict().items(), loaded, tmp_path / "bf16")
    again = load_model(tmp_path / "bf16").model
    assert all(torch.equal(t, values[n].to(t.dtype)) for n, t in again.state_dict().items())
    assert "quantization_config" not in json.loads((tmp_path / "bf16" / "config.json").read_text())


def test_damaged_scales_are_named(tmp_path: Path) -> None:
    packed_mimo(tmp_path)
    tensors = load_file(tmp_path / SINGLE)
    key = "model.layers.1.mlp.experts.2.up_proj.weight_scale"
    save_file({k: v for k, v in tensors.items() if k != key}, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=r"experts\.2\.up_proj\.weight is stored as torch\.uint8 without scales"):
        load_model(tmp_path)


def test_gpt_oss_mxfp4_release(tmp_path: Path) -> None:
    config = GptOssConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    shapes = {n: t.shape for n, t in build_meta(config).state_dict().items()}
    values = {n: torch.randn(shape).bfloat16() for n, shape in shapes.items()}
    stored = {}
    for name, value in values.items():
        if name.endswith(("gate_up_proj", "down_proj")):
            values[name] = snap(value, dim=1)
            code = encode(values[name].transpose(1, 2))
            stored[name + "_blocks"], stored[name + "_scales"] = code.codes.unflatten(-1, (-1, 16)), code.scales
        else:
            stored[name] = value
    config.save_pretrained(tmp_path)
    save_file({k: v.contiguous() for k, v in stored.items()}, tmp_path / SINGLE)
    loaded = load_model(tmp_path)
    assert all(torch.equal(t, values[n]) for n, t in loaded.model.state_dict().items())


def test_stream_hands_out_the_wanted_tensors_only(tmp_path: Path) -> None:
    values = packed_mimo(tmp_path)
    reader = plan_reader(build_meta(MiMoV2Config(**MIMO)), open_checkpoint(tmp_path), "mimo_v2")
    wanted = {"model.layers.1.mlp.experts.down_proj", "model.layers.1.self_attn.k_proj.weight"}
    found = dict(reader.stream(wanted))
    assert found.keys() == wanted
    assert all(torch.equal(t, values[n]) for n, t in found.items())


def test_shards_are_bounded_and_readable(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.randn(100) for i in range(10)}
    writer = ShardWriter(tmp_path, shard_bytes=1000)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.finish()
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [f.name for f in files] == [f"model-{i:05}-of-00005.safetensors" for i in range(1, 6)]
    assert all(f.stat().st_size <= 1000 + HEADER_ROOM for f in files)
    read = {k: v for f in files for k, v in load_file(f).items()}
    assert all(torch.equal(read[k], v) for k, v in tensors.items())
    with pytest.raises(CheckpointError, match="twice"):
        writer.add("t0", tensors["t0"])


def test_a_full_header_ends_a_shard(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path)
    for i in range(3000):
        writer.add(f"model.layers.0.mlp.experts.{i}.gate_proj.weight", torch.zeros(1))
    writer.finish()
    assert len(open_checkpoint(tmp_path).entries) == 3000


def fail(number: int) -> Any:
    def raising(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    return raising


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_failed_save_leaves_the_old_folder(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("kept")
    monkeypatch.setattr(os, "fsync", fail(number))
    with pytest.raises(CheckpointError) as caught, replacing(out) as part:
        writer = ShardWriter(part)
        writer.add("a", torch.ones(3))
        writer.finish()
    assert "\n" not in str(caught.value)
    assert ("disk is full" in str(caught.value)) == (number == errno.ENOSPC)
    assert (out / "old").read_text() == "kept"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_save_killed_between_its_renames_is_repaired(tmp_path: Path) -> None:
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.old" / "old").write_text("kept")
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "out"):
        raise KeyboardInterrupt
    assert (tmp_path / "out" / "old").read_text() == "kept"
