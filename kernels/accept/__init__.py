"""Speculative acceptance: how many leading drafts of each row stay, and the token that follows them.

The target's distribution is left unchanged: what a row emits is distributed as if each token had been drawn by
`kernels.sampling.sample`, whatever the drafter does; for greedy rows it is the same tokens. A row of which nothing was
drafted gets exactly `sample`'s token, so a batch may mix rows with and without a drafter. `kernels.accept.reference` is
the definition.
"""

import importlib
import os
from types import ModuleType

import torch
from torch import Tensor

from core.errors import ConfigError, UnsupportedError
from kernels.accept import reference
from kernels.sampling import MOST_TOKENS, Params, check_params, check_rows

__all__ = ["accept"]


def accept(
    draft: Tensor,
    q: Tensor | None,
    logits: Tensor,
    params: Params,
    position: Tensor,
    drafted: Tensor,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(accepted int32 [R], 0 .. drafted; token int64 [R], the one after the accepted drafts).

    Token -1: the logits that it would be drawn from hold a NaN, a +Inf or only -Inf.

    Args:
        draft: int64 [R, K], K at least 0. An id outside the vocabulary is never accepted.
        q: FP32 [R, K, V], the distribution that each draft was drawn from, with noise of another stream than ACCEPT,
            RESIDUAL and SAMPLE; None: drafts chosen without chance.
        logits: FP32 or BF16 [R, K + 1, V], contiguous: the target's after the anchor and after each draft.
        params: see kernels.sampling.Params; one entry a row.
        position: int64 [R], the anchor's place in its sequence. Slot j uses the noise of position + j.
        drafted: int32 [R]: how many of the row's K drafts count; the others are not looked at. 0: none.
        backend: "triton", "reference" (plain torch), or "auto": Triton on CUDA and under TRITON_INTERPRET=1.
    Raises:
        ConfigError: a shape, dtype or device that does not fit.
    """
    check(draft, q, logits, params)
    for name, value, dtype in (("position", position, torch.int64), ("drafted", drafted, torch.int32)):
        check_rows(name, value, len(draft), dtype, logits.device)
    return implementation(logits, backend).accept(draft, q, logits, params, position, drafted)


def check(draft: Tensor, q: Tensor | None, logits: Tensor, params: Params) -> None:
    """ConfigError unless the shapes are of one round."""
    if draft.dim() != 2 or draft.dtype != torch.int64 or draft.device != logits.device or not draft.is_contiguous():
        raise ConfigError(
            f"draft is {draft.dtype} {tuple(draft.shape)} on {draft.device}: "
            f"expected contiguous torch.int64 [R, K] on {logits.device}"
        )
    rows, drafts = draft.shape
    fits = logits.dim() == 3 and logits.shape[:2] == (rows, drafts + 1) and logits.is_contiguous()
    if not fits or logits.dtype not in (torch.float32, torch.bfloat16):
        raise ConfigError(
            f"logits are {logits.dtype} {tuple(logits.shape)}: "
            f"expected contiguous float32 or bfloat16 [{rows}, {drafts + 1}, V]"
        )
    size = logits.shape[2]
    if not 1 <= size <= MOST_TOKENS:
        raise ConfigError(f"logits have a vocabulary of {size}: expected 1 to {MOST_TOKENS}")
    if q is not None and (q.shape != (rows, drafts, size) or q.dtype != torch.float32 or not q.is_contiguous()):
        raise ConfigError(
            f"q is {q.dtype} {tuple(q.shape)}: expected contiguous torch.float32 {(rows, drafts, size)}, or None"
        )
    if q is not None and q.device != logits.device:
        raise ConfigError(f"q is on {q.device}: expected {logits.device}, where the logits are")
    check_params(params, rows, logits.device)


def implementation(tensor: Tensor, backend: str) -> ModuleType:
    """The module that does the work: `kernel` (Triton) or `reference` (plain torch)."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if backend == "auto":
        backend = "triton" if tensor.is_cuda or interpreted else "reference"
    if backend == "reference":
        return reference
    if backend != "triton":
        raise UnsupportedError(f"backend {backend!r} is not one of auto, triton, reference")
    if not (tensor.is_cuda or interpreted):
        raise UnsupportedError("backend 'triton' needs a CUDA tensor, or TRITON_INTERPRET=1 for the interpreter")
    # Imported when first used: a machine without Triton can still use the reference.
    return importlib.import_module("kernels.accept.kernel")
