"""Distillation and cross-entropy without the logits of a whole batch ever existing.

Forward KL(teacher || student) at temperature 1, summed over the positions that carry a label, and cross-entropy on
the labels:

    KL = sum_v p_t(v) (log p_t(v) - log p_s(v))        CE = -log p_s(label)

A vocabulary of 150k makes logits the largest tensor of a step (16k tokens: 10 GB in FP32, twice with a teacher). Both
losses are therefore computed from the last hidden states chunk by chunk through the heads, and the gradient of
the hidden states (and of the head where it is trained) is computed in the same pass: with softmax q of the student,

    d KL / d logits = q - p_t        d CE / d logits = q - onehot(label)

so that backward only scales what forward stored: one [tokens, hidden] tensor.

With precomputed top-k targets (qat/topk.py) the classes outside the top k count as one, with the mass that is left: a
lower bound of KL (log-sum inequality), whose gradient is q (1 - p_rest / q_rest) there and q - p_t in the top k.

Legend: N tokens of a batch, C tokens of a chunk, G hidden size, V vocabulary, K kept classes.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from core.train.batch import IGNORE, Batch
from core.train.engine import LossFn
from qat.config import LossConfig
from qat.teacher import Dense, Targets, Teacher, TopK, last_hidden, whole_head


class ChunkedLoss(torch.autograd.Function):
    """(hidden [N, G], head [V, G], ...) -> (loss, kl, ce, correct), sums over the labelled positions, FP32."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        labels: Tensor,
        targets: Targets | None,
        kl: float,
        ce: float,
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        want_hidden, want_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_head = torch.zeros(head.shape, dtype=torch.float32, device=head.device) if want_head else None
        sums = torch.zeros(3, dtype=torch.float32, device=hidden.device)
        for at in range(0, hidden.shape[0], chunk):
            part = slice(at, at + chunk)
            grad, values = chunk_loss(
                hidden[part] @ head.T, labels[part], chunk_targets(targets, part), kl, ce, want_hidden or want_head
            )
            sums += values
            if grad is not None and grad_hidden is not None:
                grad_hidden[part] = grad @ head
            if grad is not None and grad_head is not None:
                grad_head += (grad.T @ hidden[part]).to(torch.float32)
        ctx.grads = (grad_hidden, grad_head)
        ctx.head_dtype = head.dtype
        parts = tuple(sums.unbind())
        ctx.mark_non_differentiable(*parts)
        return (kl * sums[0] + ce * sums[1], *parts)

    @staticmethod
    def backward(ctx: Any, scale: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        # Scaled in FP32: 1/targets rounded to BF16 would be off by up to 0.4 %, the same way for every gradient.
        hidden, head = ctx.grads
        hidden = None if hidden is None else (hidden.to(torch.float32) * scale).to(hidden.dtype)
        head = None if head is None else (head * scale).to(ctx.head_dtype)
        return hidden, head, None, None, None, None, None


def chunk_targets(targets: Targets | None, part: slice) -> Tensor | TopK | None:
    """Teacher logits [C, V] or top-k of one chunk."""
    if isinstance(targets, Dense):
        return targets.logits(part)
    return None if targets is None else TopK(targets.log_p[part], targets.ids[part])


def chunk_loss(
    logits: Tensor, labels: Tensor, target: Tensor | TopK | None, kl: float, ce: float, want_grad: bool
) -> tuple[Tensor | None, Tensor]:
    """d loss / d logits [C, V] in the logits' dtype (or None), and FP32 sums [kl, ce, correct]."""
    log_q = torch.log_softmax(logits.to(torch.float32), dim=-1)
    carries = labels != IGNORE
    safe = labels.clamp(min=0)[:, None]
    weight = carries.to(torch.float32)
    ce_sum = -(log_q.gather(1, safe)[:, 0] * weight).sum()
    correct = ((log_q.argmax(-1) == labels) & carries).sum()
    kl_sum = torch.zeros_like(ce_sum)
    grad = log_q.exp().mul_(ce if target is None else kl + ce) if want_grad else None
    if isinstance(target, TopK):
        kl_sum = topk_kl(log_q, target, grad, kl, weight)
    elif target is not None:
        log_p = torch.log_softmax(target.to(torch.float32), dim=-1)
        p = log_p.exp()
        kl_sum = (p * (log_p - log_q)).sum(-1).mul_(weight).sum()
        if grad is not None:
            grad.sub_(p.mul_(kl))
    if grad is not None:
        if ce:
            grad.scatter_(1, safe, grad.gather(1, safe) - ce)  # one entry a row: deterministic, unlike scatter_add_
        grad = grad.mul_(weight[:, None]).to(logits.dtype)
    return grad, torch.stack((kl_sum, ce_sum, correct.to(torch.float32)))


def topk_kl(log_q: Tensor, target: TopK, grad: Tensor | None, kl: float, weight: Tensor) -> Tensor:
    """Summed KL over the top-k classes and the rest; turns `grad` = (kl + ce) q into the loss's share in place."""
    tiny = torch.finfo(torch.float32).tiny
    p_CK, log_q_CK = target.log_p.exp(), log_q.gather(1, target.ids)
    q_CK = log_q_CK.exp()
    p_rest, q_rest = ((1 - x.sum(-1)).clamp(min=0) for x in (p_CK, q_CK))
    rest = torch.where(p_rest > 0, p_rest * (p_rest.clamp(min=tiny).log() - q_rest.clamp(min=1e-7).log()), 0)
    if grad is not None:
        # outside the top k: minus kl * q * p_rest / q_rest; inside: minus kl * p
        share = kl * p_rest / q_rest.clamp(min=1e-7)
        change = -log_q.exp().mul_(share[:, None])
        grad.add_(change.scatter_(1, target.ids, -kl * p_CK))
    return (((p_CK * (target.log_p - log_q_CK)).sum(-1) + rest) * weight).sum()


def make_loss(config: LossConfig, teacher: Teacher | None) -> LossFn:
    """The loss of `loss=...` as the engine calls it.

    Args:
        config: weights of KL and cross-entropy, chunk size.
        teacher: needed when `config.kl` > 0. It runs before the student, while no activation is held.
    Returns:
        (model, batch) -> (loss summed over labelled positions, sums: kl, ce, correct, and aux where there is one).
    """

    def loss_fn(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        targets = teacher.targets(batch) if config.kl > 0 and teacher is not None else None
        with RouterLogits(model, config.router_aux) as routers:
            hidden = last_hidden(model, batch)
        loss, kl, ce, correct = ChunkedLoss.apply(
            hidden, whole_head(model), batch.labels_BT.flatten(), targets, config.kl, config.ce, config.chunk_tokens
        )
        stats = {"kl": kl, "ce": ce, "correct": correct}
        aux = routers.loss()
        if aux is not None:
            targets_count = (batch.labels_BT != IGNORE).sum()
            loss = loss + aux * targets_count
            stats["aux"] = (aux * targets_count).detach()
        return loss, stats

    return loss_fn


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

    def loss(self) -> Tensor | None:
        if not self.active:
            return None
        experts = getattr(self.config, "num_experts", None) or self.config.num_local_experts
        return self.coefficient * self.function(tuple(self.logits), experts, self.config.num_experts_per_tok)
