"""What each step computes: continuous batching with chunked prefill, and preemption when pages run out.

A step has room for `tokens` tokens. Requests that generate come first (their round is short and somebody waits), then
prompts that are being read, then waiting requests, each in the order of arrival. A prompt that does not fit is read in
pieces. Where pages run out, the youngest request gives its own back and waits again, at the front; its tokens and its
draft are kept, its pages mostly stay in the prefix cache, and since every bit of a row is its own, it goes on as if
nothing had happened.
"""

from collections import deque
from dataclasses import dataclass

from infer.pages import OutOfPages, PageBook
from infer.sequence import Sequence


@dataclass(frozen=True)
class Work:
    """Compute `count` tokens of `sequence.ids` from `computed` on, then, if `emits`, verify `drafted` drafts."""

    sequence: Sequence
    count: int
    drafted: int
    emits: bool


class Scheduler:
    """Requests that wait and that run.

    Args:
        rows: requests at once. tokens: of a step. drafts: most drafts of a round; rows * (1 + drafts) must fit in
            `tokens`. ahead: positions after a request's last token that a round may write. reuse: the prefix cache.
    """

    def __init__(self, book: PageBook, *, rows: int, tokens: int, drafts: int, ahead: int, reuse: bool) -> None:
        assert rows * (1 + drafts) <= tokens
        self.book, self.rows, self.tokens, self.drafts, self.ahead, self.reuse = (
            book,
            rows,
            tokens,
            drafts,
            ahead,
            reuse,
        )
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in the order of arrival
        self.preemptions = self.queries = self.hits = 0

    @property
    def step_positions(self) -> int:
        """Most positions one request advances or writes in a step."""
        return self.tokens + self.ahead

    def plan(self) -> list[Work]:
        """The next step. Pages for all of it are reserved."""
        planned: dict[int, Work] = {}
        for sequence in sorted(self.running, key=lambda s: s.behind > 1):
            if sequence in self.running:  # not preempted meanwhile
                self.place(sequence, planned)
        while self.waiting and len(self.running) < self.rows and self.room(planned) and self.admit(planned):
            pass
        return list(planned.values())

    def room(self, planned: dict[int, Work]) -> int:
        return self.tokens - sum(work.count + work.drafted for work in planned.values())

    def work_for(self, sequence: Sequence, room: int) -> Work | None:
        drafted = sequence.drafted(self.drafts)
        if sequence.behind + drafted <= room:
            return Work(sequence, sequence.behind, drafted, True)
        count = min(room, sequence.behind - 1)
        return Work(sequence, count, 0, False) if count > 0 else None

    def place(self, sequence: Sequence, planned: dict[int, Work]) -> None:
        """Plan a running request, preempting the youngest ones as long as pages are missing."""
        work = self.work_for(sequence, self.room(planned))
        while work is not None:
            try:
                self.reserve(work)
                planned[id(sequence)] = work
                return
            except OutOfPages:
                victim = self.running[-1]
                self.preempt(victim)
                planned.pop(id(victim), None)
                if victim is sequence:
                    return

    def reserve(self, work: Work) -> None:
        sequence = work.sequence
        assert sequence.table is not None
        end = len(sequence.ids) + self.ahead if work.emits else sequence.computed + work.count
        self.book.reserve(sequence.table, end)

    def admit(self, planned: dict[int, Work]) -> bool:
        """Start the first waiting request if its whole prompt fits beside what runs; False: not now."""
        sequence = self.waiting[0]
        table, cached = self.book.open(sequence.ids, self.reuse, sequence.digests)
        sequence.table, sequence.computed = table, cached
        work = self.work_for(sequence, self.room(planned))
        try:
            if work is None or (self.running and not self.book.holds(table, len(sequence.ids) + self.ahead)):
                raise OutOfPages
            self.reserve(work)
        except OutOfPages:
            self.drop(sequence)
            return False
        self.waiting.popleft()
        self.running.append(sequence)
        if sequence.cached is None:
            sequence.cached = cached
            if self.reuse:
                self.queries, self.hits = self.queries + len(sequence.ids), self.hits + cached
        planned[id(sequence)] = work
        return True

    def preempt(self, sequence: Sequence) -> None:
        self.drop(sequence)
        self.running.remove(sequence)
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def drop(self, sequence: Sequence) -> None:
        """Give its pages back."""
        assert sequence.table is not None
        self.book.close(sequence.table)
        sequence.table, sequence.computed = None, 0

    def advance(self, sequence: Sequence, computed: int) -> None:
        """The first `computed` tokens are final."""
        assert sequence.table is not None
        sequence.computed = computed
        self.book.commit(sequence.table, sequence.ids, computed)

    def remove(self, sequence: Sequence) -> None:
        """A request that ended, wherever it is."""
        if sequence.table is not None:
            self.drop(sequence)
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
