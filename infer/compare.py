"""The figures of infer.validate: the runtime against the trainer's model, in FP32 and in the runtime's dtype.

The FP32 model, the same model in the runtime's dtype and the runtime read the same tokens; every figure of the runtime
stands beside that of plain rounding. Documents are compared one at a time, logits are never kept.

Legend: T tokens of a document, V vocabulary, G hidden size.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from core.errors import ConfigError, DataError
from core.generate.target import Target
from core.models.load import load_model
from core.train.data.chat import render
from core.train.data.documents import jsonl_records
from core.train.data.embedded import stdlib_records
from infer.engine import ModelEngine
from infer.request import Request, SamplingParams
from infer.score import scored

ALARM = 0.7  # of the acceptance that training reported
KL_SLACK, TOP_SLACK, PERPLEXITY_SLACK = 1.5, 0.005, 0.01
EXACT_KL = 1e-6  # what two FP32 computations may differ by
PROMPT = "validate"


@dataclass(frozen=True)
class Plan:
    """documents: token ids, at least 2 each. tau: tokens a round that training reported, None: unknown."""

    documents: list[list[int]]
    prompts: list[list[int]]
    reply_tokens: int
    layers: bool = False
    tau: float | None = None


@dataclass
class Sums:
    """Over all positions, against the FP32 model: KL(FP32 || this), largest difference of a logit, argmax that agree,
    this one's own negative log-likelihood of the text, and how much that is above FP32's (sum, sum of squares)."""

    positions: int = 0
    kl: float = 0.0
    worst: float = 0.0
    agree: int = 0
    nll: float = 0.0
    excess: float = 0.0
    excess_squares: float = 0.0
    predicted: int = 0

    def add(self, logits: Tensor, reference: Tensor, labels: Tensor) -> None:
        """logits, reference [T, V]; labels: the tokens after each but the last."""
        own, other = logits.double().log_softmax(-1), reference.double().log_softmax(-1)
        self.positions += len(logits)
        self.kl += float((other.exp() * (other - own)).sum())
        self.worst = max(self.worst, float((logits.double() - reference.double()).abs().max()))
        self.agree += int((logits.argmax(-1) == reference.argmax(-1)).sum())
        nll, exact = (-t[: len(labels)].gather(1, labels[:, None]) for t in (own, other))
        self.nll += float(nll.sum())
        self.excess += float((nll - exact).sum())
        self.excess_squares += float((nll - exact).square().sum())
        self.predicted += len(labels)

    @property
    def mean_kl(self) -> float:
        return self.kl / self.positions

    @property
    def top(self) -> float:
        return self.agree / self.positions

    @property
    def drift(self) -> float:
        """Logarithm of the perplexity's ratio to FP32's."""
        return self.excess / max(1, self.predicted)

    @property
    def drift_error(self) -> float:
        """Standard error of `drift` over positions."""
        count = max(2, self.predicted)
        return math.sqrt(max(0.0, self.excess_squares / count - self.drift**2) / (count - 1))

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll / max(1, self.predicted))


@dataclass
class Figures:
    """own: the runtime; rounding: the trainer's model in the runtime's dtype; exact: in FP32."""

    dtype: str
    own: Sums = field(default_factory=Sums)
    rounding: Sums = field(default_factory=Sums)
    exact: Sums = field(default_factory=Sums)
    layers: list[float] = field(default_factory=list)  # relative error of the stream after each layer
    same_replies: int = 0
    replies: int = 0
    close_calls: int = 0  # replies that part where the two best logits are closer than the error
    tau: float | None = None
    trained_tau: float | None = None


@dataclass(frozen=True)
class Row:
    """good: None where it is no check."""

    what: str
    text: str
    good: bool | None = None


def texts_of(path: str | None, tokenizer: Any, count: int, length: int) -> list[list[int]]:
    """Token ids of `count` documents, each cut to `length`.

    Raises:
        ConfigError: a file that is not there. DataError: it has no text of two tokens.
    """
    found = []
    for text in texts(path, tokenizer):
        ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])[:length]
        if len(ids) >= 2:
            found.append(ids)
        if len(found) == count:
            return found
    if not found:
        raise DataError(f"--text {path} has no document of at least two tokens; take another file")
    return found


def texts(path: str | None, tokenizer: Any) -> Iterator[str]:
    if path is None:
        for record in stdlib_records("code", True, 0):
            yield record["text"]
    elif not Path(path).is_file():
        raise ConfigError(f"--text {path}: no such file")
    elif path.endswith((".jsonl", ".jsonl.gz")):
        for record in jsonl_records(Path(path)):
            yield record["text"] if "text" in record else render(record, tokenizer).text
    else:
        yield from Path(path).read_text(encoding="utf-8").split("\n\n")


def trained_tau(drafter: Path) -> float | None:
    """Tokens a round on held-out replies, the mean over domains, from the report of the run that trained it.

    Raises:
        DataError: a report that cannot be read.
    """
    report = drafter.parent / "report.json"
    if not report.is_file():
        return None
    try:
        found = json.loads(report.read_text(encoding="utf-8")).get("teacher_forced", {})
        values = [float(domain["tau"]) for domain in found.values()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{report} is no report of draft_training ({error!r}); write it again or move it away"
        ) from error
    return sum(values) / len(values) if values else None


def compare(engine: ModelEngine, against: Path, plan: Plan) -> Figures:
    """All figures. Under several ranks every rank takes part; rank 0's are the answer."""
    model = engine.runner.model
    found = Figures(str(model.dtype).removeprefix("torch."), trained_tau=plan.tau)
    exact = load_model(against, dtype=torch.float32, device=model.device, attention="eager").model
    if exact.config.vocab_size != engine.vocabulary:
        raise ConfigError(
            f"--against {against} has a vocabulary of {exact.config.vocab_size}, --model of {engine.vocabulary}: they "
            "are not the same model"
        )
    rounded = (
        load_model(against, dtype=model.dtype, device=model.device).model if model.dtype != torch.float32 else None
    )
    streams: list[list[Tensor]] = []
    bar = tqdm(plan.documents, desc="compare", unit="document")
    for ids in bar:
        streams.append(one_document(engine, exact, rounded, ids, found, plan.layers))
        bar.set_postfix(kl=f"{found.own.mean_kl:.1e}")
    if plan.layers:
        found.layers = [float(torch.stack(layer).mean()) for layer in zip(*streams, strict=True)]
    greedy(engine, exact, plan, found)
    return found


@torch.no_grad()
def one_document(
    engine: ModelEngine, exact: Any, rounded: Any, ids: list[int], found: Figures, layers: bool
) -> list[Tensor]:
    """Add one text to the sums; relative errors by layer where they are asked for."""
    device = engine.runner.model.device
    given = torch.tensor(ids, device=device)
    labels, own = given[1:], []
    seen: dict[int, list[Tensor]] = {}
    watch: Callable[[int, Tensor], None] | None = None
    if layers:

        def watch(layer: int, stream: Tensor) -> None:
            seen.setdefault(layer, []).append(stream.float())

    target = Target(exact, tuple(range(len(exact.model.layers))) if layers else ())
    with target.tapping() as tapped:
        reference = exact(input_ids=given[None]).logits[0]
    for _, logits in scored(engine, ids, watch):
        own.append(logits)
    found.own.add(torch.cat(own), reference, labels)
    found.exact.add(reference, reference, labels)
    found.rounding.add(rounded(input_ids=given[None]).logits[0] if rounded else reference, reference, labels)
    return [relative(torch.cat(seen[i]), tapped[i][0]) for i in sorted(seen)]


def relative(found: Tensor, wanted: Tensor) -> Tensor:
    return (found.double() - wanted.double()).norm() / wanted.double().norm()


@torch.no_grad()
def greedy(engine: ModelEngine, exact: Any, plan: Plan, found: Figures) -> None:
    """Greedy replies of the engine (with its drafter, if it has one) against the FP32 model's choices."""
    replies = generated(engine, plan.prompts, plan.reply_tokens)
    margin = 2 * found.own.worst
    for prompt, reply in zip(plan.prompts, replies, strict=True):
        found.replies += 1
        if len(reply) < plan.reply_tokens:
            continue  # it failed: neither the same nor a close call
        ids = torch.tensor(prompt + reply, device=engine.runner.model.device)
        logits = exact(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1]
        wrong = (logits.argmax(-1) != ids[len(prompt) :]).nonzero().flatten().tolist()
        if not wrong:
            found.same_replies += 1
        else:  # from the first difference on they are other texts
            best = logits[wrong[0]].topk(2).values
            found.close_calls += bool(best[0] - best[1] <= margin)
    stats = engine.stats()
    if stats.rounds:
        found.tau = 1 + stats.accepted / stats.rounds


def generated(engine: ModelEngine, prompts: Iterable[list[int]], tokens: int) -> list[list[int]]:
    replies: dict[str, list[int]] = {}
    for number, prompt in enumerate(prompts):
        replies[f"{PROMPT}-{number}"] = []
        engine.add(Request(f"{PROMPT}-{number}", prompt, SamplingParams(max_tokens=tokens, ignore_eos=True)))
    with tqdm(total=len(replies), desc="greedy replies", unit="reply") as bar:
        while engine.busy:
            for output in engine.step():
                replies[output.id].extend(output.ids)
                bar.update(output.finish is not None)
    return list(islice(replies.values(), len(replies)))


def verdict(found: Figures) -> list[Row]:
    """Every figure, and whether it holds."""
    own, rounding, exact = found.own, found.rounding, found.exact
    kl_bar = max(EXACT_KL, KL_SLACK * rounding.mean_kl)
    drift_bar = max(PERPLEXITY_SLACK, KL_SLACK * abs(rounding.drift), 2 * own.drift_error)
    told = found.replies - found.same_replies - found.close_calls
    rows = [
        Row("logits", f"KL {own.mean_kl:.2e} (bar {kl_bar:.2e}: trainer's model in {found.dtype} "
            f"{rounding.mean_kl:.2e}), largest error {own.worst:.3g} (trainer's {rounding.worst:.3g}), "
            f"{own.positions:,} positions", own.mean_kl <= kl_bar),
        Row("top token", f"{own.top:.2%} agree with FP32 (trainer's model in {found.dtype}: {rounding.top:.2%})",
            own.top >= rounding.top - TOP_SLACK),
        Row("perplexity", f"{own.perplexity:.4f}, FP32 {exact.perplexity:.4f}: {math.expm1(own.drift):+.2%} (bar "
            f"{math.expm1(drift_bar):.2%}; trainer's model in {found.dtype} {math.expm1(rounding.drift):+.2%})",
            abs(own.drift) <= drift_bar),
        Row("greedy", f"{found.same_replies} of {found.replies} replies are the FP32 model's; {found.close_calls} part "
            f"where its two best logits are closer than twice the error, {told} elsewhere", told == 0),
    ]  # fmt: skip
    rows += [Row(f"layer {i}", f"relative error of the stream {e:.2e}") for i, e in enumerate(found.layers)]
    if found.tau is not None:
        trained = found.trained_tau
        text = f"{found.tau:.2f} tokens a round" + (
            f", {found.tau / trained:.0%} of the {trained:.2f} that training reported (alarm below {ALARM:.0%})"
            if trained else "; what training reported is unknown (no report.json beside the folder)"
        )  # fmt: skip
        rows.append(Row("drafter", text, found.tau >= ALARM * trained if trained else None))
    return rows
