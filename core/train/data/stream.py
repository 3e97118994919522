"""Endless packed batches, resumable exactly and independent of how many ranks share them.

Rows of a global batch are made in one order from the seed alone; rank r of w takes rows [r*B/w, (r+1)*B/w). Documents
of a source are drawn in an order shuffled anew each epoch; the next document comes from the source whose share of
emitted tokens lags its weight most. Long documents continue in the next row as a document of their own.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from core.errors import DataError
from core.train.batch import IGNORE, Batch
from core.train.data.encode import Document


@dataclass
class Ingredient:
    """One source of a mixture: its documents, and how far the draw has come."""

    name: str
    documents: list[Document]
    weight: float
    seed: int
    epoch: int = 0
    place: int = 0
    emitted: int = 0

    def draw(self) -> Document:
        if self.place == len(self.documents):
            self.epoch, self.place = self.epoch + 1, 0
        order = self.order()
        document = self.documents[order[self.place]]
        self.place += 1
        self.emitted += len(document.ids)
        return document

    def order(self) -> np.ndarray:
        key = (self.epoch, len(self.documents))
        if getattr(self, "_key", None) != key:
            self._order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.documents))
            self._key = key
        return self._order


class Packer:
    """Turns documents into rows of `seq_len` tokens with labels and positions."""

    def __init__(self, seq_len: int) -> None:
        self.seq_len = seq_len

    def row(self, pieces: list[tuple[Document, int, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pieces (document, start, stop) that fill a row exactly -> ids, labels, positions, int64 [T]."""
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

    def __init__(self, ingredients: list[Ingredient], seq_len: int, batch_size: int, rank: int, world: int) -> None:
        self.ingredients = ingredients
        self.packer = Packer(seq_len)
        self.seq_len, self.batch_size, self.rank, self.world = seq_len, batch_size, rank, world
        self.open: tuple[int, int] | None = None  # (ingredient, offset) of a document that continues in the next row
        self.current: Document | None = None

    def __next__(self) -> Batch:
        rows = [self.next_row() for _ in range(self.batch_size)]
        share = self.batch_size // self.world
        mine = rows[self.rank * share : (self.rank + 1) * share]
        return as_batch([self.packer.row(r) for r in mine])

    def next_row(self) -> list[tuple[Document, int, int]]:
        pieces: list[tuple[Document, int, int]] = []
        room = self.seq_len
        while room:
            if self.current is None:
                chosen = self.choose()
                self.current, self.open = self.ingredients[chosen].draw(), (chosen, 0)
            assert self.open is not None
            chosen, at = self.open
            stop = min(len(self.current.ids), at + room)
            pieces.append((self.current, at, stop))
            room -= stop - at
            done = stop == len(self.current.ids)
            self.current, self.open = (None, None) if done else (self.current, (chosen, stop))
        return pieces

    def choose(self) -> int:
        lag = [i.emitted / i.weight for i in self.ingredients]
        return lag.index(min(lag))

    def state_dict(self) -> dict[str, Any]:
        return {
            "ingredients": [[i.name, i.epoch, i.place, i.emitted] for i in self.ingredients],
            "open": list(self.open) if self.open else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        names = [row[0] for row in state["ingredients"]]
        if names != [i.name for i in self.ingredients]:
            raise DataError(f"the run to resume was fed by {names}; give it the same data")
        for ingredient, (_, epoch, place, emitted) in zip(self.ingredients, state["ingredients"], strict=True):
            ingredient.epoch, ingredient.place, ingredient.emitted = epoch, place, emitted
        self.open, self.current = None, None
        if state["open"]:
            chosen, at = state["open"]
            drawn = self.ingredients[chosen]
            self.open, self.current = (chosen, at), drawn.documents[drawn.order()[drawn.place - 1]]


def as_batch(rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Batch:
    return Batch(*(torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True)))
