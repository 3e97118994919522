"""Pages: none is lost or shared by mistake, the prefix cache finds what is there, windows let go of the rest."""

import random
from itertools import product

import pytest

from core.errors import ConfigError
from infer.pages import NOWHERE, OutOfPages, PageBook, Pool, Table, plan_pools

SIZE = 4


def book(*windows: int | None, pages: int = 12) -> PageBook:
    return PageBook([Pool(pages, SIZE, window) for window in windows])


def whole(given: PageBook, tables: list[Table]) -> None:
    """Every page is free, idle or held, once; holders are exactly the tables."""
    for group, pool in enumerate(given.pools):
        holders: dict[int, int] = {}
        for table in tables:
            for page in table.pages[group]:
                if page != NOWHERE:
                    holders[page] = holders.get(page, 0) + 1
        assert holders == pool.held
        states = [*pool.free, *pool.idle, *pool.held]
        assert sorted(states) == list(range(pool.pages))
        assert set(pool.idle) <= set(pool.hash_of) and sorted(pool.by_hash.values()) == sorted(pool.hash_of)


def test_random_lives_of_requests_keep_the_books() -> None:
    """Opening, growing, registering, sliding, closing, running out: 400 random lives over shared beginnings."""
    rng = random.Random(0)
    given = book(None, 6, pages=20)
    texts = [[rng.randrange(3) for _ in range(60)] for _ in range(3)]
    live: list[tuple[Table, list[int], int]] = []
    for _ in range(3000):
        action = rng.random()
        if action < 0.2 and len(live) < 5:
            ids = texts[rng.randrange(3)][: rng.randrange(1, 60)]
            table, cached = given.open(ids, reuse=True)
            assert cached % SIZE == 0 and cached < len(ids)
            live.append((table, ids, cached))
        elif action < 0.8 and live:
            at = rng.randrange(len(live))
            table, ids, done = live[at]
            step = min(len(ids) - done, rng.randrange(1, 9))
            try:
                given.reserve(table, done + step)
            except OutOfPages:
                given.close(table)
                del live[at]
            else:
                given.commit(table, ids, done + step)
                live[at] = (table, ids, done + step)
                for group, pool in enumerate(given.pools):  # all that the next query sees is there
                    first = pool.first_seen(done + step)
                    assert NOWHERE not in table.pages[group][first:]
        elif live:
            table, *_ = live.pop(rng.randrange(len(live)))
            given.close(table)
        whole(given, [t for t, *_ in live])
    for table, *_ in live:
        given.close(table)
    whole(given, [])
    assert given.used == 0


def filled(given: PageBook, ids: list[int]) -> Table:
    table, cached = given.open(ids, reuse=True)
    given.reserve(table, len(ids))
    given.commit(table, ids, len(ids))
    assert cached >= 0
    return table


def test_a_beginning_is_found_again_and_another_is_not() -> None:
    given = book(None)
    ids = list(range(11))
    table = filled(given, ids)
    shared, cached = given.open([*ids, 99], reuse=True)
    assert cached == 8 and shared.pages[0] == table.pages[0][:2]
    assert given.open([0, 1, 2, 99, *ids[4:]], reuse=True)[1] == 0
    assert given.open([*ids, 99], reuse=False)[1] == 0
    given.close(table)
    assert given.open(ids[:8], reuse=True)[1] == 4, "one token must be left to compute"


def test_digests_are_continued(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that waits is looked up at every step, and hashed once."""
    given, known = book(None), list[bytes]()
    given.close(filled(given, list(range(20))))
    assert given.open(list(range(9)), True, known)[1] == 8
    monkeypatch.setattr("infer.pages.link", lambda before, ids: pytest.fail("hashed again"))
    assert given.open(list(range(9)), True, known)[1] == 8
    monkeypatch.undo()
    assert given.open(list(range(17)), True, known)[1] == 16 and len(known) == 4
    assert given.open(list(range(9)), True, known)[1] == 8, "only the pages of these tokens"


def test_a_window_needs_only_its_last_positions() -> None:
    """After 20 tokens the window group has let go of the first pages; a longer prompt still starts there."""
    given = book(None, 5)
    ids = list(range(20))
    table = filled(given, ids)
    assert table.pages[1][:4] == [NOWHERE] * 4 and len([p for p in table.pages[0] if p != NOWHERE]) == 5
    given.close(table)
    again, cached = given.open([*ids, 1, 2], reuse=True)
    assert cached == 20 and again.pages[1] == [NOWHERE] * 4 + [again.pages[1][4]]
    given.close(again)
    while given.pools[1].free:  # the window's pages are needed by somebody else
        given.pools[1].take()
    for _ in range(5):
        given.pools[1].take()
    assert given.open([*ids, 1, 2], reuse=True)[1] == 0


def test_the_oldest_beginning_is_forgotten_first() -> None:
    given = book(None, pages=4)
    first, second = [1] * 8, [2] * 8
    for ids in (first, second):
        given.close(filled(given, ids))
    given.close(filled(given, [3] * 4))
    assert given.open([*second, 0], reuse=True)[1] == 8
    assert given.open([*first, 0], reuse=True)[1] < 8


def test_the_end_of_a_text_is_forgotten_before_its_beginning() -> None:
    given = book(None, pages=4)
    given.close(filled(given, [1] * 16))
    for pages in (3, 2, 1):
        given.pools[0].take()
        table, cached = given.open([1] * 17, reuse=True)
        assert cached == pages * SIZE
        given.close(table)


def test_out_of_pages_takes_nothing_away() -> None:
    given = book(None, pages=3)
    table, _ = given.open([1], reuse=False)
    with pytest.raises(OutOfPages):
        given.reserve(table, 13)
    given.reserve(table, 12)
    given.close(table)
    assert given.used == 0


def test_what_fits_alone_is_what_a_lonely_request_can_have() -> None:
    for window, pages in product((None, 5, 9), (4, 5, 6, 7)):
        for step, ahead in product((1, 3, 8), (2, 9)):
            given = book(window, pages=pages)
            fitting = [n for n in range(1, 60) if given.fits(n, step, ahead)]
            if not fitting:
                continue
            longest = max(fitting)
            assert fitting == list(range(1, longest + 1))
            table, _ = given.open([0] * min(longest, 50), reuse=False)
            for at in range(0, min(longest, 50), step):
                end = min(at + step, longest, 50)
                given.reserve(table, end + ahead)
                given.commit(table, [0] * 60, end)


def test_pools_of_windows_are_small_and_too_few_positions_are_refused() -> None:
    sizes = {"size": 16, "rows": 4, "step_tokens": 64, "ahead": 15}
    full, window = plan_pools([None, 128], tokens=16_000, **sizes)
    assert full.pages == 1000 and window.pages == 2 * 4 * 10 + 4
    assert plan_pools([None, 128], tokens=160, **sizes)[1].pages == 10
    with pytest.raises(ConfigError, match="kv_tokens=15"):
        plan_pools([None], tokens=15, **sizes)
