"""Random requests, lengths, cancellations, too few pages: each text is that of the request alone, no page is lost."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from infer.engine import ModelEngine
from infer.pages import NOWHERE, PageBook, Table
from infer.request import CANCELLED, LENGTH, STOP, Output, Request, SamplingParams, TokenLogprob
from tests import runtime_cases as cases

PAGE = 8
TIGHT = {"rows": 5, "kv_tokens": 14 * PAGE, "page_size": PAGE, "step_tokens": 25, "max_length": 80}
ROOMY = {"rows": 1, "kv_tokens": 1024, "page_size": PAGE, "prefix_cache": False, "max_length": 80}


@dataclass
class Text:
    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: str | None = None

    def take(self, output: Output) -> None:
        assert self.finish is None, "nothing follows the end"
        self.ids.extend(output.ids)
        self.logprobs.extend(output.logprobs)
        self.finish = output.finish


@pytest.fixture(scope="module")
def folders(tmp_path_factory: Any) -> Iterator[tuple[Path, Path]]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    folder, drafter, *_ = cases.both_folders(tmp_path_factory.mktemp("stress"), "mimo")
    yield folder, drafter
    torch.set_num_threads(before)


def random_request(rng: random.Random, name: str, stems: list[list[int]]) -> Request:
    """Prompts that share beginnings, often of whole pages; every way to end."""
    size = rng.choice((1, 2, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 3 * PAGE, 4 * PAGE + 1, rng.randrange(1, 60)))
    sampled = rng.random() < 0.5
    params = SamplingParams(
        temperature=rng.choice((0.5, 1.0, 1.5)) if sampled else 0.0, top_k=rng.choice((0, 0, 20)),
        top_p=rng.choice((1.0, 0.9)), max_tokens=rng.choice((1, 2, 5, 9, 16, 30, None)), seed=rng.randrange(3),
        stop_token_ids=tuple(rng.sample(range(64), rng.choice((0, 0, 3)))), ignore_eos=rng.random() < 0.7,
        logprobs=rng.choice((None, None, 0, 2)),
    )  # fmt: skip
    return Request(name, rng.choice(stems)[:size], params)


def alone(engine: ModelEngine, request: Request) -> Text:
    text = Text()
    engine.add(request)
    while engine.busy:
        for output in engine.step():
            text.take(output)
    return text


def check_books(book: PageBook, tables: list[Table]) -> None:
    """Every page is free, idle or held, once; its holders are the requests that run."""
    for group, pool in enumerate(book.pools):
        held: dict[int, int] = {}
        for page in (p for table in tables for p in table.pages[group] if p != NOWHERE):
            held[page] = held.get(page, 0) + 1
        assert held == pool.held
        assert sorted([*pool.free, *pool.idle, *pool.held]) == list(range(pool.pages))


def crowd(rng: random.Random, engine: ModelEngine, requests: list[Request]) -> dict[str, Text]:
    """Add and cancel at random moments until all have ended."""
    found: dict[str, Text] = {}
    coming = list(requests)
    while coming or engine.busy:
        while coming and rng.random() < 0.5:
            engine.add(coming[0])
            found[coming[0].id] = Text()
            coming.pop(0)
        if found and rng.random() < 0.12:
            engine.cancel(rng.choice(list(found)))  # may have ended
        for output in engine.step():
            found[output.id].take(output)
        running = engine.scheduler.running
        assert len(running) <= engine.scheduler.rows
        assert not any(s.table for s in engine.scheduler.waiting)
        check_books(engine.scheduler.book, [s.table for s in running if s.table])
    return found


@pytest.mark.parametrize("drafted", [False, True], ids=("plain", "drafter"))
def test_a_request_in_a_crowd_is_the_request_alone(folders: tuple[Path, Path], drafted: bool) -> None:
    folder, drafter = folders[0], folders[1] if drafted else None
    rng = random.Random(11 + drafted)
    stems = [[rng.randrange(64) for _ in range(60)] for _ in range(3)]
    requests = [random_request(rng, str(i), stems) for i in range(45)]
    crowded, lonely = cases.engine(folder, drafter, **TIGHT), cases.engine(folder, drafter, **ROOMY)
    undrafted = cases.engine(folder, **ROOMY)
    ends = frozenset({5, 6, 7, 8})
    crowded.ends = lonely.ends = undrafted.ends = ends
    found = crowd(rng, crowded, requests)
    kinds = {CANCELLED: 0, STOP: 0, LENGTH: 0}
    for request in requests:
        wanted = alone(lonely if request.params.temperature else undrafted, request)
        text = found[request.id]
        kinds[text.finish or ""] += 1
        count = len(text.ids)
        if text.finish == CANCELLED:
            assert text.ids == wanted.ids[:count] and count <= len(wanted.ids)
        else:
            assert (text.ids, text.finish) == (wanted.ids, wanted.finish)
        assert len(text.logprobs) == (0 if request.params.logprobs is None else count)
        for one, other in zip(text.logprobs, wanted.logprobs, strict=False):
            assert (one.id, len(one.top)) == (other.id, request.params.logprobs)
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)  # sums of torch's own products on a CPU
    stats = crowded.stats()
    assert all(kinds.values()) and stats.preemptions > 3 and stats.prefix_hits > 0
    assert stats.running == stats.waiting == stats.kv_used == 0 and not crowded.live
    assert not drafted or 0 < stats.accepted < stats.drafted
