"""The command convert.export: lossless there and back, PTQ by the definition, carried bytes, dry runs, refusals."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from convert import export, load
from convert.manifest import model_hash
from core.mxfp4 import ScaleRule, encode
from tests.convert_cases import (
    CARRIED,
    CONFIGS,
    PER_EXPERT,
    bytes_of,
    checkpoint,
    digest,
    edit_tensors,
    exported,
    is_packed,
    manifest_of,
    raw_bytes,
    small_shards,
    tensors_of,
    values_of,
)

LOSSLESS = [
    *((f, a, b) for f in PER_EXPERT for a, b in (("hf", "quark"), ("hf", "bf16"), ("quark", "bf16"), ("quark", "hf"))),
    *((f, "gpt-oss", "bf16") for f in ("gpt_oss", "gpt_oss wide")),
]  # fmt: skip


def failure(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line on stderr that a failing command ends with."""
    capsys.readouterr()
    assert export.main(words) == 2
    error = capsys.readouterr().err
    line = error[error.index("convert.export: ") :].strip()
    assert "\n" not in line
    return line.removeprefix("convert.export: ")


@pytest.mark.parametrize("rule", ["even", "floor"])
@pytest.mark.parametrize(("family", "there", "middle"), LOSSLESS)
def test_there_and_back_is_the_same_bytes(family: str, there: str, middle: str, rule: str, tmp_path: Path) -> None:
    """A -> B -> A: every tensor byte for byte, and one model_hash in all three."""
    source = checkpoint(tmp_path / "model", family, ScaleRule(rule), carried=family == "mimo")
    first = exported(source, there, tmp_path / "first")
    second = exported(first, middle, tmp_path / "second")
    third = exported(second, there, tmp_path / "third")
    assert any(is_packed(n) for n in bytes_of(first))
    assert bytes_of(third) == bytes_of(first)
    assert (third / "config.json").read_bytes() == (first / "config.json").read_bytes()
    manifests = [manifest_of(f) for f in (first, second, third)]
    assert len({m["model_hash"] for m in manifests}) == 1
    assert manifests[2]["tensors"] == manifests[0]["tensors"] == manifests[1]["tensors"]


def test_rceil_keeps_the_values(tmp_path: Path) -> None:
    """Going through BF16 may choose another pair of code and scale; the values and the model's hash stay."""
    source = checkpoint(tmp_path / "model", "qwen3_moe", ScaleRule.rceil)
    first = exported(source, "hf", tmp_path / "first")
    third = exported(exported(first, "bf16", tmp_path / "second"), "hf", tmp_path / "third")
    assert manifest_of(third)["model_hash"] == manifest_of(first)["model_hash"]
    assert bytes_of(exported(third, "bf16", tmp_path / "again")) == bytes_of(tmp_path / "second")


@pytest.mark.parametrize("family", ["mimo", "mimo pro"])
def test_mimo_encodes_once(family: str, tmp_path: Path) -> None:
    """Codes are those of `hf`, FP8 is listed, and a second export hands every byte through."""
    source = checkpoint(tmp_path / "model", family, carried=True)
    folder, hf = exported(source, "mimo", tmp_path / "mimo"), exported(source, "hf", tmp_path / "hf")
    found, wanted = tensors_of(folder), tensors_of(hf)
    names = [n.removesuffix("_packed") for n in wanted if n.endswith("_packed")]
    assert all(torch.equal(found[n], wanted[f"{n}_packed"]) for n in names)
    assert all(torch.equal(found[f"{n}_scale"], wanted[f"{n}_scale"]) for n in names)
    manifest = manifest_of(folder)
    layers = CONFIGS[family]().num_hidden_layers
    assert set(manifest["reencoded"]) == {
        *(f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(layers) for p in "qkv"),
        *(f"model.layers.0.mlp.{p}_proj.weight" for p in ("gate", "up", "down")),
    }
    assert manifest["model_hash"] == manifest_of(hf)["model_hash"]
    again = exported(folder, "mimo", tmp_path / "again")
    assert bytes_of(again) == bytes_of(folder)
    assert manifest_of(again)["reencoded"] == manifest["reencoded"], "still the model it came from"
    now = {n: e["sha256"] for n, e in manifest["tensors"].items()}
    assert manifest_of(again)["model_hash"] == manifest["model_hash"] != model_hash(now)
    # FP8 to BF16 is a rounding too: products of code and scale, to the nearest BF16
    loaded = exported(folder, "bf16", tmp_path / "bf16")
    assert {n: e["sha256"] for n, e in manifest_of(loaded)["tensors"].items()} == now


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("rule", [r.value for r in ScaleRule])
def test_ptq_is_the_definition(family: str, rule: str, tmp_path: Path, capsys: Any) -> None:
    source = checkpoint(tmp_path / "model", family, rule=None)
    line = failure(capsys, "--to", "hf", "--from", str(source), "--out", str(tmp_path / "hf"))
    assert ".experts." in line and "not on the MXFP4 grid" in line and "--ptq even" in line
    assert not (tmp_path / "hf").exists()
    folder = exported(source, "hf", tmp_path / "hf", "--ptq", rule)
    manifest = manifest_of(folder)
    assert (manifest["method"], manifest["scale_rule"]) == ("ptq", rule)
    found, seen = tensors_of(folder), 0
    for name, weight in tensors_of(source).items():
        if f"{name}_packed" in found:
            wanted, codes, scales = encode(weight, ScaleRule(rule)), found[f"{name}_packed"], found[f"{name}_scale"]
        elif f"{name}_blocks" in found:
            wanted = encode(weight.transpose(1, 2), ScaleRule(rule))
            codes, scales = found[f"{name}_blocks"].flatten(-2), found[f"{name}_scales"]
        else:
            assert torch.equal(found[name], weight)
            continue
        seen += 1
        assert torch.equal(codes, wanted.codes) and torch.equal(scales, wanted.scales), name
    assert seen == (4 * 2 * 3 if family == "qwen3_moe" else 2 * 2)
    again = manifest_of(exported(folder, "bf16", tmp_path / "again"))
    assert (again["method"], again["scale_rule"]) == ("ptq", rule)
    line = failure(capsys, "--to", "bf16", "--from", str(folder), "--out", str(tmp_path / "no"), "--ptq", "even")
    assert "quantised already" in line


def test_select_rounds_what_it_names(tmp_path: Path, capsys: Any) -> None:
    source = checkpoint(tmp_path / "model", "qwen3_moe", rule=None)
    words = ("--to", "hf", "--from", str(source), "--out", str(tmp_path / "hf"))
    assert "--ptq" in failure(capsys, *words, "--select", "*.down_proj")
    assert "matches no matrix" in failure(capsys, *words, "--ptq", "even", "--select", "*.nothing")
    folder = exported(source, "hf", tmp_path / "hf", "--ptq", "even", "--select", "*.1.mlp.experts.down_proj")
    packed = {n for n in tensors_of(folder) if n.endswith("_packed")}
    assert packed == {f"model.layers.1.mlp.experts.{e}.down_proj.weight_packed" for e in range(4)}


def test_ptq_says_so_even_for_a_snapped_model(tmp_path: Path) -> None:
    """A model whose values happen to be on the grid gives the same bytes, under the name of what was done."""
    source = checkpoint(tmp_path / "model", "mimo")
    trained, rounded = exported(source, "hf", tmp_path / "a"), exported(source, "hf", tmp_path / "b", "--ptq", "even")
    assert bytes_of(trained) == bytes_of(rounded)
    assert [manifest_of(f)["method"] for f in (trained, rounded)] == ["qat", "ptq"]


@pytest.mark.parametrize(("family", "to"), [("mimo", "hf"), ("mimo", "mimo"), ("gpt_oss", "hf"), ("qwen3_moe", "dcp")])
def test_a_dry_run_lists_every_tensor_and_writes_nothing(family: str, to: str, tmp_path: Path, capsys: Any) -> None:
    source = checkpoint(tmp_path / "model", family, carried=family == "mimo")
    before = digest(tmp_path)
    words = ["--to", to, "--from", str(source), "--out", str(tmp_path / "out"), "--shard-gb", str(40_000 / 2**30)]
    assert export.main([*words, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert digest(tmp_path) == before and sorted(p.name for p in tmp_path.iterdir()) == ["model"]
    listed = {}
    for line in text.splitlines():
        if " -> " in line:
            name, _, _, size = line.split(" -> ")[1].split()
            listed[name] = int(size.replace(",", ""))
    made = exported(source, "bf16" if to == "dcp" else to, tmp_path / "out")
    assert listed == {n: len(b) for n, (_, _, b) in bytes_of(made).items()}
    assert all(any(name in line.split(" -> ")[0] for line in text.splitlines()) for name in tensors_of(source))


@pytest.mark.parametrize("to", ["hf", "bf16", "mimo", "quark"])
def test_carried_tensors_are_byte_identical(to: str, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "model", "mimo", carried=True)
    folder = small_shards(source, to, tmp_path / to)
    found = bytes_of(folder)
    for name, tensor in CARRIED.items():
        assert found[name] == (str(tensor.dtype), tuple(tensor.shape), raw_bytes(tensor)), name
    assert set(manifest_of(folder)["carried"]) == set(CARRIED)


@pytest.mark.parametrize(
    ("family", "to"), [("mimo", "hf"), ("qwen3_moe", "quark"), ("mimo", "mimo"), ("gpt_oss", "hf")]
)
def test_experts_take_4_25_bits(family: str, to: str, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "model", family)
    folder = exported(source, to, tmp_path / to)
    sizes = [sum(len(b) for n, (_, _, b) in bytes_of(f).items() if is_packed(n)) for f in (folder, source)]
    assert sizes[0] / sizes[1] == 0.265625 <= 0.266


def test_a_finished_run_is_found_and_exported(tmp_path: Path, capsys: Any) -> None:
    """Without --from the newest finished run; the folder lands beside its model/; selection.json says what is MXFP4."""

    words = ("--to", "hf", "--runs", str(tmp_path / "runs"))
    assert "no finished run" in failure(capsys, *words)
    for number, (name, state) in enumerate([("old", "finished"), ("new", "finished"), ("broken", "running")]):
        run = tmp_path / "runs" / name
        run.mkdir(parents=True)
        checkpoint(run / "model", "qwen3_moe", seed=number)
        (run / "run.json").write_text(json.dumps({"state": state, "git": {"commit": "abc"}, "command": "c"}))
        os.utime(run / "run.json", (number, number))
        chosen = [{"name": f"model.layers.{i}.mlp.experts.down_proj"} for i in range(2)]
        (run / "selection.json").write_text(json.dumps({"tensors": chosen, "rule": "even"}))
    assert export.main(words) == 0
    folder = tmp_path / "runs" / "new" / "hf"
    assert "the latest finished run" in capsys.readouterr().out
    packed = {n for n in tensors_of(folder) if n.endswith("_packed")}
    assert packed == {f"model.layers.{i}.mlp.experts.{e}.down_proj.weight_packed" for i in range(2) for e in range(4)}
    manifest = manifest_of(folder)
    assert (manifest["method"], manifest["scale_rule"]) == ("qat", "even")
    assert manifest["source"]["run"] == {"commit": "abc", "command": "c"}
    assert "has not finished" in failure(capsys, "--to", "hf", "--from", str(tmp_path / "runs" / "broken"))


def test_refusals_name_the_way_out(tmp_path: Path, capsys: Any) -> None:
    def line(family: str, *words: str) -> str:
        source = tmp_path / family
        if not source.exists():
            checkpoint(source, family)
        return failure(capsys, "--from", str(source), "--out", str(tmp_path / "out"), *words)

    assert "use --to hf" in line("qwen3_moe", "--to", "mimo")
    assert "use --to hf" in line("qwen3_moe", "--to", "gpt-oss")
    assert "use --to gpt-oss or --to bf16" in line("gpt_oss", "--to", "quark")
    assert "--drafter DIR" in line("mimo", "--to", "hf", "--what", "both")
    assert "must be positive" in line("mimo", "--to", "hf", "--workers", "0")
    assert "must be positive" in line("mimo", "--to", "hf", "--shard-gb", "0")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gpt_oss", "mimo", "qwen3_moe"]


def test_import_gives_the_model_back(tmp_path: Path) -> None:
    """hf -> convert.load -> a BF16 folder whose tensors are the checkpoint's."""
    source = checkpoint(tmp_path / "model", "deepseek_v3")
    folder = exported(source, "hf", tmp_path / "hf")
    assert load.main(["--from", str(folder), "--out", str(tmp_path / "back")]) == 0
    assert bytes_of(tmp_path / "back") == bytes_of(source)


def test_a_nan_is_named(tmp_path: Path, capsys: Any) -> None:
    source = checkpoint(tmp_path / "model", "qwen3_moe", rule=None)
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    edit_tensors(source, lambda t: t[name][3, 40].fill_(float("nan")))
    line = failure(capsys, "--to", "hf", "--from", str(source), "--out", str(tmp_path / "out"), "--ptq", "even")
    assert name in line and "NaN" in line
    assert not (tmp_path / "out").exists()


def test_cases_are_what_they_say() -> None:
    """Snapped values have many scales, a block of zeros and negative zeros, so that the tests above see them."""
    values = values_of(CONFIGS["qwen3_moe"](), ScaleRule.even)["model.layers.0.mlp.experts.gate_up_proj"]
    packed = encode(values)
    assert len(packed.scales.unique()) > 5 and (packed.scales == 0).any() and (packed.codes & 0xF == 8).any()
