"""Held-out loss, perplexity and KL to the BF16 model, row by row; and `python -m qat.evaluate` on demand.

Every arm (BF16, PTQ, QAT, ...) is measured on the same packed rows; sums are kept for each row, so that intervals can
resample rows, and differences between arms are paired.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from core.config import Command, entry
from core.train.batch import IGNORE, Batch
from qat.config import QATConfig, check
from qat.teacher import whole_head

CHUNK = 1024
HELP = """Evaluate a finished run again: held-out loss and KL for BF16, PTQ and QAT, and the tasks of eval.tasks.

  python -m qat.evaluate run.resume=latest
  python -m qat.evaluate run.resume=NAME"""
COMMAND = Command("qat.evaluate", "qat", QATConfig, HELP, check)


@dataclass(frozen=True)
class Rows:
    """Sums over each packed row of one domain, float64 [rows]: labelled tokens, CE, KL to BF16, argmax agreement."""

    tokens: Tensor
    ce: Tensor
    kl: Tensor
    agree: Tensor


Arm = dict[str, Rows]
REFERENCES, STARTS = ("BF16", "teacher"), ("PTQ", "start")  # arms: what KL is measured to, what training set out from


@torch.no_grad()
def arm_sums(model: nn.Module, reference: nn.Module, batches: dict[str, list[Batch]], device: torch.device) -> Arm:
    """Rows of every domain for one arm.

    Args:
        model: the arm. reference: the BF16 model, whose logits define KL; may be `model` itself.
        batches: fixed rows by domain.
    """
    model.eval(), reference.eval()
    return {domain: stack(row_sums(model, reference, b.to(device)) for b in found) for domain, found in batches.items()}


def bf16_sums(model: nn.Module, batches: dict[str, list[Batch]], device: torch.device) -> Arm:
    return arm_sums(model, model, batches, device)


def held_out_loss(model: nn.Module, batches: dict[str, list[Batch]], device: torch.device) -> dict[str, float]:
    """Mean cross-entropy by domain, for the curves during training; the model's mode is restored."""
    training = model.training
    arm = bf16_sums(model, batches, device)
    model.train(training)
    return {domain: float(r.ce.sum() / r.tokens.sum()) for domain, r in arm.items()}


def states(model: nn.Module, batch: Batch) -> Tensor:
    return model.model(
        input_ids=batch.input_ids_BT, position_ids=batch.position_ids_BT, use_cache=False
    ).last_hidden_state


def row_sums(model: nn.Module, reference: nn.Module, batch: Batch) -> Rows:
    """Chunked over tokens: the logits of two models never exist whole."""
    own, other = states(model, batch), states(reference, batch) if reference is not model else None
    head, other_head = whole_head(model), whole_head(reference)
    rows, tokens = batch.labels_BT.shape
    sums = torch.zeros(4, rows, dtype=torch.float64, device=own.device)
    for at in range(0, tokens, max(1, CHUNK // rows)):
        part = slice(at, at + max(1, CHUNK // rows))
        labels = batch.labels_BT[:, part]
        log_q = torch.log_softmax((own[:, part] @ head.T).float(), -1)
        log_p = log_q if other is None else torch.log_softmax((other[:, part] @ other_head.T).float(), -1)
        carries = (labels != IGNORE).double()
        ce = -log_q.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        agree = log_p.argmax(-1) == log_q.argmax(-1)
        sums += torch.stack([(x.double() * carries).sum(1) for x in (torch.ones_like(ce), ce, kl, agree)])
    return Rows(*sums.cpu().unbind())


def stack(parts: Iterable[Rows]) -> Rows:
    found = list(parts)
    return Rows(*(torch.cat([getattr(r, f) for r in found]) for f in ("tokens", "ce", "kl", "agree")))


def main(config: QATConfig, resolved: str) -> int:  # noqa: ARG001
    from qat.pipeline import evaluate_run

    evaluate_run(config)
    return 0


if __name__ == "__main__":
    sys.exit(entry(COMMAND, main))
