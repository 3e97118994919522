"""The DFlash drafter as a proposer: context features into its key-value cache, one pass over the block, and the walk.

Legend: R rows, K drafts, B = K + 1 slots, C candidates of a slot, G hidden size, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from core.errors import ConfigError
from core.generate.interface import Draft
from core.generate.sampling import Sampling, draw, probabilities
from core.generate.slots import SlotCache
from core.generate.target import Target
from core.models.dflash import Drafter, Selector
from core.models.dflash_mask import additive, decoding

CANDIDATES = 16


@dataclass(frozen=True)
class Walked:
    """tokens [R, K], their probability [R, K], q [R, K, V] where they were drawn, candidates [R, K, C]."""

    tokens: Tensor
    probability: Tensor
    q: Tensor | None
    candidates: Tensor


def argmax_slots(logits: Tensor, count: int) -> Walked:
    """Every slot's best token, its probability and `count` candidates, from logits [..., V]; drawn without chance."""
    logits = logits.to(torch.float32)
    if count == 1:  # cheaper than a selection
        top, token = logits.max(-1, keepdim=True)
    else:
        top, token = logits.topk(count, dim=-1)
    return Walked(token[..., 0], (top[..., 0] - logits.logsumexp(-1)).exp(), None, token)


def refuse_other_target(vocab: int, hidden: int, target: Target) -> None:
    """ConfigError for a target of another vocabulary or width than the drafter's."""
    size = tuple(target.embedding.weight.shape)
    if (vocab, hidden) != size:
        raise ConfigError(
            f"the drafter was made for a target of vocabulary {vocab} and width {hidden}; "
            f"this one has {size[0]} and {size[1]}"
        )


class Ends(Protocol):
    """What a drafter borrows of its target: embeddings [..., G] of token ids, and logits [..., V] of hidden states."""

    @property
    def embedding(self) -> Callable[[Tensor], Tensor]: ...
    @property
    def head(self) -> Callable[[Tensor], Tensor]: ...


def walk(
    drafter: Drafter, target: Ends, hidden_RKG: Tensor, anchor_R: Tensor, sampling: Sampling,
    noise: torch.Generator | None, candidates: int = CANDIDATES,
) -> Walked:  # fmt: skip
    """Hidden states of the slots -> drafts. Without a selector every slot is decided by itself.

    Slots of a plain drafter are marginals: drawing each by chance loses what holds them together, so they are the
    argmax at any temperature. The selector's walk is a chain of conditionals and is drawn where the target is.
    `candidates`: that a drafter without a selector reports, for the log.
    """
    logits = target.head(hidden_RKG)
    if drafter.selector is None:
        return argmax_slots(logits, min(candidates, logits.shape[-1]))
    best = logits.to(torch.float32).topk(drafter.config.selector_top_k, dim=-1)
    score_RKCC = pair_scores(drafter.selector, target, hidden_RKG, anchor_R, best.values, best.indices)
    row = torch.arange(len(anchor_R), device=anchor_R.device)
    at, found, scores = torch.zeros_like(row), [], []
    for slot in range(hidden_RKG.shape[1]):
        scores.append(score_RKCC[row, slot, at])
        if sampling.greedy or noise is None:
            at = scores[-1].argmax(-1)
        else:
            at = draw(probabilities(scores[-1], Sampling(temperature=sampling.temperature)), noise)
        found.append(at)
    picked, score_RKC = torch.stack(found, 1)[..., None], torch.stack(scores, 1)
    tokens = best.indices.gather(2, picked)[..., 0]
    if sampling.greedy or noise is None:
        return Walked(tokens, score_RKC.softmax(-1).gather(2, picked)[..., 0], None, best.indices)
    prob = probabilities(score_RKC, Sampling(temperature=sampling.temperature))
    q = torch.zeros_like(logits, dtype=torch.float32).scatter(2, best.indices, prob)
    return Walked(tokens, prob.gather(2, picked)[..., 0], q, best.indices)


def pair_scores(
    selector: Selector, target: Ends, hidden_RKG: Tensor, anchor_R: Tensor, value_RKC: Tensor, id_RKC: Tensor
) -> Tensor:
    """FP32 [R, K, C, C]: of every candidate (last) behind every candidate of the slot before; behind the anchor at the
    first slot, C times. All at once, so that the walk itself only looks them up."""
    first = anchor_R[:, None, None].expand(-1, 1, id_RKC.shape[2])
    before = target.embedding(torch.cat((first, id_RKC[:, :-1]), 1))
    left, right = selector.left(before, hidden_RKG[:, :, None]), selector.right(target.embedding(id_RKC))
    return value_RKC[:, :, None] + (left @ right.transpose(2, 3)).to(torch.float32)


class DFlashProposer:
    """Keeps the whole context; the mask applies the window. `candidates`: reported without a selector, for the log."""

    def __init__(self, drafter: Drafter, target: Target, candidates: int = CANDIDATES) -> None:
        config = drafter.config
        refuse_other_target(config.vocab_size, config.hidden_size, target)
        self.drafter, self.target = drafter, target
        self.taps, self.drafts, self.candidates = config.taps, config.drafts, candidates

    def start(self, rows: int, slots: int) -> None:
        self.cache = SlotCache(rows, slots)

    def extend(self, ids_RT: Tensor, features_RTF: Tensor, position_RT: Tensor, used: int) -> None:  # noqa: ARG002
        self.cache.at(position_RT, used)
        for layer, (k, v) in enumerate(self.drafter.context(features_RTF, position_RT)):
            self.cache.update(k, v, layer)

    @torch.no_grad()
    def hidden(self, anchor_R: Tensor, position_R: Tensor) -> Tensor:
        """[R, K, G]: one pass over a block at each row's anchor."""
        config, used = self.drafter.config, self.cache.used
        x = self.drafter.block(self.target.embedding(anchor_R))
        place = position_R[:, None] + torch.arange(config.block_size, device=x.device)
        masks = {k: additive(decoding(config, k, position_R, used), x.dtype) for k in set(config.layer_types)}
        context = [(k[:, :, :used], v[:, :, :used]) for k, v in self.cache.layers.values()]
        return self.drafter(x, place, context, masks)[:, 1:]

    @torch.no_grad()
    def propose(self, anchor_R: Tensor, position_R: Tensor, sampling: Sampling, noise: torch.Generator) -> Draft:
        hidden = self.hidden(anchor_R, position_R)
        found = walk(self.drafter, self.target, hidden, anchor_R, sampling, noise, self.candidates)
        return Draft(found.tokens, found.q, found.probability, found.candidates)

    def keep(self, rows: Tensor) -> None:
        self.cache.keep(rows)
