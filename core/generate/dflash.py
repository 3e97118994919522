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
from core.models.dflash import Drafter
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
    best = logits.to(torch.float32).topk(count, dim=-1)
    probability = (best.values[..., 0] - logits.to(torch.float32).logsumexp(-1)).exp()
    return Walked(best.indices[..., 0], probability, None, best.indices)


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
    noise: torch.Generator | None,
) -> Walked:  # fmt: skip
    """Hidden states of the slots -> drafts. Without a selector every slot is decided by itself.

    Slots of a plain drafter are marginals: drawing each by chance loses what holds them together, so they are the
    argmax at any temperature. The selector's walk is a chain of conditionals and is drawn where the target is.
    """
    logits = target.head(hidden_RKG)
    count = drafter.config.selector_top_k or min(CANDIDATES, logits.shape[-1])
    if drafter.selector is None:
        return argmax_slots(logits, count)
    best = logits.to(torch.float32).topk(count, dim=-1)
    selector, before = drafter.selector, target.embedding(anchor_R)
    right = selector.right(target.embedding(best.indices))
    tokens, chances, dense = [], [], []
    for slot in range(hidden_RKG.shape[1]):
        left = selector.left(before, hidden_RKG[:, slot])
        score = best.values[:, slot] + (right[:, slot] @ left[..., None])[..., 0].to(torch.float32)
        if sampling.greedy or noise is None:
            picked, prob = score.argmax(-1), score.softmax(-1)
        else:
            prob = probabilities(score, Sampling(temperature=sampling.temperature))
            picked = draw(prob, noise)
            dense.append(torch.zeros_like(logits[:, slot], dtype=torch.float32).scatter(1, best.indices[:, slot], prob))
        chances.append(prob.gather(1, picked[:, None])[:, 0])
        tokens.append(best.indices[:, slot].gather(1, picked[:, None])[:, 0])
        before = target.embedding(tokens[-1])
    stacked = torch.stack(tokens, 1), torch.stack(chances, 1)
    return Walked(*stacked, torch.stack(dense, 1) if dense else None, best.indices)


class DFlashProposer:
    """Keeps the whole context; the mask applies the window."""

    def __init__(self, drafter: Drafter, target: Target) -> None:
        config = drafter.config
        refuse_other_target(config.vocab_size, config.hidden_size, target)
        self.drafter, self.target = drafter, target
        self.taps, self.drafts = config.taps, config.drafts

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
        found = walk(self.drafter, self.target, self.hidden(anchor_R, position_R), anchor_R, sampling, noise)
        return Draft(found.tokens, found.q, found.probability, found.candidates)

    def keep(self, rows: Tensor) -> None:
        self.cache.keep(rows)
