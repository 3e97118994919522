"""The engine: requests in, tokens out, one round a step. See infer.request for what it promises.

    add ─► scheduler.plan ─► round.run ─► here: cut at ends, count, report ─► Output

Every rank of a tensor-parallel group runs this same code on the same requests and comes to the same tokens
(infer.lockstep hands requests from rank 0 to the others).
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from core.errors import ConfigError
from core.generate.rounds import Round as LoggedRound
from infer.request import CANCELLED, FAILED, LENGTH, STOP, EngineStats, Output, Request, TokenLogprob
from infer.round import Emitted, Round
from infer.scheduler import Scheduler, Work
from infer.sequence import Sequence

GOLDEN = 0x9E3779B97F4A7C15  # spreads consecutive request numbers over 63 bits


@dataclass
class Counters:
    prompt: int = 0
    generated: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    accepted_at: Counter[int] = field(default_factory=Counter)


class ModelEngine:
    """`Engine` on a loaded model (infer.build makes one).

    Args:
        max_length: most tokens of a request, prompt and reply. vocabulary: ids below it are tokens. ends: the model's
            own end tokens. adaptive: draft fewer tokens where they are rejected. seed: of requests without one.
        on_round: called with every verified draft (core.generate.rounds).
    """

    def __init__(
        self, scheduler: Scheduler, runner: Round, *, max_length: int, vocabulary: int, ends: frozenset[int],
        seed: int, adaptive: bool = True, on_round: Callable[[LoggedRound], None] | None = None,
    ) -> None:  # fmt: skip
        self.scheduler, self.runner, self.max_length = scheduler, runner, max_length
        self.vocabulary, self.ends, self.adaptive, self.on_round = vocabulary, ends, adaptive, on_round
        self.seed = seed
        self.live: dict[str, Sequence] = {}
        self.ended: list[Output] = []  # cancelled since the last step
        self.counters = Counters()
        self.added = 0

    def add(self, request: Request) -> None:
        """Queue a request; ConfigError as infer.request.Engine.add says."""
        ids, params = list(request.ids), request.params
        if request.id in self.live:
            raise ConfigError(f"request id {request.id!r} is in use; wait for its end or take another")
        if not ids:
            raise ConfigError(f"request {request.id!r} has no prompt token; give at least one")
        wrong = next((i for i in ids if not 0 <= i < self.vocabulary), None)
        if wrong is not None:
            raise ConfigError(f"request {request.id!r}: token id {wrong} is not in the vocabulary of {self.vocabulary}")
        if len(ids) >= self.max_length:
            raise ConfigError(
                f"the prompt has {len(ids):,} tokens and the context {self.max_length:,}, prompt and reply together: "
                "shorten it, or start the engine with more room (--max-length, --kv-tokens)"
            )
        limit = self.max_length if params.max_tokens is None else min(self.max_length, len(ids) + params.max_tokens)
        drafts = float(self.scheduler.drafts) if self.scheduler.drafts else None
        sequence = Sequence(
            request, ids, self.seed_of(request), frozenset(params.stop_token_ids) | self.ends_of(request), limit,
            expected=drafts, prompt=len(ids),
        )  # fmt: skip
        self.added += 1
        self.ended = [o for o in self.ended if o.id != request.id]  # an earlier one's end would be taken for this one's
        self.live[request.id] = sequence
        self.scheduler.waiting.append(sequence)

    def seed_of(self, request: Request) -> int:
        given = request.params.seed
        return given if given is not None else (self.seed + GOLDEN * (self.added + 1)) % 2**63

    def ends_of(self, request: Request) -> frozenset[int]:
        return frozenset() if request.params.ignore_eos else self.ends

    def cancel(self, request_id: str) -> None:
        sequence = self.live.pop(request_id, None)
        if sequence is not None:
            self.scheduler.remove(sequence)
            self.ended.append(Output(request_id, finish=CANCELLED, cached=sequence.cached or 0))

    @property
    def busy(self) -> bool:
        return bool(self.live or self.ended)

    def step(self) -> list[Output]:
        outputs, self.ended = self.ended, []
        work = self.scheduler.plan()
        if work:
            for planned, emitted in zip(work, self.runner.run(work), strict=True):
                output = self.commit(planned, emitted)
                if output is not None:
                    outputs.append(output)
        return outputs

    def commit(self, work: Work, emitted: Emitted | None) -> Output | None:
        """Take a row's result over."""
        sequence = work.sequence
        self.counters.prompt += max(0, min(sequence.computed + work.count, sequence.prompt) - sequence.computed)
        if emitted is None:
            self.scheduler.advance(sequence, sequence.computed + work.count)
            return None
        if emitted.tokens[-1] < 0:
            return self.end(sequence, (), FAILED, error="the model's output is not a number (NaN)")
        anchor = len(sequence.ids) - 1
        kept, finish = sequence.kept(emitted.tokens)
        sequence.ids.extend(kept)
        self.count(work, emitted, len(kept))
        self.log(work, emitted, len(kept), anchor, finish)
        self.scheduler.advance(sequence, len(sequence.ids) - 1)  # at an end too: what was read stays findable
        if finish is not None:
            return self.end(sequence, kept, finish, emitted.logprobs[: len(kept)])
        sequence.learn(work.drafted, emitted.accepted if self.adaptive else work.drafted)
        sequence.draft = emitted.draft
        return Output(
            sequence.request.id, tuple(kept), logprobs=tuple(emitted.logprobs), cached=sequence.cached or 0
        )  # fmt: skip

    def end(
        self,
        sequence: Sequence,
        ids: Iterable[int],
        finish: str,
        logprobs: Iterable[TokenLogprob] = (),
        error: str = "",
    ) -> Output:
        del self.live[sequence.request.id]
        self.scheduler.remove(sequence)
        return Output(sequence.request.id, tuple(ids), finish, tuple(logprobs), sequence.cached or 0, error)

    def count(self, work: Work, emitted: Emitted, kept: int) -> None:
        c = self.counters
        c.generated += kept
        if work.drafted:
            c.rounds += 1
            c.drafted += work.drafted
            c.accepted += emitted.accepted
            c.accepted_at.update(range(emitted.accepted))

    def log(self, work: Work, emitted: Emitted, kept: int, anchor: int, finish: str | None) -> None:
        """One line of the round log; the token that follows a prompt belongs to no round."""
        sequence, draft = work.sequence, work.sequence.draft
        if self.on_round is None or not draft.tokens:
            return
        ranks = [
            row.index(token) if token in row else -1
            for token, row in zip(emitted.tokens[: work.drafted], draft.candidates, strict=False)
        ]
        self.on_round(
            LoggedRound(
                sequence.request.id, sequence.rounds, anchor, work.drafted, emitted.accepted, kept, emitted.agree,
                [round(p, 4) for p in draft.probability[: work.drafted]], ranks,
                {STOP: "eos", LENGTH: "length", None: ""}[finish],
            )
        )  # fmt: skip
        sequence.rounds += 1

    def stats(self) -> EngineStats:
        s, c = self.scheduler, self.counters
        return EngineStats(
            running=len(s.running), waiting=len(s.waiting), kv_used=s.book.used, prefix_queries=s.queries,
            prefix_hits=s.hits, prompt_tokens=c.prompt, generated_tokens=c.generated, preemptions=s.preemptions,
            rounds=c.rounds, drafted=c.drafted, accepted=c.accepted,
            accepted_at=tuple(c.accepted_at[k] for k in range(s.drafts)),
        )  # fmt: skip
