"""`python -m infer.serve --model DIR`: an OpenAI-compatible server for one model.

python -m infer.serve --model DIR                           http://127.0.0.1:8000/v1, no key
torchrun --nproc-per-node 8 -m infer.serve --model DIR      one model over eight GPUs
python -m infer.serve --model DIR --drafter DRAFTER         speculative decoding with a DFlash drafter
FP4FLASH_API_KEY=… python -m infer.serve --model DIR --host 0.0.0.0 --port 80 --served-model-name mimo

    curl http://127.0.0.1:8000/v1/chat/completions -d '{"messages": [{"role": "user", "content": "Hello"}]}'

Endpoints: /v1/completions, /v1/chat/completions, /v1/models, /tokenize, /detokenize, /health, /ready, /metrics,
/version.
SIGTERM and Ctrl-C: new requests get 503, those under way have --grace seconds; the exit status is 0. A second one does
not wait.
"""

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from aiohttp import web

from core.errors import ConfigError
from infer.build import build_engine, join
from infer.command import ending
from infer.lockstep import LeadEngine, follow
from infer.options import add_options, options_of
from infer.parallel import together
from infer.plan import plan_text
from infer.server.app import Server, Settings

KEY_VARIABLE = "FP4FLASH_API_KEY"
LOCAL = ("127.0.0.1", "localhost", "::1")
CLOSING_S = 5.0  # for handlers to write their last words after the grace


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m infer.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="checkpoint folder with its tokenizer")
    parser.add_argument("--drafter", metavar="DIR", help="drafter folder (default: one token a step)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: %(default)s)")
    parser.add_argument(
        "--api-key", help=f"asked of clients; better in the variable {KEY_VARIABLE}, which process lists do not show"
    )
    parser.add_argument(
        "--served-model-name", nargs="+", metavar="NAME", help="names clients may use (default: the folder's name)"
    )
    parser.add_argument(
        "--max-waiting", type=int, default=256, help="requests that may wait for a place; more get 429 (default: 256)"
    )
    parser.add_argument("--max-body-mb", type=float, default=16.0, help="largest request body, in MiB (default: 16)")
    parser.add_argument(
        "--grace", type=float, default=30.0, help="seconds for requests under way after SIGTERM (default: 30)"
    )
    add_options(parser)
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    options = arguments(words)
    return ending("infer.serve", lambda: run(options))


def run(options: argparse.Namespace) -> int:
    settings, engine_options = settings_of(options), options_of(options)
    if options.dry_run:
        print(plan_text(engine_options))
        return 0
    tokenizer = tokenizer_of(Path(options.model))
    ranks = join(engine_options)
    with together(ranks):
        engine = build_engine(engine_options, ranks)
        if not ranks.first:
            for name in (signal.SIGTERM, signal.SIGINT):
                signal.signal(name, signal.SIG_IGN)  # rank 0 says when to end
            follow(engine, ranks)
        elif ranks.shard.world == 1:
            asyncio.run(serve(Server(engine, tokenizer, settings), options))
        else:
            with closing(LeadEngine(engine, ranks)) as lead:
                asyncio.run(serve(Server(lead, tokenizer, settings), options))
    return 0


def tokenizer_of(folder: Path) -> Any:
    """Raises ConfigError for a folder that is not there or has no tokenizer."""
    from core.models.load import load_tokenizer

    if not folder.is_dir():
        raise ConfigError(f"--model {folder}: no such folder")
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise ConfigError(f"--model {folder}: no tokenizer in it (tokenizer.json); copy the base model's there")
    return tokenizer


def settings_of(options: argparse.Namespace) -> Settings:
    """Raises ConfigError for a value out of range."""
    rules = {
        "port": (0 <= options.port < 2**16, "0 to 65535"),
        "max-waiting": (options.max_waiting >= 1, "at least 1"),
        "max-body-mb": (0 < options.max_body_mb <= 2**20, "above 0"),
        "grace": (0 <= options.grace <= 86_400, "0 to 86400"),
    }
    for name, (holds, rule) in rules.items():
        if not holds:
            raise ConfigError(f"--{name} {getattr(options, name.replace('-', '_'))}: expected {rule}")
    key = options.api_key if options.api_key is not None else os.environ.get(KEY_VARIABLE)
    if key is not None and not key.strip():
        raise ConfigError(f"--api-key or {KEY_VARIABLE} is empty; leave it out to ask for no key")
    names = tuple(options.served_model_name or [Path(options.model).resolve().name])
    return Settings(names, key and key.strip(), options.max_waiting, int(options.max_body_mb * 2**20))


async def serve(server: Server, options: argparse.Namespace) -> None:
    """Listen until a signal, then end in order. Prints the address once it can be used."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    stop, hurry = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, lambda: (hurry if stop.is_set() else stop).set())
    # handler_cancellation: a client that goes away ends the handler, which ends its requests.
    runner = web.AppRunner(
        server.app(), handler_cancellation=True, shutdown_timeout=CLOSING_S, access_log=None
    )  # fmt: skip
    await runner.setup()
    try:
        await listen(runner, options.host, options.port)
        if options.host not in LOCAL and server.settings.api_key is None:
            print(
                f"warning: listening on {options.host} without an API key: whoever reaches the port can use the model",
                file=sys.stderr, flush=True,
            )  # fmt: skip
        host, port = runner.addresses[0][:2]
        print(f"serving {', '.join(server.settings.names)} on http://{host}:{port}/v1", flush=True)
        await stop.wait()
        print(f"shutting down; requests under way have {options.grace:g} s", flush=True)
        await first_of(server.engine.drain(options.grace), hurry.wait())
        server.engine.end_all()
    finally:
        await runner.cleanup()


async def listen(runner: web.AppRunner, host: str, port: int) -> None:
    """Raises ConfigError for an address that is taken, or is none of this machine."""
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as error:
        raise ConfigError(f"--host {host} --port {port}: cannot listen there ({error.strerror or error})") from error


async def first_of(*work: Any) -> None:
    tasks = [asyncio.ensure_future(w) for w in work]
    _, others = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


if __name__ == "__main__":
    sys.exit(main())
