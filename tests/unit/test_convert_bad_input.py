"""Bad input to convert.export: status 2, one line that names the file and a remedy, and nothing half-written."""

import errno
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from convert import export, load
from convert import write as files
from core.checkpoint.index import INDEX, SINGLE, open_checkpoint
from core.models.load import save_model
from core.mxfp4 import ScaleRule
from tests.convert_cases import (
    CONFIGS,
    checkpoint,
    digest,
    edit_header,
    edit_json,
    edit_tensors,
    exported,
    small_shards,
    values_of,
    weight_map,
)

EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
NORM = "model.norm.weight"


def shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[1]


def first_entry(header: dict[str, Any]) -> dict[str, Any]:
    return next(v for k, v in header.items() if k != "__metadata__")


def link_outside(folder: Path) -> None:
    target = folder.parent / "elsewhere.safetensors"
    shutil.move(shard(folder), target)
    (folder / target.name).symlink_to(target)
    (folder / target.name).rename(folder / sorted(set(weight_map(folder).values()))[1])


def replace_by_pickle(folder: Path) -> None:
    torch.save({"x": torch.ones(3)}, shard(folder))


def pickles_only(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"x": 1}))


def all_in(folder: Path, name: str, value: str) -> None:
    edit_json(folder / INDEX, lambda i: i["weight_map"].update({name: value}))


# what is done to a folder of several shards: (how, words of the message)
DAMAGE: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "missing shard": (lambda f: shard(f).unlink(), ("missing", "incomplete, repeat")),
    "truncated shard": (lambda f: shard(f).write_bytes(shard(f).read_bytes()[:-9]), ("download it again",)),
    "grown shard": (lambda f: shard(f).write_bytes(shard(f).read_bytes() + b"x"), ("download it again",)),
    "no JSON in the header": (lambda f: shard(f).write_bytes(b"\x08" + bytes(7) + b"notjson!"), ("download it again",)),
    "deep JSON in the header": (
        lambda f: shard(f).write_bytes((200_000).to_bytes(8, "little") + b"[" * 200_000),
        ("download it again",),
    ),
    "negative offsets": (
        lambda f: edit_header(shard(f), lambda h: first_entry(h).update(data_offsets=[-64, 0])),
        ("download it again",),
    ),
    "overlapping offsets": (
        lambda f: edit_header(shard(f), lambda h: h.update(twin=dict(first_entry(h)))),
        ("overlaps", "download it again"),
    ),
    "enormous header": (lambda f: shard(f).write_bytes(b"\xff" * 64), ("download it again",)),
    "offsets are text": (
        lambda f: edit_header(shard(f), lambda h: first_entry(h).update(data_offsets="ab")),
        ("download it again",),
    ),
    "dtype is a list": (
        lambda f: edit_header(shard(f), lambda h: first_entry(h).update(dtype=[])),
        ("download it again",),
    ),
    "pickle under a safetensors name": (replace_by_pickle, ("not a complete safetensors file", "download it again")),
    "pickle only": (pickles_only, ("download the weights (safetensors)",)),
    "extra key": (
        lambda f: edit_header(
            shard(f), lambda h: h.update(stranger={"dtype": "U8", "shape": [0], "data_offsets": [0, 0]})
        ),
        ("stranger",),
    ),
    "index lacks a key": (lambda f: edit_json(f / INDEX, lambda i: i["weight_map"].pop(NORM)), (NORM, "download")),
    "index leads up": (lambda f: all_in(f, NORM, "../model.safetensors"), ("outside the folder",)),
    "index leads to the root": (lambda f: all_in(f, NORM, "/etc/passwd"), ("outside the folder",)),
    "index names a folder": (lambda f: all_in(f, NORM, "."), ("missing", "repeat")),
    "index holds a NUL": (lambda f: all_in(f, NORM, "a\0b"), ("outside the folder",)),
    "index holds a line break": (lambda f: all_in(f, NORM, "a\nb"), ("outside the folder",)),
    "index is a list": (lambda f: (f / INDEX).write_text("[]"), ("expected an object", "download it again")),
    "index is deep": (lambda f: (f / INDEX).write_text("[" * 200_000), ("download it again",)),
    "index is not UTF-8": (lambda f: (f / INDEX).write_bytes(b"\xff\xfe{"), ("download it again",)),
    "symlink out of the folder": (link_outside, ("leads out of the folder",)),
    "no config": (lambda f: (f / "config.json").unlink(), ("no config.json", "download")),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), ("config.json", "download it again")),
    "config is another model's": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(moe_intermediate_size=64)),
        ("config.json and weights",),
    ),
    "config has other experts": (
        lambda f: edit_json(
            f / "config.json", lambda c: c.update({k: 5 for k in c if k.startswith("num_") and k.endswith("experts")})
        ),
        ("experts.4.", "incomplete"),
    ),
    "config has a layer too many": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(num_hidden_layers=3)),
        ("lacks model.layers.2",),
    ),
    "unknown model": (lambda f: edit_json(f / "config.json", lambda c: c.update(model_type="x")), ("unknown",)),
    "nibble order": (
        lambda f: (f / "manifest.json").write_text('{"nibble_order": "high_first"}'),
        ("manifest.json", "nibble_order='high_first'", "expected low_first"),
    ),
    "scale rule": (lambda f: (f / "manifest.json").write_text('{"scale_rule": "best"}'), ("scale_rule='best'",)),
    "scale rule is a list": (lambda f: (f / "manifest.json").write_text('{"scale_rule": []}'), ("scale_rule=[]",)),
    "nibble order is a list": (
        lambda f: (f / "manifest.json").write_text('{"nibble_order": []}'),
        ("nibble_order=[]",),
    ),
    "manifest of numbers": (
        lambda f: (f / "manifest.json").write_text('{"tensors": {"model.norm.weight": 3}}'),
        ("manifest.json", "export again"),
    ),
    "config with a million experts": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(num_local_experts=10**6)),
        ("num_local_experts=1000000", "beyond any model"),
    ),
    "config is huge": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(hidden_size=2**40, vocab_size=2**40)),
        ("config.json",),
    ),
    "config is negative": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(hidden_size=-64)),
        ("config.json",),
    ),
    "config holds text": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(hidden_size="x")),
        ("config.json",),
    ),
    "config without heads": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(num_attention_heads=0)),
        ("config.json",),
    ),
}


def failure(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert export.main(words) == 2
    error = capsys.readouterr().err
    line = error[error.index("convert.export: ") :].strip("\n")
    assert "\n" not in line
    return line


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = CONFIGS["qwen3_moe"]()
    save_model(values_of(config, ScaleRule.even).items(), config, tmp_path / "model", shard_bytes=50_000)
    return tmp_path / "model"


@pytest.mark.parametrize("case", list(DAMAGE))
def test_damage_is_one_line(case: str, folder: Path, tmp_path: Path, capsys: Any) -> None:
    damage, words = DAMAGE[case]
    damage(folder)
    before = sorted(p.name for p in tmp_path.iterdir())
    line = failure(capsys, "--to", "hf", "--from", str(folder), "--out", str(tmp_path / "out"))
    assert all(word in line for word in words), line
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize("to", ["hf", "quark", "gpt-oss"])
def test_a_scale_byte_of_255_is_named(to: str, tmp_path: Path, capsys: Any) -> None:
    source = checkpoint(tmp_path / "model", "gpt_oss" if to == "gpt-oss" else "qwen3_moe")
    packed = exported(source, to, tmp_path / "packed")
    key = "model.layers.1.mlp.experts.down_proj_scales" if to == "gpt-oss" else f"{EXPERT}_scale"
    edit_tensors(packed, lambda t: t[key].view(-1)[5].fill_(255))
    line = failure(capsys, "--to", "bf16", "--from", str(packed), "--out", str(tmp_path / "out"))
    assert key.removesuffix("_scales").removesuffix("_scale") in line and "255" in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "packed"]


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update({f"{EXPERT}_packed": t[f"{EXPERT}_packed"][:, :-1].contiguous()}),
        lambda t: t.update({f"{EXPERT}_scale": t[f"{EXPERT}_scale"][:-1].contiguous()}),
        lambda t: t.update({f"{EXPERT}_packed": t[f"{EXPERT}_packed"].view(torch.int8)}),
        lambda t: t.update({f"{EXPERT}_scale": t[f"{EXPERT}_scale"].float()}),
        lambda t: t.update({f"{EXPERT}_scale": t[f"{EXPERT}_scale"].reshape(-1)}),
        lambda t: t.pop(f"{EXPERT}_scale"),
    ],
)
def test_codes_and_scales_must_fit(change: Callable[[Any], Any], tmp_path: Path, capsys: Any) -> None:
    packed = exported(checkpoint(tmp_path / "model", "qwen3_moe"), "hf", tmp_path / "packed")
    edit_tensors(packed, change)
    for to in ("bf16", "quark"):
        line = failure(capsys, "--to", to, "--from", str(packed), "--out", str(tmp_path / "out"))
        assert EXPERT in line, line
        assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "packed"]


def test_symlinks_of_the_hub_cache_are_read(folder: Path, tmp_path: Path) -> None:
    """snapshots/<revision>/<file> -> ../../blobs/<hash>: the cache's own layout, and links that stay in the folder."""
    cache = tmp_path / "models--a--b"
    snapshot, blobs = cache / "snapshots" / ("0" * 40), cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copyfile(file, blobs / f"{number:064x}")
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / f"{number:064x}")
    assert set(open_checkpoint(snapshot).entries) == set(open_checkpoint(folder).entries)
    other = sorted(folder.glob("*.safetensors"))[0]
    other.rename(folder / "real.bin")
    other.symlink_to("real.bin")
    assert open_checkpoint(folder)
    (tmp_path / "link").symlink_to(folder)
    assert open_checkpoint(tmp_path / "link")


def test_a_single_file_that_leads_out_is_refused(tmp_path: Path, capsys: Any) -> None:
    source = checkpoint(tmp_path / "model", "qwen3_moe")
    (source / SINGLE).rename(tmp_path / "secret")
    (source / SINGLE).symlink_to(tmp_path / "secret")
    assert "leads out of the folder" in failure(
        capsys, "--to", "hf", "--from", str(source), "--out", str(tmp_path / "o")
    )


@pytest.mark.parametrize("layout", ["bf16", "dcp"])
def test_a_card_that_leads_out_is_refused(layout: str, tmp_path: Path, capsys: Any) -> None:
    source = exported(checkpoint(tmp_path / "model", "qwen3_moe"), layout, tmp_path / "source")
    (tmp_path / "secret").write_text("private")
    (source / "README.md").symlink_to(tmp_path / "secret")
    assert load.main(["--from", str(source), "--out", str(tmp_path / "out")]) == 2
    assert "leads out of the folder" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_out_is_not_empty(folder: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("kept")
    line = failure(capsys, "--to", "hf", "--from", str(folder), "--out", str(out))
    assert str(out) in line and "not empty" in line and "choose another" in line
    (tmp_path / "file").write_text("kept")
    assert "not empty" in failure(capsys, "--to", "hf", "--from", str(folder), "--out", str(tmp_path / "file"))
    assert digest(out).keys() == {"mine"} and (tmp_path / "file").read_text() == "kept"
    (out / "mine").unlink()
    exported(folder, "hf", out)  # an empty folder is fine


@pytest.mark.parametrize(
    ("number", "word"), [(errno.ENOSPC, "disk is full"), (errno.EROFS, "Read-only"), (errno.EIO, "")]
)
@pytest.mark.parametrize("to", ["hf", "dcp"])
def test_a_full_or_read_only_disk(
    to: str, number: int, word: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """One line; `out` is not there; with room again the same command ends in the same bytes."""
    out = tmp_path / "out"
    words = ("--to", to, "--from", str(folder), "--out", str(out), "--shard-gb", str(40_000 / 2**30))
    real, calls = os.fsync, []

    def fsync(handle: int) -> None:
        calls.append(handle)
        if len(calls) > 4:
            raise OSError(number, os.strerror(number))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    line = failure(capsys, *words)
    assert word in line and str(tmp_path) in line and "run the command again" in line
    assert not out.exists()
    monkeypatch.undo()
    assert export.main(words) == 0
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {"model", "out"}
    if to == "hf":
        assert digest(out) == digest(small_shards(folder, "hf", tmp_path / "fresh"))


def test_a_target_that_cannot_be_made(folder: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "file").write_text("x")
    line = failure(capsys, "--to", "hf", "--from", str(folder), "--out", str(tmp_path / "file" / "out"))
    assert str(tmp_path / "file" / "out") in line and "choose another --out" in line


def test_options_that_are_no_numbers(folder: Path, tmp_path: Path, capsys: Any) -> None:
    for value in ("nan", "inf", "-1"):
        line = failure(capsys, "--to", "hf", "--from", str(folder), "--out", str(tmp_path / "o"), "--shard-gb", value)
        assert "--shard-gb" in line and "positive" in line


def test_a_failing_tensor_leaves_no_leftovers(tmp_path: Path, capsys: Any) -> None:
    """Off the grid in the last layer, after shards were written: neither `out` nor its hidden places stay."""
    source = checkpoint(tmp_path / "model", "qwen3_moe")
    edit_tensors(source, lambda t: t["model.layers.1.mlp.experts.3.down_proj.weight"].view(-1)[7].fill_(0.3))
    out = tmp_path / "out"
    line = failure(capsys, "--to", "hf", "--from", str(source), "--out", str(out), "--shard-gb", str(20_000 / 2**30))
    assert "layers.1.mlp.experts.3.down_proj" in line and "--ptq even" in line
    assert not out.exists() and not files.Target(out).part.exists() and not files.Target(out).journal.exists()


def test_source_and_target_may_not_be_one(folder: Path, tmp_path: Path, capsys: Any) -> None:
    before = digest(folder)
    assert "not empty" in failure(capsys, "--to", "hf", "--from", str(folder), "--out", str(folder))
    assert digest(folder) == before


def test_a_run_file_that_is_damaged(tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    checkpoint(run / "model", "qwen3_moe")
    words = ("--to", "hf", "--from", str(run), "--out", str(tmp_path / "out"))
    (run / "run.json").write_text(json.dumps({"state": "finished"}))
    for text in (
        '{"tensors": 3, "rule": "even"}',
        '{"rule": "even"}',
        '{"tensors": [{"name": "x"}], "rule": "best"}',
        "[",
    ):
        (run / "selection.json").write_text(text)
        assert "selection.json" in failure(capsys, *words), text
