"""The engine in one thread, its results on the event loop.

The loop's side puts work into a thread-safe inbox and reads events from each submission's own queue. The engine's
thread takes what the inbox holds, runs one step, and hands the outputs over with call_soon_threadsafe, once a step.
Without work it is blocked on the inbox. Only that thread touches the engine.

Failures. A request that the engine refuses or reports as failed concerns that request. A step that raises fails the
requests in flight, which are cancelled, and the engine goes on; MAX_STRIKES such steps in a row, or an error anywhere
else, and it is dead: nothing is accepted any more and /health says so.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from core.errors import ConfigError
from infer.request import CANCELLED, FAILED, Engine, EngineStats, Output, Request
from infer.server.errors import ApiError, unavailable
from infer.server.metrics import Metrics, Timing

log = logging.getLogger("fp4flash.server")
MAX_STRIKES = 3
JOIN_S = 10.0
Event = tuple[int, Output | ConfigError]  # index of the request within its submission


class EngineDeadError(Exception):
    """Steps keep failing."""


@dataclass
class Submission:
    """Requests of one client, and what the engine says about them, in order."""

    ids: list[str]
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)


@dataclass
class Live:
    """A request that has not ended, on the loop's side."""

    submission: Submission
    index: int
    timing: Timing


class AsyncEngine:
    """Args: max_waiting: requests that may wait for a place in the batch; more are refused with 429."""

    def __init__(self, engine: Engine, max_waiting: int, metrics: Metrics) -> None:
        self.max_length = engine.max_length
        self.max_waiting = max_waiting
        self.metrics = metrics
        self.stats: EngineStats = engine.stats()
        self.alive = False
        self.draining = False
        self.idle = asyncio.Event()
        self.idle.set()
        self._engine = engine
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._live: dict[str, Live] = {}
        # of the engine's thread only:
        self._known: set[str] = set()
        self._queued: dict[str, None] = {}  # requests that no step has begun, in order of arrival
        self._strikes = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin stepping; called on the loop."""
        self._loop = asyncio.get_running_loop()
        self.alive = True
        self._thread.start()

    # The loop's side.

    @property
    def waiting(self) -> int:
        return max(0, len(self._live) - self.stats.running)

    def submit(self, requests: Sequence[Request]) -> Submission:
        """Queue requests, all or none.

        Raises:
            ApiError: 503 while shutting down or when the engine is dead, 429 when too many wait.
        """
        self.check_open()
        self.check_room(len(requests))
        submission, now = Submission([r.id for r in requests]), time.perf_counter()
        for index, request in enumerate(requests):
            self._live[request.id] = Live(submission, index, Timing(now, len(request.ids)))
            self._inbox.put(partial(self._add, request))
        self.idle.clear()
        return submission

    def check_open(self) -> None:
        if not self.alive:
            raise unavailable("the engine is not running any more; restart the server", "engine_dead")
        if self.draining:
            raise unavailable("the server is shutting down", "shutting_down")

    def check_room(self, count: int) -> None:
        if self.waiting + count > self.max_waiting:
            raise ApiError(
                429, f"{self.waiting:,} requests are waiting and at most {self.max_waiting:,} may; try again later",
                type="rate_limit_error", code="queue_full",
            )  # fmt: skip

    def release(self, request_id: str, reason: str = CANCELLED) -> None:
        """End a request from this side: a stop string was found, or the client is gone. Ended ones are ignored."""
        if self._forget(request_id, reason):
            self._inbox.put(partial(self._cancel, request_id))

    def release_all(self, submission: Submission) -> None:
        for request_id in submission.ids:
            self.release(request_id)

    async def drain(self, grace: float) -> None:
        """Refuse new requests, wait for the others, and after `grace` seconds end them as cancelled."""
        self.draining = True
        try:
            await asyncio.wait_for(self.idle.wait(), grace)
        except TimeoutError:
            self.end_all()

    def end_all(self) -> None:
        for request_id, live in list(self._live.items()):
            live.submission.events.put_nowait((live.index, Output(request_id, finish=CANCELLED)))
            self.release(request_id)

    async def close(self) -> None:
        """Stop the thread; a step that is under way ends first, or is left behind after JOIN_S seconds."""
        self.draining = True
        self._inbox.put(None)
        if self._thread.ident is not None:
            await asyncio.to_thread(self._thread.join, JOIN_S)
        self.alive = False

    def _forget(self, request_id: str, reason: str) -> bool:
        live = self._live.pop(request_id, None)
        if live is None:
            return False
        self.metrics.finished(live.timing, reason, time.perf_counter())
        if not self._live:
            self.idle.set()
        return True

    def _deliver(self, now: float, events: Sequence[Output | tuple[str, ConfigError]], begun: Sequence[str]) -> None:
        for request_id in begun:
            if request_id in self._live:
                self._live[request_id].timing.began(now)
        for event in events:
            request_id = event.id if isinstance(event, Output) else event[0]
            live = self._live.get(request_id)
            if live is None:
                continue  # released on this side
            if isinstance(event, Output):
                self.metrics.tokens(live.timing, now, len(event.ids))
            live.submission.events.put_nowait((live.index, event if isinstance(event, Output) else event[1]))
            if not isinstance(event, Output) or event.finish is not None:
                self._forget(request_id, event.finish or FAILED if isinstance(event, Output) else FAILED)

    def _died(self, reason: str) -> None:
        self.alive = False
        for request_id, live in list(self._live.items()):
            live.submission.events.put_nowait((live.index, Output(request_id, finish=FAILED, error=reason)))
            self._forget(request_id, FAILED)

    # The engine's thread.

    def _run(self) -> None:
        reason = "the engine stopped"
        try:
            while self._take():
                if self._engine.busy:
                    self._step()
        except Exception as error:
            log.exception("the engine is dead")
            reason = f"{type(error).__name__}: {error}"
        finally:
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._died, reason)

    def _take(self) -> bool:
        """Do what the inbox asks for; blocked while there is nothing to do. False: end."""
        wait = not self._engine.busy
        while True:
            try:
                command = self._inbox.get(block=wait)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            wait = False

    def _add(self, request: Request) -> None:
        try:
            self._engine.add(request)
        except ConfigError as error:
            self._post([(request.id, error)])
        except Exception as error:
            log.exception("request %s could not be added", request.id)
            self._post([failure(request.id, error)])
        else:
            self._known.add(request.id)
            self._queued[request.id] = None

    def _cancel(self, request_id: str) -> None:
        self._known.discard(request_id)
        self._queued.pop(request_id, None)
        self._engine.cancel(request_id)

    def _step(self) -> None:
        worked = bool(self._known)  # else it only reports what was cancelled, which says nothing about the engine
        try:
            outputs = self._engine.step()
        except Exception as error:
            log.exception("a step failed; %d requests end with it", len(self._known))
            failed = [failure(request_id, error) for request_id in self._known]
            for request_id in list(self._known):
                self._cancel(request_id)
            self._post(failed)
            self._strikes += 1
            if self._strikes == MAX_STRIKES:
                raise EngineDeadError(f"{MAX_STRIKES} steps in a row failed, the last with {error}") from error
            return
        if worked:
            self._strikes = 0
        stats = self._engine.stats()
        self._known.difference_update(o.id for o in outputs if o.finish is not None)
        # Requests begin in order of arrival, so those that still wait are the last ones.
        begun = list(self._queued)[: max(0, len(self._queued) - stats.waiting)]
        for request_id in (*begun, *(o.id for o in outputs if o.finish is not None)):
            self._queued.pop(request_id, None)
        self.stats = stats
        if outputs or begun:
            self._post(outputs, begun)

    def _post(self, events: Sequence[Output | tuple[str, ConfigError]], begun: Sequence[str] = ()) -> None:
        self._loop.call_soon_threadsafe(self._deliver, time.perf_counter(), events, begun)


def failure(request_id: str, error: Exception) -> Output:
    return Output(request_id, finish=FAILED, error=f"{type(error).__name__}: {error}")
