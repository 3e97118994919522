"""Text in, packed batches out: the embedded standard library, JSON lines, or hub datasets."""

from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from core.errors import DataError
from core.train.batch import Batch
from core.train.config import DataConfig, DataSource, Source
from core.train.data.documents import domain_of, embedded_sources, read_records
from core.train.data.encode import Document, encode_all
from core.train.data.stream import Ingredient, TrainStream, as_batch

__all__ = ["TrainStream", "document_texts", "eval_batches", "train_stream"]


def mixture(config: DataConfig, validation: bool) -> list[Source]:
    """The configured sources, or the embedded ones.

    Raises:
        DataError: none is configured.
    """
    chosen = config.val if validation else config.train
    if not chosen and config.source is DataSource.embedded:
        chosen = embedded_sources(validation)
    if not chosen:
        raise DataError(f"data.{'val' if validation else 'train'} is empty; name at least one source")
    return list(chosen)


def load_documents(config: DataConfig, source: Source, validation: bool, tokenizer: Any) -> list[Document]:
    documents = encode_all(read_records(config, source, validation), tokenizer, config)
    if not documents:
        raise DataError(f"data source {source.path} has no usable document; check that the file is not empty")
    return documents


def train_stream(
    config: DataConfig, tokenizer: Any, *, batch_size: int, seed: int, rank: int = 0, world: int = 1
) -> TrainStream:
    """The training mixture.

    Args:
        batch_size: rows of a global batch; `rank` of `world` gets its share of them.
    Raises:
        DataError: a source is missing, damaged or empty.
    """
    sources = mixture(config, validation=False)
    bar = tqdm(sources, desc="tokenising", unit="source", disable=rank != 0, leave=False)
    ingredients = [
        Ingredient(domain_of(s), load_documents(config, s, False, tokenizer), s.weight, seed + n) for n, s in enumerate(bar)
    ]
    return TrainStream(ingredients, config.seq_len, batch_size, rank, world)


def eval_batches(config: DataConfig, tokenizer: Any, batch_size: int) -> dict[str, list[Batch]]:
    """Fixed held-out rows by domain: the first `data.eval_rows` packed rows of each source (fewer if it is short)."""
    found: dict[str, list[Batch]] = {}
    for source in mixture(config, validation=True):
        documents = load_documents(config, source, True, tokenizer)
        total = sum(len(d.ids) for d in documents)
        count = min(config.eval_rows, total // config.seq_len)
        if count == 0:
            raise DataError(
                f"validation source {source.path} has {total} tokens, less than one row of data.seq_len={config.seq_len}; "
                "lower data.seq_len or add text"
            )
        stream = TrainStream([Ingredient(domain_of(source), documents, 1.0, 0)], config.seq_len, 1, 0, 1)
        rows = [stream.packer.row(stream.next_row()) for _ in range(count)]
        found[domain_of(source)] = [as_batch(rows[a : a + batch_size]) for a in range(0, count, batch_size)]
    return found


def document_texts(config: DataConfig) -> Iterator[str]:
    """Plain texts of the training mixture, for training a tokenizer."""
    for source in mixture(config, validation=False):
        for record in read_records(config, source, False):
            if "text" in record:
                yield record["text"]
            else:
                yield "\n".join(str(m.get("content") or "") for m in record.get("messages", []))
