"""Verification finds every kind of difference; import gives back what was exported; pairs are checked."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from convert import export, load, verify
from convert.formats.dcp import METADATA, read_dcp
from convert.manifest import check_pair, model_hash
from core.errors import CheckpointError, ConfigError
from core.models.experts import find_experts
from core.models.load import save_model
from core.models.mimo_v2 import MiMoV2ForCausalLM
from core.mxfp4 import snap
from qat.base import nano_config
from qat.config import NanoConfig

NANO = NanoConfig(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=2, head_dim=32, v_head_dim=32, intermediate_size=96,
    moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2, vocab_size=128,
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny MiMo-V2 checkpoint whose experts are on the grid."""
    torch.manual_seed(0)
    made = MiMoV2ForCausalLM(nano_config(NANO, 0, 1)).to(torch.bfloat16)
    tensors = dict(made.state_dict())
    for expert in find_experts(made):
        tensors[expert.name] = snap(tensors[expert.name])
    folder = tmp_path_factory.mktemp("model") / "model"
    save_model(tensors.items(), made.config, folder)
    return folder


def exported(model: Path, to: str, out: Path) -> Path:
    assert export.main(["--to", to, "--from", str(model), "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize("to", ["hf", "bf16", "mimo", "quark", "dcp"])
def test_every_format_verifies_and_comes_back(to: str, model: Path, tmp_path: Path, capsys) -> None:
    folder = exported(model, to, tmp_path / to)
    assert verify.main([str(folder), "--source", str(model)]) == 0
    text = capsys.readouterr().out
    assert "WRONG" not in text and "bit-equal" in text and f"Engines, for --to {to}" in text
    assert load.main(["--from", str(folder), "--out", str(tmp_path / "back")]) == 0
    again = exported(tmp_path / "back", "hf", tmp_path / "again")
    first = exported(model, "hf", tmp_path / "first")
    one, other = (load_file(f / "model.safetensors") for f in (first, again))
    packed = [n for n in one if n.endswith(("_packed", "weight_scale"))]
    assert packed and all(torch.equal(one[n], other[n]) for n in packed)
    if to != "mimo":  # whose FP8 is lossy
        assert all(torch.equal(one[n], other[n]) for n in one)
        hashes = {json.loads((f / "manifest.json").read_text())["model_hash"] for f in (folder, first, again)}
        assert len(hashes) == 1


def edit(folder: Path, name: str) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    key = next(k for k in tensors if k.endswith(name))
    tensors[key] = tensors[key].clone()
    tensors[key].view(torch.uint8).reshape(-1)[0] ^= 1
    save_file(tensors, path)


@pytest.mark.parametrize("name", ["weight_packed", "weight_scale", "o_proj.weight"])
def test_one_changed_bit_is_found(name: str, model: Path, tmp_path: Path, capsys) -> None:
    folder = exported(model, "hf", tmp_path / "hf")
    edit(folder, name)
    assert verify.main([str(folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("WRONG") and "manifest hashes" in line and "1 differ" in line for line in lines)


def test_changed_configuration_and_layout_are_found(model: Path, tmp_path: Path, capsys) -> None:
    folder = exported(model, "hf", tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["ignore"].pop()
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(tensors, folder / "model.safetensors")
    assert verify.main([str(folder)]) == 1
    text = capsys.readouterr().out
    assert "WRONG  quantization_config" in text and "WRONG  names, shapes, dtypes model.norm.weight" in text


def test_off_grid_values_in_a_baked_folder_are_found(model: Path, tmp_path: Path, capsys) -> None:
    folder = exported(model, "bf16", tmp_path / "bf16")
    tensors = load_file(folder / "model.safetensors")
    key = next(k for k in tensors if ".experts." in k)
    tensors[key] = tensors[key] * 1.1
    save_file(tensors, folder / "model.safetensors")
    assert verify.main([str(folder)]) == 2
    error = capsys.readouterr().err.split("convert.verify: ")[1].strip()
    assert key in error and "off the grid" in error and "\n" not in error


def test_nothing_to_compare_with_is_said(model: Path, tmp_path: Path, capsys) -> None:
    folder = exported(model, "hf", tmp_path / "hf")
    (folder / "manifest.json").unlink()
    assert verify.main([str(folder)]) == 1
    assert "nothing to compare with" in capsys.readouterr().out
    assert verify.main([str(folder), "--source", str(model)]) == 0


def test_reencoded_tensors_keep_the_models_hash(model: Path, tmp_path: Path) -> None:
    found = json.loads((exported(model, "mimo", tmp_path / "mimo") / "manifest.json").read_text())
    attention = {f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(2) for p in "qkv"}
    assert set(found["reencoded"]) == attention | {
        f"model.layers.0.mlp.{p}_proj.weight" for p in ("gate", "up", "down")
    }
    now = {name: entry["sha256"] for name, entry in found["tensors"].items()}
    assert model_hash(now) != found["model_hash"] == model_hash({**now, **found["reencoded"]})


class Harmful:
    def __reduce__(self):
        return (print, ("code ran",))


def test_a_pickle_in_dcp_metadata_runs_no_code(model: Path, tmp_path: Path, capsys) -> None:
    folder = exported(model, "dcp", tmp_path / "dcp")
    capsys.readouterr()
    (folder / METADATA).write_bytes(pickle.dumps(Harmful()))
    assert load.main(["--from", str(folder), "--out", str(tmp_path / "back")]) == 2
    captured = capsys.readouterr()
    assert "code ran" not in captured.out and "builtins.print has no place" in captured.err
    assert not (tmp_path / "back").exists()


def test_truncated_dcp_is_named(model: Path, tmp_path: Path) -> None:
    folder = exported(model, "dcp", tmp_path / "dcp")
    data = next(folder.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        list(read_dcp(folder))


def test_pairs(tmp_path: Path) -> None:
    for name, content in {
        "t": {"model_hash": "a" * 64},
        "d": {"target_hash": "a" * 64},
        "o": {"target_hash": "b" * 64},
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(json.dumps(content))
    check_pair(tmp_path / "t", tmp_path / "d")
    with pytest.raises(ConfigError, match=r"was trained against model bbbbbbbbbbbb, the target .* is aaaaaaaaaaaa"):
        check_pair(tmp_path / "t", tmp_path / "o")
    check_pair(tmp_path / "t", tmp_path / "o", force=True)
    with pytest.raises(CheckpointError, match=r"has no manifest\.json"):
        check_pair(tmp_path / "t", tmp_path)
