"""Whether sampled speculative decoding has the target's distribution: a test that can fail.

At fixed prefixes one round is run many times. The first token it emits is compared with the target's probabilities
after the prefix; the second, among rounds whose accepted first draft was x, with those after prefix + x, for the x seen
most (accepting a draft says nothing of what follows it, so these are draws from the target too). Each comparison is a
G-test with small cells pooled; Holm's correction over all of them. The same samples' worth of a verifier that accepts
with min(1, 1.15 p / q) must be rejected, else the test had no power and says so.

The probabilities are those of the logits that verification read: the test is of the sampling rule, not of the rounding
between two shapes of the target's forward (that distance, in total variation, is reported beside it).

Legend: R rows, K drafts, V vocabulary, C cells.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from core.generate.decode import DRAFT_STREAM
from core.generate.interface import Draft, Prompt, Proposer
from core.generate.sampling import Sampling, Verdict, draw, leading, probabilities, verify_sampled
from core.generate.slots import SlotCache
from core.generate.target import Target
from draft_training.drafters import Opened

SMALLEST_CELL = 10.0  # expected count
BIAS = 1.15
ALPHA = 0.01
Verifier = Callable[[Draft, Tensor, Sampling, torch.Generator], Verdict]


def exact_verifier(draft: Draft, logits: Tensor, sampling: Sampling, noise: torch.Generator) -> Verdict:
    return verify_sampled(draft.tokens, draft.q, logits, sampling, noise)


def biased_verifier(draft: Draft, logits: Tensor, sampling: Sampling, noise: torch.Generator) -> Verdict:
    """Wrong on purpose: drafts are accepted 1.15 times as often as the rule says."""
    p = probabilities(logits, sampling)
    token = draft.tokens[..., None]
    q = draft.q if draft.q is not None else torch.zeros_like(p[:, :-1]).scatter_(2, token, 1.0)
    chance = torch.rand(draft.tokens.shape, generator=noise, device=p.device)
    accepted = leading(chance * q.gather(2, token)[..., 0] < BIAS * p[:, :-1].gather(2, token)[..., 0])
    rest = p.clone()
    rest[:, :-1] = (p[:, :-1] - q).clamp(min=0)
    row = torch.arange(len(p), device=p.device)
    at = rest[row, accepted]
    at = torch.where(at.sum(-1, keepdim=True) > 0, at, p[row, accepted])
    return Verdict(accepted, draw(at / at.sum(-1, keepdim=True), noise))


@dataclass(frozen=True)
class GTest:
    """p: of the G statistic under the target's distribution. adjusted: after Holm."""

    prefix: str
    token: str  # first | second
    samples: int
    cells: int
    g: float
    p: float
    adjusted: float = 1.0


def chi_square_tail(value: float, freedom: int) -> float:
    """P(X > value) of a chi-square variable."""
    half = torch.tensor([freedom / 2, value / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1].clamp(min=0)))


def g_test(counts: Tensor, prob: Tensor) -> tuple[int, float, float]:
    """(cells, G, p) of counts [V] against probabilities [V]. Cells expected under 10 times are one; (1, 0, 1) where no
    other is left. A token that the target never says gives p = 0."""
    counts, expected = counts.double().cpu(), prob.double().cpu()
    expected = expected / expected.sum() * counts.sum()
    if bool((counts[expected == 0] > 0).any()):
        return len(counts), float("inf"), 0.0
    large = expected >= SMALLEST_CELL
    seen, want = counts[large], expected[large]
    small = torch.stack((counts[~large].sum(), expected[~large].sum()))
    if small[1] >= SMALLEST_CELL or not len(want):
        seen, want = torch.cat((seen, small[:1])), torch.cat((want, small[1:]))
    elif small[1] > 0:
        least = int(want.argmin())
        seen[least] += small[0]
        want[least] += small[1]
    if len(want) < 2:
        return 1, 0.0, 1.0
    g = float(2 * torch.xlogy(seen, seen / want).sum())
    return len(want), g, chi_square_tail(g, len(want) - 1)


def holm(tests: list[GTest]) -> list[GTest]:
    """Adjusted p-values (Holm 1979), in the order given."""
    adjusted, worst = {}, 0.0
    for rank, place in enumerate(sorted(range(len(tests)), key=lambda i: tests[i].p)):
        worst = max(worst, min(1.0, (len(tests) - rank) * tests[place].p))
        adjusted[place] = worst
    return [GTest(**{**vars(t), "adjusted": adjusted[i]}) for i, t in enumerate(tests)]


@dataclass
class Seen:
    """Counts [V] of first tokens, and of second ones after each first draft that was accepted, with the probabilities
    that verification read."""

    first: Tensor
    first_prob: Tensor
    second: dict[int, Tensor] = field(default_factory=dict)
    second_prob: dict[int, Tensor] = field(default_factory=dict)


class Prefix:
    """A prefix whose last token is the anchor, read once for `rows` rows; `sample` runs the round after it."""

    def __init__(self, target: Target, proposer: Proposer, prompt: Prompt, rows: int) -> None:
        self.target, self.proposer = target, proposer
        size, device = len(prompt.ids), target.device
        ids = torch.tensor(prompt.ids, device=device).expand(rows, -1)
        position = torch.arange(size - 1, device=device).expand(rows, -1)
        self.used = size + proposer.drafts
        self.cache = SlotCache(rows, self.used)
        last = torch.full((rows,), size - 2, device=device)
        _, features = target.step(ids[:, :-1], position, self.cache, size - 1, last)
        proposer.start(rows, self.used)
        proposer.extend(ids[:, :-1], features, position, size - 1)
        self.anchor, self.place = ids[:, -1].contiguous(), torch.full((rows,), size - 1, device=device)

    def sample(
        self, verify: Verifier, sampling: Sampling, noise: torch.Generator, draft_noise: torch.Generator
    ) -> tuple[Draft, Tensor, Verdict]:
        """(drafts, logits [R, K + 1, V], verdict) of one round. Nothing of it is kept: what it wrote into the caches
        lies behind the context and is written again by the next."""
        draft = self.proposer.propose(self.anchor, self.place, sampling, draft_noise)
        ids = torch.cat((self.anchor[:, None], draft.tokens), dim=1)
        position = self.place[:, None] + torch.arange(ids.shape[1], device=ids.device)
        logits, _ = self.target.step(ids, position, self.cache, self.used)
        return draft, logits, verify(draft, logits, sampling, noise)


def tally(prefix: Prefix, verify: Verifier, sampling: Sampling, samples: int, seed: int) -> Seen:
    device = prefix.target.device
    noise, draft_noise = (torch.Generator(device).manual_seed(seed + s) for s in (0, DRAFT_STREAM))
    found: Seen | None = None
    for _ in range(-(-samples // len(prefix.anchor))):
        draft, logits, verdict = prefix.sample(verify, sampling, noise, draft_noise)
        size = logits.shape[-1]
        if found is None:
            found = Seen(torch.zeros(size, dtype=torch.int64), probabilities(logits[0, 0], sampling).cpu())
        kept = verdict.accepted > 0
        first = torch.where(kept, draft.tokens[:, 0], verdict.token)
        found.first += torch.bincount(first.cpu(), minlength=size)
        next_draft = draft.tokens[:, 1] if draft.tokens.shape[1] > 1 else verdict.token
        second = torch.where(verdict.accepted > 1, next_draft, verdict.token)
        for token in draft.tokens[kept, 0].unique().tolist():
            rows = kept & (draft.tokens[:, 0] == token)
            found.second.setdefault(token, torch.zeros(size, dtype=torch.int64))
            found.second[token] += torch.bincount(second[rows].cpu(), minlength=size)
            if token not in found.second_prob:
                found.second_prob[token] = probabilities(logits[rows.nonzero()[0, 0], 1], sampling).cpu()
    assert found is not None
    return found


def tests_of(name: str, seen: Seen) -> list[GTest]:
    found = [GTest(name, "first", int(seen.first.sum()), *g_test(seen.first, seen.first_prob))]
    if seen.second:
        token = max(seen.second, key=lambda t: int(seen.second[t].sum()))
        counts = seen.second[token]
        found.append(GTest(name, "second", int(counts.sum()), *g_test(counts, seen.second_prob[token])))
    return found


@dataclass(frozen=True)
class Distribution:
    """The exact rule's tests and the biased one's, Holm-corrected; p: the smallest adjusted value of each."""

    tests: tuple[GTest, ...]
    biased: tuple[GTest, ...]
    total_variation: float  # largest, between the logits of verification and of a packed forward

    @property
    def p(self) -> float:
        return min((t.adjusted for t in self.tests), default=1.0)

    @property
    def biased_p(self) -> float:
        return min((t.adjusted for t in self.biased), default=1.0)

    @property
    def verdict(self) -> str:
        """passed | rejected | no power: where the biased verifier was not found out, nothing was shown."""
        if self.p < ALPHA:
            return "rejected"
        return "passed" if self.biased_p < ALPHA else "no power"


def packed_distance(target: Target, prompt: Prompt, prob: Tensor, sampling: Sampling) -> float:
    ids = torch.zeros(1, target.room(len(prompt.ids)), dtype=torch.int64)
    ids[0, : len(prompt.ids)] = torch.tensor(prompt.ids)
    hidden, _ = target.packed(ids.to(target.device), torch.arange(ids.shape[1], device=target.device)[None])
    other = probabilities(target.head(hidden[0, len(prompt.ids) - 1]), sampling).cpu()
    return float((other - prob).abs().sum() / 2)


@torch.no_grad()
def distribution(
    model: Any, opened: Opened, prompts: list[Prompt], sampling: Sampling, samples: int, rows: int = 256
) -> Distribution:
    """Test `samples` draws, spread over the prompts (of at least two tokens), by the exact and by the biased rule."""
    tests: list[GTest] = []
    biased: list[GTest] = []
    distance, each = 0.0, -(-samples // len(prompts))
    for number, prompt in enumerate(tqdm(prompts, desc="distribution", unit="prefix", leave=False)):
        target = Target(model, opened.taps)
        prefix = Prefix(target, opened.proposer(target), prompt, min(rows, each))
        seed = sampling.seed + 1000 * number
        seen = tally(prefix, exact_verifier, sampling, each, seed)
        distance = max(distance, packed_distance(target, prompt, seen.first_prob, sampling))
        tests += tests_of(prompt.id, seen)
        biased += tests_of(prompt.id, tally(prefix, biased_verifier, sampling, each, seed + 1))
    return Distribution(tuple(holm(tests)), tuple(holm(biased)), distance)
