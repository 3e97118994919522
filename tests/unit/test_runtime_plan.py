"""The dry run's sums are the bytes that loading gives, for every family and rank; and published geometries fit."""

from pathlib import Path

import pytest
import torch

from core.models.build import meta_model, preset_names
from infer import generate
from infer.geometry import geometry_of
from infer.plan import weights_of
from infer.shard import Shard
from infer.weights import load_weights
from tests.convert_cases import checkpoint


@pytest.mark.parametrize("family", ["mimo", "mimo pro", "qwen3_moe", "gpt_oss wide"])
@pytest.mark.parametrize("packed", [True, False])
def test_bytes_are_those_that_loading_gives(tmp_path: Path, family: str, packed: bool) -> None:
    folder = checkpoint(tmp_path / "m", family) if packed else checkpoint(tmp_path / "m", family, rule=None)
    for world in (1, 2):
        for rank in range(world):
            shard = Shard(rank, world)
            found = load_weights(folder, dtype=torch.bfloat16, device=torch.device("cpu"), shard=shard)
            planned = weights_of(found.geometry, shard, 2, packed=packed, tied=False)
            assert planned.total == found.weights.nbytes(), (world, rank)


def test_published_geometries_run_on_one_to_eight_gpus() -> None:
    """MiMo-V2.5-Pro: a trillion parameters, whose ranks of eight need what the arithmetic says."""
    for name in preset_names():
        geometry = geometry_of(meta_model(name)[1])
        for world in (1, 2, 4, 8):
            Shard(0, world).check(geometry)
    pro = geometry_of(meta_model("mimo_v2_5_pro")[1])
    assert (pro.heads, pro.head_dim, pro.value_dim, pro.rotary_dims, pro.experts) == (128, 192, 128, 64, 384)
    assert 60e9 < weights_of(pro, Shard(0, 8), 2, packed=True, tied=False).experts < 75e9
    whole, rank = (weights_of(pro, Shard(0, w), 2, packed=True, tied=False).experts for w in (1, 8))
    assert whole == 8 * rank


def test_a_dry_run_prints_the_plan_and_loads_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint(tmp_path / "m", "mimo")
    (folder / "model.safetensors").unlink()
    assert generate.main(["--model", str(folder), "--device", "cpu", "--kv-tokens", "4096", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "Weights" in said and "for one request of 256 tokens" in said and "--kv-tokens 4,096" in said
