"""Pages of the key-value cache: who holds which, and which can be reused for another request with the same beginning.

Layers with the same window share page numbers and form a **group**; every group has a pool of its own, because a window
layer needs few pages however long the text is. A page holds `size` consecutive positions of one request.

Prefix cache. A full page of final tokens is registered under the hash of everything up to its end. When nobody holds it
any more it stays, oldest first to go, until its memory is needed. A request may start after n pages of its prompt if
every group still has what later queries can see: all n pages without a window, the last W - 1 positions with one.

Only host bookkeeping here; the tensors are in infer.cache. Nothing is ever moved or copied.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from core.errors import ConfigError

NOWHERE = -1  # a page that slid out of the window


class OutOfPages(Exception):
    """A pool has no page left."""


@dataclass
class Pool:
    """Pages of one group: free, held (count of holders), or registered and idle (kept for the prefix cache)."""

    pages: int
    size: int
    window: int | None
    free: list[int] = field(init=False)
    held: dict[int, int] = field(default_factory=dict)
    idle: OrderedDict[int, None] = field(default_factory=OrderedDict)  # oldest first
    by_hash: dict[bytes, int] = field(default_factory=dict)
    hash_of: dict[int, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.free = list(range(self.pages - 1, -1, -1))

    @property
    def available(self) -> int:
        return len(self.free) + len(self.idle)

    def take(self) -> int:
        """A page for new tokens; forgets the longest idle registered one if none is free."""
        if self.free:
            page = self.free.pop()
        elif self.idle:
            page, _ = self.idle.popitem(last=False)
            del self.by_hash[self.hash_of.pop(page)]
        else:
            raise OutOfPages
        self.held[page] = 1
        return page

    def share(self, page: int) -> None:
        """One holder more of a registered page."""
        self.idle.pop(page, None)
        self.held[page] = self.held.get(page, 0) + 1

    def release(self, page: int) -> None:
        self.held[page] -= 1
        if self.held[page]:
            return
        del self.held[page]
        if page in self.hash_of:
            self.idle[page] = None
        else:
            self.free.append(page)

    def register(self, page: int, digest: bytes) -> None:
        """Make a full page findable, unless an equal one already is."""
        if digest not in self.by_hash and page not in self.hash_of:
            self.by_hash[digest], self.hash_of[page] = page, digest

    def first_seen(self, position: int) -> int:
        """Number of the first page that a query at `position` or later can see."""
        return 0 if self.window is None else max(0, position - self.window + 1) // self.size


@dataclass
class Table:
    """Pages of one request: `pages[g][i]` holds positions i * size .. of group g. `hashed`: registered pages."""

    pages: list[list[int]]
    dropped: list[int]  # by group: pages before this one slid out
    hashed: int = 0
    digest: bytes = b""


class PageBook:
    """All groups' pools, and the tables of the requests that run."""

    def __init__(self, pools: Sequence[Pool]) -> None:
        self.pools = list(pools)
        self.size = pools[0].size

    @property
    def used(self) -> float:
        """Share of pages held by requests, of the fullest pool."""
        return max(len(p.held) / p.pages for p in self.pools)

    def fits(self, tokens: int, step: int, ahead: int) -> bool:
        """Whether a request of `tokens` could run alone, reading `step` at a time and writing `ahead` of its end."""
        return all(self.worst(pool, tokens + ahead, step + ahead) <= pool.pages for pool in self.pools)

    def worst(self, pool: Pool, positions: int, step: int) -> int:
        whole = -(-positions // self.size)
        return whole if pool.window is None else min(whole, -(-(pool.window + step) // self.size) + 1)

    def open(self, ids: Sequence[int], reuse: bool, known: list[bytes] | None = None) -> tuple[Table, int]:
        """A table for a new request, and how many of its first tokens are cached. At least one token is left over.

        known: digests of the request from earlier calls, continued here: who waits for pages asks at every step.
        """
        table = Table([[] for _ in self.pools], [0] * len(self.pools))
        digests = chain(ids, self.size, (len(ids) - 1) // self.size, known) if reuse else []
        count = self.longest(digests)
        for group, pool in enumerate(self.pools):
            first = pool.first_seen(count * self.size)
            table.dropped[group] = first
            table.pages[group] = [NOWHERE] * min(first, count)
            for digest in digests[first:count]:
                page = pool.by_hash[digest]
                pool.share(page)
                table.pages[group].append(page)
        table.hashed, table.digest = count, digests[count - 1] if count else b""
        return table, count * self.size

    def longest(self, digests: Sequence[bytes]) -> int:
        """Most leading pages after which every group has all that a later query sees."""
        runs = [0] * len(self.pools)  # cached pages in a row, up to here
        best = 0
        for count, digest in enumerate(digests, 1):
            for group, pool in enumerate(self.pools):
                runs[group] = runs[group] + 1 if digest in pool.by_hash else 0
            if all(run >= count - p.first_seen(count * self.size) for run, p in zip(runs, self.pools, strict=True)):
                best = count
        return best

    def holds(self, table: Table, positions: int) -> bool:
        """Whether the pages that a request needs at once, read up to `positions`, are there now."""
        need = -(-positions // self.size)
        return all(
            min(need - len(pages), pool.pages if pool.window is None else self.row(pool)) <= pool.available
            for pool, pages in zip(self.pools, table.pages, strict=True)
        )

    def row(self, pool: Pool) -> int:
        """Pages of a request in a group with a window, between two steps."""
        assert pool.window is not None
        return -(-pool.window // self.size) + 1

    def reserve(self, table: Table, positions: int) -> None:
        """Pages for positions 0 .. positions - 1.

        Raises:
            OutOfPages: not enough; what was taken stays in the table, so that the call can be repeated or the table
                closed.
        """
        need = -(-positions // self.size)
        for group, pool in enumerate(self.pools):
            pages = table.pages[group]
            while len(pages) < need:
                pages.append(pool.take())

    def commit(self, table: Table, ids: Sequence[int], final: int) -> None:
        """Tokens 0 .. final - 1 are computed and will not change: register full pages, drop those out of sight.

        ids: the request's tokens, at least `final`.
        """
        while (table.hashed + 1) * self.size <= final:
            at = table.hashed
            table.digest = link(table.digest, ids[at * self.size : (at + 1) * self.size])
            for group, pool in enumerate(self.pools):
                if table.pages[group][at] != NOWHERE:
                    pool.register(table.pages[group][at], table.digest)
            table.hashed += 1
        self.slide(table, final)

    def slide(self, table: Table, final: int) -> None:
        """Drop the pages that no query at `final` or later can see."""
        for group, pool in enumerate(self.pools):
            pages, first = table.pages[group], min(pool.first_seen(final), len(table.pages[group]))
            for at in range(table.dropped[group], first):
                pool.release(pages[at])
                pages[at] = NOWHERE
            table.dropped[group] = max(table.dropped[group], first)

    def close(self, table: Table) -> None:
        """Give everything back; the last pages first, so that beginnings stay cached longest."""
        for pool, pages in zip(self.pools, table.pages, strict=True):
            for page in reversed(pages):
                if page != NOWHERE:
                    pool.release(page)
            pages.clear()


def link(before: bytes, ids: Sequence[int]) -> bytes:
    """Hash of a page's tokens and everything before them; cryptographic, since prompts come from strangers."""
    return hashlib.sha256(before + b"".join(i.to_bytes(4, "little") for i in ids)).digest()


def chain(ids: Sequence[int], size: int, pages: int, known: list[bytes] | None = None) -> list[bytes]:
    """Digests of the first `pages` full pages; `known`, the first of them, is continued in place."""
    digests = [] if known is None else known
    for at in range(len(digests), pages):
        digests.append(link(digests[-1] if at else b"", ids[at * size : (at + 1) * size]))
    return digests[:pages]


def plan_pools(
    windows: Sequence[int | None], *, size: int, tokens: int, rows: int, step_tokens: int, ahead: int
) -> list[Pool]:
    """Pools for the distinct windows of a model and its drafter.

    Args:
        tokens: positions that groups without a window hold in all. rows: requests at once. step_tokens: of all requests
            together. ahead: positions that a round writes beyond a request's last token.
    Window groups get what `rows` requests can need, and as much again for the prefix cache, but never more than a group
    without a window.
    """
    if tokens < size:
        raise ConfigError(f"kv_tokens={tokens}: expected at least one page of {size}")
    whole = tokens // size
    pools = []
    for window in windows:
        if window is None:
            pools.append(Pool(whole, size, None))
        else:
            row = -(-(window + ahead) // size) + 1
            pools.append(Pool(min(whole, 2 * rows * row + -(-step_tokens // size)), size, window))
    return pools
