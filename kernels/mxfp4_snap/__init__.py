"""MXFP4 snap, encode and decode: Triton on CUDA, plain torch elsewhere, byte for byte equal to core.mxfp4.

Snapping a weight means decode(encode(w)): BF16 values on the MXFP4 grid. Training does it to every selected weight
after every optimiser step, so it must cost one pass over memory and no host synchronisation. A NaN or Inf therefore
does not raise inside; it sets a one-element int32 device flag. Snap hundreds of tensors with one flag, then look once:

    flag = new_flag(device)
    for w in weights: snap_(w, rule, flag=flag)
    raise_if_flagged(flag, "weights after step 17")  # the step's only synchronisation

Without a flag each call checks its own (and synchronises), which is right for single calls.
"""

import importlib
import os
from types import ModuleType

import torch
from torch import Tensor

from core.errors import FormatError, UnsupportedError
from core.mxfp4 import BLOCK, Packed, ScaleRule, check_blocks
from kernels.mxfp4_snap import reference

__all__ = ["decode", "encode", "new_flag", "raise_if_flagged", "snap_", "snap_from"]


def new_flag(device: torch.device | str = "cpu") -> Tensor:
    """A cleared flag: int32 [1] on `device`. Kernels set it to 1 and never clear it; `flag.zero_()` does."""
    return torch.zeros(1, dtype=torch.int32, device=device)


def raise_if_flagged(flag: Tensor, name: str, w: Tensor | None = None, rule: ScaleRule = ScaleRule.even) -> None:
    """Synchronise on `flag`; if it is set, raise an error that says where.

    Args:
        flag: from `new_flag`.
        name: the tensor, or a phrase for the set of tensors that shared the flag.
        w: the source of the snap (any shape [..., K]); the first bad block in it is named. If it has none, nothing is
            raised: call in turn for every tensor that shared the flag. Without `w` a set flag always raises.
        rule: the rule of the snap.
    Raises:
        FormatError: the flag is set (and `w`, if given, holds a bad block).
    """
    if int(flag) == 0:
        return
    where = ""
    if w is not None:
        bad = reference.refused_blocks(w, rule).nonzero()
        if len(bad) == 0:
            return
        where = f" in block {tuple(bad[0].tolist())}"
    raise FormatError(
        f"{name} has a NaN, an Inf or a value near 2^128{where}; MXFP4 cannot hold it: "
        "repair the checkpoint, or lower optim.lr if training produced it"
    )


def snap_(
    w: Tensor,
    rule: ScaleRule = ScaleRule.even,
    *,
    flag: Tensor | None = None,
    name: str = "tensor",
    backend: str = "auto",
) -> Tensor:
    """Put `w` on the MXFP4 grid in place and return it.

    Args:
        w: BF16 or FP32, contiguous, [..., K] with K a multiple of 32 (so also a flat shard of whole blocks). The source
            is the BF16 cast of FP32 values, as everywhere.
        rule: how block scales are chosen.
        flag: see `new_flag`; set if a block holds NaN or Inf, which is then left as it was. None: check and raise here.
        name: used in errors only.
        backend: "triton", "reference" (plain torch), or "auto": Triton on CUDA and under TRITON_INTERPRET=1.
    Raises:
        FormatError: dtype, layout or K; NaN or Inf when `flag` is None.
    """
    return snap_from(w, w, rule, flag=flag, name=name, backend=backend)


def snap_from(
    source: Tensor,
    out: Tensor,
    rule: ScaleRule = ScaleRule.even,
    *,
    flag: Tensor | None = None,
    name: str = "tensor",
    backend: str = "auto",
) -> Tensor:
    """out = snap(bf16(source)) in one pass, e.g. from FP32 masters (4 B read) into BF16 working copies (2 B written).

    A block that cannot be snapped keeps what `out` held. Arguments and errors as `snap_`; shapes must agree.
    """
    check(source, name)
    check(out, name)
    if source.shape != out.shape or source.device != out.device:
        raise FormatError(
            f"{name}: source {tuple(source.shape)} on {source.device} and out {tuple(out.shape)} on {out.device} differ"
        )
    with torch.no_grad(), Flag(flag, source.device, name, source, rule) as raised:
        implementation(source, backend).snap_from(source, out, rule, raised)
        if not out.is_inference():
            torch.autograd.graph.increment_version(out)  # autograd must see that saved copies are stale
    return out


def encode(
    w: Tensor,
    rule: ScaleRule = ScaleRule.even,
    *,
    flag: Tensor | None = None,
    name: str = "tensor",
    backend: str = "auto",
) -> Packed:
    """Packed codes [..., K/2] and scales [..., K/32] of `w`; a block with NaN or Inf becomes zeros under a flag."""
    check(w, name)
    with Flag(flag, w.device, name, w, ScaleRule.floor) as raised:
        return implementation(w, backend).encode(w, rule, raised)


def decode(
    packed: Packed,
    dtype: torch.dtype = torch.bfloat16,
    *,
    flag: Tensor | None = None,
    name: str = "tensor",
    backend: str = "auto",
) -> Tensor:
    """Values [..., K] (BF16 or FP32); a block with scale byte 0xFF, or a value of 2^128, becomes NaN under a flag."""
    codes, scales = packed.codes.contiguous(), packed.scales.contiguous()
    if codes.shape[:-1] != scales.shape[:-1] or codes.shape[-1] * 2 != scales.shape[-1] * BLOCK:
        raise FormatError(f"{name}: codes {tuple(codes.shape)} and scales {tuple(scales.shape)} are not one tensor")
    if dtype not in (torch.bfloat16, torch.float32):
        raise FormatError(f"{name}: decode gives bfloat16 or float32, not {dtype}")
    with Flag(flag, codes.device, name) as raised:
        return implementation(codes, backend).decode(Packed(codes, scales), dtype, raised)


class Flag:
    """The caller's flag, or a private one that is checked (with a synchronisation) when the call ends."""

    def __init__(
        self,
        flag: Tensor | None,
        device: torch.device,
        name: str,
        w: Tensor | None = None,
        rule: ScaleRule = ScaleRule.even,
    ) -> None:
        self.private = flag is None
        self.flag = new_flag(device) if flag is None else flag
        self.where = (name, w, rule)
        if self.flag.device != device or self.flag.dtype != torch.int32 or self.flag.numel() != 1:
            raise FormatError(f"the flag of {name} must be one int32 on {device}: make it with new_flag(device)")

    def __enter__(self) -> Tensor:
        return self.flag

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self.private:
            raise_if_flagged(self.flag, *self.where)


def check(w: Tensor, name: str) -> None:
    """FormatError unless `w` is BF16 or FP32, contiguous, and made of whole blocks."""
    if w.dtype not in (torch.bfloat16, torch.float32):
        raise FormatError(f"{name} is {w.dtype}; MXFP4 is made from bfloat16 or float32: cast it first")
    if not w.is_contiguous():
        raise FormatError(f"{name} is not contiguous; blocks lie along contiguous memory: pass {name}.contiguous()")
    check_blocks(w.shape[-1] if w.dim() else 0, f"the last dimension of {name}")


def implementation(w: Tensor, backend: str) -> ModuleType:
    """The module that does the work: `kernel` (Triton) or `reference` (plain torch)."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if backend == "auto":
        backend = "triton" if w.is_cuda or interpreted else "reference"
    if backend == "reference":
        return reference
    if backend != "triton":
        raise UnsupportedError(f"backend {backend!r} is not one of auto, triton, reference")
    if not (w.is_cuda or interpreted):
        raise UnsupportedError("backend 'triton' needs a CUDA tensor, or TRITON_INTERPRET=1 for the interpreter")
    # Imported when first used: a machine without Triton can still use the reference.
    return importlib.import_module("kernels.mxfp4_snap.kernel")
