"""Sources of a mixture as endless draws of documents, held in memory or read when needed. Both resume exactly."""

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from core.errors import DataError
from core.train.data.documents import Record, numbered_records
from core.train.data.encode import Document


class Ingredient(Protocol):
    """One source of a mixture. `emitted` counts the tokens drawn so far; `epoch` the passes finished."""

    name: str
    weight: float
    emitted: int
    epoch: int

    def draw(self) -> Document: ...

    def last(self) -> Document:
        """The document drawn last."""
        ...

    def state(self) -> dict[str, Any]:
        """All that decides the next draws, as JSON."""
        ...

    def restore(self, state: dict[str, Any]) -> None: ...


class InMemory:
    """A source that was read and tokenised as a whole; every epoch is a permutation of its documents."""

    def __init__(self, name: str, documents: list[Document], weight: float, seed: int) -> None:
        self.name, self.documents, self.weight, self.seed = name, documents, weight, seed
        self.epoch = self.place = self.emitted = 0
        self.permutation = self.order()
        self.checksum: int | None = None

    def order(self) -> np.ndarray:
        return np.random.default_rng([self.seed, self.epoch]).permutation(len(self.documents))

    def draw(self) -> Document:
        if self.place == len(self.documents):
            self.epoch, self.place = self.epoch + 1, 0
            self.permutation = self.order()
        self.place += 1
        self.emitted += len(self.last().ids)
        return self.last()

    def last(self) -> Document:
        return self.documents[self.permutation[self.place - 1]]

    def fingerprint(self) -> int:
        if self.checksum is None:
            self.checksum = self.seed
            for document in self.documents:
                self.checksum = zlib.crc32(document.ids.tobytes(), self.checksum)
        return self.checksum

    def state(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "place": self.place, "emitted": self.emitted, "fingerprint": self.fingerprint()}

    def restore(self, state: dict[str, Any]) -> None:
        if state["fingerprint"] != self.fingerprint():
            raise DataError(
                f"data source {self.name} is not what the run began with (files, tokenizer, seed); restore it"
            )
        self.epoch, self.place, self.emitted = state["epoch"], state["place"], state["emitted"]
        self.permutation = self.order()


class Cursor(Protocol):
    """A place in a stream of records, as JSON, that reading can start from."""

    def start(self, state: Any | None) -> None:
        """Go to `state`; None is the beginning."""
        ...

    def state(self) -> Any: ...

    def take(self, count: int) -> list[Record]:
        """The next records; fewer than `count` only at the end."""
        ...


class JsonlCursor:
    """JSON-lines files one after another. They are not read through `datasets`: Arrow gives all records one schema,
    which fills the arguments of tool calls with nulls, and its errors name neither file nor line."""

    def __init__(self, files: list[Path], text_field: str) -> None:
        self.files, self.text_field = files, text_field
        self.start(None)

    def start(self, state: Any | None) -> None:
        self.at = list(state or [0, 0])
        self.records = self.walk(*self.at)

    def walk(self, first: int, after: int) -> Any:
        for file in range(first, len(self.files)):
            for number, record in numbered_records(self.files[file], self.text_field, after if file == first else 0):
                self.at = [file, number]
                yield record

    def state(self) -> Any:
        return list(self.at)

    def take(self, count: int) -> list[Record]:
        return [record for _, record in zip(range(count), self.records, strict=False)]


class Streamed:
    """A source too large to hold: records are read in blocks of `buffer`, tokenised, and drawn in a random order.

    A block is read again on resume, from the place where it began: unlike the shuffle buffer of `datasets`, which is
    lost and refilled, this gives the very documents an uninterrupted run would have drawn.
    """

    def __init__(
        self,
        name: str,
        cursor: Cursor,
        encode: Callable[[list[Record]], list[Document]],
        weight: float,
        seed: int,
        buffer: int,
    ) -> None:
        self.name, self.weight, self.seed = name, weight, seed
        self.cursor, self.encode, self.buffer = cursor, encode, buffer
        self.epoch = self.place = self.emitted = 0
        self.block, self.began = -1, cursor.state()
        self.documents: list[Document] = []

    def read_block(self) -> bool:
        """The next block into `documents`; False at the end of the epoch."""
        self.block, self.place, self.began = self.block + 1, 0, self.cursor.state()
        records = self.cursor.take(self.buffer)
        documents = self.encode(records)
        order = np.random.default_rng([self.seed, self.epoch, self.block]).permutation(len(documents))
        self.documents = [documents[n] for n in order]
        return bool(records)

    def draw(self) -> Document:
        ends = 0
        while self.place == len(self.documents):
            if self.read_block():
                continue
            ends += 1
            if ends == 2:
                raise DataError(f"data source {self.name} has no usable document: empty, or all without a reply")
            self.epoch, self.block = self.epoch + 1, -1
            self.cursor.start(None)
        self.place += 1
        self.emitted += len(self.last().ids)
        return self.last()

    def last(self) -> Document:
        return self.documents[self.place - 1]

    def state(self) -> dict[str, Any]:
        names = ("epoch", "block", "place", "emitted", "began", "seed", "buffer")
        return {name: getattr(self, name) for name in names}

    def restore(self, state: dict[str, Any]) -> None:
        if (state["seed"], state["buffer"]) != (self.seed, self.buffer):
            raise DataError(f"data source {self.name} had another train.seed or data.shuffle_buffer; set them back")
        self.epoch, self.block, self.emitted = state["epoch"], state["block"] - 1, state["emitted"]
        self.cursor.start(state["began"] if state["block"] >= 0 else None)
        if state["block"] >= 0:
            self.read_block()
        else:
            self.block, self.documents = -1, []
        if state["place"] > len(self.documents):
            raise DataError(f"data source {self.name} changed since the run was interrupted; restore it")
        self.place = state["place"]
