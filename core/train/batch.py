"""What flows from the data pipeline into a step.

Legend: B packed rows, T tokens in a row.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

IGNORE = -100


@dataclass(frozen=True)
class Batch:
    """Packed rows. Documents do not see each other: positions restart at 0 where one begins.

    input_ids_BT: int64.
    labels_BT: int64, already shifted: labels[b, t] is the token that position t must predict; -100 carries no loss
        (last token of a document, masked chat turns, padding).
    position_ids_BT: int64, 0 at the first token of every document (padding is a document of its own).
    """

    input_ids_BT: Tensor
    labels_BT: Tensor
    position_ids_BT: Tensor

    @property
    def num_targets(self) -> int:
        return int((self.labels_BT != IGNORE).sum())

    def to(self, device: torch.device | str) -> Self:
        return type(self)(*(t.to(device, non_blocking=True) for t in self.tensors()))

    def rows(self, start: int, stop: int) -> Self:
        return type(self)(*(t[start:stop] for t in self.tensors()))

    def tensors(self) -> tuple[Tensor, ...]:
        return self.input_ids_BT, self.labels_BT, self.position_ids_BT


def document_ids(position_ids_BT: Tensor) -> Tensor:
    """int64 [B, T]: index of the document each token belongs to within its row (0, 1, ...)."""
    return (position_ids_BT == 0).cumsum(-1) - (position_ids_BT[:, :1] == 0).to(torch.int64)
