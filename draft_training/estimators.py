"""Acceptance figures of a round log, each with a 95 % interval by bootstrap over prompts.

A round is one draft and one verification; a: leading drafts accepted; committed: tokens added to the reply, a + 1 (the
bonus token is included), the last round cut to what was emitted. A draft counts as accepted where it was emitted, so a
cut round keeps min(a, committed); the positions behind its cut were not observed. The first token of a reply comes from
reading the prompt and belongs to no round.

Rounds of one reply are correlated, so prompts are resampled, within their domain; every figure is a ratio of sums over
prompts, and all figures of a report use the same resamples, which is what makes differences paired.

Legend: P prompts, N draws.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.errors import DataError
from core.generate.rounds import Round

Rounds = dict[str, list[Round]]  # by request, in the order of the prompts; a request without rounds has an empty list
INCONCLUSIVE = "inconclusive"  # nothing was counted
RECALL = (1, 2, 4, 8, 16)
FIRST_BUCKET = 256  # tokens; the next ones double


@dataclass(frozen=True)
class Estimate:
    """value with its 95 % interval; NaN where nothing was counted."""

    value: float
    low: float = math.nan
    high: float = math.nan

    def __str__(self) -> str:
        if math.isnan(self.value):
            return INCONCLUSIVE
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    @property
    def has_zero(self) -> bool:
        return not (self.low > 0 or self.high < 0)

    def as_json(self) -> dict[str, float | None]:
        found = {"value": self.value, "low": self.low, "high": self.high}
        return {k: None if math.isnan(v) else v for k, v in found.items()}


Ratio = tuple[Tensor, Tensor]  # numerator and denominator of each prompt [P]


class Bootstrap:
    """How often each draw takes each prompt: `weight` [N, P], resampled within domains."""

    def __init__(self, domains: Sequence[str], draws: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.domains = list(domains)
        self.weight = torch.zeros(draws, len(self.domains), dtype=torch.float64)
        for domain in dict.fromkeys(self.domains):
            place = torch.tensor([i for i, d in enumerate(self.domains) if d == domain])
            pick = place[torch.randint(len(place), (draws, len(place)), generator=generator)]
            self.weight.scatter_add_(1, pick, torch.ones_like(pick, dtype=torch.float64))

    def mask(self, domain: str | None) -> Tensor:
        """[P]: 1 for the prompts of `domain`, or for all."""
        return torch.tensor([float(domain is None or d == domain) for d in self.domains], dtype=torch.float64)

    def estimate(self, *ratios: Ratio) -> Estimate:
        """The first ratio, less the second where there is one, over the same resamples."""
        value, drawn = 0.0, torch.zeros(len(self.weight), dtype=torch.float64)
        for sign, (top, bottom) in zip((1, -1), ratios, strict=False):
            if not bottom.sum() > 0:
                return Estimate(math.nan)
            value += sign * float(top.sum() / bottom.sum())
            drawn += sign * (self.weight @ top) / (self.weight @ bottom)
        drawn = drawn[drawn.isfinite()].sort().values  # a draw may take prompts without any rounds
        if not len(drawn):
            return Estimate(value)
        low, high = (float(drawn[round(q * (len(drawn) - 1))]) for q in (0.025, 0.975))
        return Estimate(value, low, high)


def kept(one: Round) -> int:
    """Accepted drafts that were emitted."""
    return min(one.accepted, one.committed)


def is_cut(one: Round) -> bool:
    return one.committed < one.accepted + 1


def observed(one: Round, position: int) -> bool:
    """Whether the reply was long enough to say if the draft at `position` (from 1) would stand."""
    return not is_cut(one) or position <= one.committed


def column(rounds: Rounds, value: Callable[[Round], float]) -> Tensor:
    """[P]: sum of `value` over the rounds of each request."""
    return torch.tensor([float(sum(value(r) for r in found)) for found in rounds.values()], dtype=torch.float64)


def pooled(rounds: Rounds) -> Ratio:
    """Total committed over total rounds."""
    return column(rounds, lambda r: r.committed), column(rounds, lambda _: 1)


def per_request(rounds: Rounds) -> Ratio:
    """The mean over requests of the request's own mean; requests without a round are left out."""
    committed, count = pooled(rounds)
    has = (count > 0).to(torch.float64)
    return committed / count.clamp(min=1), has


def unconditional(rounds: Rounds, position: int) -> Ratio:
    """Share of all rounds that kept the drafts at positions 1 .. position."""
    return column(rounds, lambda r: kept(r) >= position), column(rounds, lambda _: 1)


def conditional(rounds: Rounds, position: int) -> Ratio:
    """The same among rounds that kept the drafts before it and were not cut before it."""
    reached = column(rounds, lambda r: kept(r) >= position - 1 and observed(r, position))
    return column(rounds, lambda r: kept(r) >= position), reached


def recall(rounds: Rounds, position: int, k: int) -> Ratio:
    """Share of rounds whose text token at `position` was among the drafter's k best of that slot."""
    found = column(rounds, lambda r: len(r.hit) >= position and 0 <= r.hit[position - 1] < k)
    return found, column(rounds, lambda r: len(r.hit) >= position)


def bucket(context: int) -> tuple[int, int]:
    """[low, high) of the bucket of context lengths: 0 to 256, then doubling."""
    high = FIRST_BUCKET
    while context >= high:
        high *= 2
    return (0 if high == FIRST_BUCKET else high // 2), high


def within(rounds: Rounds, low: int, high: int) -> Rounds:
    return {i: [r for r in found if low <= r.context < high] for i, found in rounds.items()}


def masked(ratio: Ratio, mask: Tensor) -> Ratio:
    return ratio[0] * mask, ratio[1] * mask


@dataclass(frozen=True)
class Figures:
    """What one domain (or all) says. position, conditional: of 1 .. K. recall: [slot][k of RECALL], empty where the log
    has no ranks for all slots. context: (low, high, rounds, tau)."""

    prompts: int
    rounds: int
    committed: int
    cut: int
    tau_pooled: Estimate
    tau_request: Estimate
    position: tuple[Estimate, ...]
    conditional: tuple[Estimate, ...]
    context: tuple[tuple[int, int, int, Estimate], ...]
    recall: tuple[tuple[Estimate, ...], ...] = ()

    @property
    def conclusive(self) -> bool:
        return self.rounds > 0


def figures(rounds: Rounds, boot: Bootstrap, domain: str | None, ranks: bool = False) -> Figures:
    """All figures of one domain; `ranks`: the log has ranks for every slot (teacher-forced), so Recall@k is known.

    Raises:
        DataError: the log has other requests than the prompts that are resampled.
    """
    if len(rounds) != len(boot.domains):
        raise DataError(f"the round log has {len(rounds)} requests for {len(boot.domains)} prompts; measure again")
    mask = boot.mask(domain)
    mine = {i: found for (i, found), m in zip(rounds.items(), mask.tolist(), strict=True) if m}
    flat = [r for found in mine.values() for r in found]
    positions = range(1, max((r.drafted for r in flat), default=0) + 1)

    def of(ratio: Ratio) -> Estimate:
        return boot.estimate(masked(ratio, mask))

    edges = sorted({bucket(r.context) for r in flat})
    return Figures(
        prompts=len(mine),
        rounds=len(flat),
        committed=sum(r.committed for r in flat),
        cut=sum(is_cut(r) for r in flat),
        tau_pooled=of(pooled(rounds)),
        tau_request=of(per_request(rounds)),
        position=tuple(of(unconditional(rounds, k)) for k in positions),
        conditional=tuple(of(conditional(rounds, k)) for k in positions),
        context=tuple(
            (a, b, sum(a <= r.context < b for r in flat), of(pooled(within(rounds, a, b)))) for a, b in edges
        ),
        recall=tuple(tuple(of(recall(rounds, p, k)) for k in RECALL) for p in positions) if ranks else (),
    )


@dataclass(frozen=True)
class Difference:
    """Paired differences a - b: of the pooled taus, and the mean over prompts of the difference of a prompt's tau."""

    tau_pooled: Estimate
    tau_request: Estimate
    equal: int  # requests whose rounds are the same, one by one
    requests: int

    @property
    def fault(self) -> bool:
        """Whether the pooled difference lies outside what resampling explains."""
        return not self.tau_pooled.has_zero


def difference(a: Rounds, b: Rounds, boot: Bootstrap, domain: str | None = None) -> Difference:
    """Both logs have the prompts of `boot`, in its order."""
    mask = boot.mask(domain)
    (mean_a, has_a), (mean_b, has_b) = per_request(a), per_request(b)
    both = has_a * has_b * mask
    chosen = [(x, y) for x, y, m in zip(a.values(), b.values(), mask.tolist(), strict=True) if m]

    def shape(found: list[Round]) -> list[tuple[int, int, int]]:
        return [(r.context, kept(r), r.committed) for r in found]

    return Difference(
        tau_pooled=boot.estimate(masked(pooled(a), mask), masked(pooled(b), mask)),
        tau_request=boot.estimate(((mean_a - mean_b) * both, both)),
        equal=sum(shape(x) == shape(y) for x, y in chosen),
        requests=len(chosen),
    )
