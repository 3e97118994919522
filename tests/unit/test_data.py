"""Packing, mixing, resuming: what a row holds, and that nothing but the seed decides it."""

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core.errors import ConfigError, DataError
from core.train.batch import IGNORE, document_ids
from core.train.config import DataConfig, DataSource, Source
from core.train.data import document_texts, eval_batches, train_stream
from core.train.data import documents as on_disk
from core.train.data.embedded import is_table, stdlib_files
from core.train.data.encode import Document, cut, encode_all
from core.train.data.ingredients import InMemory
from core.train.data.stream import TrainStream
from core.train.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    texts = [f"record number {n} holds some words\n" for n in range(300)]
    return train_tokenizer(texts, 400, tmp_path_factory.mktemp("tokenizer") / "t")


def counted(lengths: list[int], first: int = 0) -> list[Document]:
    """Documents whose tokens are all different, so that each can be followed."""
    found = []
    for length in lengths:
        found.append(Document(np.arange(first, first + length, dtype=np.int32), np.ones(length, dtype=bool)))
        first += length
    return found


def stream_of(
    lengths: list[list[int]], weights: list[float], rank: int = 0, world: int = 1, seq_len: int = 16
) -> TrainStream:
    """A mixture; source n holds tokens from n * 1,000,000 on."""
    parts = [
        InMemory(f"s{n}", counted(part, n * 1_000_000), weight, seed=n)
        for n, (part, weight) in enumerate(zip(lengths, weights, strict=True))
    ]
    return TrainStream(parts, seq_len, 4, rank, world)


LENGTHS = [1, 2, 3, 5, 16, 17, 40, 7, 100, 31]


def rows_of(stream: TrainStream, batches: int) -> torch.Tensor:
    return torch.stack([torch.stack(next(stream).tensors()) for _ in range(batches)])


def test_every_token_once_an_epoch_and_in_order() -> None:
    total = sum(LENGTHS)
    stream = stream_of([LENGTHS], [1.0])
    flat = torch.cat([next(stream).input_ids_BT.flatten() for _ in range(20)]).tolist()
    starts = np.cumsum([0, *LENGTHS[:-1]]).tolist()
    for epoch in range(3):
        seen = flat[epoch * total : (epoch + 1) * total]
        assert sorted(seen) == list(range(total))
        for start, length in zip(starts, LENGTHS, strict=True):
            at = seen.index(start)
            assert seen[at : at + length] == list(range(start, start + length))
    assert flat[:total] != flat[total : 2 * total], "each epoch has an order of its own"


def test_labels_stay_in_their_document_and_positions_restart() -> None:
    """A label is the next token of the same document, also where that token lies in the next row; the last token of a
    document has none. Positions count from 0 in each piece."""
    ends = set(np.cumsum(LENGTHS) - 1)
    starts = {0, *(np.cumsum(LENGTHS)[:-1])}
    stream = stream_of([LENGTHS], [1.0])
    for _ in range(30):
        batch = next(stream)
        for ids, labels, positions in zip(*(t.tolist() for t in batch.tensors()), strict=True):
            assert labels == [IGNORE if i in ends else i + 1 for i in ids]
            for at, token in enumerate(ids):
                assert positions[at] == (0 if at == 0 or token in starts else positions[at - 1] + 1)
        documents = document_ids(batch.position_ids_BT)
        assert (documents.diff(dim=-1) == (batch.position_ids_BT[:, 1:] == 0)).all()


def test_loss_mask_follows_the_target() -> None:
    carries = np.array([False, False, True, True, False])
    stream = TrainStream([InMemory("s", [Document(np.arange(5, dtype=np.int32), carries)], 1.0, 0)], 5, 1, 0, 1)
    assert next(stream).labels_BT.tolist() == [[IGNORE, 2, 3, IGNORE, IGNORE]]


@pytest.mark.parametrize("stop", [0, 1, 2, 3, 5, 8, 13])
def test_resume_equals_the_uninterrupted_run(stop: int) -> None:
    """Some of these stops lie inside the 100-token document, some behind an epoch's end."""
    lengths, weights = [LENGTHS, [9, 4, 33]], [2.0, 1.0]
    whole = rows_of(stream_of(lengths, weights), 20)
    first = stream_of(lengths, weights)
    rows_of(first, stop) if stop else None
    state = json.loads(json.dumps(first.state_dict()))
    second = stream_of(lengths, weights)
    rows_of(second, 3)  # a stream that already moved
    second.load_state_dict(state)
    assert torch.equal(rows_of(second, 20 - stop), whole[stop:])


def test_stops_above_meet_a_split_document_and_a_new_epoch() -> None:
    stream, split, epochs = stream_of([LENGTHS, [9, 4, 33]], [2.0, 1.0]), [], set()
    for stop in range(14):
        if stop in {0, 1, 2, 3, 5, 8, 13}:
            split.append(stream.open is not None)
            epochs |= {i.epoch for i in stream.ingredients}
        next(stream)
    assert any(split) and max(epochs) >= 1


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_rows_of_one_process(world: int) -> None:
    alone = rows_of(stream_of([LENGTHS, [50]], [1.0, 1.0]), 6)
    parts = [rows_of(stream_of([LENGTHS, [50]], [1.0, 1.0], rank, world), 6) for rank in range(world)]
    assert torch.equal(torch.cat(parts, dim=2), alone)


def test_resume_at_another_world_size() -> None:
    alone = stream_of([LENGTHS], [1.0])
    rows_of(alone, 5)
    ranks = [stream_of([LENGTHS], [1.0], rank, 2) for rank in range(2)]
    for stream in ranks:
        stream.load_state_dict(copy.deepcopy(alone.state_dict()))
    assert torch.equal(torch.cat([rows_of(s, 3) for s in ranks], dim=2), rows_of(alone, 3))


def test_mixture_shares() -> None:
    """A source is never further from its share than the longest document, plus the row that is being filled."""
    weights = [1.0, 2.0, 0.5]
    stream = stream_of([LENGTHS, [30] * 9, [11, 3]], weights)
    ids = torch.cat([next(stream).input_ids_BT.flatten() for _ in range(100)])
    for n, weight in enumerate(weights):
        share = ((ids // 1_000_000) == n).sum().item() / len(ids)
        assert abs(share - weight / sum(weights)) <= (max(LENGTHS) + 16) / len(ids)


def test_resume_refuses_other_data() -> None:
    state = stream_of([LENGTHS], [1.0]).state_dict()
    with pytest.raises(DataError, match="s0 is not what the run began with"):
        stream_of([LENGTHS[:-1]], [1.0]).load_state_dict(state)
    with pytest.raises(DataError, match="was fed by s0"):
        stream_of([LENGTHS, [3]], [1.0, 1.0]).load_state_dict(state)
    with pytest.raises(ConfigError, match="batch_size=4 does not divide over 3 ranks"):
        stream_of([LENGTHS], [1.0], 0, 3)


def test_cut_loses_nothing_and_prefers_blank_lines() -> None:
    rng = random.Random(1)
    for _ in range(50):
        text = "".join(rng.choice(["word ", "line\n", "end.\n\n", "x" * 30]) for _ in range(rng.randrange(400)))
        pieces = cut(text, 100)
        assert "".join(pieces) == text and all(len(p) <= 100 for p in pieces)
    assert cut("a" * 70 + "\n\n" + "b" * 60, 100) == ["a" * 70 + "\n\n", "b" * 60]


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def jsonl(root: Path, **changes: Any) -> DataConfig:
    sources = {"train": [Source(path="a.jsonl")], "val": [Source(path="a.jsonl")]}
    return DataConfig(**{"source": DataSource.jsonl, "root": str(root), "seq_len": 32, **sources, **changes})


RECORDS = [{"text": f"record number {n} holds some words\n" * (1 + n % 3)} for n in range(57)]


def hub_jsonl(root: Path) -> DataConfig:
    write(root / "a.jsonl", RECORDS[:40])
    write(root / "b.jsonl", RECORDS[40:])
    return jsonl(root, source=DataSource.hub, train=[Source(path=str(root))], shuffle_buffer=10)


def hub_parquet(root: Path) -> DataConfig:
    import pyarrow as pa
    from pyarrow import parquet

    for name, part in (("a", RECORDS[:40]), ("b", RECORDS[40:])):
        table = pa.table({"body": [r["text"] for r in part]})
        parquet.write_table(table, root / f"{name}.parquet", row_group_size=7)
    source = Source(path=str(root), text_field="body")
    return jsonl(root, source=DataSource.hub, train=[source], shuffle_buffer=10)


def large_jsonl(root: Path) -> DataConfig:
    write(root / "a.jsonl", RECORDS[:40])
    write(root / "b.jsonl", RECORDS[40:])
    return jsonl(root, train=[Source(path="*.jsonl", domain="x")], shuffle_buffer=10)


@pytest.mark.parametrize("make", [hub_jsonl, hub_parquet, large_jsonl])
def test_streams_draw_everything_and_resume_exactly(
    make: Callable[[Path], DataConfig], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_disk, "STREAM_ABOVE", 100)
    config = make(tmp_path)
    begin: Callable[[], TrainStream] = lambda: train_stream(config, tokenizer, batch_size=2, seed=3)  # noqa: E731
    expected = sorted(tuple(d.ids.tolist()) for d in encode_all(RECORDS, tokenizer, config))
    source = begin().ingredients[0]
    drawn = [tuple(source.draw().ids.tolist()) for _ in range(2 * len(RECORDS))]
    assert sorted(drawn[:57]) == sorted(drawn[57:]) == expected
    assert drawn[:57] != drawn[57:] and source.epoch == 1
    batches = 2 * sum(map(len, expected)) // (2 * 32) + 1
    whole = rows_of(begin(), batches)
    for stop in (0, 1, 2, batches // 3, batches // 2, batches // 2 + 1, batches - 1):
        first, second = begin(), begin()
        rows_of(first, stop) if stop else None
        rows_of(second, 2)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert torch.equal(rows_of(second, batches - stop), whole[stop:]), stop


def test_stream_without_usable_documents(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_disk, "STREAM_ABOVE", 1)
    write(tmp_path / "a.jsonl", [{"text": ""}, {"messages": [{"role": "user", "content": "?"}], "prompt_only": True}])
    with pytest.raises(DataError, match="no usable document"):
        next(train_stream(jsonl(tmp_path), tokenizer, batch_size=1, seed=0))


def test_hub_keeps_tool_arguments_as_they_were(tmp_path: Path) -> None:
    from core.train.data.hub import hub_records

    def record(arguments: dict[str, Any]) -> dict[str, Any]:
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        return {
            "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        }

    written = [record({"a": 1}), record({"b": "x"})]
    write(tmp_path / "a.jsonl", written)
    read = list(hub_records(Source(path=str(tmp_path))))
    calls = [m["messages"][1]["tool_calls"][0]["function"]["arguments"] for m in read]
    assert calls == [{"a": 1}, {"b": "x"}]


def test_unreachable_hub_source_is_one_line(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    config = DataConfig(source=DataSource.hub, train=[Source(path="nobody/no-such-set")])
    with pytest.raises(DataError, match="nobody/no-such-set could not be read") as caught:
        train_stream(config, tokenizer, batch_size=1, seed=0)
    assert "\n" not in str(caught.value) and "again" in str(caught.value)


def test_download_that_breaks_off_is_one_line_and_resumes(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = hub_jsonl(tmp_path)
    whole = rows_of(train_stream(config, tokenizer, batch_size=2, seed=0), 12)
    stream = train_stream(config, tokenizer, batch_size=2, seed=0)
    rows_of(stream, 2)
    state = copy.deepcopy(stream.state_dict())

    def broken() -> Any:
        raise ConnectionResetError("peer closed\nmore lines")
        yield

    stream.ingredients[0].cursor.rows = broken()
    with pytest.raises(DataError, match=r"ConnectionResetError: peer closed\)") as caught:
        rows_of(stream, 12)
    assert "\n" not in str(caught.value)
    again = train_stream(config, tokenizer, batch_size=2, seed=0)
    again.load_state_dict(state)
    assert torch.equal(rows_of(again, 10), whole[2:])


def test_eval_rows_are_fixed_and_never_repeat_text(tokenizer: Any, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", RECORDS)
    config = jsonl(tmp_path, eval_rows=1000)
    first, again = (eval_batches(config, tokenizer, 4)["a"] for _ in range(2))
    assert all(torch.equal(x.input_ids_BT, y.input_ids_BT) for x, y in zip(first, again, strict=True))
    total = sum(len(d.ids) for d in encode_all(RECORDS, tokenizer, config))
    assert sum(len(b.input_ids_BT) for b in first) == total // 32
    with pytest.raises(DataError, match="fewer tokens than one row"):
        eval_batches(jsonl(tmp_path, seq_len=100_000), tokenizer, 4)


def test_embedded_text(tokenizer: Any) -> None:
    """Held-out files are no training files, tables are left out, and a batch mixes many files."""
    train, held_out = stdlib_files(False), stdlib_files(True)
    assert train and held_out and not set(train) & set(held_out)
    assert is_table("TABLE = {\n" + "    'a': 1,\n" * 50 + "}\n") and not is_table("def f():\n    return 1\n" * 20)
    config = DataConfig(seq_len=128, max_bytes=400_000, eval_rows=2)
    assert 400_000 <= sum(map(len, document_texts(config))) < 800_000
    source = train_stream(config, tokenizer, batch_size=16, seed=0).ingredients[0]
    longest = max(len(d.ids) for d in source.documents)
    assert longest <= 2001, "one document cannot fill a batch of 16 rows (2,048 tokens)"
    assert set(eval_batches(config, tokenizer, 2)) == {"code", "docstrings", "comments"}
