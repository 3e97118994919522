"""Served and teacher-forced round logs of prompts, with progress."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from core.generate.decode import PlainGenerator
from core.generate.interface import Generator, Prompt, Reply
from core.generate.sampling import Sampling
from core.generate.target import Target
from draft_training.drafters import Opened, pairs_of
from draft_training.estimators import Rounds
from draft_training.replay import rounds_along

Replies = dict[str, Reply]  # by prompt


def counted(found: Iterator[Any], total: int, title: str, tokens: Any) -> Iterator[Any]:
    """A bar over replies with tokens/s."""
    made, began = 0, time.perf_counter()
    with tqdm(total=total, desc=title, unit="reply", leave=False) as bar:
        for one in found:
            made += tokens(one)
            bar.update()
            bar.set_postfix(tok_s=f"{made / (time.perf_counter() - began):,.0f}", refresh=False)
            yield one


def decode(generator: Generator, prompts: list[Prompt], sampling: Sampling, title: str) -> Replies:
    """Replies by prompt, in the order of the prompts."""
    found = {r.id: r for r in counted(generator.generate(prompts, sampling), len(prompts), title, lambda r: len(r.ids))}
    return {p.id: found[p.id] for p in prompts}


def served(
    model: Any, opened: Opened, prompts: list[Prompt], sampling: Sampling, rows: int, eos: Iterable[int], title: str
) -> Replies:
    """Replies by speculative decoding; their `rounds` are the log."""
    target = Target(model, opened.taps)
    return decode(PlainGenerator(target, opened.proposer(target), rows=rows, eos=eos), prompts, sampling, title)


def plain_text(
    model: Any, prompts: list[Prompt], sampling: Sampling, rows: int, eos: Iterable[int], title: str
) -> Replies:
    """The target's own text, by ordinary decoding: what no drafter had a part in."""
    return decode(PlainGenerator(Target(model), rows=rows, eos=eos), prompts, sampling, title)


def log_of(replies: Replies) -> Rounds:
    return {i: reply.rounds for i, reply in replies.items()}


def teacher_forced(model: Any, opened: Opened, prompts: list[Prompt], text: Replies, title: str) -> Rounds | None:
    """The rounds along a text that is there; None where this kind of drafter cannot be replayed."""
    if opened.replayed is None:
        return None
    found = opened.replayed(Target(model, opened.taps), pairs_of(prompts, text))
    log = {
        one.id: rounds_along(one, text[one.id].stop)
        for one in counted(found, len(prompts), title, lambda one: len(one.text) - one.first)
    }
    return {p.id: log[p.id] for p in prompts}


@dataclass(frozen=True)
class Same:
    """How many replies are token for token the target's own greedy text, and where the others part from it."""

    equal: int
    total: int
    first: tuple[tuple[str, int], ...]  # (request, first token that differs) of some


def same_text(own: Replies, other: Replies) -> Same:
    parted = []
    for i, reply in own.items():
        there = other[i].ids
        if reply.ids != there:
            shorter = min(len(reply.ids), len(there))
            place = next((n for n in range(shorter) if reply.ids[n] != there[n]), shorter)
            parted.append((i, place))
    return Same(len(own) - len(parted), len(own), tuple(parted[:8]))
