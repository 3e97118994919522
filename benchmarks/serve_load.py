"""Many clients at once against a running server on this machine: what is lost, what fails, how long it takes.

    python -m benchmarks.serve_load [--url http://127.0.0.1:8000] [--concurrency 64] [--requests 512] [--cancel 0.2]
                                    [--json FILE]

Prompts and replies of mixed lengths, streamed and whole; a share of the clients leaves at a random moment. Every reply
that ends must have exactly the tokens it asked for, or it counts as lost. Latencies are the client's, of streamed
replies. At the end nothing may run or wait in the server any more. Memory is the server's own figure, before and after.
"""

import argparse
import asyncio
import json
import os
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.common import publish

LOOPBACK = ("127.0.0.1", "localhost", "::1")
WORDS = (
    "the",
    "quick",
    "brown",
    "fox",
    "jumps over",
    "a lazy dog",
    "größer",
    "日本語",
    "🎉",
    "and more text,",
    "follows.\n",
)
SETTLING_S = 10.0


@dataclass
class Tally:
    """outcomes: done, cancelled, busy (429), failed, lost. Seconds of streamed replies."""

    outcomes: Counter[str] = field(default_factory=Counter)
    complaints: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    tokens: int = 0

    def complain(self, kind: str, what: str) -> None:
        self.outcomes[kind] += 1
        self.complaints.append(f"{kind}: {what[:200]}")


class Client:
    def __init__(self, options: argparse.Namespace, session: aiohttp.ClientSession) -> None:
        self.options, self.session, self.tally = options, session, Tally()
        self.random = random.Random(options.seed)

    def body(self) -> dict[str, Any]:
        """Short requests among long ones, as in real traffic."""
        size, limit = (int(m ** self.random.random()) for m in (self.options.prompt_words, self.options.max_tokens))
        return {
            "prompt": " ".join(self.random.choice(WORDS) for _ in range(max(1, size))),
            "max_tokens": max(1, limit),
            "ignore_eos": True,
            "stream": self.random.random() < 0.75,
            "temperature": self.random.choice([0, 1]),
        }

    async def worker(self, work: list[dict[str, Any]]) -> None:
        while work:
            body = work.pop()
            patience = self.random.expovariate(1 / self.options.patience)
            leaves = self.random.random() < self.options.cancel
            try:
                async with asyncio.timeout(patience if leaves else self.options.timeout):
                    await self.one(body)
            except TimeoutError:
                if leaves:
                    self.tally.outcomes["cancelled"] += 1
                else:
                    self.tally.complain("lost", f"no end after {self.options.timeout:g} s: {body['max_tokens']} tokens")
            except aiohttp.ClientError as error:
                self.tally.complain("failed", f"{type(error).__name__}: {error}")

    async def one(self, body: dict[str, Any]) -> None:
        begun = time.perf_counter()
        if body["stream"]:
            body = body | {"stream_options": {"include_usage": True}}
        async with self.session.post("/v1/completions", json=body) as reply:
            if reply.status == 429:
                self.tally.outcomes["busy"] += 1
            elif reply.status != 200:
                self.tally.complain("failed", f"{reply.status} {await reply.text()}")
            else:
                usage = await (self.events(reply, begun) if body["stream"] else self.object(reply))
                self.check(usage, body)
                self.tally.whole.append(time.perf_counter() - begun)

    async def object(self, reply: aiohttp.ClientResponse) -> dict[str, Any] | None:
        return (await reply.json())["usage"]

    async def events(self, reply: aiohttp.ClientResponse, begun: float) -> dict[str, Any] | None:
        """The usage, or None where the stream broke off or reported an error."""
        usage, last = None, None
        async for line in reply.content:
            text = line.decode().strip()
            if text == "data: [DONE]":
                return usage
            if not text:
                continue
            event = json.loads(text.removeprefix("data: "))
            if "error" in event:
                self.tally.complaints.append(text[:200])
                return None
            now = time.perf_counter()
            (self.tally.first if last is None else self.tally.between).append(now - (last or begun))
            last, usage = now, event.get("usage") or usage
        return None

    def check(self, usage: dict[str, Any] | None, body: dict[str, Any]) -> None:
        made = usage["completion_tokens"] if usage else None
        if made == body["max_tokens"]:
            self.tally.outcomes["done"] += 1
            self.tally.tokens += made
        else:
            self.tally.complain("lost", f"{made} tokens of {body['max_tokens']}")


async def figures(session: aiohttp.ClientSession) -> dict[str, float]:
    async with session.get("/metrics") as reply:
        text = await reply.text()
    wanted = ("process_resident_memory_bytes", "fp4flash:num_requests_running", "fp4flash:num_requests_waiting")
    samples = (s for f in text_string_to_metric_families(text) for s in f.samples)
    return {s.name: s.value for s in samples if s.name in wanted}


async def settled(session: aiohttp.ClientSession) -> dict[str, float]:
    """Figures once nothing runs or waits, or after SETTLING_S."""
    end = time.monotonic() + SETTLING_S
    while True:
        now = await figures(session)
        if time.monotonic() > end or not any(v for k, v in now.items() if "num_requests" in k):
            return now
        await asyncio.sleep(0.1)


def percentiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    if not ordered:
        return {}
    return {f"p{p}": round(ordered[min(len(ordered) - 1, len(ordered) * p // 100)], 6) for p in (50, 90, 99)}


async def load(options: argparse.Namespace) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(options.url, headers=headers, connector=connector) as session:
        client = Client(options, session)
        before = await settled(session)
        work = [client.body() for _ in range(options.requests)]
        begun = time.perf_counter()
        await asyncio.gather(*(client.worker(work) for _ in range(options.concurrency)))
        wall = time.perf_counter() - begun
        after = await settled(session)
    tally = client.tally
    return {
        "concurrency": options.concurrency,
        "requests": options.requests,
        "outcomes": dict(tally.outcomes),
        "complaints": tally.complaints[:10],
        "wall_s": round(wall, 3),
        "tokens_per_s": round(tally.tokens / wall, 1),
        "first_event_s": percentiles(tally.first),
        "between_events_s": percentiles(tally.between),
        "whole_s": percentiles(tally.whole),
        "server_mib": {
            when: round(found["process_resident_memory_bytes"] / 2**20, 1)
            for when, found in (("before", before), ("after", after))
            if "process_resident_memory_bytes" in found
        },
        "left_in_server": {k.split(":")[1]: v for k, v in after.items() if "num_requests" in k},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of a server on this machine")
    parser.add_argument("--api-key", default=os.environ.get("FP4FLASH_API_KEY"))
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--prompt-words", type=int, default=200, help="most words of a prompt")
    parser.add_argument("--max-tokens", type=int, default=128, help="most tokens of a reply")
    parser.add_argument("--cancel", type=float, default=0.2, help="share of clients that leave")
    parser.add_argument("--patience", type=float, default=0.5, help="mean seconds after which these leave")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds after which a reply counts as lost")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="also write the result here")
    options = parser.parse_args()
    if urlsplit(options.url).hostname not in LOOPBACK:
        parser.error(f"--url {options.url}: a load is for a server on this machine ({', '.join(LOOPBACK)})")
    try:
        result = asyncio.run(load(options))
    except aiohttp.ClientConnectorError as error:
        print(f"benchmarks.serve_load: {error}; start one with python -m infer.serve --model DIR", file=sys.stderr)
        return 2
    publish("serve_load", result, options.json)
    wrong = result["outcomes"].get("lost", 0) + result["outcomes"].get("failed", 0)
    return 1 if wrong or any(result["left_in_server"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
