"""Token ids to text while they arrive, and strings that end it.

Detokenisation. A token is not a piece of text: byte-level tokens hold parts of characters, and SentencePiece drops the
blank of a sequence's first token only. So a short window of the latest ids is decoded again with each push, through the
tokenizer's own decode(), and what is new at its end is released. A character that is not whole yet decodes to U+FFFD;
a window that ends so is held back until it does not.

Stop strings. The reply ends where a stop string is complete for the first time, and of several complete at once the one
that began first; it is cut. Text that may be the beginning of one is held back. The rule looks at characters only, so
the same reply gives the same text however it is divided into pushes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

REPLACEMENT = "\ufffd"
LONGEST_PART = 3  # bytes, and so ids, that may be the beginning of a character; they decode to at most as many U+FFFD
CONTEXT = 6  # prompt tokens decoded before the reply's first one
PATIENCE = 16  # tokens without a whole character after which the window moves on


@dataclass(frozen=True)
class TextDelta:
    """text: new, final, may be empty. stopped: a stop string was found; nothing follows."""

    text: str
    stopped: bool = False


class Detokenizer:
    """The text of a growing sequence of ids, piece by piece: pieces never change and never split a character.

    Args:
        tokenizer: a transformers tokenizer. Special tokens have no text.
        prompt: the ids before the first pushed one; their end decides whether the first word keeps its blank.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.window = list(prompt[-CONTEXT:])
        before = self.decoded()
        if before.endswith(REPLACEMENT):  # a prompt of ids that ends within a character
            self.window, before = [], ""
        self.settled = len(self.window)  # ids of the window whose text is sent and ended in a whole character
        self.sent = len(before)  # characters of the decoded window

    def decoded(self, count: int | None = None) -> str:
        # Cleaning up blanks would change text that was sent: "word ." to "word." when the dot arrives.
        ids = self.window[:count]
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def push(self, ids: Sequence[int]) -> str:
        self.window.extend(ids)
        fresh = len(self.window) - self.settled
        for held in range(min(LONGEST_PART + 1, fresh)):  # the last ids may be the beginning of a character
            count = len(self.window) - held
            text = self.decoded(count)
            if not text.endswith(REPLACEMENT):
                return self.settle(text, count)
        return self.move_on() if fresh > PATIENCE else ""

    def settle(self, text: str, count: int) -> str:
        """Release `text`, that of the window's first `count` ids. Without any (special tokens), what was before them
        still decides about the next blank and stays."""
        new = text[self.sent :]
        start = self.settled if new else max(0, count - PATIENCE)
        if start:
            self.window = self.window[start:]
        self.settled = count - start
        self.sent = len(self.decoded(self.settled))
        return new

    def move_on(self) -> str:
        """Release all but the last characters of a text in which no id ends in a whole one: bytes that are no text."""
        text = self.decoded()
        part = min(LONGEST_PART, len(text) - len(text.rstrip(REPLACEMENT)))
        new = text[self.sent : len(text) - part]
        self.window = self.window[-PATIENCE:]
        self.settled = len(self.window)
        self.sent = len(self.decoded()) - part
        return new

    def finish(self) -> str:
        """What was held back; a character that never became whole is U+FFFD."""
        text = self.decoded()[self.sent :]
        self.sent += len(text)
        return text


class StopFinder:
    """Cuts a growing text at the first complete stop string; holds back what may be the beginning of one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop = tuple(stop)
        self.held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self.held + text
        found = [(at + len(s), at) for s in self.stop if (at := text.find(s)) >= 0]
        if found:
            self.held, self.stopped = "", True
            return text[: min(found)[1]]
        keep = max((overlap(text, s) for s in self.stop), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        held, self.held = self.held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that are the beginning, not the whole, of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


class TextStream:
    """The text of one reply as it arrives: `push` ids, then `finish` once.

    Args:
        tokenizer: a transformers tokenizer.
        stop: strings that end the text.
        prompt: the prompt's ids, for the blank before the first word.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), prompt: Sequence[int] = ()) -> None:
        self.detokenizer = Detokenizer(tokenizer, prompt)
        self.finder = StopFinder(stop)
        self.read = 0  # characters detokenised, held ones included
        self.length = 0  # characters given out

    @property
    def stopped(self) -> bool:
        return self.finder.stopped

    def push(self, ids: Sequence[int]) -> TextDelta:
        """The text that these ids make final. After a stop nothing is decoded any more."""
        if self.stopped:
            return TextDelta("", True)
        return self.given(self.detokenizer.push(ids))

    def given(self, text: str) -> TextDelta:
        self.read += len(text)
        out = self.finder.push(text)
        self.length += len(out)
        return TextDelta(out, self.stopped)

    def finish(self) -> str:
        """The rest of the text: there will be no more ids. `stopped` says whether a stop string was in it."""
        if self.stopped:
            return ""
        text = self.given(self.detokenizer.finish()).text
        held = self.finder.finish()
        self.length += len(held)
        return text + held
