"""What a step computes, without a model: who comes first, who gives way, and nobody twice."""

import pytest

from infer.pages import PageBook, Pool
from infer.request import Request
from infer.scheduler import Scheduler
from infer.sequence import Pending, Sequence

SIZE = 4


def scheduler(pages: int = 100, *, rows: int = 4, tokens: int = 16, drafts: int = 0) -> Scheduler:
    ahead = 2 * drafts + 1 if drafts else 0
    return Scheduler(
        PageBook([Pool(pages, SIZE, None)]), rows=rows, tokens=tokens, drafts=drafts, ahead=ahead, reuse=False
    )


def waiting(given: Scheduler, name: str, length: int, drafted: int = 0) -> Sequence:
    made = Sequence(
        Request(name, [0]), list(range(length)), 0, frozenset(), 1000, expected=float(drafted) if drafted else None,
        draft=Pending(list(range(drafted))),
    )  # fmt: skip
    given.waiting.append(made)
    return made


def running(given: Scheduler, name: str, length: int, computed: int) -> Sequence:
    """As if earlier steps had read its first `computed` tokens."""
    made = waiting(given, name, length)
    given.waiting.remove(made)
    given.running.append(made)
    made.table, _ = given.book.open(made.ids, False)
    given.book.reserve(made.table, computed)
    given.advance(made, computed)
    return made


def planned(given: Scheduler) -> list[tuple[str, int, bool]]:
    return [(w.sequence.request.id, w.count, w.emits) for w in given.plan()]


def test_who_generates_comes_before_prompts_and_both_before_who_waits() -> None:
    given = scheduler(tokens=10, rows=4)
    running(given, "prompt", 30, 4)
    running(given, "generates", 9, 8)
    waiting(given, "next", 5)
    assert planned(given) == [("generates", 1, True), ("prompt", 9, False)]
    given.running[0].ids = given.running[0].ids[:9]
    assert planned(given) == [("generates", 1, True), ("prompt", 5, True), ("next", 4, False)]


def test_the_youngest_gives_way_and_comes_back_first() -> None:
    given = scheduler(pages=6, rows=4)
    old, middle, young = (running(given, name, 9, 8) for name in ("old", "middle", "young"))
    waiting(given, "new", 2)
    assert planned(given) == [("old", 1, True), ("middle", 1, True)]
    assert given.running == [old, middle] and given.preemptions == 1
    assert [s.request.id for s in given.waiting] == ["young", "new"] and young.table is None
    given.remove(middle)
    assert [name for name, *_ in planned(given)] == ["old", "young"]
    assert given.waiting[0].request.id == "new"


def test_who_gave_way_is_not_computed_although_it_was_planned() -> None:
    given = scheduler(pages=6, tokens=9)
    old = running(given, "old", 24, 16)
    young = running(given, "young", 8, 7)
    assert planned(given) == [("old", 8, True)]
    assert given.running == [old] and list(given.waiting) == [young]


@pytest.mark.parametrize("tokens", [5, 6, 7, 8, 9])
def test_an_anchor_is_read_in_the_step_that_verifies_its_draft(tokens: int) -> None:
    """However little room there is for a prompt that is read again with a draft that waits."""
    given = scheduler(tokens=tokens, rows=1, drafts=4)
    sequence = waiting(given, "a", 13, drafted=4)
    while not (work := given.plan())[0].emits:
        assert work[0].drafted == 0 and sequence.computed + work[0].count < 13
        given.advance(sequence, sequence.computed + work[0].count)
    assert sequence.computed + work[0].count == 13 and work[0].drafted == 4
