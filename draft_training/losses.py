"""Losses of the drafter, computed from hidden states chunk by chunk through the target's frozen head.

    ce      -w_k log q_k(label), w_k = exp(-(k - 1) / gamma): an early miss wastes all later slots (arXiv 2602.06036)
    dpace   the same with w_k = sum_{j >= k} prod_{i <= j} ((1 - alpha) q_i(label) + alpha), detached: the expected
            number of accepted tokens that slot k still decides (arXiv 2605.18810)
    kl      w_k KL(p || q_k), p the target's own distribution at the slot, temperature 1
    selector  cross-entropy of the label among the slot's top candidates under logit + pair score, given the true token
            before it. DFlash 2 published the selector and not its objective: this one is ours.

Labels are the data's tokens, or what the target would say after the data's tokens before them (its argmax).
All are sums over slots; the loop divides by the number of labelled slots. d ce / d logits = w (softmax - onehot) is
formed in the same pass, so a chunk's logits live once.

Legend: N slots (blocks x K), K drafts, G hidden size, V vocabulary, C candidates.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.generate.target import Target
from core.models.dflash import Drafter
from core.train.batch import IGNORE, Batch
from draft_training.anchors import DraftBatch, gathered
from draft_training.config import Labels, LossConfig
from draft_training.replay import hidden_slots


@dataclass(frozen=True)
class Slots:
    """labels [N] (-100: none); teacher: the target's hidden state that predicts each slot's token [N, G], or None."""

    labels: Tensor
    teacher: Tensor | None
    drafts: int


def decay(drafts: int, gamma: float, device: torch.device) -> Tensor:
    """[K] exp(-(k - 1) / gamma), all 1 where gamma is 0."""
    steps = torch.arange(drafts, dtype=torch.float32, device=device)
    return torch.exp(-steps / gamma) if gamma else torch.ones_like(steps)


def dpace(prob_label: Tensor, alpha: float) -> Tensor:
    """[blocks, K] probabilities of the labels (0 where there is none) -> weights, same shape."""
    reach = ((1 - alpha) * prob_label + alpha).cumprod(-1)
    return reach.flip(-1).cumsum(-1).flip(-1)


class ChunkedDraftLoss(torch.autograd.Function):
    """(hidden [N, G], head [V, G], slots, config) -> (loss, ce, kl, leading hits, top values, top ids, labels)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, slots: Slots, config: LossConfig, candidates: int
    ) -> tuple[Tensor, ...]:
        count, drafts = hidden.shape[0], slots.drafts
        chunk = max(1, config.chunk_tokens // drafts) * drafts
        work, best = (compiled(f) if hidden.is_cuda else f for f in (chunk_loss, best_of))
        grad = torch.empty_like(hidden)
        sums = torch.zeros(4, dtype=torch.float32, device=hidden.device)
        labels = slots.labels.clone()
        top = (
            torch.empty(count, candidates, dtype=torch.float32, device=hidden.device),
            torch.empty(count, candidates, dtype=torch.int64, device=hidden.device),
        )
        for at in range(0, count, chunk):
            part = slice(at, min(at + chunk, count))
            target = None if slots.teacher is None else slots.teacher[part] @ head.T
            logits = hidden[part] @ head.T
            d_logits, values, labels[part] = work(logits, labels[part], target, drafts, config)
            if candidates:
                top[0][part], top[1][part] = best(logits, candidates)
            grad[part] = d_logits @ head
            sums += values
        ctx.save_for_backward(grad)
        parts = tuple(sums.unbind())
        ctx.mark_non_differentiable(*parts[1:], *top, labels)
        return (*parts, *top, labels)

    @staticmethod
    def backward(ctx: Any, scale: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return (grad.to(torch.float32) * scale).to(grad.dtype), None, None, None, None


def chunk_loss(
    logits: Tensor, labels: Tensor, target: Tensor | None, drafts: int, config: LossConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """(d loss / d logits in their dtype, FP32 sums [loss, ce, kl, leading hits], labels) of whole blocks."""
    carries = labels != IGNORE
    if config.labels is Labels.target and target is not None:
        labels = torch.where(carries, target.argmax(-1), IGNORE)
    log_q = torch.log_softmax(logits.to(torch.float32), dim=-1)
    safe = labels.clamp(min=0)[:, None]
    log_label = log_q.gather(1, safe)[:, 0]
    hits = ((logits.argmax(-1) == labels) & carries).view(-1, drafts)
    if config.dpace_alpha is not None:
        weight = dpace((log_label.exp() * carries).view(-1, drafts), config.dpace_alpha).flatten()
    else:
        weight = decay(drafts, config.gamma, logits.device).repeat(len(labels) // drafts)
    weight = weight * carries
    ce = -(log_label * carries).sum()
    loss = config.ce * -(log_label * weight).sum()
    kl = torch.zeros_like(ce)
    grad = log_q.exp().mul_(config.ce + (config.kl if target is not None else 0.0))
    if config.kl and target is not None:
        log_p = torch.log_softmax(target.to(torch.float32), dim=-1)
        p = log_p.exp()
        each = (p * (log_p - log_q)).sum(-1)
        kl, loss = (each * carries).sum(), loss + config.kl * (each * weight).sum()
        grad.sub_(p.mul_(config.kl))
    if config.ce:  # written as a comparison so that a compiled version makes one pass of it
        grad = torch.where(torch.arange(logits.shape[-1], device=logits.device) == safe, grad - config.ce, grad)
    grad = grad.mul_(weight[:, None]).to(logits.dtype)
    leading = hits.to(torch.float32).cumprod(-1).sum()
    return grad, torch.stack((loss, ce, kl, leading)), labels


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Fused on a GPU: as written, each of a dozen elementwise steps would read and write all logits in FP32."""
    return torch.compile(function, dynamic=False)


GROUP = 128


def best_of(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(values FP32, ids) [C, count] of the largest logits, best first, in one pass over them.

    The best `count` entries lie in the `count` groups of 128 with the largest maxima, whatever the ties.
    """
    rows, vocab = logits.shape
    groups = -(-vocab // GROUP)
    if groups <= count:
        best = logits.topk(count, dim=-1)
        return best.values.to(torch.float32), best.indices
    padded = F.pad(logits, (0, groups * GROUP - vocab), value=float("-inf")).view(rows, groups, GROUP)
    group = padded.amax(-1).topk(count, dim=-1).indices
    inside = padded.gather(1, group[..., None].expand(-1, -1, GROUP)).flatten(1)
    best = inside.topk(count, dim=-1)
    ids = group.gather(1, best.indices // GROUP) * GROUP + best.indices % GROUP
    return best.values.to(torch.float32), ids


def selector_loss(
    drafter: Drafter, embedding: Tensor, hidden: Tensor, before: Tensor, labels: Tensor, values: Tensor, ids: Tensor
) -> tuple[Tensor, Tensor]:
    """(summed cross-entropy among candidates, hits) over slots whose label is a candidate.

    before [N]: the true token in front of each slot. values, ids [N, C]: the slot's candidates.
    """
    assert drafter.selector is not None
    right = drafter.selector.right(embedding)  # of the whole vocabulary: cheaper than N x C projections
    left = drafter.selector.left(embedding[before], hidden)
    score = values + torch.einsum("nr,ncr->nc", left, F.embedding(ids, right)).to(torch.float32)
    same = ids == labels[:, None]
    found = same.any(-1)
    each = F.cross_entropy(score, same.to(torch.int8).argmax(-1), reduction="none")
    return (each * found).sum(), (same.gather(1, score.argmax(-1, keepdim=True))[:, 0] & found).sum()


def make_loss(target: Target, config: LossConfig) -> Callable[[nn.Module, Batch], tuple[Tensor, dict[str, Tensor]]]:
    """The loss as the engine calls it; the target runs first, without gradients, while no activation is held."""

    def loss_fn(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert isinstance(batch, DraftBatch)
        drafter: Any = model
        ids, position, anchors = batch.input_ids_BT, batch.position_ids_BT, batch.anchors_RA
        drafts = drafter.config.drafts
        last, features = batch.capture(target)
        hidden = hidden_slots(drafter, target, ids, position, features, anchors).flatten(0, 2)
        pairs = isinstance(drafter, Drafter) and drafter.selector is not None
        labels = gathered(batch.labels_BT, position, anchors, drafts)
        place = (anchors.clamp(min=0)[..., None] + torch.arange(drafts, device=ids.device)).clamp(max=ids.shape[1] - 1)
        soft = config.kl > 0 or config.labels is Labels.target
        teacher = last.gather(1, place.flatten(1)[..., None].expand(-1, -1, last.shape[-1])).flatten(0, 1)
        slots = Slots(labels.flatten(), teacher if soft else None, drafts)
        head = target.head.weight.detach()
        loss, ce, kl, leading, values, best, used = ChunkedDraftLoss.apply(
            hidden, head, slots, config, drafter.config.selector_top_k if pairs else 0
        )
        stats = {"ce": ce, "leading": leading, "blocks": (labels[..., 0] != IGNORE).sum()}
        if soft:
            stats["kl"] = kl
        if pairs:
            before = ids.gather(1, place.flatten(1)).flatten()
            pair, right = selector_loss(drafter, target.embedding.weight.detach(), hidden, before, used, values, best)
            loss = loss + config.selector * pair
            stats |= {"selector_ce": pair.detach(), "selector_hits": right}
        return loss, stats

    return loss_fn
