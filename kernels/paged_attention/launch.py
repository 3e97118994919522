"""Which kernels a call launches, with which shapes. Decided from what the host knows, so a CUDA graph can hold it.

Requests with few queries are split where they would not fill the machine otherwise; the others are folded. A step that
has both kinds launches both, and every program leaves at once if its request is of the other kind.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

from kernels.follow import followed
from kernels.paged_attention.kernel import (
    LOG2E,
    PIECE_BITS,
    ROUNDING,
    STRIDES,
    attention_kernel,
    layer_constants,
    merge_kernel,
)

if TYPE_CHECKING:
    from kernels.paged_attention import Batch

FEW = 32  # queries of a request that may be split
FULL = 128  # as many (request, KV head, tile of rows) programs fill the machine without splitting


@dataclass(frozen=True)
class Shape:
    """Rows of a program and its launch options."""

    rows: int
    num_warps: int
    num_stages: int = 3


# The smallest that holds a request's rows is taken. The bits do not depend on it.
SPLIT_SHAPES = (Shape(16, 2), Shape(64, 4), Shape(128, 8))
FOLD_SHAPES = (Shape(16, 2), Shape(64, 4))
EXACT_SHAPES = (Shape(16, 4, 1),)  # FP32 has no tensor cores: the plain units do its products, for tests


def pieces_of(keys: int) -> int:
    """How many pieces hold keys 0 .. keys - 1."""
    unit = (keys - 1) >> PIECE_BITS
    level = max(0, unit.bit_length() - 7)
    return (level << 6) + (unit >> level) + 1


@dataclass(frozen=True)
class Problem:
    """The tensors of a call, and the constants that every launch of it gets."""

    tensors: tuple[Tensor, ...]
    batch: "Batch"
    scale: float
    constants: dict[str, Any]
    shape: Shape | None

    @property
    def group(self) -> int:
        return self.constants["H"] // self.constants["KH"]

    @property
    def lanes(self) -> int:
        return len(self.batch.length) * self.constants["KH"]

    def pick(self, shapes: tuple[Shape, ...], rows: int) -> Shape:
        """The smallest that holds the rows, or the largest."""
        shapes = EXACT_SHAPES if self.tensors[0].dtype == torch.float32 else shapes
        return self.shape or next((shape for shape in shapes if shape.rows >= rows), shapes[-1])

    def most_pieces(self, queries: int) -> int:
        """Pieces that a request's queries can see between them."""
        window = self.constants["WINDOW"]
        seen = self.batch.longest_key if not window else min(self.batch.longest_key, window + queries)
        return pieces_of(self.batch.longest_key) if seen == self.batch.longest_key else (seen >> PIECE_BITS) + 2


def launch(problem: Problem, out: Tensor, scratch: tuple[Tensor, Tensor], shape: Shape, grid: tuple[int, ...],
           rows: int, **constants: Any) -> None:  # fmt: skip
    q, k, v, sinks = problem.tensors
    batch = problem.batch
    attention_kernel[grid](
        q, k, v, out, *scratch, sinks, batch.page_table, batch.length, batch.start, problem.scale, len(q),
        len(batch.length), batch.page_table.shape[1], rows, **problem.constants, ROWS=shape.rows,
        STAGES=shape.num_stages, num_warps=shape.num_warps, **ROUNDING, **followed(grid), **constants,
    )  # fmt: skip


def fold(problem: Problem, out: Tensor, least: int) -> None:
    """Requests with at least `least` queries; a program walks all keys of its rows."""
    rows = problem.batch.longest_query * problem.group
    shape = problem.pick(FOLD_SHAPES, rows)
    grid = (triton.cdiv(rows, shape.rows), problem.lanes + problem.constants["KH"], 1)
    launch(problem, out, (out, out), shape, grid, rows, FOLD=True, LEAST=least, MOST=2**31 - 1)


def split(problem: Problem, out: Tensor, clear: bool) -> None:
    """Requests with at most FEW queries; a program a piece, and a second launch that adds the pieces up."""
    queries = min(problem.batch.longest_query, FEW)
    rows, pieces = queries * problem.group, pieces_of(problem.batch.longest_key)
    shape = problem.pick(SPLIT_SHAPES, rows)
    constants, value_dim = problem.constants, out.shape[-1]
    part = torch.empty(problem.lanes * pieces * rows * value_dim, dtype=torch.float32, device=out.device)
    stat = torch.empty(problem.lanes * pieces * 2 * rows, dtype=torch.float32, device=out.device)
    grid = (triton.cdiv(rows, shape.rows), problem.lanes, pieces)
    launch(problem, out, (part, stat), shape, grid, rows, FOLD=False, LEAST=1, MOST=FEW)
    names = ("H", "KH", "V", "WINDOW", "CAUSAL", "SINKS")
    merge_kernel[(rows, problem.lanes + constants["KH"], constants["CHUNKS"])](
        part, stat, out, problem.tensors[3], problem.batch.length, problem.batch.start, len(out),
        len(problem.batch.length), pieces, rows, **{name: constants[name] for name in names}, MOST=FEW, CLEAR=clear,
        PIECES=triton.next_power_of_2(pieces), num_warps=1, **ROUNDING, **followed(grid),
    )  # fmt: skip


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: "Batch",
    *,
    scale: float,
    window: int | None,
    sinks: Tensor | None,
    causal: bool,
    shape: Shape | None = None,
) -> Tensor:
    """Arguments as kernels.paged_attention.paged_attention, checked there; `shape` instead of the usual ones."""
    value_dim = v_cache.shape[3]
    out = torch.empty(*q.shape[:2], value_dim, dtype=q.dtype, device=q.device)
    _, page, kv_heads, head_dim = k_cache.shape
    constants = layer_constants(q.shape[1], kv_heads, head_dim, value_dim, page, window, causal, sinks is not None)
    strides = (*q.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3])
    constants |= dict(zip(STRIDES, strides, strict=True))
    tensors = (q, k_cache, v_cache, q if sinks is None else sinks.contiguous())
    problem = Problem(tensors, batch, scale * LOG2E.value, constants, shape)
    tiles = triton.cdiv(min(batch.longest_query, FEW) * problem.group, FOLD_SHAPES[-1].rows)
    spread = problem.most_pieces(min(batch.longest_query, FEW)) > 2 and problem.lanes * tiles < FULL
    with torch.cuda.device_of(q):
        if spread:
            split(problem, out, clear=batch.longest_query <= FEW)
        if not spread or batch.longest_query > FEW:
            fold(problem, out, least=FEW + 1 if spread else 1)
    return out
