"""`python -m infer.chat --model DIR [--drafter DIR]`: talk to a model in the terminal.

/reset forgets the conversation, /stats prints figures of the engine, /system TEXT sets the system message and forgets,
Ctrl-C ends a reply, Ctrl-D ends the program. The whole conversation goes through the model's chat template each turn;
the prefix cache keeps what was read before.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

from core.errors import ConfigError
from infer.command import ending
from infer.generate import add_sampling, sampling_of, statistics
from infer.options import add_options, options_of
from infer.request import SamplingParams

NAME = "infer.chat"


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m {NAME}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="checkpoint folder with its tokenizer")
    parser.add_argument("--drafter", metavar="DIR", help="DFlash drafter folder: speculative decoding")
    parser.add_argument("--system", help="system message")
    add_sampling(parser)
    add_options(parser)
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    options = arguments(words)
    return ending(NAME, lambda: run(options))


def run(options: argparse.Namespace) -> int:
    params, engine = sampling_of(options), options_of(options)
    if options.dry_run:
        from infer.plan import plan_text

        print(plan_text(engine))
        return 0
    from infer.llm import LLM

    given = {k: v for k, v in vars(engine).items() if k not in ("model", "drafter")}
    with LLM(engine.model, drafter=engine.drafter, **given) as llm:
        llm.need_template()
        Conversation(llm, params, options.system).run()
    return 0


class Conversation:
    """Turns so far; rank 0 reads the terminal, and every rank says the same."""

    def __init__(self, llm: Any, params: SamplingParams, system: str | None) -> None:
        self.llm, self.params = llm, params
        self.seconds = 0.0
        self.restart(system)

    def restart(self, system: str | None) -> None:
        self.system = system
        self.turns = [{"role": "system", "content": system}] if system else []

    def run(self) -> None:
        while (line := self.llm.ranks.agree(self.read() if self.llm.ranks.first else None)) is not None:
            if line == "/reset":
                self.restart(self.system)
            elif line.startswith("/system"):
                self.restart(line.removeprefix("/system").strip() or None)
            elif line == "/stats":
                self.say(statistics(self.llm.stats(), self.seconds or 1.0) + "\n")
            elif line.strip():
                self.reply(line)

    def read(self) -> str | None:
        try:
            return input("> ")
        except EOFError:
            print()
            return None

    def say(self, text: str) -> None:
        if self.llm.ranks.first:
            print(text, end="", flush=True)

    def reply(self, line: str) -> None:
        self.turns.append({"role": "user", "content": line})
        begun, text, stream = time.perf_counter(), "", None
        try:
            stream = self.llm.stream(self.llm.encode_chat(self.turns), self.params)
            for piece, done in stream:
                self.say(piece)
                text += piece
                if done.error:
                    self.say(f"[{done.error}]")
        except ConfigError as error:  # too long by now, or the template refuses it
            self.say(f"[{error}; /reset forgets the conversation]\n")
            self.turns.pop()
            return
        except KeyboardInterrupt:
            if self.llm.ranks.shard.world > 1:
                raise  # the other ranks cannot know where this one stopped
        finally:
            if stream is not None:
                stream.close()
        self.say("\n")
        self.seconds += time.perf_counter() - begun
        self.turns.append({"role": "assistant", "content": text})


if __name__ == "__main__":
    sys.exit(main())
