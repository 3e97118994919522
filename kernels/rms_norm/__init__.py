"""RMSNorm, alone or behind the addition to the residual stream: x / rms(x) * weight.

The rounding points are those of the models (core.models.ops.rms_norm, Qwen3-MoE's module): FP32 inside, rounded to x's
dtype before the weight multiplies. GPT-OSS's module rounds once, after it; in BF16 the two differ by one rounding.
"""

from torch import Tensor

from core.errors import FormatError
from kernels.dispatch import check_activations, check_tensor, implementation, rows

__all__ = ["rms_norm"]

MOST_VALUES = 32768  # of a row, which one program holds in registers


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None, backend: str = "auto"
) -> Tensor | tuple[Tensor, Tensor]:
    """y = weight * round(s / sqrt(mean(s^2) + eps)) with s = x, or s = round(x + residual) where one is given.

    A row's bits depend on that row alone.

    Args:
        x: BF16 or FP32 [..., G], G at most 32,768; contiguous, or it is copied. No rows at all are allowed.
        weight: [G], x's dtype.
        eps: added to the mean square; not negative.
        residual: x's shape and dtype.
        backend: "triton", "reference" (plain torch), or "auto": Triton on CUDA and under TRITON_INTERPRET=1.
    Returns:
        y, or (y, s) where a residual is given; both of x's shape and dtype.
    Raises:
        FormatError: shape, dtype, device or eps.
    """
    check_activations(x)
    check_tensor("weight", weight, (x.shape[-1],), x.dtype, x.device)
    if x.shape[-1] > MOST_VALUES:
        raise FormatError(f"x has rows of {x.shape[-1]} values: rms_norm takes at most {MOST_VALUES}")
    if not eps >= 0:
        raise FormatError(f"eps={eps}: expected 0 or more")
    if residual is not None and (residual.shape, residual.dtype, residual.device) != (x.shape, x.dtype, x.device):
        raise FormatError(
            f"residual is {residual.dtype} {tuple(residual.shape)} on {residual.device}: "
            f"expected x's {x.dtype} {tuple(x.shape)} on {x.device}"
        )
    work = implementation(__name__, x, backend)
    if residual is None:
        return work.rms_norm(rows(x), weight, eps).view(x.shape)
    y, summed = work.add_rms_norm(rows(x), rows(residual), weight, eps)
    return y.view(x.shape), summed.view(x.shape)
