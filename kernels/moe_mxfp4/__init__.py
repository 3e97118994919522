"""MXFP4 experts: the feed-forward of a Mixture-of-Experts layer on packed weights, which are never expanded in memory.

`experts` is the whole of it; `gate_up` and `down` are its halves. Activations are BF16 on the Triton path and BF16 or
FP32 in the reference. Products, biases, activation, routing weights and the sum over slots are FP32; only h (between
the halves) and the result are rounded to x's dtype. A token's bits do not depend on which tokens share the call, nor on
their number (`kernel` says how). No call on the Triton path waits for the device or has a shape that depends on the
routing's content, so all of them can be captured in a CUDA graph.

A negative id in `chosen` adds nothing: padding, or an expert that lives on another rank. Ids at or above E are the
caller's error: the reference raises IndexError, the kernel would read past the weights.

Legend: E experts, T tokens (0 allowed), k slots a token, I intermediate size, H hidden size.
"""

import importlib
import os
from types import ModuleType

import torch
from torch import Tensor

from core.errors import UnsupportedError
from kernels.moe_mxfp4 import reference
from kernels.moe_mxfp4.weights import (
    Activation,
    DenseWeights,
    ExpertWeights,
    check,
    check_dense,
    check_tokens,
    check_weight,
)

__all__ = ["Activation", "DenseWeights", "ExpertWeights", "down", "experts", "experts_dense", "gate_up"]


def experts(
    x: Tensor,
    weights: ExpertWeights,
    chosen: Tensor,
    weight: Tensor,
    activation: Activation,
    *,
    backend: str = "auto",
) -> Tensor:
    """sum_s weight[t, s] * expert[chosen[t, s]](x[t]), slots in order.

    Args:
        x: [T, H] BF16, or FP32 for the reference.
        weights: one layer's experts.
        chosen: int32 or int64 [T, k], expert ids; negative adds nothing; an id may stand in several slots of a token.
        weight: float32 [T, k].
        activation: see `Activation`.
        backend: "triton", "reference" (plain torch), or "auto": Triton for BF16 on CUDA and under TRITON_INTERPRET=1,
            the reference for FP32 activations (which have no kernel) and elsewhere.
    Returns:
        [T, H] in x's dtype. The Triton path needs 4 T k H bytes of workspace: give it long prompts in chunks (the bits
        are the same).
    Raises:
        FormatError: a shape or dtype disagrees. UnsupportedError: the backend cannot do it.
    """
    check(weights)
    check_tokens(x, chosen, (x.shape[0], weights.hidden))
    check_weight(weight, chosen)
    return implementation(x, backend).experts(
        x.contiguous(), weights, chosen.contiguous(), weight.contiguous(), activation
    )


def gate_up(
    x: Tensor, weights: ExpertWeights, chosen: Tensor, activation: Activation, *, backend: str = "auto"
) -> Tensor:
    """act(gate_up[chosen[t, s]] x[t]) for every slot: [T, k, I] in x's dtype, zeros where `chosen` is negative."""
    check(weights)
    check_tokens(x, chosen, (x.shape[0], weights.hidden))
    return implementation(x, backend).gate_up(x.contiguous(), weights, chosen.contiguous(), activation)


def down(h: Tensor, weights: ExpertWeights, chosen: Tensor, weight: Tensor, *, backend: str = "auto") -> Tensor:
    """sum_s weight[t, s] * (down[chosen[t, s]] h[t, s]) for h [T, k, I]: [T, H] in h's dtype."""
    check(weights)
    check_tokens(h, chosen, (*chosen.shape, weights.intermediate), "h")
    check_weight(weight, chosen)
    return implementation(h, backend).down(h.contiguous(), weights, chosen.contiguous(), weight.contiguous())


def experts_dense(x: Tensor, weights: DenseWeights, chosen: Tensor, weight: Tensor, activation: Activation) -> Tensor:
    """`experts` for weights that were not quantised. The slow path: plain torch, one expert after the other, and a
    synchronisation to learn which experts have tokens, so it cannot be captured in a CUDA graph."""
    check_dense(weights)
    check_tokens(x, chosen, (x.shape[0], weights.hidden))
    check_weight(weight, chosen)
    return reference.experts_dense(x, weights, chosen, weight, activation)


def implementation(x: Tensor, backend: str) -> ModuleType:
    """The module that does the work: `kernel` (Triton) or `reference` (plain torch)."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if backend == "auto":
        backend = "triton" if (x.is_cuda or interpreted) and x.dtype == torch.bfloat16 else "reference"
    if backend == "reference":
        return reference
    if backend != "triton":
        raise UnsupportedError(f"backend {backend!r} is not one of auto, triton, reference")
    if not (x.is_cuda or interpreted):
        raise UnsupportedError("backend 'triton' needs a CUDA tensor, or TRITON_INTERPRET=1 for the interpreter")
    if x.dtype != torch.bfloat16:
        raise UnsupportedError(f"backend 'triton' takes bfloat16 activations, not {x.dtype}: cast, or use 'reference'")
    # Imported when first used: a machine without Triton can still use the reference.
    return importlib.import_module("kernels.moe_mxfp4.kernel")
