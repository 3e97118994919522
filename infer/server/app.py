"""Routes, the API key, and what the handlers share.

Open to anyone who can reach the port: /health, /ready, /metrics, /version. With an API key everything else needs it.
"""

import asyncio
import hmac
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from infer.request import Engine
from infer.server.async_engine import AsyncEngine
from infer.server.choices import TokenNames
from infer.server.errors import INVALID, ApiError, Handler, as_error_objects, bad, read_json
from infer.server.metrics import Metrics
from infer.server.prompts import Prompts
from infer.server.replies import Reply
from infer.server.schema import Fields, Job, chat_job, completion_job, read_ids, read_messages, read_tools

OPEN = ("/health", "/ready", "/metrics", "/version")


@dataclass(frozen=True)
class Settings:
    """names: of the model, the first is used in replies. max_body: bytes. api_key None: no key is asked for."""

    names: tuple[str, ...]
    api_key: str | None = None
    max_waiting: int = 256
    max_body: int = 16 * 2**20


class Server:
    """The handlers, and what they share."""

    def __init__(self, engine: Engine, tokenizer: Any, settings: Settings) -> None:
        self.settings = settings
        self.tokenizer = tokenizer
        self.metrics = Metrics(settings.names[0])
        self.engine = AsyncEngine(engine, settings.max_waiting, self.metrics)
        self.metrics.watch(lambda: self.engine.stats)
        self.prompts = Prompts(tokenizer, engine.max_length)
        self.names = TokenNames(tokenizer)
        self.tokenising = ThreadPoolExecutor(1, "tokenizer")  # long prompts must not hold up the others' tokens
        self.started = int(time.time())

    def app(self) -> web.Application:
        app = web.Application(
            middlewares=[as_error_objects, self.authorised], client_max_size=self.settings.max_body
        )  # fmt: skip
        app.add_routes(
            [
                web.post("/v1/completions", partial(self.generate, completion_job)),
                web.post("/v1/chat/completions", partial(self.generate, chat_job)),
                web.get("/v1/models", self.models),
                web.get("/v1/models/{name:.+}", self.model),
                web.post("/tokenize", self.tokenize),
                web.post("/detokenize", self.detokenize),
                web.get("/health", self.health),
                web.get("/ready", self.ready),
                web.get("/metrics", self.figures),
                web.get("/version", self.version),
            ]
        )
        app.on_startup.append(self.start)
        app.on_cleanup.append(self.stop)
        return app

    async def start(self, _: web.Application) -> None:
        self.engine.start()

    async def stop(self, _: web.Application) -> None:
        await self.engine.close()
        self.tokenising.shutdown(wait=False)

    @web.middleware
    async def authorised(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Before the body is read. The comparison takes the same time wherever the keys differ."""
        key = self.settings.api_key
        if key is not None and request.path not in OPEN:
            scheme, _, given = request.headers.get("Authorization", "").partition(" ")
            same = hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), key.encode())
            if scheme.lower() != "bearer" or not same:
                raise ApiError(
                    401, "missing or wrong API key; send the header Authorization: Bearer KEY", type=INVALID,
                    code="invalid_api_key",
                )  # fmt: skip
        return await handler(request)

    async def in_tokenizer(self, work: Any, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.tokenising, partial(work, *args))

    async def generate(self, read: Any, request: web.Request) -> web.StreamResponse:
        self.engine.check_open()
        job: Job = read(await read_json(request))
        model = self.named(job.model)
        count = max(1, len(job.prompts)) * job.n
        if count > self.settings.max_waiting:
            most = self.settings.max_waiting
            raise bad(f"n times the prompts is {count:,}; this server queues at most {most:,} (--max-waiting)", "n")
        self.engine.check_room(count)
        prompts = await self.in_tokenizer(self.prompts.of, job)
        reply = Reply(self.engine, self.names, job, model, prompts)
        return await (reply.stream(request) if job.stream else reply.whole())

    def named(self, name: str | None) -> str:
        """The model's name as the client wrote it; the first one where it wrote none."""
        names = self.settings.names
        if name is None or name in names:
            return name or names[0]
        raise ApiError(
            404, f"model {name!r} is not served here; this server has {', '.join(names)}", param="model",
            code="model_not_found",
        )  # fmt: skip

    def card(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self.started,
            "owned_by": "fp4flash",
            "max_model_len": self.engine.max_length,
        }

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [self.card(n) for n in self.settings.names]})

    async def model(self, request: web.Request) -> web.Response:
        return web.json_response(self.card(self.named(request.match_info["name"])))

    async def tokenize(self, request: web.Request) -> web.Response:
        """{"prompt"} or {"messages", "tools"} to {"tokens", "count", "max_model_len"}."""
        fields = Fields(await read_json(request))
        self.named(fields.take("model", "a string"))
        if fields.body.get("messages") is not None:
            messages = read_messages(fields.take("messages", "a list"))
            prompted = fields.take("add_generation_prompt", "true or false", True)
            work = (self.prompts.chat, messages, read_tools(fields), prompted)
        else:
            prompt = fields.take("prompt", "a string")
            if prompt is None:
                raise bad("give prompt or messages", "prompt")
            work = (self.prompts.encode, prompt, fields.take("add_special_tokens", "true or false", True))
        fields.end()
        ids = await self.in_tokenizer(*work)
        return web.json_response({"tokens": ids, "count": len(ids), "max_model_len": self.engine.max_length})

    async def detokenize(self, request: web.Request) -> web.Response:
        """{"tokens"} to {"prompt"}; special tokens are written out."""
        fields = Fields(await read_json(request))
        self.named(fields.take("model", "a string"))
        ids = read_ids(fields.take("tokens", "a list", []), "tokens")
        fields.end()
        most = len(self.tokenizer)
        if any(i >= most for i in ids):
            raise bad(f"tokens: {max(ids)} is beyond this vocabulary of {most:,}", "tokens")
        text = await self.in_tokenizer(partial(self.tokenizer.decode, ids, clean_up_tokenization_spaces=False))
        return web.json_response({"prompt": text})

    async def health(self, _: web.Request) -> web.Response:
        """Whether the engine lives."""
        alive = self.engine.alive
        return web.json_response({"status": "ok" if alive else "the engine is dead"}, status=200 if alive else 503)

    async def ready(self, _: web.Request) -> web.Response:
        """Whether a request would be accepted now."""
        self.engine.check_open()
        self.engine.check_room(1)
        return web.json_response({"status": "ready"})

    async def figures(self, _: web.Request) -> web.Response:
        return web.Response(body=self.metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def version(self, _: web.Request) -> web.Response:
        try:
            found = metadata.version("fp4flash")
        except metadata.PackageNotFoundError:
            found = "a checkout that is not installed"
        return web.json_response({"version": found})
