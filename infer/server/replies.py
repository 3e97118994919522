"""A job's choices as one JSON object or as server-sent events, in the dialect of completions or of chat.

Events: `data: {chunk}`, an empty line, …, `data: [DONE]`. Headers go out with the first tokens, so that a request the
engine refuses still gets its own status; an error after that is an event. A client that goes away ends its requests.
"""

import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from aiohttp import web

from core.errors import ConfigError
from infer.request import CANCELLED, FAILED, STOP, Output, Request
from infer.server.async_engine import AsyncEngine, Event
from infer.server.choices import Choice, Delta, TokenNames
from infer.server.errors import ApiError, bad, engine_failure, unavailable
from infer.server.schema import Job

EVENT_STREAM = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


class Reply:
    """Args: prompts: ids of each; `job.n` choices of the first come before those of the second."""

    def __init__(self, engine: AsyncEngine, names: TokenNames, job: Job, model: str, prompts: list[list[int]]) -> None:
        self.engine, self.names, self.job, self.model = engine, names, job, model
        self.id = f"{'chatcmpl' if job.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.prompt_tokens = sum(map(len, prompts))
        each = [(ids, turn) for ids in prompts for turn in range(job.n)]
        self.requests = [
            Request(f"{self.id}-{at}", ids, seeded(job, turn)) for at, (ids, turn) in enumerate(each)
        ]  # fmt: skip
        self.choices = [
            Choice(at, names.tokenizer, job.params, r.ids) for at, r in enumerate(self.requests)
        ]  # fmt: skip

    async def deltas(self) -> AsyncIterator[tuple[Choice, Delta]]:
        """Whatever ends this iteration ends the requests.

        Raises:
            ApiError: refused (400, 429, 503), failed (500), or ended by a shutdown (503).
        """
        submission = self.engine.submit(self.requests)
        try:
            while any(c.finish is None for c in self.choices):
                index, output = checked(await submission.events.get())
                choice = self.choices[index]
                if choice.finish is not None:
                    continue  # tokens of a round that began before the stop string was seen
                delta = choice.feed(output)
                if choice.finish is not None:
                    self.engine.release(submission.ids[index], STOP)
                yield choice, delta
        finally:
            self.engine.release_all(submission)

    async def whole(self) -> web.Response:
        texts = [""] * len(self.choices)
        entries: list[list[Any]] = [[] for _ in self.choices]
        async with aclosing(self.deltas()) as deltas:
            async for choice, delta in deltas:
                texts[choice.index] += delta.text
                entries[choice.index].extend(delta.entries)
        made = [self.whole_choice(c, texts[c.index], entries[c.index]) for c in self.choices]
        kind = "chat.completion" if self.job.chat else "text_completion"
        return web.json_response(self.head(kind) | {"choices": made, "usage": self.usage()})

    async def stream(self, request: web.Request) -> web.StreamResponse:
        async with aclosing(self.deltas()) as deltas:
            first = await anext(deltas)
            response = web.StreamResponse(headers=EVENT_STREAM)
            await response.prepare(request)
            try:
                if self.job.chat:
                    for choice in self.choices:
                        await self.send(
                            response, [self.chunk(choice, {"role": "assistant", "content": ""}, None, None)]
                        )
                await self.send_delta(response, *first)
                async for choice, delta in deltas:
                    await self.send_delta(response, choice, delta)
                if self.job.include_usage:
                    await self.send(response, [], self.usage())
            except ApiError as error:
                await write_event(response, error.body)
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    async def send_delta(self, response: web.StreamResponse, choice: Choice, delta: Delta) -> None:
        if not (delta.text or delta.entries or delta.finish):
            return
        logprobs = self.logprobs(delta.entries) if delta.entries else None
        if self.job.chat:
            made = self.chunk(choice, {"content": delta.text} if delta.text else {}, logprobs, delta.finish)
        else:
            made = {"index": choice.index, "text": delta.text, "logprobs": logprobs, "finish_reason": delta.finish}
        await self.send(response, [made])

    async def send(self, response: web.StreamResponse, choices: list[Any], usage: Any = None) -> None:
        kind = "chat.completion.chunk" if self.job.chat else "text_completion"
        body = self.head(kind) | {"choices": choices}
        await write_event(response, body | {"usage": usage} if self.job.include_usage else body)

    def head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def chunk(self, choice: Choice, delta: dict[str, Any], logprobs: Any, finish: str | None) -> dict[str, Any]:
        return {"index": choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def whole_choice(self, choice: Choice, text: str, entries: list[Any]) -> dict[str, Any]:
        wanted = self.job.params.logprobs is not None
        rest = {"logprobs": self.logprobs(entries) if wanted else None, "finish_reason": choice.finish}
        if self.job.chat:
            return {"index": choice.index, "message": {"role": "assistant", "content": text}} | rest
        return {"index": choice.index, "text": text} | rest

    def logprobs(self, entries: Any) -> dict[str, Any]:
        return self.names.chat(entries) if self.job.chat else self.names.completion(entries)

    def usage(self) -> dict[str, Any]:
        """A prompt counts once, however many choices continue it."""
        made = sum(c.tokens for c in self.choices)
        cached = sum(c.cached for c in self.choices[:: self.job.n])
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": made,
            "total_tokens": self.prompt_tokens + made,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


def seeded(job: Job, turn: int) -> Any:
    """Choices of one prompt differ: each has the next seed."""
    seed = job.params.seed
    return job.params if seed is None or not turn else replace(job.params, seed=(seed + turn) % 2**63)


def checked(event: Event) -> tuple[int, Output]:
    index, output = event
    if isinstance(output, ConfigError):
        raise bad(str(output))
    if output.finish == FAILED:
        raise engine_failure(output.error)
    if output.finish == CANCELLED:
        raise unavailable("the server is shutting down; the request was ended", "shutting_down")
    return index, output


async def write_event(response: web.StreamResponse, body: dict[str, Any]) -> None:
    await response.write(b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n")
