"""Grouped experts with a cheap backward: the experts implementation named `fp4flash`.

transformers' `grouped_mm` sorts (token, slot) pairs by expert and multiplies group by group. Autograd turns each of
its gathers into an accumulating scatter, which on CUDA sorts again or uses atomics. All gathers here are by a
permutation whose inverse is known, so every backward is a gather too: same products and sums in the same
order in the forward (bit-identical outputs), and a deterministic backward.

Registered with transformers' own registry: `model.set_experts_implementation("fp4flash")` works for every v5 model;
layouts it does not cover (biases, a norm after each expert, expert parallelism) go to `grouped_mm`.

Legend: S = tokens x k pairs, k experts a token.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _grouped_linear, grouped_mm_experts_forward

NAME = "fp4flash"


class Dispatch(torch.autograd.Function):
    """out[s] = x[order[s] // k]; `back` is the inverse permutation of `order`."""

    @staticmethod
    def forward(x: Tensor, order_S: Tensor, back_S: Tensor, k: int) -> Tensor:  # noqa: ARG004
        return x[order_S // k] if k > 1 else x[order_S]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        _, _, back_S, k = inputs
        ctx.save_for_backward(back_S)
        ctx.k = k

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (back_S,) = ctx.saved_tensors
        grad = grad[back_S]
        if ctx.k > 1:
            grad = grad.view(-1, ctx.k, grad.shape[-1]).sum(1)
        return grad, None, None, None


def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The signature of transformers' registry: [tokens, hidden], [tokens, k], [tokens, k] -> [tokens, hidden]."""
    if module.has_bias or module.has_post_expert_norm or module._is_expert_parallel:
        return grouped_mm_experts_forward(module, hidden_states, top_k_index, top_k_weights)
    tokens, k = top_k_index.shape
    narrow = torch.int16 if module.num_experts < 2**15 else torch.int32  # fewer passes of a radix sort
    expert_S, order_S = torch.sort(top_k_index.reshape(-1).to(narrow), stable=True)
    back_S = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(tokens * k, device=order_S.device))
    bounds = torch.arange(1, module.num_experts + 1, device=expert_S.device, dtype=narrow)
    offsets_E = torch.searchsorted(expert_S, bounds, out_int32=True)
    x_S = Dispatch.apply(hidden_states, order_S, back_S, k)
    up_S = _grouped_linear(
        x_S, module.gate_up_proj if module.has_gate else module.up_proj, offsets_E, is_transposed=module.is_transposed
    )
    up_S = module._apply_gate(up_S) if module.has_gate else module.act_fn(up_S)
    down_S = _grouped_linear(up_S, module.down_proj, offsets_E, is_transposed=module.is_transposed)
    by_token = Dispatch.apply(down_S, back_S, order_S, 1).view(tokens, k, -1)
    return (by_token * top_k_weights.unsqueeze(-1)).sum(1).to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
