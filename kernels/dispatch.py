"""What every operation's door does with its arguments: choose the implementation, and lay tokens out as rows."""

import importlib
import os
from types import ModuleType

import torch
from torch import Tensor

from core.errors import FormatError, UnsupportedError

DTYPES = (torch.bfloat16, torch.float32)  # of activations and dense weights
ALIGNMENT = 16  # bytes of the widest access


def implementation(package: str, tensor: Tensor, backend: str) -> ModuleType:
    """The module of `package` that does the work: `kernel` (Triton) or `reference` (plain torch).

    Args:
        backend: "triton", "reference", or "auto": Triton on CUDA tensors and under TRITON_INTERPRET=1.
    Raises:
        UnsupportedError: another backend, or Triton for a CPU tensor without the interpreter.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if backend == "auto":
        backend = "triton" if tensor.is_cuda or interpreted else "reference"
    if backend == "reference":
        return importlib.import_module(f"{package}.reference")
    if backend != "triton":
        raise UnsupportedError(f"backend {backend!r} is not one of auto, triton, reference")
    if not (tensor.is_cuda or interpreted):
        raise UnsupportedError("backend 'triton' needs a CUDA tensor, or TRITON_INTERPRET=1 for the interpreter")
    # Imported when first used: a machine without Triton can still use the reference.
    return importlib.import_module(f"{package}.kernel")


def rows(x: Tensor) -> Tensor:
    """x [..., N] as contiguous, aligned [T, N]; a copy only where x is not.

    Alignment decides how a compiled program lays a row over its threads, hence the order of its sums: a row must not
    have other bits because it came from an odd address.
    """
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    return flat.clone() if flat.data_ptr() % ALIGNMENT else flat


def check_tensor(
    name: str, tensor: Tensor, shape: tuple[int | None, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """FormatError unless `tensor` is contiguous and of that shape (None: any size), dtype and device."""
    fits = tensor.dim() == len(shape) and all(
        want in (None, got) for want, got in zip(shape, tensor.shape, strict=True)
    )
    if not fits or tensor.dtype != dtype or tensor.device != device:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise FormatError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}: "
            f"expected {dtype} ({wanted}) on {device}"
        )
    if not tensor.is_contiguous():
        raise FormatError(f"{name} is not contiguous: pass {name}.contiguous()")


def check_activations(x: Tensor) -> None:
    """FormatError unless x is BF16 or FP32 [..., N] with N of at least 1."""
    if x.dtype not in DTYPES:
        raise FormatError(f"x is {x.dtype}: expected bfloat16 or float32")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise FormatError(f"x has the shape {tuple(x.shape)}: expected [..., N] with N of at least 1")
