"""A server of infer.server on a loopback port, in a thread with its own event loop, for tests that use real clients."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from typing import Any

from aiohttp import web
from openai import OpenAI

from infer.server.app import Server, Settings


class Served:
    """server: its Server object, to be touched only through `on_loop`."""

    def __init__(self, engine: Any, tokenizer: Any, settings: Settings) -> None:
        self.engine, self.settings, self.tokenizer = engine, settings, tokenizer
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.on_loop(self.open())

    def on_loop(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(20)

    async def open(self) -> None:
        self.server = Server(self.engine, self.tokenizer, self.settings)
        self.runner = web.AppRunner(self.server.app(), handler_cancellation=True, shutdown_timeout=2.0)
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", 0).start()
        self.port = self.runner.addresses[0][1]

    def close(self) -> None:
        self.engine.paused = False
        self.on_loop(self.runner.cleanup())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(5)
        self.loop.close()

    @property
    def client(self) -> OpenAI:
        return OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key=self.settings.api_key or "none", max_retries=0,
            timeout=20,
        )  # fmt: skip

    def open_request(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> HTTPConnection:
        """Send a request; `getresponse()` waits for the reply. bytes go as they are, other bodies as JSON."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=20)
        raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection.request("GET" if body is None else "POST", path, raw, headers or {})
        return connection

    def ask(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any, Any]:
        """(status, JSON or text, headers)."""
        connection = self.open_request(path, body, headers)
        reply = connection.getresponse()
        text = reply.read().decode()
        connection.close()
        is_json = reply.headers.get_content_type() == "application/json"
        return reply.status, json.loads(text) if is_json else text, reply.headers


@contextmanager
def serving(engine: Any, tokenizer: Any, **settings: Any) -> Iterator[Served]:
    served = Served(engine, tokenizer, Settings(("tiny", "other"), **settings))
    try:
        yield served
    finally:
        served.close()


def eventually(holds: Callable[[], object], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)
