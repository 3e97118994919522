"""From records to token ids with a mask of the tokens that carry loss."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from core.errors import ConfigError
from core.train.config import DataConfig
from core.train.data.chat import assistant_tokens, normal, render, with_tools
from core.train.data.documents import Record

__all__ = ["Document", "Tally", "cut", "encode_all", "normal", "with_tools"]

BATCH = 256
CHARACTERS_PER_TOKEN = 4  # about; decides where long texts are cut
SHORTEST_CUT = 2000  # characters


@dataclass(frozen=True)
class Document:
    """`ids` int32 [n]; `carries` bool [n]: whether the token, as a prediction target, has loss."""

    ids: np.ndarray
    carries: np.ndarray


@dataclass
class Tally:
    """Records left out: without any reply (`prompt_only`), or without an assistant turn where only those carry loss."""

    prompt_only: int = 0
    silent: int = 0

    def line(self) -> str | None:
        """One line for the user; None when nothing was left out."""
        parts = [f"{self.prompt_only:,} without a reply (prompt_only)"] if self.prompt_only else []
        parts += [f"{self.silent:,} without an assistant turn"] if self.silent else []
        return f"data: left out {' and '.join(parts)}" if parts else None


def encode_all(
    records: Iterable[Record], tokenizer: Any, config: DataConfig, tally: Tally | None = None
) -> list[Document]:
    """Every usable record as documents, in order.

    A text ends in EOS and is cut into documents of about a row at blank lines: books and whole source files would
    fill batch after batch otherwise. A conversation stays one document, ending in EOS unless its template wrote it.
    """
    if config.loss_on not in {"all", "assistant"}:
        raise ConfigError(f"data.loss_on={config.loss_on}: expected all or assistant")
    tally = tally or Tally()
    longest = max(SHORTEST_CUT, CHARACTERS_PER_TOKEN * config.seq_len)
    found: list[Document] = []
    waiting: list[tuple[str, bool]] = []  # (text, whether EOS follows)
    for record in records:
        if record.get("prompt_only"):
            tally.prompt_only += 1
        elif "messages" not in record:
            pieces = cut(record["text"], longest)
            waiting += [(piece, piece is pieces[-1]) for piece in pieces]
        elif config.loss_on == "assistant":
            found += flush(waiting, tokenizer)
            found += masked(record, tokenizer, tally)
        else:
            text = render(record, tokenizer).text
            waiting.append((text, not closed(text, tokenizer)))
        if len(waiting) >= BATCH:
            found += flush(waiting, tokenizer)
    return found + list(flush(waiting, tokenizer))


def cut(text: str, longest: int) -> list[str]:
    """Pieces of at most `longest` characters that join to `text`; cut at blank lines, else where a line ends."""
    pieces, at = [], 0
    while len(text) - at > longest:
        window = text[at : at + longest]
        stop = longest
        for mark in ("\n\n", "\n", " "):
            place = window.rfind(mark, longest // 2)
            if place >= 0:
                stop = place + len(mark)
                break
        pieces.append(window[:stop])
        at += stop
    return [*pieces, text[at:]]


def closed(text: str, tokenizer: Any) -> bool:
    return tokenizer.eos_token is not None and text.rstrip().endswith(tokenizer.eos_token)


def flush(waiting: list[tuple[str, bool]], tokenizer: Any) -> Iterator[Document]:
    """Tokenise what waits, in one call, and empty the list."""
    if not waiting:
        return
    rows = tokenizer([text for text, _ in waiting], add_special_tokens=False, verbose=False)["input_ids"]
    ends = [end for _, end in waiting]
    waiting.clear()
    for ids, end in zip(rows, ends, strict=True):
        if ids:
            yield document(ids, [True] * len(ids), tokenizer, end)


def masked(record: Record, tokenizer: Any, tally: Tally) -> Iterator[Document]:
    """The conversation with loss on its assistant turns; nothing where it has none."""
    chat = render(record, tokenizer)
    ids, carries = assistant_tokens(chat, tokenizer)
    if any(carries):
        yield document(ids, carries, tokenizer, not closed(chat.text, tokenizer), eos_carries=False)
    else:
        tally.silent += 1


def document(ids: list[int], carries: list[bool], tokenizer: Any, end: bool, eos_carries: bool = True) -> Document:
    if end and tokenizer.eos_token_id is not None and ids[-1] != tokenizer.eos_token_id:
        ids, carries = [*ids, tokenizer.eos_token_id], [*carries, eos_carries]
    return Document(np.array(ids, dtype=np.int32), np.array(carries, dtype=bool))
