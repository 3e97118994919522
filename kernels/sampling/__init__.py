"""One token a row from logits, with parameters of its own for each row; the same token whatever shares the batch.

A token is a function of its row's logits, its parameters, its seed and its position, and of nothing else: the weights
are whole numbers and the noise is counted, not carried. Plain torch, Triton, CPU and GPU give the same tokens, bit for
bit. `kernels.sampling.reference` says how and is the definition.
"""

import importlib
import os
from types import ModuleType

import torch
from torch import Tensor

from core.errors import ConfigError, UnsupportedError
from kernels.sampling import reference
from kernels.sampling.reference import ACCEPT, DRAFT, RESIDUAL, SAMPLE, Params

__all__ = ["ACCEPT", "DRAFT", "RESIDUAL", "SAMPLE", "Params", "probabilities", "sample", "uniform"]

MOST_TOKENS = 2**18  # of a vocabulary; the sums of weights are sized for it


def probabilities(logits: Tensor, params: Params, *, backend: str = "auto") -> Tensor:
    """FP32 [R, V] after temperature, top-k and top-p.

    The meaning of core.generate.sampling.probabilities, within 1e-6, but that tokens with the very logit of top-p's
    edge are all kept, and that what is below 2^-40 of the largest is 0. Greedy rows are 1 at the largest logit (the
    lowest id where several have it) and 0 elsewhere. A row with a NaN, a +Inf or only -Inf is NaN.

    Args:
        logits: FP32 or BF16 [R, V], values of a row beside each other, V at most 262,144; -Inf excludes a token.
        params: see `Params`.
        backend: "triton", "reference" (plain torch), or "auto": Triton on CUDA and under TRITON_INTERPRET=1.
    Raises:
        ConfigError: a shape, dtype or device that does not fit.
    """
    check(logits, params)
    return implementation(logits, backend).probabilities(logits, params)


def uniform(seed: Tensor, position: Tensor, stream: int, *, backend: str = "auto") -> Tensor:
    """FP32 in [0, 1), multiples of 2^-24: the first word of Philox4x32-10 with key `seed` and counter
    (position, stream).

    Args:
        seed, position: int64 of one shape [...]. stream: 0 to 2^31 - 1; see SAMPLE, ACCEPT, RESIDUAL and DRAFT.
    """
    if seed.dtype != torch.int64 or position.dtype != torch.int64 or seed.shape != position.shape:
        raise ConfigError(
            f"seed is {seed.dtype} {tuple(seed.shape)}, position {position.dtype} {tuple(position.shape)}: "
            "expected int64 of one shape"
        )
    return implementation(seed, backend).uniform(seed, position, check_stream(stream))


def sample(logits: Tensor, params: Params, position: Tensor, *, stream: int = SAMPLE, backend: str = "auto") -> Tensor:
    """int64 [R]: a draw from `probabilities` by 32 bits of noise, whose upper 24 are `uniform`, in vocabulary order.

    -1 marks a row that cannot be drawn from: a NaN, a +Inf or only -Inf. The device is never waited for.

    Args:
        logits, params, backend: as for `probabilities`.
        position: int64 [R]: the place in its sequence of the token that the logits follow.
        stream: which noise of that position.
    """
    check(logits, params)
    check_rows("position", position, len(logits), torch.int64, logits.device)
    return implementation(logits, backend).sample(logits, params, position, check_stream(stream))


def check_stream(stream: int) -> int:
    if not 0 <= stream < 2**31:
        raise ConfigError(f"stream={stream}: expected 0 to 2^31 - 1")
    return stream


def check_rows(name: str, value: Tensor, rows: int, dtype: torch.dtype, device: torch.device) -> None:
    """ConfigError unless `value` is [rows], contiguous, of that dtype and device."""
    if value.shape != (rows,) or value.dtype != dtype or value.device != device or not value.is_contiguous():
        raise ConfigError(
            f"{name} is {value.dtype} {tuple(value.shape)} on {value.device}: "
            f"expected contiguous {dtype} ({rows},) on {device}"
        )


def check(logits: Tensor, params: Params) -> None:
    """ConfigError unless logits are [R, V] and the parameters fit them."""
    if logits.dim() != 2 or logits.dtype not in (torch.float32, torch.bfloat16):
        raise ConfigError(f"logits are {logits.dtype} {tuple(logits.shape)}: expected float32 or bfloat16 [R, V]")
    rows, size = logits.shape
    if not 1 <= size <= MOST_TOKENS:
        raise ConfigError(f"logits have a vocabulary of {size}: expected 1 to {MOST_TOKENS}")
    if logits.stride(1) != 1 and size > 1:
        raise ConfigError(f"logits have strides {logits.stride()}: a row's values must lie beside each other")
    check_params(params, rows, logits.device)


def check_params(params: Params, rows: int, device: torch.device) -> None:
    """ConfigError unless the parameters are of `rows` rows."""
    for name, dtype in (
        ("temperature", torch.float32), ("top_p", torch.float32), ("top_k", torch.int32), ("seed", torch.int64)
    ):  # fmt: skip
        check_rows(f"params.{name}", getattr(params, name), rows, dtype, device)


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
    return importlib.import_module("kernels.sampling.kernel")
