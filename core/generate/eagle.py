"""An EAGLE drafter as a proposer: K steps of one layer, the drafter's own hidden state and token fed back.

Entries of true positions are computed from the target's features when the target has read the tokens, and take the
place of what the chain wrote there provisionally; a query sees entries up to its own position, so that what is left of
a rejected draft is never seen. Drafts are the argmax at any temperature (q = 1, see core.generate.sampling).

Legend: R rows, T tokens, S slots, G hidden size, K drafts.
"""

import torch
from torch import Tensor

from core.generate.dflash import CANDIDATES, argmax_slots, refuse_other_target
from core.generate.interface import Draft
from core.generate.sampling import Sampling
from core.generate.slots import SlotCache, seen
from core.generate.target import Target
from core.models.dflash_mask import additive
from core.models.eagle import EagleDrafter


class EagleProposer:
    """Keeps the whole context, and the fused features of it; the mask applies the window. `candidates`: reported of
    every slot, for the log."""

    def __init__(self, drafter: EagleDrafter, target: Target, candidates: int = CANDIDATES) -> None:
        config = drafter.config
        refuse_other_target(config.vocab_size, config.hidden_size, target)
        self.drafter, self.target = drafter, target
        self.taps, self.drafts, self.candidates = config.taps, config.drafts, candidates

    def start(self, rows: int, slots: int) -> None:
        self.cache, self.used = SlotCache(rows, slots), 0
        weight = self.drafter.fc.weight
        self.fused_RSG = weight.new_zeros(rows, slots, weight.shape[0])

    @torch.no_grad()
    def extend(self, ids_RT: Tensor, features_RTF: Tensor, position_RT: Tensor, used: int) -> None:
        row = torch.arange(len(ids_RT), device=ids_RT.device)[:, None]
        self.fused_RSG[row, position_RT] = self.drafter.fuse(features_RTF)
        before = self.fused_RSG[row, (position_RT - 1).clamp(min=0)]  # position 0 gets an entry that nobody sees
        self.cache.at(position_RT, used)
        self.cache.update(*self.drafter.key_value(self.target.embedding(ids_RT), before, position_RT), 0)
        self.used = used

    def sees(self, position_R1: Tensor, dtype: torch.dtype) -> Tensor:
        """Additive mask over the used slots."""
        used = self.cache.used
        near = seen(position_R1, used, self.drafter.config.window or None)
        return additive(near & (torch.arange(used, device=position_R1.device) > 0), dtype)

    @torch.no_grad()
    def propose(self, anchor_R: Tensor, position_R: Tensor, sampling: Sampling, noise: torch.Generator) -> Draft:  # noqa: ARG002
        row = torch.arange(len(anchor_R), device=anchor_R.device)[:, None]
        hidden, token, found = self.fused_RSG[row, position_R[:, None] - 1], anchor_R, []
        for step in range(self.drafts):
            place = position_R[:, None] + step
            # an anchor is at most at position `used`: its token came out of the forward that ended there
            self.cache.at(place, min(self.used + step + 1, self.cache.slots))
            mask = self.sees(place, hidden.dtype)
            embed = self.target.embedding(token)[:, None]
            hidden = self.drafter(embed, hidden, place, lambda k, v: self.cache.update(k, v, 0), mask)
            logits = self.target.head(self.drafter.norm(hidden[:, 0]))
            found.append(argmax_slots(logits, min(self.candidates, logits.shape[-1])))
            token = found[-1].tokens
        return Draft(
            torch.stack([f.tokens for f in found], 1),
            None,
            torch.stack([f.probability for f in found], 1),
            torch.stack([f.candidates for f in found], 1),
        )

    def keep(self, rows: Tensor) -> None:
        self.cache.keep(rows)
        self.fused_RSG = self.fused_RSG[rows]
