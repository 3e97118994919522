"""The chunked loss against autograd over whole logits; anchors and slot labels against loops."""

import numpy as np
import pytest
import torch
from torch import Tensor

from core.train.batch import IGNORE
from draft_training.anchors import draw_anchors, gathered
from draft_training.config import Labels, LossConfig
from draft_training.losses import ChunkedDraftLoss, Slots, best_of

BLOCKS, DRAFTS, SIZE, VOCAB = 5, 3, 8, 300


def case() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, teacher = (torch.randn(BLOCKS * DRAFTS, SIZE, generator=generator, dtype=torch.float64) for _ in range(2))
    head = torch.randn(VOCAB, SIZE, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, VOCAB, (BLOCKS * DRAFTS,), generator=generator)
    labels[5] = labels[13] = labels[14] = IGNORE
    return hidden.requires_grad_(), head, labels, teacher


def plain(config: LossConfig, hidden: Tensor, head: Tensor, labels: Tensor, teacher: Tensor) -> Tensor:
    """The formulas as written, in float64, slot by slot."""
    logits, soft = hidden @ head.T, teacher @ head.T
    if config.labels is Labels.target:
        labels = torch.where(labels != IGNORE, soft.argmax(-1), IGNORE)
    total = torch.zeros((), dtype=torch.float64)
    log_q, log_p = logits.log_softmax(-1), soft.log_softmax(-1)
    for block in range(BLOCKS):
        here = range(block * DRAFTS, (block + 1) * DRAFTS)
        q = [float(log_q[n, labels[n]].detach().exp()) if labels[n] != IGNORE else 0.0 for n in here]
        for k, n in enumerate(here):
            if labels[n] == IGNORE:
                continue
            if config.dpace_alpha is None:
                weight = float(np.exp(-k / config.gamma)) if config.gamma else 1.0
            else:
                a = config.dpace_alpha
                weight = sum(float(np.prod([(1 - a) * q[i] + a for i in range(j + 1)])) for j in range(k, DRAFTS))
            total = total - config.ce * weight * log_q[n, labels[n]]
            total = total + config.kl * weight * (log_p[n].exp() * (log_p[n] - log_q[n])).sum()
    return total


CONFIGS = [
    LossConfig(), LossConfig(gamma=0.0), LossConfig(dpace_alpha=0.5), LossConfig(ce=0.0, kl=1.0),
    LossConfig(ce=0.5, kl=2.0), LossConfig(labels=Labels.target),
]  # fmt: skip


@pytest.mark.parametrize("chunk", [1, 6, 1000])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_loss_and_gradient_are_those_of_the_formula(config: LossConfig, chunk: int) -> None:
    hidden, head, labels, teacher = case()
    config.chunk_tokens = chunk
    wanted = plain(config, hidden, head, labels, teacher)
    (gradient,) = torch.autograd.grad(wanted, hidden)
    soft = config.kl > 0 or config.labels is Labels.target
    found = ChunkedDraftLoss.apply(hidden, head, Slots(labels, teacher if soft else None, DRAFTS), config, 4)
    (mine,) = torch.autograd.grad(found[0], hidden)
    torch.testing.assert_close(found[0].double(), wanted, rtol=1e-5, atol=1e-5)  # sums are FP32
    torch.testing.assert_close(mine, gradient, rtol=1e-4, atol=1e-5)
    assert mine[[5, 13, 14]].abs().max() == 0, "no gradient without a label"


def test_candidates_are_the_largest_logits() -> None:
    logits = torch.randn(7, 1000, generator=torch.Generator().manual_seed(0))
    for count in (1, 5, 16):
        values, ids = best_of(logits, count)
        wanted = logits.topk(count)
        assert torch.equal(values, wanted.values) and torch.equal(ids, wanted.indices)


def test_slot_labels_end_with_the_document_and_the_supervised_part() -> None:
    generator = torch.Generator().manual_seed(1)
    position = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 0, 1]])
    labels = torch.randint(0, 50, (1, 12), generator=generator)
    labels[0, [3, 6, 11]] = IGNORE
    anchors = torch.tensor([[-1, 0, 1, 2, 5, 7, 9, 10]])
    found = gathered(labels, position, anchors, 4)[0]
    for row, anchor in zip(found.tolist(), anchors[0].tolist(), strict=True):
        expected, at = [], anchor
        while anchor >= 0 and len(expected) < 4 and at < 12:
            if position[0, at] != position[0, anchor] + at - anchor or labels[0, at] == IGNORE:
                break
            expected.append(int(labels[0, at]))
            at += 1
        assert row == expected + [IGNORE] * (4 - len(expected))


def test_anchors_are_distinct_supervised_and_have_a_context() -> None:
    labels, positions = np.full(20, 7), np.concatenate((np.arange(12), np.arange(8)))
    labels[3:6] = IGNORE
    able = {t for t in range(20) if positions[t] > 0 and labels[t] != IGNORE}
    few = draw_anchors(labels, positions, 8, np.random.default_rng(0))
    assert list(few) == sorted(set(few)) and set(few.tolist()) <= able
    every = draw_anchors(labels, positions, 30, np.random.default_rng(0))
    assert every.tolist() == [-1] * (30 - len(able)) + sorted(able)
    again = draw_anchors(labels, positions, 8, np.random.default_rng(0))
    assert np.array_equal(few, again)
