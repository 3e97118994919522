"""A linear layer in plain torch: the definition, and the path without a GPU.

Rows go through the BLAS in blocks of 16, the last one filled with zeros. So every call has the same shape, and neither
the number of rows nor the values of others can change the order of a row's sums. What remains is a row's place in its
block: libraries are free to treat the places differently. None was seen to (Intel MKL in FP32), and a test looks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 16


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """x [T, K], weight [N, K], bias [N] or None -> [T, N] in out_dtype, in FP32 until the one rounding."""
    count = len(x)
    filled = F.pad(x.to(torch.float32), (0, 0, 0, -count % BLOCK))
    right = weight.to(torch.float32).T
    parts = [torch.mm(part, right) for part in filled.split(BLOCK)] if count else []
    out = torch.cat(parts)[:count] if parts else x.new_zeros(0, len(weight), dtype=torch.float32)
    if bias is not None:
        out = out + bias.to(torch.float32)
    return out.to(out_dtype)
