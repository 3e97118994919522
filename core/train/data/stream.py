"""Endless packed batches, resumable exactly and independent of how many ranks share them.

Rows of a global batch are made in one order from the seed alone; rank r of w takes rows [r*B/w, (r+1)*B/w). The next
document comes from the source whose share of emitted tokens lags its weight most. A document that does not fit
continues at the start of the next row: positions restart at 0 there (it cannot see its beginning), and the last token
before the cut still predicts the first one after it, which is a true continuation of what it sees.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from core.errors import ConfigError, DataError
from core.train.batch import IGNORE, Batch
from core.train.data.encode import Document
from core.train.data.ingredients import Ingredient

Piece = tuple[Document, int, int]  # document, start, stop


def pack(pieces: list[Piece]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pieces that fill a row -> ids, labels, positions, int64 [T]."""
    ids = np.concatenate([d.ids[a:b] for d, a, b in pieces]).astype(np.int64)
    labels = np.full(len(ids), IGNORE, dtype=np.int64)
    positions = np.concatenate([np.arange(b - a) for _, a, b in pieces])
    at = 0
    for document, start, stop in pieces:
        targets, carries = document.ids[start + 1 : stop + 1], document.carries[start + 1 : stop + 1]
        labels[at : at + len(targets)] = np.where(carries, targets, IGNORE)
        at += stop - start
    return ids, labels, positions


class TrainStream:
    """`next()` gives this rank's rows of the next global batch."""

    def __init__(self, ingredients: Sequence[Ingredient], seq_len: int, batch_size: int, rank: int, world: int) -> None:
        if seq_len < 2:
            raise ConfigError(f"data.seq_len={seq_len}: expected at least 2 tokens")
        if batch_size % world:
            raise ConfigError(f"batch_size={batch_size} does not divide over {world} ranks; choose a multiple")
        self.ingredients = ingredients
        self.seq_len, self.batch_size, self.rank, self.world = seq_len, batch_size, rank, world
        self.open: tuple[int, int] | None = None  # (ingredient, offset) of a document that continues in the next row

    def __next__(self) -> Batch:
        rows = [self.next_row() for _ in range(self.batch_size)]
        share = self.batch_size // self.world
        return as_batch([pack(r) for r in rows[self.rank * share : (self.rank + 1) * share]])

    def next_row(self) -> list[Piece]:
        pieces: list[Piece] = []
        room = self.seq_len
        while room:
            if self.open is None:
                chosen = self.choose()
                document, at = self.ingredients[chosen].draw(), 0
            else:
                chosen, at = self.open
                document = self.ingredients[chosen].last()
            stop = min(len(document.ids), at + room)
            pieces.append((document, at, stop))
            room -= stop - at
            self.open = None if stop == len(document.ids) else (chosen, stop)
        return pieces

    def choose(self) -> int:
        lag = [i.emitted / i.weight for i in self.ingredients]
        return lag.index(min(lag))

    def state_dict(self) -> dict[str, Any]:
        return {
            "ingredients": [{"name": i.name, **i.state()} for i in self.ingredients],
            "open": list(self.open) if self.open else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        names = [row["name"] for row in state["ingredients"]]
        if names != [i.name for i in self.ingredients]:
            raise DataError(f"the run to resume was fed by {', '.join(names)}; give it the same data")
        for ingredient, saved in zip(self.ingredients, state["ingredients"], strict=True):
            ingredient.restore(saved)
        self.open = tuple(state["open"]) if state["open"] else None


def as_batch(rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Batch:
    return Batch(*(torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True)))
