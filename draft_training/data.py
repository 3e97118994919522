"""Text for a drafter: replies of the target as token ids, or any mixture of the trainers.

Every `val_share`-th reply of a domain is held out, by its id alone.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from core.errors import DataError
from core.train.data import TrainStream, train_stream
from core.train.data.encode import Document
from core.train.data.ingredients import InMemory
from draft_training.anchors import AnchorStream
from draft_training.config import DraftTrainConfig
from draft_training.replies import Text, held_out, read_replies


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


def make_data(
    config: DraftTrainConfig, tokenizer: Any, vocabulary: int, drafts: int, rank: int = 0, world: int = 1
) -> DraftData:
    """The rows of this rank, and what is held out.

    Args:
        vocabulary: rows of the target's embedding. drafts: K.
    Raises:
        ConfigError, DataError: the text is missing, damaged or too short; one line.
    """
    train = config.train
    validation: dict[str, list[Text]] = {}
    if config.replies.path is None:
        rows = train_stream(
            config.data, tokenizer, batch_size=train.batch_size, seed=train.seed, rank=rank, world=world
        )
    else:
        documents: dict[str, list[Document]] = {}
        for text in read_replies(config.replies, vocabulary):
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
