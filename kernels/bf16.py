"""BF16 in kernels that also run under Triton's interpreter, which holds it as 16-bit integers.

Its cast from FP32 truncates and its matrix product multiplies the bit patterns. Both are said here once in a way that
is right there and costs nothing compiled.
"""

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def rounded(value, DTYPE: tl.constexpr):
    """`value` (FP32) in DTYPE, to nearest even; NaN stays NaN."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = value.to(tl.int32, bitcast=True)
        bits = tl.where(value == value, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        result = (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        result = value.to(DTYPE)
    return result


@triton.jit
def operand(value):
    """`value` as tl.dot takes it: FP32 under the interpreter, as it is for the compiler."""
    return value.to(tl.float32) if INTERPRETED else value
