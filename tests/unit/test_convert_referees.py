"""Exports in the hands of programs we did not write: transformers, compressed-tensors, safetensors, huggingface_hub."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import MXFP4PackedCompressor
from compressed_tensors.quantization import QuantizationScheme
from huggingface_hub import CommitOperationAdd, ModelCard
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, Mxfp4Config

from core.checkpoint.index import INDEX, SINGLE
from core.models.experts import find_experts
from core.models.load import load_model
from core.mxfp4 import Packed, ScaleRule, decode
from tests.convert_cases import CONFIGS, bytes_of, checkpoint, exported, small_shards, tensors_of, values_of, weight_map

LOADED = (
    "mimo",
    "qwen3_moe",
    "deepseek_v3",
)  # model classes of transformers; the Pro geometry is beyond its MiMo class
IDS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))


def transformers_load(folder: Path, **more: Any) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="eager", experts_implementation="eager", **more
    ).eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


def assert_same_model(found: torch.nn.Module, baked: torch.nn.Module, values: dict[str, Tensor]) -> None:
    for expert in find_experts(baked):
        weight = found.get_parameter(expert.name)
        assert torch.equal(weight.view(torch.int16), values[expert.name].view(torch.int16)), expert.name
    assert torch.equal(logits(found), logits(baked))


@pytest.mark.parametrize("family", LOADED)
def test_transformers_loads_compressed_tensors(family: str, tmp_path: Path) -> None:
    """By default and with dequantize=True: the experts to the bit, the logits of the baked BF16 export."""
    source = checkpoint(tmp_path / "model", family)
    folder = exported(source, "hf", tmp_path / "hf")
    baked = transformers_load(exported(source, "bf16", tmp_path / "bf16"))
    values = values_of(CONFIGS[family](), ScaleRule.even)
    assert_same_model(baked, baked, values)
    assert_same_model(transformers_load(folder), baked, values)
    dequantised = transformers_load(folder, quantization_config=CompressedTensorsConfig(dequantize=True))
    assert_same_model(dequantised, baked, values)


@pytest.mark.parametrize("family", ["gpt_oss", "gpt_oss wide"])
def test_transformers_loads_the_gpt_oss_layout(family: str, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "model", family)
    folder = exported(source, "hf", tmp_path / "hf")
    assert json.loads((folder / "manifest.json").read_text())["format"] == "gpt-oss"
    found = transformers_load(folder, quantization_config=Mxfp4Config(dequantize=True))
    baked = transformers_load(exported(source, "bf16", tmp_path / "bf16"))
    assert_same_model(found, baked, load_model(source).model.state_dict())


@pytest.mark.parametrize("family", ["mimo", "mimo pro", "qwen3_moe", "deepseek_v3"])
def test_compressed_tensors_decompresses_every_tensor(family: str, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "model", family)
    folder = exported(source, "hf", tmp_path / "hf")
    group = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    scheme = QuantizationScheme(**group)
    tensors, wanted = tensors_of(folder), tensors_of(source)
    packed = [n.removesuffix("_packed") for n in tensors if n.endswith("_packed")]
    assert len(packed) == sum(".experts." in n for n in wanted)
    for name in packed:
        state = {"weight_packed": tensors[f"{name}_packed"], "weight_scale": tensors[f"{name}_scale"]}
        value = MXFP4PackedCompressor.decompress(state, scheme)["weight"]
        assert torch.equal(value.to(torch.bfloat16).view(torch.int16), wanted[name].view(torch.int16)), name


@pytest.mark.parametrize("to", ["hf", "bf16", "mimo", "quark"])
def test_the_safetensors_library_reads_every_file_and_the_index_is_the_hubs(to: str, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "model", "mimo", carried=True)
    folder = small_shards(source, to, tmp_path / to)
    index = json.loads((folder / INDEX).read_text())
    files = sorted(p.name for p in folder.glob("*.safetensors"))
    count = len(files)
    assert count > 2 and files == [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    seen: dict[str, str] = {}
    for name in files:
        seen |= dict.fromkeys(load_file(folder / name), name)
    assert index["weight_map"] == seen
    total = sum(t.numel() * t.element_size() for t in tensors_of(folder).values())
    assert index["metadata"]["total_size"] == total
    whole = exported(source, to, tmp_path / "whole")
    assert [p.name for p in whole.glob("*.safetensors*")] == [SINGLE]
    assert bytes_of(whole) == bytes_of(folder)


def test_the_folder_is_what_the_hub_takes(tmp_path: Path) -> None:
    """Plain relative files only, nothing hidden, and the source's model card, whose metadata parses."""
    source = checkpoint(tmp_path / "model", "mimo")
    (source / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    (source / "tokenizer.json").write_text("{}")
    (source / "LICENSE").write_text("MIT")
    folder = small_shards(source, "hf", tmp_path / "hf")
    paths = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    ignored = ["*.part", "*.partial", "*.tmp", ".*"]
    assert list(filter_repo_objects(paths, ignore_patterns=ignored)) == paths
    operations = [CommitOperationAdd(path_in_repo=p, path_or_fileobj=folder / p) for p in paths]
    assert all(o.upload_info.size == (folder / o.path_in_repo).stat().st_size for o in operations)
    assert {"config.json", "manifest.json", "tokenizer.json", "LICENSE", "README.md", INDEX} <= set(paths)
    assert set(weight_map(folder).values()) == {p for p in paths if p.endswith(".safetensors")}
    assert ModelCard.load(folder / "README.md").data.license == "mit"
    assert json.loads((folder / "manifest.json").read_text())["licence_of_base"] == "LICENSE"


@pytest.mark.parametrize(
    ("family", "to"),
    [(f, t) for f in ("mimo", "mimo pro") for t in ("hf", "bf16", "quark", "mimo")]
    + [(f, t) for f in ("qwen3_moe", "deepseek_v3") for t in ("hf", "bf16", "quark")]
    + [(f, t) for f in ("gpt_oss", "gpt_oss wide") for t in ("gpt-oss", "bf16")],
)
def test_our_own_loader_reads_every_format(family: str, to: str, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "model", family)
    wanted = load_model(source).model.state_dict()
    found = load_model(exported(source, to, tmp_path / "out")).model.state_dict()
    lossy = {n for n in wanted if ".experts." not in n} if to == "mimo" else set()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        if name not in lossy:
            assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype, name


def test_codes_decode_by_the_definition(tmp_path: Path) -> None:
    """Against core.mxfp4 alone, names written out: low nibble first, along the last dimension."""
    source = checkpoint(tmp_path / "model", "qwen3_moe")
    tensors = tensors_of(exported(source, "quark", tmp_path / "quark"))
    for name, value in tensors_of(source).items():
        if ".experts." in name:
            assert torch.equal(decode(Packed(tensors[name], tensors[f"{name}_scale"])), value)
