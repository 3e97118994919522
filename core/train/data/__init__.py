"""Text in, packed batches out: the embedded standard library, JSON lines, or hub datasets."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from tqdm import tqdm

from core.errors import ConfigError, DataError
from core.train.batch import Batch
from core.train.config import DataConfig, DataSource, Source
from core.train.data import documents as on_disk
from core.train.data.chat import plain
from core.train.data.documents import domain_of, jsonl_files, read_records
from core.train.data.embedded import embedded_sources
from core.train.data.encode import Tally, encode_all
from core.train.data.ingredients import Cursor, Ingredient, InMemory, JsonlCursor, Streamed
from core.train.data.stream import TrainStream, as_batch, pack

__all__ = ["TrainStream", "document_texts", "eval_batches", "train_stream"]

TOKENIZER_CHARACTERS = 20_000_000  # a tokenizer of some thousand entries learns nothing from more


def mixture(config: DataConfig, validation: bool) -> list[Source]:
    """The configured sources, or the embedded ones.

    Raises:
        ConfigError: a weight is not positive. DataError: no source is configured.
    """
    chosen = config.val if validation else config.train
    if not chosen and config.source is DataSource.embedded:
        chosen = embedded_sources(validation)
    if not chosen:
        raise DataError(f"data.{'val' if validation else 'train'} is empty; name at least one source")
    for source in chosen:
        if source.weight <= 0:
            raise ConfigError(f"data source {source.path} has weight={source.weight}: expected above 0")
    if config.shuffle_buffer < 1:
        raise ConfigError(f"data.shuffle_buffer={config.shuffle_buffer}: expected at least 1 document")
    return list(chosen)


def cursor_of(config: DataConfig, source: Source) -> Cursor | None:
    """Where to stream this source from; None when it is small enough to hold."""
    if config.source is DataSource.hub:
        from core.train.data.hub import HubCursor

        return HubCursor(source)
    if config.source is DataSource.jsonl:
        files = jsonl_files(config, source)
        if sum(f.stat().st_size for f in files) > on_disk.STREAM_ABOVE:
            return JsonlCursor(files, source.text_field)
    return None


def ingredient(
    config: DataConfig, source: Source, validation: bool, tokenizer: Any, seed: int, tally: Tally
) -> Ingredient:
    cursor = cursor_of(config, source)
    if cursor is not None:
        encode = partial(encode_all, tokenizer=tokenizer, config=config, tally=tally)
        return Streamed(domain_of(source), cursor, encode, source.weight, seed, config.shuffle_buffer)
    documents = encode_all(read_records(config, source, validation), tokenizer, config, tally)
    if not documents:
        raise DataError(f"data source {source.path} has no usable document; every record is empty or without a reply")
    return InMemory(domain_of(source), documents, source.weight, seed)


def train_stream(
    config: DataConfig, tokenizer: Any, *, batch_size: int, seed: int, rank: int = 0, world: int = 1
) -> TrainStream:
    """The training mixture.

    Args:
        batch_size: rows of a global batch; `rank` of `world` gets its share of them.
    Raises:
        ConfigError, DataError: a source is missing, damaged or empty.
    """
    tally = Tally()
    sources = mixture(config, validation=False)
    with tqdm(sources, desc="tokenising", unit="source", disable=rank != 0, leave=False) as bar:
        ingredients = [ingredient(config, s, False, tokenizer, seed + n, tally) for n, s in enumerate(bar)]
    if rank == 0 and (line := tally.line()):
        print(line)
    return TrainStream(ingredients, config.seq_len, batch_size, rank, world)


def eval_batches(config: DataConfig, tokenizer: Any, batch_size: int) -> dict[str, list[Batch]]:
    """Fixed held-out rows by domain: the first `data.eval_rows` packed rows of each source (fewer if it is short).

    The rows mix the whole of a source that fits in memory: its documents come in a fixed random order.
    """
    if config.eval_rows < 1:
        raise ConfigError(f"data.eval_rows={config.eval_rows}: expected at least 1 row")
    found: dict[str, list[Batch]] = {}
    for source in mixture(config, validation=True):
        drawn = ingredient(config, source, True, tokenizer, 0, Tally())
        stream = TrainStream([drawn], config.seq_len, 1, 0, 1)
        rows = []
        while len(rows) < config.eval_rows:
            pieces = stream.next_row()
            if drawn.epoch:
                break  # the row begins again with text that is in an earlier one
            rows.append(pack(pieces))
        if not rows:
            raise DataError(
                f"validation source {source.path} has fewer tokens than one row of data.seq_len={config.seq_len}; "
                "lower data.seq_len or add text"
            )
        batches = [as_batch(rows[a : a + batch_size]) for a in range(0, len(rows), batch_size)]
        found.setdefault(domain_of(source), []).extend(batches)
    return found


def document_texts(config: DataConfig) -> Iterator[str]:
    """Plain texts of the training mixture, for training a tokenizer: about as much of each source."""
    sources = mixture(config, validation=False)
    for source in sources:
        left = TOKENIZER_CHARACTERS // len(sources)
        for record in read_records(config, source, False):
            turns = record.get("messages", [])
            text = record["text"] if "text" in record else "\n".join(plain(m.get("content")) for m in turns)
            yield text
            left -= len(text)
            if left < 0:
                break
