"""Stored features: the same numbers as online ones, the same rows for any number of ranks, errors in one line."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from core.errors import ConfigError, DataError
from core.generate.target import Target
from core.train.data import TrainStream
from core.train.data.encode import Document
from core.train.data.ingredients import InMemory
from draft_training.features import FeatureBatch, FeatureStream, write_features

ROWS, TOKENS = 6, 24
SETTINGS = {"target": "one", "taps": [0, 2]}


def rows() -> TrainStream:
    rng = np.random.default_rng(0)
    documents = [
        Document(rng.integers(3, 50, n).astype(np.int32), np.ones(n, dtype=bool)) for n in (7, 19, 33, 12, 5, 40)
    ]
    return TrainStream([InMemory("text", documents, 1.0, 0)], TOKENS, 2, 0, 1)


@pytest.fixture(scope="module")
def target() -> Target:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
            num_key_value_heads=1,
        )
    )  # fmt: skip
    return Target(model.eval(), (0, 2))


@pytest.fixture
def folder(tmp_path: Path, target: Target) -> Path:
    write_features(tmp_path / "features", rows(), target, ROWS, SETTINGS)
    return tmp_path / "features"


def stream(folder: Path, rank: int = 0, world: int = 1) -> FeatureStream:
    return FeatureStream(folder, ROWS, 4, 3, 2, 7, rank, world)


def test_stored_features_are_those_of_the_target(folder: Path, target: Target) -> None:
    source, seen = stream(folder), []
    for _ in range(3):
        batch = next(source)
        assert isinstance(batch, FeatureBatch)
        last, features = target.packed(batch.input_ids_BT, batch.position_ids_BT)
        stored = batch.capture(target)
        torch.testing.assert_close(stored[0], last)
        torch.testing.assert_close(stored[1], features)
        seen += batch.input_ids_BT.tolist()
    plain = rows()
    assert sorted(seen) == sorted(row for _ in range(3) for row in next(plain).input_ids_BT.tolist()), "each row once"


def test_rows_and_anchors_do_not_depend_on_the_number_of_ranks(folder: Path) -> None:
    whole, parts = next(stream(folder)), [next(stream(folder, rank, 2)) for rank in range(2)]
    for at, tensor in enumerate(whole.tensors()):
        assert torch.equal(tensor, torch.cat([p.tensors()[at] for p in parts]))


def test_resume_continues_with_the_same_rows_and_anchors(folder: Path) -> None:
    first = stream(folder)
    for _ in range(4):
        next(first)
    second = stream(folder)
    second.load_state_dict(first.state_dict())
    a, b = next(first), next(second)
    assert torch.equal(a.input_ids_BT, b.input_ids_BT) and torch.equal(a.anchors_RA, b.anchors_RA)


def test_finished_rows_are_kept_and_other_settings_refused(folder: Path, target: Target) -> None:
    kept = folder / "row-0000003.safetensors"
    before, lost = kept.stat().st_mtime_ns, folder / "row-0000004.safetensors"
    content = lost.read_bytes()
    lost.unlink()
    write_features(folder, rows(), target, ROWS, SETTINGS)
    assert kept.stat().st_mtime_ns == before and lost.read_bytes() == content
    with pytest.raises(ConfigError, match=r"taps=\[0, 2\], not \[1\]"):
        write_features(folder, rows(), target, ROWS, SETTINGS | {"taps": [1]})


def test_a_damaged_row_is_named(folder: Path) -> None:
    for path in folder.glob("row-*.safetensors"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"row-\d+\.safetensors is missing or damaged"):
        next(stream(folder))
    with pytest.raises(ConfigError, match=r"train\.batch_size=2 is more than features\.rows=1"):
        FeatureStream(folder, 1, 4, 3, 2, 7, 0, 1)
