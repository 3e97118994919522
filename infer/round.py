"""One step on the device: forward, acceptance, the drafter's context, its next drafts.

`Round.run` takes what the scheduler planned and returns host values. Everything between the upload of the inputs and
the download of the results is `compute`: it waits for nothing, and its shapes follow from the inputs' shapes, so a step
in which every row generates can be replayed as a CUDA graph (infer.graphs).

Legend: T tokens, R rows that emit, K drafts, V vocabulary, P pages of the longest row.
"""

from collections.abc import Sequence as Several
from dataclasses import dataclass, field

import torch
from torch import Tensor

from core.generate.dflash import Walked
from infer.cache import KVCache, Step, group_step
from infer.drafting import BlockDrafter, Tables
from infer.graphs import Graphs
from infer.model import Model
from infer.request import TokenLogprob
from infer.scheduler import Work
from infer.sequence import Pending
from kernels.sampling import Params


@dataclass(frozen=True)
class Inputs:
    """step.logits_at has K + 1 rows of tokens for each row that emits; position: of the anchors.

    draft [R, K] int64 and drafted [R] int32: what is verified; entries after `drafted` are not looked at.
    """

    step: Step
    params: Params
    position: Tensor
    draft: Tensor
    drafted: Tensor
    tables: Tables | None = None


@dataclass(frozen=True)
class Outcome:
    """accepted [R], token [R]: kernels.accept; logits [R, K + 1, V]; the next drafts, with a drafter."""

    accepted: Tensor
    token: Tensor
    logits: Tensor
    walked: Walked | None


@dataclass(frozen=True)
class Emitted:
    """What one row got: `tokens` ends with the one that the target said; None of it is final before the engine has
    looked for ends. agree: whether each verified draft is the target's argmax (only where it was asked for)."""

    accepted: int
    tokens: list[int]
    draft: Pending
    logprobs: list[TokenLogprob] = field(default_factory=list)
    agree: list[bool] = field(default_factory=list)


class Round:
    """Runs steps of `model` on `cache`; log: also fetch what only the round log needs."""

    def __init__(
        self, model: Model, cache: KVCache, drafter: BlockDrafter | None, *, log: bool = False, graphs: bool = False
    ) -> None:
        self.model, self.cache, self.drafter, self.log = model, cache, drafter, log
        self.drafts = drafter.drafts if drafter else 0
        self.graphs = None
        if graphs:
            self.graphs = Graphs(
                self.compute, device=model.device, drafts=self.drafts, spare=cache.spare, page=cache.size,
                drafting=drafter is not None,
            )  # fmt: skip

    def run(self, work: Several[Work]) -> list[Emitted | None]:
        """One entry for each of `work`; None for those that only read a piece of their prompt."""
        emitting = [w for w in work if w.emits]
        if self.graphs is not None and self.graphs.fits(work):
            outcome = self.graphs.run(work, any(cuts(w) for w in work))
        else:
            outcome = self.compute(self.inputs(work, emitting))
        found = iter(self.fetch(emitting, outcome))
        return [next(found) if w.emits else None for w in work]

    def inputs(self, work: Several[Work], emitting: Several[Work]) -> Inputs:
        device, size = self.model.device, self.cache.size
        ids, first, counts = [], [], []
        for w in work:
            s = w.sequence
            ids.append(s.ids[s.computed : s.computed + w.count] + s.draft.tokens[: w.drafted])
            first.append(s.computed)
            counts.append(len(ids[-1]))
        tables = [w.sequence.table for w in work]
        groups = tuple(
            group_step([t.pages[g] for t in tables if t is not None], first, counts, size, device)
            for g in range(len(self.cache.spare))
        )
        position = torch.cat([torch.arange(f, f + c) for f, c in zip(first, counts, strict=True)])
        ends = torch.tensor(counts).cumsum(0).tolist()
        at = [e - 1 - w.drafted + min(k, w.drafted)
              for w, e in zip(work, ends, strict=True) if w.emits for k in range(self.drafts + 1)]  # fmt: skip
        step = Step(
            torch.tensor([i for row in ids for i in row]).to(device), position.to(device), groups,
            torch.tensor(at, dtype=torch.int64).to(device),
        )  # fmt: skip
        draft = torch.zeros(len(emitting), self.drafts, dtype=torch.int64)
        for row, w in enumerate(emitting):
            draft[row, : w.drafted] = torch.tensor(w.sequence.draft.tokens[: w.drafted], dtype=torch.int64)
        return Inputs(
            step, params_of(emitting, device),
            torch.tensor([len(w.sequence.ids) - 1 for w in emitting], dtype=torch.int64).to(device), draft.to(device),
            torch.tensor([w.drafted for w in emitting], dtype=torch.int32).to(device),
            self.tables(work, emitting, groups) if self.drafter else None,
        )  # fmt: skip

    def tables(self, work: Several[Work], emitting: Several[Work], groups: tuple) -> Tables:
        rows = torch.tensor([i for i, w in enumerate(work) if w.emits], dtype=torch.int64, device=self.model.device)
        longest = max((len(w.sequence.ids) + w.drafted for w in emitting), default=0) + self.drafts + 1
        return Tables(tuple(g.batch.page_table[rows] for g in groups), longest)

    @torch.no_grad()
    def compute(self, given: Inputs) -> Outcome:
        """No host value is read from the device here."""
        model, step = self.model, given.step
        computed = model.forward(step, self.cache)
        if self.drafter is not None and computed.features is not None:
            self.drafter.extend(computed.features, step.position, step.groups, self.cache)
        rows = len(given.position)
        logits = computed.logits.view(rows, self.drafts + 1, computed.logits.shape[-1])
        if not rows:
            none = given.position
            return Outcome(none, none, logits, None)
        accepted, token = model.ops.accept(given.draft, None, logits, given.params, given.position, given.drafted)
        walked = None
        if self.drafter is not None and given.tables is not None:
            place = given.position + accepted + 1
            walked = self.drafter.propose(token.clamp(min=0), place, given.tables, self.cache)
        return Outcome(accepted, token, logits, walked)

    def fetch(self, emitting: Several[Work], outcome: Outcome) -> list[Emitted]:
        """The host's copy, without rows that fill a graph; one transfer, more where logprobs or a log are asked for."""
        if not emitting:
            return []
        parts = [outcome.accepted[:, None].to(torch.int64), outcome.token[:, None]]
        if outcome.walked is not None:
            parts.append(outcome.walked.tokens)
        rows = torch.cat(parts, dim=1)[: len(emitting)].tolist()
        agree = self.agreement(emitting, outcome) if self.log else None
        chances = outcome.walked.probability.tolist() if self.log and outcome.walked else None
        candidates = outcome.walked.candidates.tolist() if self.log and outcome.walked else None
        found = []
        for row, w in enumerate(emitting):
            accepted, token, *draft = rows[row]
            pending = Pending(draft, chances[row] if chances else [], candidates[row] if candidates else [])
            tokens = [*w.sequence.draft.tokens[:accepted], token]
            logprobs = []
            if w.sequence.request.params.logprobs is not None and token >= 0:
                logprobs = logprobs_of(outcome.logits[row, : len(tokens)], tokens, w.sequence.request.params.logprobs)
            found.append(Emitted(accepted, tokens, pending, logprobs, agree[row] if agree else []))
        return found

    def agreement(self, emitting: Several[Work], outcome: Outcome) -> list[list[bool]]:
        best = outcome.logits[: len(emitting), :-1].argmax(-1).tolist()
        return [
            [a == b for a, b in zip(w.sequence.draft.tokens[: w.drafted], best[row], strict=False)]
            for row, w in enumerate(emitting)
        ]


def params_of(emitting: Several[Work], device: torch.device) -> Params:
    given = [w.sequence.request.params for w in emitting]
    return Params(
        torch.tensor([p.temperature for p in given], dtype=torch.float32).to(device),
        torch.tensor([p.top_p for p in given], dtype=torch.float32).to(device),
        torch.tensor([p.top_k for p in given], dtype=torch.int32).to(device),
        torch.tensor([w.sequence.seed for w in emitting], dtype=torch.int64).to(device),
        cut=any(cuts(w) for w in emitting),
    )


def cuts(work: Work) -> bool:
    """Whether the request's distribution is cut by top-p or top-k."""
    params = work.sequence.request.params
    return params.top_p < 1 or params.top_k > 0


def logprobs_of(logits: Tensor, tokens: list[int], count: int) -> list[TokenLogprob]:
    """Of the model's own distribution, FP32, from logits [n, V] of n emitted tokens."""
    scores = logits.to(torch.float32).log_softmax(-1)
    chosen = scores.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    best = scores.topk(min(count, scores.shape[-1]), dim=-1)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [
        TokenLogprob(token, one, tuple(zip(ids, values, strict=True)))
        for token, one, (ids, values) in zip(tokens, chosen, pairs, strict=True)
    ]
