"""Logits of an engine's model along given text, as its own kernels and paged cache compute them."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from infer.cache import Step, group_step
from infer.engine import ModelEngine


def scored(
    engine: ModelEngine, ids: Sequence[int], watch: Callable[[int, Tensor], None] | None = None
) -> Iterator[tuple[int, Tensor]]:
    """(position of the first, FP32 logits [n, V] after each of n tokens), in pieces of the engine's step size.

    Uses pages that no request holds, and gives them back; nothing enters the prefix cache.

    Args:
        ids: at most `engine.max_length`.
        watch: as for `infer.model.Model.forward`.
    """
    book, runner, size = engine.scheduler.book, engine.runner, engine.scheduler.tokens
    device, page = runner.model.device, runner.cache.size
    table, _ = book.open(ids, reuse=False)
    try:
        for first in range(0, len(ids), size):
            piece = list(ids[first : first + size])
            book.reserve(table, first + len(piece))
            groups = tuple(group_step([pages], [first], [len(piece)], page, device) for pages in table.pages)
            place = torch.arange(first, first + len(piece), device=device)
            every = torch.arange(len(piece), device=device)
            step = Step(torch.tensor(piece, device=device), place, groups, every)
            yield first, runner.model.forward(step, runner.cache, watch).logits
            book.slide(table, first + len(piece))
    finally:
        book.close(table)
