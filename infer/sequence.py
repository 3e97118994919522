"""One request while it runs: its tokens, how far the model has read them, and the draft that waits to be verified."""

import math
from collections.abc import Sequence as Several
from dataclasses import dataclass, field

from infer.pages import Table
from infer.request import LENGTH, STOP, Request

FORGETTING = 0.25  # weight of the last round in a request's own expectation of accepted drafts


@dataclass
class Pending:
    """Drafts that follow the last token, with what the drafter thought: for the round log."""

    tokens: list[int] = field(default_factory=list)
    probability: list[float] = field(default_factory=list)
    candidates: list[list[int]] = field(default_factory=list)


@dataclass(eq=False)
class Sequence:
    """ids: prompt and reply; the last one is the anchor, which the model has not read yet once it generates.

    computed: leading tokens whose keys and values are in the cache. limit: most tokens that `ids` may come to have.
    expected: running mean of accepted drafts; None without a drafter. cached: prompt tokens found in the prefix cache.
    digests: of its first full pages, as far as they were asked for (infer.pages.PageBook.open).
    """

    request: Request
    ids: list[int]
    seed: int
    ends: frozenset[int]
    limit: int
    expected: float | None = None
    prompt: int = 0
    table: Table | None = None
    computed: int = 0
    cached: int | None = None
    digests: list[bytes] = field(default_factory=list)
    rounds: int = 0
    draft: Pending = field(default_factory=Pending)

    @property
    def behind(self) -> int:
        """Tokens that the model has to read before it can say the next one, the anchor included."""
        return len(self.ids) - self.computed

    def drafted(self, most: int) -> int:
        """How many drafts the next round verifies: one more than this request lately had accepted, rounded up."""
        if self.expected is None:
            return 0
        room = self.limit - len(self.ids) - 1  # the round adds one token in any case
        return max(0, min(len(self.draft.tokens), math.ceil(self.expected) + 1, most, room))

    def learn(self, drafted: int, accepted: int) -> None:
        """A draft that was accepted whole might have been accepted further."""
        if self.expected is not None and drafted:
            seen = accepted + (accepted == drafted)
            self.expected += FORGETTING * (seen - self.expected)

    def kept(self, tokens: Several[int]) -> tuple[list[int], str | None]:
        """What of `tokens` is emitted, and why the reply ends there: at an end token, at the limit, or None."""
        for count, token in enumerate(tokens, 1):
            if token in self.ends:
                return list(tokens[:count]), STOP
            if len(self.ids) + count >= self.limit:
                return list(tokens[:count]), LENGTH
        return list(tokens), None
