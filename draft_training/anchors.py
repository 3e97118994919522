"""Which tokens of a packed row are anchors, drawn anew for every row, and what each slot must predict.

Anchors are drawn from the seed and the number of the row alone, so a resumed run draws the same ones and a row's do not
depend on how many processes share the work.

Legend: R rows, T tokens, A anchors of a row, K drafts.
"""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.errors import ConfigError
from core.generate.target import Target
from core.train.batch import IGNORE, Batch
from core.train.data import TrainStream


@dataclass(frozen=True)
class DraftBatch(Batch):
    """Packed rows with anchors.

    anchors_RA: int64, ascending indices along the row; -1 (first) where a row has fewer.
    drafts: K, as a tensor [R] of equal numbers so that rows can be cut and moved like the rest.
    """

    anchors_RA: Tensor
    drafts_R: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, f.name) for f in fields(self))

    def capture(self, target: Target) -> tuple[Tensor, Tensor]:
        """(last hidden states [R, T, G], features [R, T, F]) of the frozen target."""
        return target.packed(self.input_ids_BT, self.position_ids_BT)

    @property
    def num_targets(self) -> int:
        """Slots with a label."""
        return int((self.slot_labels() != IGNORE).sum())

    def slot_labels(self) -> Tensor:
        """int64 [R, A, K]: the token each slot predicts; -100 behind the end of the document or the supervised part."""
        return gathered(self.labels_BT, self.position_ids_BT, self.anchors_RA, int(self.drafts_R[0]))


def gathered(labels_RT: Tensor, position_RT: Tensor, anchors_RA: Tensor, drafts: int) -> Tensor:
    tokens = labels_RT.shape[1]
    anchors = anchors_RA.shape[1]
    start = anchors_RA.clamp(min=0)
    place = start[..., None] + torch.arange(drafts, device=start.device)
    inside = place < tokens
    flat = place.clamp(max=tokens - 1).flatten(1)
    label = labels_RT.gather(1, flat).unflatten(1, (anchors, drafts))
    position = position_RT.gather(1, flat).unflatten(1, (anchors, drafts))
    wanted = position_RT.gather(1, start)[..., None] + torch.arange(drafts, device=start.device)
    good = inside & (position == wanted) & (label != IGNORE) & (anchors_RA[..., None] >= 0)
    return torch.where(good.to(torch.int8).cumprod(-1).bool(), label, IGNORE)


def draw_anchors(labels_T: np.ndarray, positions_T: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` distinct tokens whose next token carries loss and that have a context; ascending, -1 in front."""
    able = np.flatnonzero((labels_T != IGNORE) & (positions_T > 0))
    chosen = np.sort(rng.choice(able, min(count, len(able)), replace=False)) if len(able) else able
    return np.concatenate((np.full(count - len(chosen), -1, dtype=np.int64), chosen.astype(np.int64)))


class AnchorStream:
    """A `TrainStream` whose batches carry anchors."""

    def __init__(self, stream: TrainStream, count: int, drafts: int, seed: int) -> None:
        if count < 1:
            raise ConfigError(f"anchors={count}: expected at least 1 a row")
        self.stream, self.count, self.drafts, self.seed = stream, count, drafts, seed
        self.batch = 0

    def __next__(self) -> DraftBatch:
        rows = next(self.stream)
        share = rows.input_ids_BT.shape[0]
        first = self.batch * self.stream.batch_size + self.stream.rank * share
        self.batch += 1
        labels, positions = rows.labels_BT.numpy(), rows.position_ids_BT.numpy()
        drawn = [
            draw_anchors(labels[r], positions[r], self.count, np.random.default_rng([self.seed, first + r]))
            for r in range(share)
        ]
        return DraftBatch(*rows.tensors(), torch.from_numpy(np.stack(drawn)), torch.full((share,), self.drafts))

    def state_dict(self) -> dict[str, Any]:
        return {"batch": self.batch, "rows": self.stream.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batch = state["batch"]
        self.stream.load_state_dict(state["rows"])
