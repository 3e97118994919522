"""One choice of a reply: ids in, text and log probabilities out, the same whether it is streamed or sent whole.

A log probability is given out once the first character of its token is: text that a stop string cuts takes the entries
of its tokens with it, and every entry belongs to text that the client has.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from infer.request import LENGTH, STOP, Output, SamplingParams, TokenLogprob
from infer.text import REPLACEMENT, TextStream

LOWEST = -9999.0  # JSON has no -Infinity


@dataclass(frozen=True)
class Entry:
    """A token's log probability and the character of the reply at which its text begins."""

    token: TokenLogprob
    offset: int


@dataclass(frozen=True)
class Delta:
    """What one output of the engine added. finish: stop or length with the last one."""

    text: str
    entries: tuple[Entry, ...]
    finish: str | None


class Choice:
    """Args: index: among the choices of the HTTP request. prompt: its ids, for the blank before the first word."""

    def __init__(self, index: int, tokenizer: Any, params: SamplingParams, prompt: Sequence[int]) -> None:
        self.index = index
        self.stream = TextStream(tokenizer, params.stop, prompt)
        self.by_token = bool(params.stop) or params.logprobs is not None
        self.pending: list[Entry] = []
        self.tokens = 0  # generated up to the end, an end token included
        self.cached = 0
        self.finish: str | None = None

    def feed(self, output: Output) -> Delta:
        """An output that is no failure, before `finish` is set."""
        self.cached = max(self.cached, output.cached)
        ended = output.finish == STOP and bool(output.ids)
        ids = output.ids[:-1] if ended else output.ids  # the end token has no text
        text = self.one_by_one(ids, output.logprobs) if self.by_token else self.at_once(ids)
        if not self.stream.stopped and output.finish in (STOP, LENGTH):
            text += self.stream.finish()
            self.tokens += ended
            self.finish = output.finish
        if self.stream.stopped:
            self.finish = STOP
        return Delta(text, self.due(), self.finish)

    def at_once(self, ids: Sequence[int]) -> str:
        self.tokens += len(ids)
        return self.stream.push(ids).text

    def one_by_one(self, ids: Sequence[int], logprobs: Sequence[TokenLogprob]) -> str:
        """So that the count and the entries end with the token that completed a stop string."""
        text = ""
        for at, token in enumerate(ids):
            if logprobs:
                self.pending.append(Entry(logprobs[at], self.stream.read))
            delta = self.stream.push([token])
            self.tokens += 1
            text += delta.text
            if delta.stopped:
                break
        return text

    def due(self) -> tuple[Entry, ...]:
        if self.finish is not None and not self.stream.stopped:
            count = len(self.pending)
        else:
            count = sum(e.offset < self.stream.length for e in self.pending)
        due, self.pending = tuple(self.pending[:count]), self.pending[count:]
        return due


class TokenNames:
    """How single tokens are written in log probabilities: their text, and the bytes where these are known."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.byte_of = {c: b for b, c in byte_letters().items()}
        self.known: dict[int, tuple[str, bytes | None]] = {}

    def of(self, token: int) -> tuple[str, bytes | None]:
        if token not in self.known:
            text = self.tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            self.known[token] = text, self.raw(token, text)
        return self.known[token]

    def raw(self, token: int, text: str) -> bytes | None:
        if REPLACEMENT not in text:
            return text.encode()
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if len(piece) == 6 and piece.startswith("<0x"):  # SentencePiece's byte tokens
            return bytes([int(piece[3:5], 16)])
        if all(c in self.byte_of for c in piece):
            return bytes(self.byte_of[c] for c in piece)
        return None

    def key(self, token: int) -> str:
        """Text that is distinct for parts of characters, which all decode to U+FFFD (OpenAI writes them so too)."""
        text, raw = self.of(token)
        if REPLACEMENT not in text or raw is None:
            return text
        return "bytes:" + "".join(f"\\x{b:02x}" for b in raw)

    def chat(self, entries: Sequence[Entry]) -> dict[str, Any]:
        return {"content": [self.chat_entry(e.token) for e in entries]}

    def chat_entry(self, token: TokenLogprob) -> dict[str, Any]:
        tops = [self.chat_token(t, p) for t, p in token.top]
        return self.chat_token(token.id, token.logprob) | {"top_logprobs": tops}

    def chat_token(self, token: int, logprob: float) -> dict[str, Any]:
        text, raw = self.of(token)
        return {"token": text, "logprob": max(logprob, LOWEST), "bytes": None if raw is None else list(raw)}

    def completion(self, entries: Sequence[Entry]) -> dict[str, Any]:
        """The chosen token is among its own alternatives, as OpenAI has it."""
        shown = [(*e.token.top, (e.token.id, e.token.logprob)) for e in entries]
        tops = [{self.key(token): max(p, LOWEST) for token, p in pairs} for pairs in shown]
        return {
            "tokens": [self.key(e.token.id) for e in entries],
            "token_logprobs": [max(e.token.logprob, LOWEST) for e in entries],
            "top_logprobs": tops,
            "text_offset": [e.offset for e in entries],
        }


def byte_letters() -> dict[int, str]:
    """The letter that stands for each byte in byte-level vocabularies (GPT-2's): printable Latin-1 for itself, letters
    from U+0100 on for the others."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in set(plain)]
    return {b: chr(b) for b in plain} | {b: chr(0x100 + i) for i, b in enumerate(rest)}
