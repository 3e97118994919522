"""An engine of infer.request.Engine without a model: it says the prompt again, a fixed number of tokens a step."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from core.errors import ConfigError
from core.train.tokenizer import train_tokenizer
from infer.request import CANCELLED, FAILED, LENGTH, STOP, EngineStats, Output, Request, TokenLogprob

TEXTS = ["The quick brown fox jumps over the lazy dog. größer 日本語 🎉 stop END user assistant\n"] * 20
VOCAB = 330


def make_tokenizer(folder: Path) -> Any:
    """Byte-level BPE with a template that knows tools and refuses the role `bad`."""
    tokenizer = train_tokenizer(TEXTS, VOCAB, folder)
    tokenizer.chat_template = (
        "{% if tools %}tools:{{ tools | tojson }}\n{% endif %}"
        "{% for m in messages %}{% if m['role'] == 'bad' %}{{ raise_exception('no role bad') }}{% endif %}"
        "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


class Failure(Exception):
    """Raised by the engine in the tests."""


class FakeEngine:
    """Echoes the prompt's ids and then ends; with ignore_eos again and again.

    places: requests in the batch. per_step: tokens a request gets a step. delay: seconds of a step.
    poison: a prompt with this id fails alone; broken: steps that raise from now on.
    """

    def __init__(self, eos: int, max_length: int = 512, places: int = 4, per_step: int = 1, delay: float = 0.0) -> None:
        self.eos, self.max_length, self.places, self.per_step, self.delay = eos, max_length, places, per_step, delay
        self.poison: int | None = None
        self.broken = 0
        self.paused = False
        self.answer: Callable[[Request], list[int]] = lambda request: list(request.ids)
        self.waiting: list[Request] = []
        self.running: dict[str, tuple[Request, list[int]]] = {}
        self.reports: list[Output] = []
        self.cancelled: list[str] = []
        self.seen: list[Request] = []
        self.steps = self.prompt = self.made = self.polls = 0

    def add(self, request: Request) -> None:
        if any(i >= VOCAB for i in request.ids):
            raise ConfigError(f"ids: {max(request.ids)} is beyond the vocabulary of {VOCAB}")
        self.seen.append(request)
        self.waiting.append(request)

    def cancel(self, request_id: str) -> None:
        mine = [r for r in self.waiting if r.id == request_id]
        self.waiting = [r for r in self.waiting if r.id != request_id]
        if self.running.pop(request_id, None) or mine:
            self.cancelled.append(request_id)
            self.reports.append(Output(request_id, finish=CANCELLED))

    @property
    def busy(self) -> bool:
        self.polls += 1
        return bool(self.waiting or self.running or self.reports)

    def step(self) -> list[Output]:
        self.steps += 1
        while self.paused:
            time.sleep(0.001)
        time.sleep(self.delay)
        if self.broken:
            self.broken -= 1
            raise Failure("a step broke")
        while self.waiting and len(self.running) < self.places:
            request = self.waiting.pop(0)
            self.running[request.id] = (request, [])
            self.prompt += len(request.ids)
        outputs, self.reports = self.reports, []
        outputs += [self.round(r, made) for r, made in list(self.running.values())]
        for output in outputs:
            if output.finish is not None:
                self.running.pop(output.id, None)
        return outputs

    def round(self, request: Request, made: list[int]) -> Output:
        if self.poison in request.ids:
            return Output(request.id, finish=FAILED, error="this request is poison")
        answer, params = self.answer(request), request.params
        limit = min(params.max_tokens or self.max_length, self.max_length - len(request.ids))
        new: list[int] = []
        finish = None
        while finish is None and len(new) < self.per_step:
            at = len(made) + len(new)
            again = params.ignore_eos and answer
            new.append(answer[at % len(answer)] if again else answer[at] if at < len(answer) else self.eos)
            ended = not again and (new[-1] == self.eos or new[-1] in params.stop_token_ids)
            finish = STOP if ended else LENGTH if at + 1 == limit else None
        made += new
        self.made += len(new)
        logprobs = () if params.logprobs is None else tuple(self.logprob(i, params.logprobs) for i in new)
        return Output(request.id, tuple(new), finish, logprobs, cached=len(request.ids) // 16 * 16)

    def logprob(self, token: int, count: int) -> TokenLogprob:
        top = tuple((token + k, -0.5 - k) for k in range(count))
        return TokenLogprob(token, -0.5, top)

    def stats(self) -> EngineStats:
        return EngineStats(
            len(self.running), len(self.waiting), len(self.running) / self.places, prefix_queries=self.prompt,
            prefix_hits=self.prompt // 2, prompt_tokens=self.prompt, generated_tokens=self.made, preemptions=0,
            rounds=self.steps, drafted=3 * self.steps, accepted=2 * self.steps, accepted_at=(self.steps, 1),
        )  # fmt: skip
