"""Teacher-forced acceptance: what a drafter would have drafted along a text that is already there.

Every position of a reply is an anchor once; drafts are compared with the text. Walking from the first anchor, each
round commits its leading hits and one token more, as served decoding does. On the target's own greedy text this equals
greedy serving round for round, so the two are printed side by side and a gap is a fault of one of them.

Legend: R rows, T tokens, A anchors of a row, K drafts, C candidates, F taps x hidden size.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from core.generate.dflash import CANDIDATES, Walked, walk
from core.generate.interface import Prompt, Reply
from core.generate.rounds import Round
from core.generate.sampling import Sampling
from core.generate.target import Target
from core.models.dflash import Drafter
from core.models.dflash_mask import additive, dense, sparse
from core.models.drafters import AnyDrafter
from core.models.eagle import EagleDrafter
from core.models.ops import FLEX
from core.train.batch import document_ids
from draft_training.eagle import drafted_chains, trained_chains

GREEDY = Sampling()


def masks_of(drafter: Drafter, document_RT: Tensor, anchor_RA: Tensor, dtype: torch.dtype) -> dict[str, object]:
    """By layer type, in the form that the drafter's attention reads."""
    kinds = sorted(set(drafter.config.layer_types))
    if drafter.ops is FLEX:
        return {k: sparse(drafter.config, k, document_RT, anchor_RA) for k in kinds}
    return {k: additive(dense(drafter.config, k, document_RT, anchor_RA), dtype) for k in kinds}


def hidden_at(
    drafter: Drafter, target: Target, ids_RT: Tensor, position_RT: Tensor, features_RTF: Tensor, anchor_RA: Tensor
) -> Tensor:
    """Hidden states [R, A, B, G] of the blocks at `anchor_RA`, indices along packed rows, ascending; below 0: none."""
    config = drafter.config
    place = anchor_RA.clamp(min=0)
    x = drafter.block(target.embedding(ids_RT.gather(1, place)).detach())
    slots = torch.arange(config.block_size, device=ids_RT.device)
    position = position_RT.gather(1, place)[..., None] + slots
    masks = masks_of(drafter, document_ids(position_RT), anchor_RA, x.dtype)
    context = drafter.context(features_RTF, position_RT)
    return drafter(x.flatten(1, 2), position.flatten(1), context, masks).unflatten(1, x.shape[1:3])


def hidden_slots(
    drafter: AnyDrafter, target: Target, ids_RT: Tensor, position_RT: Tensor, features_RTF: Tensor, anchor_RA: Tensor
) -> Tensor:
    """What training scores: hidden states [R, A, K, G] of the drafted slots, by either kind of drafter."""
    if isinstance(drafter, EagleDrafter):
        return trained_chains(drafter, target, ids_RT, position_RT, features_RTF, anchor_RA)
    return hidden_at(drafter, target, ids_RT, position_RT, features_RTF, anchor_RA)[:, :, 1:]


def drafts_at(
    drafter: AnyDrafter, target: Target, ids_RT: Tensor, position_RT: Tensor, features_RTF: Tensor, anchor_RA: Tensor
) -> Walked:
    """Greedy drafts at every anchor, by either kind: tokens and probability [R, A, K], candidates [R, A, K, C]."""
    if isinstance(drafter, EagleDrafter):
        return drafted_chains(drafter, target, ids_RT, position_RT, features_RTF, anchor_RA, CANDIDATES)
    hidden = hidden_slots(drafter, target, ids_RT, position_RT, features_RTF, anchor_RA)
    anchor = ids_RT.gather(1, anchor_RA.clamp(min=0))
    found = walk(drafter, target, hidden.flatten(0, 1), anchor.flatten(), GREEDY, None)
    shaped = [t.unflatten(0, anchor_RA.shape) for t in (found.tokens, found.probability, found.candidates)]
    return Walked(shaped[0], shaped[1], None, shaped[2])


@dataclass(frozen=True)
class Replayed:
    """Of one text: drafts, their probability and candidates at every anchor of the reply.

    first: index of the first anchor in the text (the reply's first token). tokens, probability [A, K] and candidates
    [A, K, C] belong to anchors first, first + 1, ...; text: all token ids.
    """

    id: str
    text: list[int]
    first: int
    tokens: Tensor
    probability: Tensor
    candidates: Tensor


@torch.no_grad()
def replay(
    target: Target,
    drafter: AnyDrafter,
    texts: list[tuple[Prompt, Reply]],
    *,
    row_tokens: int = 4096,
    anchors: int = 128,
) -> Iterator[Replayed]:
    """Drafts at every position of each reply; texts are grouped by length into padded rows.

    Args:
        row_tokens: tokens of one forward, about. anchors: blocks a row and pass (memory).
    """
    pairs = sorted(texts, key=lambda pair: len(pair[0].ids) + len(pair[1].ids))
    while pairs:
        length = target.room(len(pairs[-1][0].ids) + len(pairs[-1][1].ids))
        count = max(1, row_tokens // length)
        rows, pairs = pairs[-count:], pairs[:-count]
        shape = (count if target.compiles_shapes else len(rows), length)
        yield from replay_rows(target, drafter, rows, shape, anchors)


def replay_rows(
    target: Target, drafter: AnyDrafter, rows: list[tuple[Prompt, Reply]], shape: tuple[int, int], anchors: int
) -> Iterator[Replayed]:
    """`shape`: rows and tokens of the target's forward; what the texts leave empty is seen by nobody in them."""
    device = target.device
    ids = torch.zeros(shape, dtype=torch.int64)
    for row, (prompt, reply) in enumerate(rows):
        text = [*prompt.ids, *reply.ids]
        ids[row, : len(text)] = torch.tensor(text)
    ids = ids.to(device)
    position = torch.arange(shape[1], device=device).expand(shape)
    _, features = target.packed(ids, position)
    ids, position, features = ids[: len(rows)], position[: len(rows)], features[: len(rows)]
    starts = [len(prompt.ids) for prompt, _ in rows]
    counts = [len(reply.ids) for _, reply in rows]
    parts: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in rows]
    for at in range(0, max(counts), anchors):
        width = min(anchors, max(counts) - at)
        first = torch.tensor(starts, device=device)[:, None] + at
        last = torch.tensor([s + c - 1 for s, c in zip(starts, counts, strict=True)], device=device)[:, None]
        place = torch.minimum(first + torch.arange(width, device=device), last)
        found = drafts_at(drafter, target, ids, position, features, place)
        shaped = [t.cpu() for t in (found.tokens, found.probability, found.candidates)]
        for row, count in enumerate(counts):
            if at < count:
                keep = min(width, count - at)
                parts[row].append((shaped[0][row, :keep], shaped[1][row, :keep], shaped[2][row, :keep]))
    for (prompt, reply), start, pieces in zip(rows, starts, parts, strict=True):
        joined = [torch.cat(column) for column in zip(*pieces, strict=True)]
        yield Replayed(reply.id, [*prompt.ids, *reply.ids], start, joined[0], joined[1], joined[2])


def rounds_along(one: Replayed, stop: str = "length") -> list[Round]:
    """The rounds that greedy serving of this text would have had; the last is cut to the tokens that are there."""
    rounds: list[Round] = []
    at, end, drafts = one.first, len(one.text), one.tokens.shape[1]
    tokens, probability = one.tokens.tolist(), one.probability.tolist()
    while at < end - 1:
        index = at - one.first
        truth = one.text[at + 1 : at + 1 + drafts]
        agree = [a == b for a, b in zip(tokens[index], truth, strict=False)]
        accepted = next((k for k, hit in enumerate(agree) if not hit), len(agree))
        committed = min(accepted + 1, end - 1 - at)
        last = at + accepted + 1 >= end - 1
        ranks = [rank(one.candidates[index, k], t) for k, t in enumerate(truth)]
        rounds.append(
            Round(
                one.id, len(rounds), at, drafts, accepted, committed, agree,
                [round(p, 4) for p in probability[index]], ranks, stop if last else "",
            )
        )  # fmt: skip
        at += accepted + 1
    return rounds


def rank(candidates: Tensor, token: int) -> int:
    """Place of `token` among the candidates, best first; -1 where it is none."""
    found = (candidates == token).nonzero()
    return int(found[0, 0]) if len(found) else -1
