"""Batched decoding in plain torch, with or without a drafter: the reference of the generation interface.

A round: the proposer drafts K tokens after the anchor (the last token emitted, which the target has not read yet), the
target reads anchor and drafts in one forward, and the leading drafts it agrees with are emitted with the token that it
says next. Without a proposer K = 0 and a round is a step of ordinary decoding. Greedy output is the target's own greedy
text either way; sampled output has its distribution (core.generate.sampling).

Prompts run in waves of similar length; rows that finish are dropped from the wave when half have.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from core.errors import ConfigError
from core.generate.interface import Draft, Prompt, Proposer, Reply
from core.generate.rounds import Round
from core.generate.sampling import Sampling, Verdict, choose, verify_greedy, verify_sampled
from core.generate.slots import SlotCache
from core.generate.target import Target

DRAFT_STREAM = 0x5EED  # the drafter's noise is another stream than the target's


@dataclass
class Wave:
    """Rows being decoded. anchor and position are on the device; position is the anchor's."""

    replies: list[Reply]
    cache: SlotCache
    anchor_R: Tensor
    position_R: Tensor
    places: list[int]  # position_R on the host
    alive: list[bool]


class PlainGenerator:
    """`generate` for a target, with a drafter if one is given; `rows` prompts at a time."""

    def __init__(self, target: Target, proposer: Proposer | None = None, *, rows: int = 64, eos: Iterable[int] = ()):
        if proposer is not None and tuple(proposer.taps) != tuple(target.taps):
            raise ConfigError(f"the drafter reads layers {proposer.taps}, the target is tapped at {target.taps}")
        self.target, self.proposer, self.rows, self.eos = target, proposer, rows, frozenset(eos)

    @torch.no_grad()
    def generate(self, prompts: Iterable[Prompt], sampling: Sampling) -> Iterator[Reply]:
        device = self.target.device
        noise, draft_noise = (torch.Generator(device).manual_seed(sampling.seed + s) for s in (0, DRAFT_STREAM))
        ordered = sorted(prompts, key=lambda p: len(p.ids))
        for at in range(0, len(ordered), self.rows):
            wave = self.prefill(ordered[at : at + self.rows], sampling, noise)
            yield from self.finished(wave)
            while any(wave.alive):
                self.round(wave, sampling, noise, draft_noise)
                yield from self.finished(wave)

    def prefill(self, prompts: list[Prompt], sampling: Sampling, noise: torch.Generator) -> Wave:
        """Read the prompts and emit the first token of each; it belongs to no round."""
        empty = next((p for p in prompts if not p.ids), None)
        if empty is not None:
            raise ConfigError(f"prompt {empty.id!r} has no token")
        device, lengths = self.target.device, [len(p.ids) for p in prompts]
        longest = max(lengths)
        drafts = self.proposer.drafts if self.proposer else 0
        slots = longest + sampling.max_new_tokens + drafts + 1
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : lengths[row]] = torch.tensor(prompt.ids)
        ids = ids.to(device)
        position = torch.arange(longest, device=device).expand(len(prompts), -1)
        cache = SlotCache(len(prompts), slots)
        last = torch.tensor(lengths, device=device) - 1
        logits, features = self.target.step(ids, position, cache, longest, last)
        if self.proposer:
            self.proposer.start(len(prompts), slots)
            self.proposer.extend(ids, features, position, longest)
        token = choose(logits, sampling, noise)
        wave = Wave([Reply(p.id) for p in prompts], cache, token, last + 1, lengths, [True] * len(prompts))
        for row, value in enumerate(token.tolist()):
            self.emit(wave, row, [value], sampling)
        return wave

    def round(self, wave: Wave, sampling: Sampling, noise: torch.Generator, draft_noise: torch.Generator) -> None:
        ids, draft = wave.anchor_R[:, None], None
        if self.proposer:
            draft = self.proposer.propose(wave.anchor_R, wave.position_R, sampling, draft_noise)
            ids = torch.cat((ids, draft.tokens), dim=1)
        position = wave.position_R[:, None] + torch.arange(ids.shape[1], device=ids.device)
        used = max(wave.places) + ids.shape[1]
        logits, features = self.target.step(ids, position, wave.cache, used)
        verdict = self.verify(draft, logits, sampling, noise)
        if self.proposer:
            self.proposer.extend(ids, features, position, used)
        self.record(wave, draft, logits, verdict, sampling)
        # a row that ended stays where it was: further on, its drafts would leave the cache
        alive = torch.tensor(wave.alive, device=ids.device)
        wave.position_R = torch.where(alive, wave.position_R + verdict.accepted + 1, wave.position_R)
        wave.anchor_R = verdict.token

    def verify(self, draft: Draft | None, logits: Tensor, sampling: Sampling, noise: torch.Generator) -> Verdict:
        if draft is None:
            token = choose(logits[:, 0], sampling, noise)
            return Verdict(torch.zeros_like(token), token)
        if sampling.greedy:
            return verify_greedy(draft.tokens, logits)
        return verify_sampled(draft.tokens, draft.q, logits, sampling, noise)

    def record(self, wave: Wave, draft: Draft | None, logits: Tensor, verdict: Verdict, sampling: Sampling) -> None:
        """Emit what was accepted; log the round."""
        accepted, token = verdict.accepted.tolist(), verdict.token.tolist()
        tokens = draft.tokens.tolist() if draft else [[]] * len(accepted)
        agree = (draft.tokens == logits[:, :-1].argmax(-1)).tolist() if draft else []
        probability = draft.probability.tolist() if draft else []
        ranks = rank_of(draft, verdict).tolist() if draft and draft.candidates is not None else None
        for row, reply in enumerate(wave.replies):
            if not wave.alive[row]:
                continue
            kept, place = accepted[row], wave.places[row]
            committed = self.emit(wave, row, [*tokens[row][:kept], token[row]], sampling)
            wave.places[row] += kept + 1 if wave.alive[row] else 0
            if draft is None:
                continue
            hit = ranks[row][: min(kept + 1, len(tokens[row]))] if ranks else []
            one = Round(
                reply.id, len(reply.rounds), place, len(tokens[row]), kept, committed, agree[row],
                [round(p, 4) for p in probability[row]], hit, reply.stop,
            )  # fmt: skip
            reply.rounds.append(one)

    def emit(self, wave: Wave, row: int, tokens: list[int], sampling: Sampling) -> int:
        """Append to a reply up to EOS or the limit; returns how many were."""
        reply = wave.replies[row]
        for count, token in enumerate(tokens, 1):
            reply.ids.append(token)
            ended = token in self.eos and not sampling.ignore_eos
            if ended or len(reply.ids) >= sampling.max_new_tokens:
                reply.stop = "eos" if ended else "length"
                wave.alive[row] = False
                return count
        return len(tokens)

    def finished(self, wave: Wave) -> Iterator[Reply]:
        """Replies that ended since the last call; compacts the wave when half its rows are done."""
        done = [r for r, alive in enumerate(wave.alive) if not alive]
        if any(wave.alive) and 2 * len(done) < len(wave.replies):
            return
        yield from (wave.replies[r] for r in done)
        left = [r for r in range(len(wave.replies)) if wave.alive[r]]
        index = torch.tensor(left, dtype=torch.int64, device=wave.anchor_R.device)
        wave.replies, wave.places = [wave.replies[r] for r in left], [wave.places[r] for r in left]
        wave.anchor_R, wave.position_R, wave.alive = wave.anchor_R[index], wave.position_R[index], [True] * len(left)
        wave.cache.keep(index)
        if self.proposer:
            self.proposer.keep(index)


def rank_of(draft: Draft, verdict: Verdict) -> Tensor:
    """[R, K]: rank of the emitted token among each slot's candidates, -1 where it is none of them. Slots after the
    first rejected one have no emitted token; their entries mean nothing."""
    assert draft.candidates is not None
    slot = torch.arange(draft.tokens.shape[1], device=draft.tokens.device)
    emitted = torch.where(slot == verdict.accepted[:, None], verdict.token[:, None], draft.tokens)
    same = draft.candidates == emitted[..., None]
    return torch.where(same.any(-1), same.to(torch.int8).argmax(-1), -1)
