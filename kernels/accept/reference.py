"""THE definition of acceptance, in plain torch: the rejection rule over whole-number weights.

Draft x ~ q is accepted with probability min(1, p(x) / q(x)); after the first that is not, a token is drawn from
max(p - q, 0) normalised, and after as many as were drafted one from p (Leviathan et al., arXiv 2211.17192). With p as
weights w of sum W (kernels.sampling), q W rounded down to whole numbers is called `taken`:

    accept    32 random bits of `taken`, as a place below it, fall below w:  floor(u taken) < w
    residual  max(w - taken, 0), whole numbers again, drawn from as p is

Drafts chosen without chance (q None) are q = 1 for the draft: taken = W there, 0 elsewhere. Greedy rows have all their
weight on the argmax, so the same rule accepts exactly the drafts that equal it. A token without weight is never
accepted, since no place is below 0.

Noise of slot j after the anchor is that of position + j: one stream for the tests, one for residuals, and `sample`'s
own for draws from p. So a row without drafts draws the very token that `sample` draws.

Legend: R rows, K drafts, S = K + 1 slots, V vocabulary.
"""

import torch
from torch import Tensor

from kernels.sampling.reference import ACCEPT, RESIDUAL, SAMPLE, Params, noise, pick, share, weights


def taken_of(total: Tensor, draft: Tensor, q: Tensor | None, size: int) -> Tensor:
    """int64 [..., V]: what q takes of weights of sum `total` [...]; draft [...]."""
    if q is None:
        return torch.where(torch.arange(size, device=total.device) == draft[..., None], total[..., None], 0)
    return (q.to(torch.float64) * total[..., None].to(torch.float64)).to(torch.int64)


def at(values: Tensor, index: Tensor) -> Tensor:
    """values [..., V] at index [...], 0 where the index is outside."""
    inside = (index >= 0) & (index < values.shape[-1])
    return torch.where(inside, values.gather(-1, torch.where(inside, index, 0)[..., None])[..., 0], 0)


def accept(
    draft: Tensor, q: Tensor | None, logits: Tensor, params: Params, position: Tensor, drafted: Tensor
) -> tuple[Tensor, Tensor]:
    rows, slots, size = logits.shape
    a_row = (params.temperature, params.top_p, params.top_k, params.seed)
    each = Params(*(value.repeat_interleave(slots) for value in a_row), params.cut)
    weight_RSV = weights(logits.flatten(0, 1), each).unflatten(0, (rows, slots))
    total_RS = weight_RSV.sum(-1)
    taken_RKV = taken_of(total_RS[:, :-1], draft, q, size)

    slot = torch.arange(slots, device=logits.device)
    place_RS = position[:, None] + slot
    word_RK = noise(params.seed[:, None].expand(-1, slots), place_RS, ACCEPT)[:, :-1]
    hit_RK = share(word_RK, at(taken_RKV, draft)) < at(weight_RSV[:, :-1], draft)
    hit_RK &= slot[:-1] < drafted[:, None]
    accepted = hit_RK.to(torch.int64).cumprod(-1).sum(-1)

    row = torch.arange(rows, device=logits.device)
    rejected = accepted < drafted.clamp(max=slots - 1)
    p, place = weight_RSV[row, accepted], place_RS[row, accepted]
    taken_RSV = torch.cat((taken_RKV, torch.zeros_like(weight_RSV[:, :1])), dim=1)
    rest = torch.where(rejected[:, None], (p - taken_RSV[row, accepted]).clamp(min=0), p)
    # p == q up to rounding leaves nothing, and then a rejection has probability zero up to rounding.
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)
    word = torch.where(rejected, noise(params.seed, place, RESIDUAL), noise(params.seed, place, SAMPLE))
    return accepted.to(torch.int32), pick(rest, word)
