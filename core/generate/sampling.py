"""Choosing tokens: greedy, sampled, and the acceptance rule that leaves the target's distribution unchanged.

Rejection rule (Leviathan et al., arXiv 2211.17192): draft x ~ q is accepted with probability min(1, p(x) / q(x)), else
a token is drawn from max(p - q, 0) normalised; after K accepted drafts one more is drawn from p. Drafts chosen without
chance are the case q = 1 for that token. Probabilities are FP32 from the logits of the dtype that drew the drafts, so
both sides of the ratio are the same numbers. Draft and verification draw from generators of their own: sharing noise
between them biases the result.

Legend: R rows, K drafts, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from core.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_p and top_k cut the target's distribution (and the drafter's where it samples)."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 224
    seed: int = 0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        rules = {
            "temperature": (self.temperature >= 0, "at least 0"),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1"),
            "top_k": (self.top_k >= 0, "at least 0"),
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
        }
        for key, (holds, rule) in rules.items():
            if not holds:
                raise ConfigError(f"{key}={getattr(self, key)}: expected {rule}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """FP32 [..., V] after temperature, top-k and top-p (the smallest set reaching top_p)."""
    scaled = logits.to(torch.float32) / sampling.temperature
    if sampling.top_k and sampling.top_k < scaled.shape[-1]:
        edge = scaled.topk(sampling.top_k, dim=-1).values[..., -1:]
        scaled = scaled.masked_fill(scaled < edge, float("-inf"))
    prob = scaled.softmax(-1)
    if sampling.top_p < 1:
        ranked, order = prob.sort(dim=-1, descending=True)
        cut = ranked.cumsum(-1) - ranked >= sampling.top_p
        prob = prob.masked_fill(torch.zeros_like(cut).scatter(-1, order, cut), 0)
        prob = prob / prob.sum(-1, keepdim=True)
    return prob


def draw(prob: Tensor, generator: torch.Generator) -> Tensor:
    """One index of each [..., V] distribution."""
    return torch.multinomial(prob.flatten(0, -2), 1, generator=generator).view(prob.shape[:-1])


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Next token [...] of logits [..., V]."""
    return logits.argmax(-1) if sampling.greedy else draw(probabilities(logits, sampling), generator)


@dataclass(frozen=True)
class Verdict:
    """accepted [R]: leading drafts kept, 0 .. K. token [R]: the one that follows them."""

    accepted: Tensor
    token: Tensor


def leading(hit: Tensor) -> Tensor:
    """[R, K] boolean -> how many lead without a miss."""
    return hit.to(torch.int64).cumprod(-1).sum(-1)


def verify_greedy(draft_RK: Tensor, logits: Tensor) -> Verdict:
    """logits [R, K + 1, V] of the target at the anchor and each draft."""
    best = logits.argmax(-1)
    accepted = leading(draft_RK == best[:, :-1])
    return Verdict(accepted, best.gather(1, accepted[:, None])[:, 0])


def verify_sampled(
    draft_RK: Tensor, q_RKV: Tensor | None, logits: Tensor, sampling: Sampling, generator: torch.Generator
) -> Verdict:
    """The rejection rule; q_RKV None means the drafts were chosen without chance."""
    p = probabilities(logits, sampling)
    rows, drafts = draft_RK.shape
    p_draft = p[:, :-1].gather(2, draft_RK[..., None])[..., 0]
    if q_RKV is None:
        q_RKV = torch.zeros_like(p[:, :-1]).scatter_(2, draft_RK[..., None], 1.0)
    q_draft = q_RKV.gather(2, draft_RK[..., None])[..., 0]
    chance = torch.rand(rows, drafts, generator=generator, device=p.device)
    accepted = leading(chance * q_draft < p_draft)
    rest = p.clone()
    rest[:, :-1] = (p[:, :-1] - q_RKV).clamp(min=0)
    at = rest[torch.arange(rows, device=p.device), accepted]
    # p == q up to rounding leaves nothing, and then a rejection has probability zero up to rounding
    empty = at.sum(-1, keepdim=True) <= 0
    at = torch.where(empty, p[torch.arange(rows, device=p.device), accepted], at)
    return Verdict(accepted, draw(at / at.sum(-1, keepdim=True), generator))
