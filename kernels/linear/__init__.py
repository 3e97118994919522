"""x @ weight.T + bias whose rows do not know how many they are: one decoded token, a verified block, a prefill chunk.

torch picks its kernel, hence the order of its sums, by the number of rows. Here a row has the same bits among any
others, so a token that was verified in a block of eight equals the one that decoding alone would have given.
"""

import torch
from torch import Tensor

from core.errors import FormatError
from kernels.dispatch import DTYPES, check_activations, check_tensor, implementation, rows

__all__ = ["linear"]


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Products and sums in FP32 (the bias's too), one rounding to `out_dtype`.

    What is guaranteed: Triton gives a row the same bits whatever the other rows are and however many. The reference
    does so as far as the machine's BLAS treats the rows of one block of 16 alike (see `reference`). Triton, the
    reference and torch's own product differ in the order of their sums, thus by FP32 rounding before the last one.

    Args:
        x: BF16 or FP32 [..., K], K at least 1; contiguous, or it is copied. No rows at all are allowed.
        weight: [N, K], x's dtype, contiguous.
        bias: [N], x's dtype.
        out_dtype: float32 or bfloat16; None: x's. float32 is for the router and the head, whose logits are compared.
        backend: "triton", "reference" (plain torch), or "auto": Triton on CUDA and under TRITON_INTERPRET=1.
    Returns:
        [..., N].
    Raises:
        FormatError: shape, dtype or device.
    """
    check_activations(x)
    check_tensor("weight", weight, (None, x.shape[-1]), x.dtype, x.device)
    if bias is not None:
        check_tensor("bias", bias, (len(weight),), x.dtype, x.device)
    out_dtype = x.dtype if out_dtype is None else out_dtype
    if out_dtype not in DTYPES:
        raise FormatError(f"out_dtype={out_dtype}: expected bfloat16 or float32")
    out = implementation(__name__, x, backend).linear(rows(x), weight, bias, out_dtype)
    return out.view(*x.shape[:-1], len(weight))
