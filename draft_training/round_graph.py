"""A round at batch 1 as two CUDA graphs, drafting and verification: what a round costs where launches cost nothing.

Launched one by one, a small drafter's kernels wait for the host, and a chain of K passes waits K times; a comparison of
two drafters would be one of launches. Both graphs compute on fixed memory: the same context of real text, the same
block. The values do not matter to the time, but which experts are read does, so the text is not random.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from core.errors import DataError, UnsupportedError
from core.generate.interface import Prompt
from core.generate.sampling import Sampling
from core.generate.slots import SlotCache
from core.generate.target import Target
from draft_training.drafters import Opened

REPLAYS = 50
WARM_UP = 3  # runs before recording: kernels are compiled, libraries take their workspaces


@dataclass(frozen=True)
class Graphed:
    """Medians in milliseconds over replays, with `context` tokens before the block."""

    context: int
    draft_ms: float
    verify_ms: float

    def tokens_s(self, tokens_a_round: float) -> float:
        return 1000 * tokens_a_round / (self.draft_ms + self.verify_ms)


@dataclass(frozen=True)
class Fixed:
    """One round over and over. draft: drafts [1, K] and what the drafter keeps of the block; None without a drafter.
    verify: the target's choice after every token of the block [1, K + 1]."""

    draft: Callable[[], Tensor] | None
    verify: Callable[[], Tensor]


@torch.no_grad()
def fixed_round(model: nn.Module, opened: Opened | None, prompts: Iterable[Prompt], context: int) -> Fixed:
    """Read `context` tokens of the prompts' text; the block is what follows them.

    Raises:
        DataError: the prompts have fewer tokens.
    """
    target = Target(model, opened.taps if opened else ())
    width = opened.drafts + 1 if opened else 1
    text = [i for p in prompts for i in p.ids][: context + width]
    if len(text) < context + width:
        raise DataError(f"latency.context={context} needs {context + width} tokens of prompts; there are {len(text)}")
    ids = torch.tensor([text], device=target.device)
    place = torch.arange(context + width, device=target.device)[None]
    cache, greedy, noise = SlotCache(1, context + width), Sampling(), torch.Generator(target.device)
    last = torch.tensor([context - 1], device=target.device)
    _, before = target.step(ids[:, :context], place[:, :context], cache, context, last)
    block, position, used = ids[:, context:], place[:, context:], context + width

    def verify() -> Tensor:
        return target.step(block, position, cache, used)[0].argmax(-1)

    if opened is None:
        return Fixed(None, verify)
    proposer = opened.proposer(target, candidates=1)  # more are for the log, and a selection costs a chain K times
    proposer.start(1, used)
    proposer.extend(ids[:, :context], before, place[:, :context], context)
    features = target.step(block, position, cache, used)[1]

    def draft() -> Tensor:
        found = proposer.propose(block[:, 0], position[:, 0], greedy, noise).tokens
        proposer.extend(block, features, position, used)
        return found

    return Fixed(draft, verify)


@torch.no_grad()
def record(work: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """The graph of `work` and the memory its result is left in.

    Raises:
        UnsupportedError: `work` needs a value from the GPU on the way.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            found = work()
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise UnsupportedError(f"a round cannot be recorded as a CUDA graph: {str(error).splitlines()[0]}") from error
    return graph, found


def replay_ms(graph: torch.cuda.CUDAGraph) -> float:
    """Median of one replay, the host's call and the wait included."""
    spent = []
    for _ in range(REPLAYS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        spent.append(1000 * (time.perf_counter() - began))
    return sorted(spent)[len(spent) // 2]


def graphed(model: nn.Module, opened: Opened | None, prompts: list[Prompt], context: int) -> Graphed:
    """Record and time a round.

    Raises:
        DataError: prompts shorter than `context` together. UnsupportedError: cannot be recorded.
    """
    fixed = fixed_round(model, opened, prompts, context)
    verify = replay_ms(record(fixed.verify)[0])
    draft = replay_ms(record(fixed.draft)[0]) if fixed.draft else 0.0
    return Graphed(context, draft, verify)
