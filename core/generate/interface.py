"""What a generator takes and gives. The plain one is core.generate.decode; a faster engine implements the same.

Whoever needs text from a target (regeneration, acceptance, validation) is handed a `Generator` by value.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from core.generate.rounds import Round
from core.generate.sampling import Sampling


@dataclass(frozen=True)
class Prompt:
    """id: names it in logs. ids: token ids, at least one."""

    id: str
    ids: list[int]


@dataclass
class Reply:
    """ids: the generated tokens, EOS included where it came. stop: eos | length. rounds: of speculative decoding."""

    id: str
    ids: list[int] = field(default_factory=list)
    stop: str = ""
    rounds: list[Round] = field(default_factory=list)


@dataclass(frozen=True)
class Draft:
    """tokens [R, K]; q [R, K, V] where they were drawn by chance, else None; probability [R, K] of each token under the
    drafter; candidates [R, K, C] best first, where known."""

    tokens: Tensor
    q: Tensor | None
    probability: Tensor
    candidates: Tensor | None = None


class Proposer(Protocol):
    """A drafter as the speculative loop sees it. Rows and positions as in core.generate.slots."""

    taps: tuple[int, ...]
    drafts: int

    def start(self, rows: int, slots: int) -> None:
        """Forget everything; `slots` positions will be enough."""
        ...

    def extend(self, ids_RT: Tensor, features_RTF: Tensor, position_RT: Tensor, used: int) -> None:
        """Tokens the target has just computed. Entries that verification rejected come too and must be overwritten by
        later ones at the same position."""
        ...

    def propose(self, anchor_R: Tensor, position_R: Tensor, sampling: Sampling, noise: torch.Generator) -> Draft:
        """Drafts that follow the anchors; only context before an anchor's position may be used."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        ...


class Generator(Protocol):
    def generate(self, prompts: Iterable[Prompt], sampling: Sampling) -> Iterator[Reply]:
        """Replies, in the order in which they finish."""
        ...
