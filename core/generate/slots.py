"""A key-value cache addressed by position, for rows that advance at different speeds.

Slot number = position. What a rejected draft wrote is never seen, because a query sees only positions up to its own,
and is overwritten when the true token of that position arrives: nothing is ever cropped. Rows are padded on the right.

Any transformers model takes it as `past_key_values`, with a four-dimensional mask made here: one for all layers, or one
by layer type where a model mixes full and sliding attention.

Legend: R rows, T tokens of this forward, S slots, H key-value heads, D head dim.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from core.errors import UnsupportedError


class SlotCache:
    """Keys and values [R, H, S, D] of every layer; made when a layer first writes."""

    is_compileable = False
    is_croppable = False

    def __init__(self, rows: int, slots: int) -> None:
        self.rows, self.slots = rows, slots
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.position_RT: Tensor | None = None
        self.used = 0  # slots written so far by any row

    def at(self, position_RT: Tensor, used: int) -> "SlotCache":
        """Where the next forward writes; `used`: one more than the largest of them, known to the host."""
        self.position_RT, self.used = position_RT, max(self.used, used)
        return self

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write [R, H, T, D] at the positions; returns all used slots."""
        if layer_idx not in self.layers:
            make = [t.new_zeros(self.rows, t.shape[1], self.slots, t.shape[3]) for t in (keys, values)]
            self.layers[layer_idx] = (make[0], make[1])
        assert self.position_RT is not None
        row = torch.arange(self.rows, device=keys.device)[:, None]
        for store, new in zip(self.layers[layer_idx], (keys, values), strict=True):
            store[row, :, self.position_RT] = new.transpose(1, 2)
        stored = self.layers[layer_idx]
        return stored[0][:, :, : self.used], stored[1][:, :, : self.used]

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these (indices)."""
        self.layers = {i: (k[rows], v[rows]) for i, (k, v) in self.layers.items()}
        self.rows = len(rows)

    def get_seq_length(self, _layer_idx: int = 0) -> int:
        return self.used


def seen(position_RT: Tensor, used: int, window: int | None) -> Tensor:
    """Boolean [R, 1, T, used]: slots up to the query's own position, within `window` of it."""
    slot = torch.arange(used, device=position_RT.device)
    place = position_RT[:, None, :, None]
    near = slot <= place
    return near if window is None else near & (slot > place - window)


def masks(config: Any, position_RT: Tensor, used: int, dtype: torch.dtype) -> Any:
    """The additive mask that a model with `config` reads: one tensor, or a dict by layer type.

    A sliding window of w is w keys, itself included, as everywhere in transformers. Models without layer types
    (Mistral, Qwen3-MoE) have it in all layers, if they have one.

    Raises:
        UnsupportedError: a kind of layer that does not attend to all keys or the last w.
    """

    def additive(window: int | None) -> Tensor:
        near = seen(position_RT, used, window)
        return torch.zeros(near.shape, dtype=dtype, device=near.device).masked_fill_(~near, torch.finfo(dtype).min)

    return by_kind(config, additive)


def by_kind(config: Any, make: Callable[[int | None], Any]) -> Any:
    """make(window) for all layers of a model with `config`, or a dict by layer type; None is a layer without a window.

    Raises:
        UnsupportedError: a kind of layer that does not attend to all keys or the last w.
    """
    kinds = set(getattr(config, "layer_types", None) or ())
    other = kinds - {"full_attention", "sliding_attention"}
    if other:
        raise UnsupportedError(f"the target has layers of type {min(other)}, which this decoder does not have")
    if kinds <= {"full_attention"}:
        return make(None if kinds else getattr(config, "sliding_window", None))
    return {k: make(None if k == "full_attention" else config.sliding_window) for k in sorted(kinds)}
