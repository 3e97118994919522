"""Plain-torch definition of the experts' feed-forward. Any device; the path of FP32 activations and of the CPU.

    h[t, s]  = round(act(gate_up[e] x[t] + bias[e]))            e = chosen[t, s], in x's dtype
    out[t]   = round(sum_s weight[t, s] (down[e] h[t, s] + bias[e]))    slots in order

Products, biases, activation and sums are in FP32; `round` is the only rounding to x's dtype. A negative e adds nothing.
Experts are decoded one at a time, so memory stays at one expert in FP32.

Legend: E experts, T tokens, k slots a token, I intermediate size, H hidden size, N tokens of one expert.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from core import mxfp4
from core.mxfp4 import Packed
from kernels.moe_mxfp4.weights import Activation, DenseWeights, ExpertWeights

Matrix = Callable[[int], Tensor]  # the FP32 weight of one expert
Experts = ExpertWeights | DenseWeights


def packed_matrix(packed: Packed) -> Matrix:
    return lambda e: mxfp4.decode(Packed(packed.codes[e], packed.scales[e]), torch.float32)


def activate(gate_up: Tensor, activation: Activation) -> Tensor:
    """FP32 [..., 2I] -> FP32 [..., I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    if activation.kind == "silu":
        return F.silu(gate) * up
    gate = gate.clamp(max=activation.limit)
    up = up.clamp(-activation.limit, activation.limit)
    return gate * torch.sigmoid(activation.alpha * gate) * (up + 1)


def linear(x_NK: Tensor, weight: Tensor, bias_ED: Tensor | None, e: int) -> Tensor:
    y = x_NK.to(torch.float32) @ weight.T
    return y if bias_ED is None else y + bias_ED[e].to(torch.float32)


def hit(chosen: Tensor) -> list[int]:
    """The experts that have a token, ascending (synchronises)."""
    return chosen[chosen >= 0].unique().tolist()


def first_half(x: Tensor, matrix: Matrix, weights: Experts, chosen: Tensor, activation: Activation) -> Tensor:
    h_TkI = x.new_zeros(*chosen.shape, weights.intermediate)
    for e in hit(chosen):
        token, slot = torch.where(chosen == e)
        gate_up_ND = linear(x[token], matrix(e), weights.gate_up_bias, e)
        h_TkI[token, slot] = activate(gate_up_ND, activation).to(x.dtype)
    return h_TkI


def second_half(h: Tensor, matrix: Matrix, weights: Experts, chosen: Tensor, weight: Tensor) -> Tensor:
    tokens, slots = chosen.shape
    part_TkH = torch.zeros(tokens, slots, weights.hidden, dtype=torch.float32, device=h.device)
    for e in hit(chosen):
        token, slot = torch.where(chosen == e)
        part_TkH[token, slot] = linear(h[token, slot], matrix(e), weights.down_bias, e) * weight[token, slot, None]
    total_TH = part_TkH.new_zeros(tokens, weights.hidden)
    for slot in range(slots):
        total_TH += part_TkH[:, slot]
    return total_TH.to(h.dtype)


def gate_up(x: Tensor, weights: ExpertWeights, chosen: Tensor, activation: Activation) -> Tensor:
    return first_half(x, packed_matrix(weights.gate_up), weights, chosen, activation)


def down(h: Tensor, weights: ExpertWeights, chosen: Tensor, weight: Tensor) -> Tensor:
    return second_half(h, packed_matrix(weights.down), weights, chosen, weight)


def experts(x: Tensor, weights: ExpertWeights, chosen: Tensor, weight: Tensor, activation: Activation) -> Tensor:
    return down(gate_up(x, weights, chosen, activation), weights, chosen, weight)


def experts_dense(x: Tensor, weights: DenseWeights, chosen: Tensor, weight: Tensor, activation: Activation) -> Tensor:
    h_TkI = first_half(x, lambda e: weights.gate_up[e].to(torch.float32), weights, chosen, activation)
    return second_half(h_TkI, lambda e: weights.down[e].to(torch.float32), weights, chosen, weight)
