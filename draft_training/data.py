"""Text for a drafter: replies of the target as token ids, or any mixture of the trainers.

A reply file has one JSON object a line: id, domain, prompt_ids, reply_ids, stop; the ids are what the target read and
said, not a text that is tokenised again. Every `val_share`-th reply of a domain is held out, by its id alone.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core.errors import DataError
from core.generate.interface import Prompt, Reply
from core.train.data import TrainStream, train_stream
from core.train.data.encode import Document
from core.train.data.ingredients import InMemory
from draft_training.anchors import AnchorStream
from draft_training.config import DraftTrainConfig

SETTINGS = "replies.json"


@dataclass(frozen=True)
class Text:
    """A prompt and the target's reply to it."""

    domain: str
    prompt: Prompt
    reply: Reply


def read_replies(folder: Path) -> Iterator[Text]:
    """Every reply of a folder, in the order of its files.

    Raises:
        DataError: no replies there, or a damaged line; names the file and line.
    """
    files = sorted(folder.glob("part-*.jsonl.gz"))
    if not files or not (folder / SETTINGS).is_file():
        raise DataError(f"replies.path={folder} holds no replies; write them with python -m draft_training.regenerate")
    for file in files:
        try:
            with gzip.open(file, "rt") as lines:
                for line in lines:
                    row = json.loads(line)
                    prompt = Prompt(row["id"], row["prompt_ids"])
                    yield Text(row["domain"], prompt, Reply(row["id"], row["reply_ids"], row["stop"]))
        except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{file} is damaged ({error}); delete it and run regenerate again") from error


def held_out(text: Text, share: int) -> bool:
    return zlib.crc32(text.prompt.id.encode()) % share == 0


def document(text: Text) -> Document:
    ids = np.array([*text.prompt.ids, *text.reply.ids], dtype=np.int32)
    carries = np.zeros(len(ids), dtype=bool)
    carries[len(text.prompt.ids) :] = True
    return Document(ids, carries)


@dataclass(frozen=True)
class DraftData:
    """Batches with anchors over `rows`; held-out texts by domain (none where the text is not the target's)."""

    rows: TrainStream
    stream: AnchorStream
    held_out: dict[str, list[Text]]


def make_data(config: DraftTrainConfig, tokenizer: Any, drafts: int, rank: int, world: int) -> DraftData:
    train = config.train
    validation: dict[str, list[Text]] = {}
    if config.replies.path is None:
        rows = train_stream(
            config.data, tokenizer, batch_size=train.batch_size, seed=train.seed, rank=rank, world=world
        )
    else:
        documents: dict[str, list[Document]] = {}
        for text in read_replies(Path(config.replies.path)):
            if held_out(text, config.replies.val_share):
                validation.setdefault(text.domain, []).append(text)
            else:
                documents.setdefault(text.domain, []).append(document(text))
        total = sum(len(d.ids) for found in documents.values() for d in found)
        if total < config.data.seq_len:
            raise DataError(f"replies.path={config.replies.path} has {total} tokens, fewer than a row; write more")
        sources = [
            InMemory(name, found, float(sum(len(d.ids) for d in found)), train.seed + n)
            for n, (name, found) in enumerate(sorted(documents.items()))
        ]
        rows = TrainStream(sources, config.data.seq_len, train.batch_size, rank, world)
    kept = {name: texts[: config.eval_replies] for name, texts in sorted(validation.items())}
    return DraftData(rows, AnchorStream(rows, config.anchors, drafts, train.seed), kept)
