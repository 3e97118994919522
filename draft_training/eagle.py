"""EAGLE chains at the anchors of packed rows: what training scores, and what replay drafts.

All chains of a row take a step together: K passes over A tokens, where a block drafter makes one pass over A x B. Every
step reads the drafter's own hidden state of the step before (with its gradient, so that the drafter is trained on what
it will meet when it drafts), and a token that the caller feeds: in training the text's, because a draft counts only
where the drafts before it were right; in replay the drafter's own, as in serving.

Legend: R rows, T tokens, A anchors of a row, K steps, F taps x hidden size, G hidden size.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from core.generate.dflash import Walked, argmax_slots
from core.generate.target import Target
from core.models.dflash import KeyValue
from core.models.dflash_mask import additive
from core.models.eagle import EagleDrafter
from core.models.eagle_mask import dense, sparse
from core.models.ops import FLEX
from core.train.batch import document_ids

Feed = Callable[[int, Tensor], Tensor]


class Chains:
    """Keys and values of the context and of the steps so far, in the order of core.models.eagle_mask."""

    def __init__(self, context: KeyValue, steps: int, anchors: int) -> None:
        self.context, self.own = context, [[t.new_zeros(*t.shape[:2], anchors, t.shape[3])] * steps for t in context]
        self.step = 0

    def store(self, keys: Tensor, values: Tensor) -> KeyValue:
        """Add a step's entries [R, H, A, D]; all keys and all values."""
        for own, new in zip(self.own, (keys, values), strict=True):
            own[self.step] = new
        self.step += 1
        k, v = (torch.cat((c, *own), dim=2) for c, own in zip(self.context, self.own, strict=True))
        return k, v


def along(t_RTG: Tensor, place_RA: Tensor) -> Tensor:
    """[R, A, G] at indices along the rows."""
    return t_RTG.gather(1, place_RA[..., None].expand(-1, -1, t_RTG.shape[-1]))


def mask_of(
    drafter: EagleDrafter, step: int, document_RT: Tensor, position_RT: Tensor, anchor_RA: Tensor, dtype: torch.dtype
) -> Any:
    """In the form that the drafter's attention reads."""
    if drafter.ops is FLEX:
        return sparse(drafter.config, step, document_RT, position_RT, anchor_RA)
    return additive(dense(drafter.config, step, document_RT, position_RT, anchor_RA), dtype)


def chains_at(
    drafter: EagleDrafter, target: Target, ids_RT: Tensor, position_RT: Tensor, features_RTF: Tensor,
    anchor_RA: Tensor, feed: Feed,
) -> Tensor:  # fmt: skip
    """Hidden states [R, A, K, G], after the final norm, of the chains at `anchor_RA`: indices along packed rows,
    ascending, none of them a document's first token; below 0: none.

    Args:
        feed: (k, hidden states [R, A, G] of step k, after the norm) -> tokens [R, A] that stand k places after the
            anchors, which step k + 1 reads; k = 1 .. K - 1, and once more for K, whose result nobody reads.
    """
    steps, place, document = drafter.config.drafts, anchor_RA.clamp(min=0), document_ids(position_RT)
    embed, fused = target.embedding(ids_RT), drafter.fuse(features_RTF)
    before = fused.roll(1, dims=1)  # what comes round to a row's first token is masked, as every first token is
    chains = Chains(drafter.key_value(embed, before, position_RT), steps, place.shape[1])
    token, hidden, position = along(embed, place), along(before, place), position_RT.gather(1, place)
    found = []
    for step in range(steps):
        mask = mask_of(drafter, step, document, position_RT, anchor_RA, hidden.dtype)
        hidden = drafter(token, hidden, position + step, chains.store, mask)
        found.append(drafter.norm(hidden))
        token = target.embedding(feed(step + 1, found[-1]))
    return torch.stack(found, dim=2)


def trained_chains(
    drafter: EagleDrafter, target: Target, ids_RT: Tensor, position_RT: Tensor, features_RTF: Tensor, anchor_RA: Tensor
) -> Tensor:
    """Hidden states [R, A, K, G] of chains along the text. Behind a row's end its last token stands for the others;
    no slot there has a label."""
    place, last = anchor_RA.clamp(min=0), ids_RT.shape[1] - 1

    def text(step: int, _hidden: Tensor) -> Tensor:
        return ids_RT.gather(1, (place + step).clamp(max=last))

    return chains_at(drafter, target, ids_RT, position_RT, features_RTF, anchor_RA, text)


def drafted_chains(
    drafter: EagleDrafter, target: Target, ids_RT: Tensor, position_RT: Tensor, features_RTF: Tensor,
    anchor_RA: Tensor, candidates: int,
) -> Walked:  # fmt: skip
    """What the drafter drafts at every anchor: tokens and probability [R, A, K], candidates [R, A, K, C]."""
    steps: list[Walked] = []

    def own(_step: int, hidden: Tensor) -> Tensor:
        logits = target.head(hidden)
        steps.append(argmax_slots(logits, min(candidates, logits.shape[-1])))
        return steps[-1].tokens

    chains_at(drafter, target, ids_RT, position_RT, features_RTF, anchor_RA, own)
    tokens, probability = (torch.stack([getattr(s, n) for s in steps], 2) for n in ("tokens", "probability"))
    return Walked(tokens, probability, None, torch.stack([s.candidates for s in steps], 2))
