"""Where a round's time goes at batch 1: drafting, verification, the rest; and tokens/s beside plain decoding.

The plain-torch generator is the reference of correctness, not of speed: launched kernel by kernel, its figures say how
two drafters compare on one target and machine, not what an engine reaches. On a GPU both parts of a round are timed as
CUDA graphs too (round_graph.py), which is what a serving loop replays.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from core.errors import DataError, UnsupportedError
from core.generate.decode import PlainGenerator
from core.generate.interface import Draft, Prompt, Proposer
from core.generate.sampling import Sampling
from core.generate.target import Target
from draft_training.drafters import Opened
from draft_training.round_graph import Graphed, graphed


class Clock:
    """Seconds by what they went to; the device is waited for at both ends."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.spent, self.calls = device, dict[str, float](), dict[str, int]()

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def timed(self, name: str, work: Callable[..., Any], *args: Any) -> Any:
        began = self.now()
        found = work(*args)
        self.spent[name] = self.spent.get(name, 0.0) + self.now() - began
        self.calls[name] = self.calls.get(name, 0) + 1
        return found


class TimedTarget(Target):
    """Verification, and reading the prompt, which is no part of a round."""

    def __init__(self, model: Any, taps: tuple[int, ...], clock: Clock) -> None:
        super().__init__(model, taps)
        self.clock, self.in_round = clock, False

    def step(self, ids_RT: Any, position_RT: Any, cache: Any, used: int, last_R: Any = None) -> Any:
        self.in_round = last_R is None
        name = "verify" if last_R is None else "prefill"
        return self.clock.timed(name, super().step, ids_RT, position_RT, cache, used, last_R)


class TimedProposer:
    """Drafting: the drafts and what the drafter keeps of the context."""

    def __init__(self, inner: Proposer, target: TimedTarget, clock: Clock) -> None:
        self.inner, self.target, self.clock = inner, target, clock
        self.taps, self.drafts, self.start, self.keep = inner.taps, inner.drafts, inner.start, inner.keep

    def extend(self, *args: Any) -> None:
        self.clock.timed("draft" if self.target.in_round else "prefill", self.inner.extend, *args)

    def propose(self, *args: Any) -> Draft:
        return self.clock.timed("draft", self.inner.propose, *args)


@dataclass(frozen=True)
class Latency:
    """Means over all rounds of all prompts, in milliseconds; tokens_s without the prompts' reading.

    graphed: the same round recorded, on a GPU; not_graphed: why there is none.
    """

    rounds: int
    draft_ms: float
    verify_ms: float
    rest_ms: float
    tokens_s: float
    prefill_ms: float  # of a prompt
    threads: int
    tokens_a_round: float
    graphed: Graphed | None = None
    not_graphed: str = ""

    @property
    def graphed_tokens_s(self) -> float | None:
        return self.graphed.tokens_s(self.tokens_a_round) if self.graphed else None


def latency(
    model: Any, opened: Opened | None, prompts: list[Prompt], sampling: Sampling, eos: Iterable[int], context: int = 0
) -> Latency | None:
    """Decode the prompts one by one; without a drafter a round is a step of plain decoding. None without rounds.

    The first prompt is decoded once more before, unmeasured.

    Args:
        context: tokens before the recorded round; 0 records none.
    """
    device = model.get_input_embeddings().weight.device
    clock = Clock(device)
    target = TimedTarget(model, opened.taps if opened else (), clock)
    proposer = TimedProposer(opened.proposer(target), target, clock) if opened else None
    generator = PlainGenerator(target, proposer, rows=1, eos=eos)
    list(generator.generate(prompts[:1], sampling))
    clock.spent, clock.calls = {}, {}
    began, tokens = clock.now(), 0
    for reply in generator.generate(prompts, sampling):
        tokens += len(reply.ids) - 1
    total = clock.now() - began - clock.spent.get("prefill", 0.0)
    rounds = clock.calls.get("verify", 0)
    if not rounds:
        return None
    draft, verify = clock.spent.get("draft", 0.0), clock.spent["verify"]
    rest = total - draft - verify
    per = 1000 / rounds
    prefill = 1000 * clock.spent["prefill"] / len(prompts)
    times = draft * per, verify * per, rest * per
    recorded, why = None, "" if context else "not asked for"
    if context and device.type == "cuda":
        try:
            recorded = graphed(model, opened, prompts, context)
        except (UnsupportedError, DataError) as error:
            why = str(error)
    elif context:
        why = "needs a CUDA GPU"
    threads = torch.get_num_threads()
    return Latency(rounds, *times, tokens / total, prefill, threads, tokens / rounds, recorded, why)
