"""The engine as core's generation interface: whoever takes a `Generator` by value can be handed this one.

draft_training measures acceptance with `core.generate.decode.PlainGenerator`; a script that has both hands it this, and
gets the same replies and round logs from the runtime's kernels:

    rounds = RoundLog()
    engine = build_engine(EngineOptions(model, drafter, adaptive=False), on_round=rounds.take)
    replies = EngineGenerator(engine, rounds).generate(prompts, Sampling(max_new_tokens=128))
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from core.errors import ConfigError
from core.generate.interface import Prompt, Reply
from core.generate.rounds import Round
from core.generate.sampling import Sampling
from infer.request import FAILED, STOP, Engine, Output, Request, SamplingParams


@dataclass
class RoundLog:
    """Rounds by request, as they happen."""

    found: dict[str, list[Round]] = field(default_factory=dict)

    def take(self, one: Round) -> None:
        self.found.setdefault(one.request, []).append(one)


class EngineGenerator:
    """`core.generate.interface.Generator` on an engine.

    Sampled replies have the target's distribution, and the same seed repeats them; they are other draws than
    PlainGenerator's, whose noise is carried from token to token. Drafts never go beyond a reply's end, so the last
    rounds of a reply may have fewer.

    Args:
        log: what the engine's `on_round` fills; None: replies come without rounds.
    """

    def __init__(self, engine: Engine, log: RoundLog | None = None) -> None:
        self.engine, self.log = engine, log

    def generate(self, prompts: Iterable[Prompt], sampling: Sampling) -> Iterator[Reply]:
        """Replies, in the order in which they finish.

        Raises:
            ConfigError: an empty prompt, two prompts of one id, a prompt that does not fit, or a reply that failed.
        """
        replies: dict[str, Reply] = {}
        try:
            for number, prompt in enumerate(prompts):
                self.engine.add(Request(prompt.id, prompt.ids, params_of(sampling, number)))
                replies[prompt.id] = Reply(prompt.id)
            while replies:
                for output in self.engine.step():
                    if output.id in replies:
                        reply = self.taken(replies[output.id], output)
                        if reply.stop:
                            del replies[output.id]
                            yield reply
        finally:
            for name in replies:
                self.engine.cancel(name)
                if self.log:
                    self.log.found.pop(name, None)

    def taken(self, reply: Reply, output: Output) -> Reply:
        if output.finish == FAILED:
            raise ConfigError(f"prompt {reply.id!r} has no reply: {output.error}")
        reply.ids.extend(output.ids)
        if output.finish is not None:
            reply.stop = "eos" if output.finish == STOP else "length"
            reply.rounds = self.log.found.pop(reply.id, []) if self.log else []
        return reply


def params_of(sampling: Sampling, number: int) -> SamplingParams:
    """Every prompt has noise of its own."""
    return SamplingParams(
        temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k,
        max_tokens=sampling.max_new_tokens, seed=(sampling.seed << 24) + number, ignore_eos=sampling.ignore_eos,
    )  # fmt: skip
