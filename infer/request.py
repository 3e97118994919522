"""What goes into the engine and what comes out: token ids only. Text is the business of infer.text.

An engine is stepped by one thread. `step` runs one round for every request that has work: a piece of a prompt, one
token, or a verified draft. The server, the Python API and the commands all drive the same engine.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from core.errors import ConfigError

MAX_LOGPROBS = 20
STOP, LENGTH, CANCELLED, FAILED = "stop", "length", "cancelled", "failed"


@dataclass(frozen=True)
class SamplingParams:
    """How one request is continued.

    temperature: 0 is greedy. top_p, top_k: cut the distribution; 1.0 and 0 do not.
    max_tokens: most tokens to generate; None: up to the context's end.
    stop: strings that end the text, themselves left out. stop_token_ids: beside the model's own end tokens.
    seed: the same seed, prompt and model give the same tokens whatever shares the batch; None: a random one.
    ignore_eos: go on after the model's end token. logprobs: None, or how many alternatives to report beside the chosen
        token (0 to 20).
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int | None = 256
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        rules = {
            "temperature": (0 <= self.temperature <= 100, "0 (greedy) to 100"),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1"),
            "top_k": (0 <= self.top_k < 2**31, "0 (off) to 2^31 - 1"),
            "max_tokens": (self.max_tokens is None or self.max_tokens >= 1, "at least 1"),
            "seed": (self.seed is None or 0 <= self.seed < 2**63, "0 to 2^63 - 1"),
            "logprobs": (self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}"),
            "stop": (all(self.stop), "strings that are not empty"),
        }
        for key, (holds, rule) in rules.items():
            if not holds:
                raise ConfigError(f"{key}={getattr(self, key)!r}: expected {rule}")


@dataclass(frozen=True)
class Request:
    """id: unique among the requests of an engine that have not finished. ids: the prompt, at least one token."""

    id: str
    ids: Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)


@dataclass(frozen=True)
class TokenLogprob:
    """Natural logarithms under the model's own distribution (temperature 1, nothing cut). top: (id, logprob), best
    first, as many as `SamplingParams.logprobs`."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Output:
    """New tokens of one request after a step.

    finish: None while it goes on; stop (an end token, which is among `ids`), length, cancelled, or failed with `error`.
    logprobs: one entry for each of `ids` where the request asked. cached: prompt tokens taken from the prefix cache,
    known from the first output on.
    """

    id: str
    ids: tuple[int, ...] = ()
    finish: str | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    cached: int = 0
    error: str = ""


@dataclass(frozen=True)
class EngineStats:
    """A snapshot for monitoring. Counters only grow; `accepted_at[k]` counts rounds whose draft k + 1 was accepted."""

    running: int
    waiting: int
    kv_used: float  # share of KV pages in use, 0 to 1
    prefix_queries: int  # prompt tokens looked up in the prefix cache
    prefix_hits: int
    prompt_tokens: int
    generated_tokens: int
    preemptions: int
    rounds: int = 0  # drafts verified
    drafted: int = 0
    accepted: int = 0
    accepted_at: tuple[int, ...] = ()


class Engine(Protocol):
    """Not safe for concurrent use: one thread calls everything but reads `max_length`."""

    max_length: int  # tokens of prompt and reply together

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ConfigError: no prompt token, a token id beyond the vocabulary, a prompt that leaves no room for one token,
                or an id that is in use. Nothing is queued then.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """Forget a request and free its memory; the next step reports it as cancelled, unless its id was added again.
        Unknown ids are ignored."""
        ...

    def step(self) -> list[Output]:
        """One round. Empty when there is nothing to do."""
        ...

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        ...

    def stats(self) -> EngineStats: ...
