"""What a layer's experts are: packed weights, the activation between the halves, and the checks of both.

Legend: E experts, I intermediate size, H hidden size, T tokens, k slots a token.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from core.errors import FormatError, UnsupportedError
from core.mxfp4 import BLOCK, Packed, check_blocks


@dataclass(frozen=True)
class ExpertWeights:
    """The experts of one layer, or one tensor-parallel rank's share of them; `check` says what must hold."""

    gate_up: Packed  # codes uint8 [E, 2I, H/2], scales uint8 [E, 2I, H/32]; rows 0..I-1 are gate, I..2I-1 are up
    down: Packed  # codes uint8 [E, H, I/2], scales uint8 [E, H, I/32]
    gate_up_bias: Tensor | None = None  # [E, 2I], BF16 or FP32
    down_bias: Tensor | None = None  # [E, H], BF16 or FP32

    @property
    def experts(self) -> int:
        return self.gate_up.codes.shape[0]

    @property
    def intermediate(self) -> int:
        return self.down.codes.shape[-1] * 2

    @property
    def hidden(self) -> int:
        return self.down.codes.shape[1]


@dataclass(frozen=True)
class DenseWeights:
    """The experts of one layer that were left in BF16 or FP32."""

    gate_up: Tensor  # [E, 2I, H]; rows 0..I-1 are gate, I..2I-1 are up
    down: Tensor  # [E, H, I]
    gate_up_bias: Tensor | None = None  # [E, 2I]
    down_bias: Tensor | None = None  # [E, H]

    @property
    def intermediate(self) -> int:
        return self.down.shape[2]

    @property
    def hidden(self) -> int:
        return self.down.shape[1]


@dataclass(frozen=True)
class Activation:
    """How gate and up become one value, in FP32.

    silu: silu(gate) * up. clamped (gpt-oss): gate at most `limit`, up within +-`limit`, gate * sigmoid(alpha * gate) *
    (up + 1). `alpha` and `limit` have no meaning for silu.
    """

    kind: Literal["silu", "clamped"] = "silu"
    alpha: float = 1.702
    limit: float = 7.0

    def __post_init__(self) -> None:
        if self.kind not in ("silu", "clamped"):
            raise UnsupportedError(f"activation kind {self.kind!r} is not one of silu, clamped")
        if not self.limit > 0:
            raise UnsupportedError(f"activation limit is {self.limit}; it bounds magnitudes, so give a positive number")


def check(weights: ExpertWeights) -> None:
    """Raise FormatError unless the four tensors describe one layer, contiguously; looks at no value."""
    gate_up, down = weights.gate_up, weights.down
    if gate_up.codes.dim() != 3 or down.codes.dim() != 3:
        raise FormatError(
            f"gate_up.codes {tuple(gate_up.codes.shape)} and down.codes {tuple(down.codes.shape)} must both have three "
            "dimensions (expert, row, packed column): stack the experts"
        )
    experts, hidden, width = weights.experts, weights.hidden, weights.intermediate
    check_blocks(hidden, "the hidden size (gate_up's reduction dimension)")
    check_blocks(width, "the intermediate size (down's reduction dimension)")
    shapes = {
        "gate_up.codes": (gate_up.codes, (experts, 2 * width, hidden // 2)),
        "gate_up.scales": (gate_up.scales, (experts, 2 * width, hidden // BLOCK)),
        "down.codes": (down.codes, (experts, hidden, width // 2)),
        "down.scales": (down.scales, (experts, hidden, width // BLOCK)),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor.shape != shape or tensor.dtype != torch.uint8 or not tensor.is_contiguous():
            raise FormatError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}, contiguous: {tensor.is_contiguous()}; {experts} "
                f"experts of hidden {hidden} and intermediate {width} need contiguous uint8 {shape}"
            )
    check_bias("gate_up_bias", weights.gate_up_bias, (experts, 2 * width))
    check_bias("down_bias", weights.down_bias, (experts, hidden))


def check_bias(name: str, bias: Tensor | None, shape: tuple[int, int]) -> None:
    if bias is None:
        return
    if bias.shape != shape or bias.dtype not in (torch.bfloat16, torch.float32) or not bias.is_contiguous():
        raise FormatError(f"{name} is {bias.dtype} {tuple(bias.shape)}; give contiguous bfloat16 or float32 {shape}")


def check_tokens(x: Tensor, chosen: Tensor, shape: tuple[int, ...], what: str = "x") -> None:
    """Raise FormatError unless `x` has `shape` ([T, H] or [T, k, I]) in BF16 or FP32 and `chosen` is [T, k] of ints."""
    if x.shape != shape or x.dtype not in (torch.bfloat16, torch.float32):
        raise FormatError(f"{what} is {x.dtype} {tuple(x.shape)}; these experts take bfloat16 or float32 {shape}")
    if chosen.dim() != 2 or chosen.shape[0] != x.shape[0] or chosen.dtype not in (torch.int32, torch.int64):
        raise FormatError(
            f"chosen is {chosen.dtype} {tuple(chosen.shape)}; give int32 or int64 [{x.shape[0]}, k], one row a token"
        )
    if chosen.device != x.device:
        raise FormatError(f"chosen is on {chosen.device} and {what} on {x.device}: move one of them")


def check_weight(weight: Tensor, chosen: Tensor) -> None:
    if weight.shape != chosen.shape or weight.dtype != torch.float32:
        raise FormatError(
            f"weight is {weight.dtype} {tuple(weight.shape)}; the routing weights are float32 {tuple(chosen.shape)}"
        )


def check_dense(weights: DenseWeights) -> None:
    """Raise FormatError unless the tensors describe one layer."""
    gate_up, down = weights.gate_up, weights.down
    if gate_up.dim() != 3 or down.dim() != 3 or gate_up.shape != (len(down), 2 * down.shape[2], down.shape[1]):
        raise FormatError(
            f"gate_up {tuple(gate_up.shape)} and down {tuple(down.shape)} are not one layer's [E, 2I, H] and [E, H, I]"
        )
    check_bias("gate_up_bias", weights.gate_up_bias, (len(down), gate_up.shape[1]))
    check_bias("down_bias", weights.down_bias, (len(down), down.shape[1]))
