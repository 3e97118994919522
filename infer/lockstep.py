"""One engine on several ranks: rank 0 decides, the others do the same.

All ranks hold the same queue, the same page book and the same logits, so they plan the same steps and choose the same
tokens. What rank 0 was asked to add or cancel since the last step is broadcast before each step, in order; nothing else
is ever said.
"""

from typing import Any

from infer.engine import ModelEngine
from infer.parallel import Ranks, end
from infer.request import EngineStats, Output, Request


class LeadEngine:
    """Rank 0's engine as callers see it (`infer.request.Engine`)."""

    def __init__(self, engine: ModelEngine, ranks: Ranks) -> None:
        self.engine, self.ranks, self.max_length = engine, ranks, engine.max_length
        self.said: list[Request | str] = []  # requests to add, ids to cancel

    def add(self, request: Request) -> None:
        self.engine.add(request)  # a refusal is rank 0's alone
        self.said.append(request)

    def cancel(self, request_id: str) -> None:
        self.engine.cancel(request_id)
        self.said.append(request_id)

    def step(self) -> list[Output]:
        self.ranks.agree(self.said)
        self.said = []
        try:
            return self.engine.step()
        except Exception as error:
            end(f"rank 0: a step failed and the other ranks wait inside it ({type(error).__name__}: {error})")
            raise

    @property
    def busy(self) -> bool:
        return self.engine.busy

    def stats(self) -> EngineStats:
        return self.engine.stats()

    def close(self) -> None:
        """Let the other ranks go."""
        self.ranks.agree(None)


def follow(engine: ModelEngine, ranks: Ranks) -> None:
    """What the ranks behind rank 0 do, until it closes."""
    while (said := heard(ranks)) is not None:
        for one in said:
            engine.cancel(one) if isinstance(one, str) else engine.add(one)
        engine.step()


def heard(ranks: Ranks) -> list[Any] | None:
    return ranks.agree(None)
