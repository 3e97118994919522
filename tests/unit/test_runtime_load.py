"""Loading: every family and format gives transformers' logits of the same folder, with experts that stay packed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3MoeConfig

from core.checkpoint.index import Entry
from core.errors import CheckpointError, ConfigError, UnsupportedError
from core.models.fingerprint import fingerprint
from core.models.load import load_model, save_model
from core.models.mimo_v2_config import MiMoV2Config
from core.mxfp4 import ScaleRule
from infer.geometry import Geometry
from infer.options import EngineOptions
from infer.score import scored
from infer.shard import Shard
from infer.staging import GAP_BYTES, Piece, Staging, runs_of
from infer.weights import load_weights
from kernels.moe_mxfp4 import DenseWeights, ExpertWeights
from tests import runtime_cases as cases
from tests.convert_cases import MIMO, ROUTED, SIZE, checkpoint, edit_json, exported, values_of

NATIVE = {"mimo": "mimo", "mimo pro": "mimo", "qwen3_moe": "quark", "gpt_oss": "gpt-oss", "gpt_oss wide": "gpt-oss"}


@pytest.fixture(scope="module", params=NATIVE)
def folders(request: Any, tmp_path_factory: Any) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("load")
    found = {"as trained": checkpoint(place / "source", request.param)}
    for to in ("hf", "bf16", NATIVE[request.param]):
        found[to] = exported(found["as trained"], to, place / to.replace("-", ""))
    return found


def test_logits_are_transformers(folders: dict[str, Path]) -> None:
    """Of the same folder, in FP32; and in BF16 no further from FP32 than transformers' own BF16."""
    ids = torch.randint(0, 64, (45,), generator=torch.Generator().manual_seed(2)).tolist()
    for name, folder in folders.items():
        with torch.no_grad():
            wanted, rounded = (
                load_model(folder, dtype=d, attention="eager").model(input_ids=torch.tensor([ids])).logits[0].double()
                for d in (torch.float32, torch.bfloat16)
            )
        exact, own = (
            torch.cat(
                [part for _, part in scored(cases.engine(folder, dtype=d, step_tokens=9, page_size=8, rows=4), ids)]
            ).double()
            for d in ("float32", "bfloat16")
        )
        assert (exact - wanted).abs().max() < 1e-4 * wanted.abs().max(), name
        assert (own - wanted).norm(dim=-1).median() <= 1.25 * (rounded - wanted).norm(dim=-1).median(), name


def test_experts_stay_packed_and_the_fingerprint_is_the_models(folders: dict[str, Path]) -> None:
    for name, folder in folders.items():
        for dtype in (torch.bfloat16, torch.float32):
            found = load_weights(folder, dtype=dtype, device=torch.device("cpu"), shard=Shard())
            assert all(isinstance(w.experts, ExpertWeights) for w in found.weights.layers if w.router is not None), name
            assert found.fingerprint == fingerprint(load_model(folder, dtype=dtype).model), name


@pytest.mark.parametrize("block_bytes", [1, 1 << 20])
def test_weights_that_pass_through_used_memory_are_the_same(folders: dict[str, Path], block_bytes: int) -> None:
    """As on the way to a GPU: two blocks of host memory, an expert or all of them at a time."""
    device = torch.device("cpu")
    for name, folder in folders.items():
        straight = load_weights(folder, dtype=torch.bfloat16, device=device, shard=Shard())
        staging = Staging(device, reuse=True, block_bytes=block_bytes)
        staged = load_weights(folder, dtype=torch.bfloat16, device=device, shard=Shard(), staging=staging)
        assert staged.fingerprint == straight.fingerprint, name
        for a, b in zip(staged.weights.layers, straight.weights.layers, strict=True):
            if isinstance(a.experts, ExpertWeights) and isinstance(b.experts, ExpertWeights):
                for half in ("gate_up", "down"):
                    x, y = getattr(a.experts, half), getattr(b.experts, half)
                    assert torch.equal(x.codes, y.codes) and torch.equal(x.scales, y.scales), name


def piece(file: Path, start: int, size: int) -> Piece:
    return Piece(Entry(f"{file.name}-{start}", torch.uint8, (size,), file, start), torch.empty(size, dtype=torch.uint8))


def test_what_lies_together_is_read_together() -> None:
    """In the order of the files; not across files, wide gaps, or more than a block."""
    a, b = Path("a"), Path("b")
    given = [piece(a, 60, 20), piece(b, 0, 10), piece(a, 0, 50), piece(a, 80 + GAP_BYTES + 1, 10), piece(b, 10, 95)]
    found = [[(p.entry.file, p.entry.start) for p in run] for run in runs_of(given, 100)]
    assert found == [[(a, 0), (a, 60)], [(a, 80 + GAP_BYTES + 1)], [(b, 0)], [(b, 10)]]


@pytest.mark.parametrize("reuse", [False, True])
def test_a_file_that_ends_early_is_said(tmp_path: Path, reuse: bool) -> None:
    (tmp_path / "x").write_bytes(bytes(range(100)))
    staging = Staging(torch.device("cpu"), reuse=reuse)
    whole = piece(tmp_path / "x", 90, 10)
    staging.fill([whole])
    assert whole.out.tolist() == list(range(90, 100))
    with pytest.raises(CheckpointError, match="truncated"):
        staging.fill([piece(tmp_path / "x", 90, 11)])
    with pytest.raises(CheckpointError, match="cannot be read"):
        staging.fill([piece(tmp_path / "none", 0, 1)])
    short = Piece(whole.entry, torch.empty(9, dtype=torch.uint8))
    with pytest.raises(CheckpointError, match="different models"):
        staging.fill([short])


def test_experts_off_the_grid_stay_bf16(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m", "qwen3_moe", rule=None)
    found = load_weights(folder, dtype=torch.float32, device=torch.device("cpu"), shard=Shard())
    assert all(isinstance(w.experts, DenseWeights) for w in found.weights.layers)
    assert found.weights.has_dense_experts()
    prompts = cases.prompts(3)
    model = load_model(folder, dtype=torch.float32, attention="eager").model
    assert cases.generated(cases.engine(folder), prompts, max_tokens=8) == cases.greedy(model, prompts, 8)


VARIANTS = {
    "groups, scaling, plain values": MiMoV2Config(
        **MIMO | {"routed_scaling_factor": 2.5, "n_group": 2, "topk_group": 1, "v_head_dim": 16}
        | {"attention_value_scale": None}
    ),
    "weights as they are": MiMoV2Config(**MIMO | {"norm_topk_prob": False}),
    "normalised, a dense layer": Qwen3MoeConfig(
        **SIZE, **ROUTED, num_experts=4, head_dim=32, norm_topk_prob=True, mlp_only_layers=[1]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_what_a_configuration_changes_is_computed(tmp_path: Path, name: str) -> None:
    save_model(values_of(VARIANTS[name], ScaleRule.even).items(), VARIANTS[name], tmp_path / "m")
    ids = torch.randint(0, 64, (30,), generator=torch.Generator().manual_seed(2)).tolist()
    with torch.no_grad():
        model = load_model(tmp_path / "m", dtype=torch.float32, attention="eager").model
        wanted = model(input_ids=torch.tensor([ids])).logits[0]
    own = torch.cat([part for _, part in scored(cases.engine(tmp_path / "m"), ids)])
    assert (own - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("family", ["mimo pro", "gpt_oss"])
def test_shards_add_up(tmp_path: Path, family: str, world: int) -> None:
    """Rows and columns of all ranks together are the whole, padding is zero, and the parts' sum is the layer."""
    folder = checkpoint(tmp_path / "m", family)
    device = torch.device("cpu")
    if family == "gpt_oss" and world == 4:  # two heads
        with pytest.raises(ConfigError, match="num_attention_heads=2"):
            load_weights(folder, dtype=torch.float32, device=device, shard=Shard(0, world))
        return
    parts = [
        load_weights(folder, dtype=torch.float32, device=device, shard=Shard(r, world)).weights for r in range(world)
    ]
    loaded = load_weights(folder, dtype=torch.float32, device=device, shard=Shard())
    whole, geometry = loaded.weights, loaded.geometry
    for index, layer in enumerate(whole.layers):
        found = torch.cat([p.layers[index].out for p in parts], dim=1)
        assert torch.equal(found, layer.out)
        assert sum(p.layers[index].out_bias is not None for p in parts) == (layer.out_bias is not None)
        if layer.sinks is not None:
            assert torch.equal(torch.cat([p.layers[index].sinks for p in parts]), layer.sinks)
        if layer.experts is not None:
            biased = layer.experts.down_bias is not None
            assert sum(p.layers[index].experts.down_bias is not None for p in parts) == biased
        own = [qkv_of(p.layers[index].qkv, geometry, index, Shard(r, world)) for r, p in enumerate(parts)]
        for each, together in zip(zip(*own, strict=True), qkv_of(layer.qkv, geometry, index, Shard()), strict=True):
            copies = max(1, world * len(each[0]) // len(together))  # of a key-value head, on ranks that share it
            assert torch.equal(torch.cat(each[::copies]), together)
            assert all(torch.equal(one, each[r // copies * copies]) for r, one in enumerate(each))
    vocabulary = torch.cat([p.head for p in parts])
    assert torch.equal(vocabulary[: len(whole.head)], whole.head) and not vocabulary[len(whole.head) :].any()


def qkv_of(qkv: torch.Tensor, g: Geometry, index: int, shard: Shard) -> tuple[torch.Tensor, ...]:
    """A rank's query, key and value rows."""
    kv = shard.kv_heads(g.layers[index].kv_heads)
    count = kv.stop - kv.start
    return qkv.split([g.heads // shard.world * g.head_dim, count * g.head_dim, count * g.value_dim])


def test_an_unknown_family_is_named(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m", "deepseek_v3")
    with pytest.raises(UnsupportedError, match="model_type='deepseek_v3' is no family of the runtime"):
        cases.engine(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"attention_bias": True}, "attention_bias"), ({"hidden_act": "gelu"}, "hidden_act='gelu'")],
)
def test_variants_that_are_not_computed_are_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    folder = checkpoint(tmp_path / "m", "mimo")
    edit_json(folder / "config.json", lambda found: found.update(change))
    with pytest.raises((UnsupportedError, CheckpointError), match=words):
        cases.engine(folder)


def test_damaged_folders_end_in_one_line(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m", "mimo")
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError) as caught:
        cases.engine(folder)
    assert "\n" not in str(caught.value)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        cases.engine(folder)
    shutil.rmtree(folder)
    with pytest.raises(ConfigError, match="no such folder"):
        cases.engine(folder)


def test_options_out_of_range_are_named(tmp_path: Path) -> None:
    for key, value in (("rows", 0), ("page_size", 12), ("kv_share", 1.5), ("max_length", 1), ("dtype", "float16"),
                       ("backend", "cuda"), ("kv_tokens", 3), ("seed", -1), ("step_tokens", 0)):  # fmt: skip
        with pytest.raises(ConfigError, match=f"--{key.replace('_', '-')} {value}"):
            EngineOptions(tmp_path, **{key: value})
    with pytest.raises(ConfigError, match="--drafter"):
        EngineOptions(tmp_path, tmp_path / "none")


def test_another_targets_drafter_is_refused(tmp_path: Path) -> None:
    folder, drafter, _, _ = cases.both_folders(tmp_path, "mimo")
    run = tmp_path / "run"  # of draft_training.train: stands for its model
    run.mkdir()
    (run / "run.json").write_text("{}")
    shutil.copytree(drafter, run / "model")
    assert cases.engine(folder, run).runner.drafter is not None
    other = checkpoint(tmp_path / "other", "mimo", seed=9)
    with pytest.raises(ConfigError, match="was trained for target"):
        cases.engine(other, drafter)
    assert cases.generated(cases.engine(other, drafter, force_drafter=True), cases.prompts(2), max_tokens=3)
    config = MiMoV2Config(**MIMO | {"vocab_size": 96})
    wide = tmp_path / "wide"
    save_model(values_of(config, ScaleRule.even).items(), config, wide)
    with pytest.raises(ConfigError, match="vocabulary 64, width 64"):
        cases.engine(wide, drafter, force_drafter=True)
    raw = json.loads((drafter / "config.json").read_text())
    (drafter / "config.json").write_text(json.dumps(raw | {"model_type": "another"}))
    with pytest.raises(CheckpointError, match="model_type='another'"):
        cases.engine(folder, drafter)
