"""Distillation and cross-entropy without the logits of a whole batch ever existing.

Forward KL(teacher || student) at temperature 1, summed over the positions that carry a label, and cross-entropy on
the labels:

    KL = sum_v p_t(v) (log p_t(v) - log p_s(v))        CE = -log p_s(label)

A vocabulary of 150k makes logits the largest tensor of a step (16k tokens: 10 GB in FP32, twice with a teacher). Both
losses are therefore computed from the last hidden states chunk by chunk through the heads, and the gradient of
the hidden states (and of the head where it is trained) is computed in the same pass: with softmax q of the student,

    d KL / d logits = q - p_t        d CE / d logits = q - onehot(label)

so that backward only scales what forward stored: one [tokens, hidden] tensor.

Legend: N tokens of a batch, C tokens of a chunk, G hidden size, V vocabulary.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from core.errors import UnsupportedError
from core.train.batch import IGNORE, Batch
from core.train.engine import LossFn
from qat.config import LossConfig
from qat.teacher import Teacher


def hidden_states(model: nn.Module, batch: Batch) -> Tensor:
    """[N, G] last hidden states (after the final norm) of a causal LM, documents kept apart by their positions."""
    out = model.model(input_ids=batch.input_ids_BT, position_ids=batch.position_ids_BT, use_cache=False)
    return out.last_hidden_state.flatten(0, 1)


class ChunkedLoss(torch.autograd.Function):
    """(hidden [N, G], head [V, G], ...) -> (loss, kl, ce, correct), sums over the labelled positions, FP32."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, soft: Tensor | None, soft_head: Tensor | None,
        kl: float, ce: float, chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        want_hidden, want_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_head = torch.zeros(head.shape, dtype=torch.float32, device=head.device) if want_head else None
        sums = torch.zeros(3, dtype=torch.float32, device=hidden.device)
        for at in range(0, hidden.shape[0], chunk):
            part = slice(at, at + chunk)
            target = None if soft is None or soft_head is None else soft[part] @ soft_head.T
            logits = hidden[part] @ head.T
            grad, values = chunk_loss(logits, labels[part], target, kl, ce, want_hidden or want_head)
            sums += values
            if grad is not None and grad_hidden is not None:
                grad_hidden[part] = grad @ head
            if grad is not None and grad_head is not None:
                grad_head += (grad.T @ hidden[part]).to(torch.float32)
        ctx.grads = (grad_hidden, None if grad_head is None else grad_head.to(head.dtype))
        parts = tuple(sums.unbind())
        ctx.mark_non_differentiable(*parts)
        return (kl * sums[0] + ce * sums[1], *parts)

    @staticmethod
    def backward(ctx: Any, scale: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.grads
        scaled = [None if g is None else g * scale.to(g.dtype) for g in (grad_hidden, grad_head)]
        return (*scaled, None, None, None, None, None, None)


def chunk_loss(
    logits: Tensor, labels: Tensor, target: Tensor | None, kl: float, ce: float, want_grad: bool
) -> tuple[Tensor | None, Tensor]:
    """d loss / d logits [C, V] in the logits' dtype (or None), and FP32 sums [kl, ce, correct]."""
    log_q = torch.log_softmax(logits.to(torch.float32), dim=-1)
    carries = labels != IGNORE
    safe = labels.clamp(min=0)[:, None]
    weight = carries.to(torch.float32)
    ce_sum = -(log_q.gather(1, safe)[:, 0] * weight).sum()
    correct = ((log_q.argmax(-1) == labels) & carries).sum()
    kl_sum = torch.zeros_like(ce_sum)
    grad = log_q.exp() * (kl + ce) if want_grad else None
    if target is not None:
        log_p = torch.log_softmax(target.to(torch.float32), dim=-1)
        p = log_p.exp()
        kl_sum = ((p * (log_p - log_q)).sum(-1) * weight).sum()
        if grad is not None:
            grad -= kl * p
    if grad is not None:
        grad.scatter_add_(1, safe, torch.full_like(safe, -ce, dtype=torch.float32))
        grad = grad.mul_(weight[:, None]).to(logits.dtype)
    return grad, torch.stack((kl_sum, ce_sum, correct.to(torch.float32)))


def make_loss(config: LossConfig, teacher: Teacher | None) -> LossFn:
    """The loss of `loss=...` as the engine calls it.

    Args:
        config: weights of KL and cross-entropy, chunk size.
        teacher: needed when `config.kl` > 0.
    Returns:
        (model, batch) -> (loss summed over labelled positions, sums: kl, ce, correct, and aux where there is one).
    """

    def loss_fn(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        with RouterLogits(model, config.router_aux) as routers:
            hidden = hidden_states(model, batch)
        soft = soft_head = None
        if config.kl > 0 and teacher is not None:
            soft, soft_head = teacher.targets(batch)
        head = whole_head(model)
        loss, kl, ce, correct = ChunkedLoss.apply(
            hidden, head, batch.labels_BT.flatten(), soft, soft_head, config.kl, config.ce, config.chunk_tokens
        )
        stats = {"kl": kl, "ce": ce, "correct": correct}
        aux = routers.loss(batch)
        if aux is not None:
            targets = (batch.labels_BT != IGNORE).sum()
            loss = loss + aux * targets
            stats["aux"] = (aux * targets).detach()
        return loss, stats

    return loss_fn


def whole_head(model: nn.Module) -> Tensor:
    """The output matrix [V, G]; under ZeRO-3 gathered, which needs it to be frozen."""
    weight = model.get_output_embeddings().weight
    if not hasattr(weight, "ds_id"):
        return weight
    if weight.requires_grad:
        raise UnsupportedError(
            "training the output head under parallel=zero3 is not supported (the loss reads it outside its module); "
            "freeze it with trainable.patterns or use parallel=zero2"
        )
    import deepspeed

    with deepspeed.zero.GatheredParameters([weight]):
        return weight.detach().clone()


class RouterLogits:
    """Collects router logits for the auxiliary loss a model defines, if its configuration turns it on.

    Switch-Transformer load balancing as transformers computes it (`load_balancing_loss_func` of the model's module).
    """

    def __init__(self, model: nn.Module, wanted: bool) -> None:
        config = model.config
        module = sys.modules[type(model).__module__]
        self.function = getattr(module, "load_balancing_loss_func", None)
        self.coefficient = getattr(config, "router_aux_loss_coef", 0.0) or 0.0
        on = wanted and bool(getattr(config, "output_router_logits", False)) and self.coefficient > 0
        self.active = on and self.function is not None
        self.config = config
        self.logits: list[Tensor] = []
        self.handles = []
        if self.active:
            routers = [m for n, m in model.named_modules() if n.endswith((".mlp.gate", ".mlp.router"))]
            self.handles = [m.register_forward_hook(self.keep) for m in routers]

    def keep(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self.logits.append(output[0] if isinstance(output, tuple) else output)

    def __enter__(self) -> "RouterLogits":
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def loss(self, batch: Batch) -> Tensor | None:  # noqa: ARG002
        if not self.active:
            return None
        experts = getattr(self.config, "num_experts", None) or self.config.num_local_experts
        return self.coefficient * self.function(tuple(self.logits), experts, self.config.num_experts_per_tok)
