"""Figures for Prometheus: vLLM's names and shapes under our prefix, so that its dashboards work after one replacement.

What the engine counts is read from its latest snapshot when /metrics is asked for; what a client feels is observed
here, at the moment when the engine's thread handed the tokens over.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from infer.request import CANCELLED, FAILED, LENGTH, STOP, EngineStats

PREFIX = "fp4flash:"
REASONS = {STOP: "stop", LENGTH: "length", CANCELLED: "abort", FAILED: "error"}
FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
TOKEN_S = (
    0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5,
    0.75, 1, 2.5, 5, 10,
)  # fmt: skip
REQUEST_S = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000)


@dataclass
class Timing:
    """Moments of one request, in seconds of perf_counter. begun: the engine first worked on it."""

    arrived: float
    prompt_tokens: int
    begun: float | None = None
    first: float | None = None
    last: float = 0.0
    tokens: int = 0

    def began(self, now: float) -> None:
        self.begun = now if self.begun is None else self.begun


class EngineCollector(Collector):
    """The engine's latest snapshot as metric families."""

    def __init__(self, model: str, stats: Callable[[], EngineStats]) -> None:
        self.model, self.stats = model, stats

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        now = self.stats()
        gauges = {
            "num_requests_running": (now.running, "Requests in the batch."),
            "num_requests_waiting": (now.waiting, "Requests that wait for a place in the batch."),
            "kv_cache_usage_perc": (now.kv_used, "Share of KV pages in use; 1 is all."),
        }
        counters = {
            "prefix_cache_queries": (now.prefix_queries, "Prompt tokens looked up in the prefix cache."),
            "prefix_cache_hits": (now.prefix_hits, "Prompt tokens found in the prefix cache."),
            "prompt_tokens": (now.prompt_tokens, "Prompt tokens processed."),
            "generation_tokens": (now.generated_tokens, "Tokens generated."),
            "num_preemptions": (now.preemptions, "Requests put back for want of KV pages."),
            "spec_decode_num_drafts": (now.rounds, "Drafts verified."),
            "spec_decode_num_draft_tokens": (now.drafted, "Tokens drafted."),
            "spec_decode_num_accepted_tokens": (now.accepted, "Drafted tokens accepted."),
        }
        for name, (value, text) in gauges.items():
            gauge = GaugeMetricFamily(PREFIX + name, text, labels=["model_name"])
            gauge.add_metric([self.model], value)
            yield gauge
        for name, (value, text) in counters.items():
            counter = CounterMetricFamily(PREFIX + name, text, labels=["model_name"])
            counter.add_metric([self.model], value)
            yield counter
        places = CounterMetricFamily(
            f"{PREFIX}spec_decode_num_accepted_tokens_per_pos",
            "Drafts whose token at this position was accepted; 0 is the first.",
            labels=["model_name", "position"],
        )
        for position, value in enumerate(now.accepted_at):
            places.add_metric([self.model, str(position)], value)
        yield places


class Metrics:
    """One registry a server: two in one process do not share figures."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # memory, CPU time, open files
        self.model = model

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(PREFIX + name, text, ["model_name"], registry=self.registry, buckets=buckets)
            return made.labels(model)

        self.first_token = histogram("time_to_first_token_seconds", "From arrival to the first token.", FIRST_TOKEN_S)
        self.token = histogram("inter_token_latency_seconds", "Between tokens; a round's time is shared.", TOKEN_S)
        self.request = histogram("e2e_request_latency_seconds", "From arrival to the end.", REQUEST_S)
        self.queue = histogram("request_queue_time_seconds", "From arrival to the first step with it.", REQUEST_S)
        self.prefill = histogram("request_prefill_time_seconds", "From that step to the first token.", REQUEST_S)
        self.decode = histogram("request_decode_time_seconds", "From the first token to the last.", REQUEST_S)
        self.prompt_size = histogram("request_prompt_tokens", "Prompt tokens of a request.", TOKENS)
        self.reply_size = histogram("request_generation_tokens", "Tokens generated for a request.", TOKENS)
        self.success = Counter(
            f"{PREFIX}request_success", "Requests ended, by reason.", ["model_name", "finished_reason"],
            registry=self.registry,
        )  # fmt: skip
        for reason in REASONS.values():
            self.success.labels(model, reason)

    def watch(self, stats: Callable[[], EngineStats]) -> None:
        self.registry.register(EngineCollector(self.model, stats))

    def tokens(self, timing: Timing, now: float, count: int) -> None:
        """`count` new tokens of a request arrived at `now`."""
        if not count:
            return
        if timing.first is None:
            timing.began(now)
            timing.first = now
            self.first_token.observe(now - timing.arrived)
        else:
            for _ in range(count):
                self.token.observe((now - timing.last) / count)
        timing.last = now
        timing.tokens += count

    def finished(self, timing: Timing, reason: str, now: float) -> None:
        self.success.labels(self.model, REASONS[reason]).inc()
        self.prompt_size.observe(timing.prompt_tokens)
        self.reply_size.observe(timing.tokens)
        self.request.observe(now - timing.arrived)
        if timing.begun is not None:
            self.queue.observe(timing.begun - timing.arrived)
        if timing.begun is not None and timing.first is not None:
            self.prefill.observe(timing.first - timing.begun)
            self.decode.observe(timing.last - timing.first)

    def text(self) -> bytes:
        return generate_latest(self.registry)
