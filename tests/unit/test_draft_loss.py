"""The drafter's losses against autograd over whole logits and closed formulas; anchors and labels against loops."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from core.generate.target import Target
from core.models.dflash import Drafter, init_drafter
from core.models.dflash_config import DFlashConfig
from core.train.batch import IGNORE
from core.train.data.encode import Document
from core.train.data.ingredients import InMemory
from core.train.data.stream import TrainStream
from draft_training.anchors import AnchorStream, draw_anchors, gathered
from draft_training.config import Labels, LossConfig
from draft_training.losses import ChunkedDraftLoss, Slots, best_of, make_loss, selector_loss

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
    LossConfig(ce=0.5, kl=2.0), LossConfig(labels=Labels.target), LossConfig(dpace_alpha=0.0),
    LossConfig(ce=0.0, kl=1.0, dpace_alpha=0.5), LossConfig(ce=0.5, kl=0.5, labels=Labels.target),
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


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_what_is_logged_beside_the_loss(config: LossConfig) -> None:
    hidden, head, labels, teacher = case()
    soft = config.kl > 0 or config.labels is Labels.target
    found = ChunkedDraftLoss.apply(hidden, head, Slots(labels, teacher if soft else None, DRAFTS), config, 4)
    _, ce, kl, leading, values, ids, used = found
    logits, carries = hidden.detach() @ head.T, labels != IGNORE
    said = (teacher @ head.T).argmax(-1) if config.labels is Labels.target else labels
    assert torch.equal(used, torch.where(carries, said, IGNORE))
    log_q, log_p = logits.log_softmax(-1)[carries], (teacher @ head.T).log_softmax(-1)[carries]
    wanted = -log_q.gather(1, used[carries][:, None]).sum()
    torch.testing.assert_close(ce.double(), wanted, rtol=1e-5, atol=1e-5)
    divergence = (log_p.exp() * (log_p - log_q)).sum() if config.kl else torch.zeros((), dtype=torch.float64)
    torch.testing.assert_close(kl.double(), divergence, rtol=1e-5, atol=1e-5)
    hits = (logits.argmax(-1) == used).view(BLOCKS, DRAFTS)
    assert int(leading) == int(hits.long().cumprod(-1).sum())
    assert torch.equal(ids, logits.topk(4).indices) and torch.equal(values, logits.topk(4).values.float())


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_slots_without_a_label_decide_nothing(config: LossConfig) -> None:
    hidden, head, labels, teacher = case()
    before = ChunkedDraftLoss.apply(hidden, head, Slots(labels, teacher, DRAFTS), config, 0)[0]
    changed, other = hidden.detach().clone(), teacher.clone()
    changed[labels == IGNORE], other[labels == IGNORE] = 3.0, -3.0
    assert torch.equal(ChunkedDraftLoss.apply(changed, head, Slots(labels, other, DRAFTS), config, 0)[0], before)
    nothing = Slots(torch.full_like(labels, IGNORE), teacher, DRAFTS)
    loss = ChunkedDraftLoss.apply(hidden, head, nothing, config, 0)[0]
    assert loss.item() == 0 and not torch.autograd.grad(loss, hidden)[0].any()


def flat(config: LossConfig, teacher: Tensor | None = None) -> float:
    """The loss of a drafter that gives every token the same chance, 1 / V, in every slot of one block."""
    head = torch.eye(VOCAB, dtype=torch.float64)
    slots = Slots(torch.arange(DRAFTS), teacher, DRAFTS)
    return float(ChunkedDraftLoss.apply(torch.zeros(DRAFTS, VOCAB, dtype=torch.float64), head, slots, config, 0)[0])


def test_closed_formulas() -> None:
    """Cross-entropy is log V in every slot. Decay sums to a geometric row in e^(-1/gamma). D-PACE's slot k weighs
    r^k + ... + r^K with r = (1 - alpha) / V + alpha. KL(p || flat) is log V minus the entropy of p."""
    ratio = math.exp(-1 / 4.0)
    assert flat(LossConfig(gamma=4.0)) == pytest.approx(math.log(VOCAB) * (1 - ratio**DRAFTS) / (1 - ratio), rel=1e-6)
    assert flat(LossConfig(gamma=0.0)) == pytest.approx(math.log(VOCAB) * DRAFTS, rel=1e-6)
    for alpha in (0.0, 0.3, 1.0):
        r = (1 - alpha) / VOCAB + alpha
        weight = sum(k * r**k for k in range(1, DRAFTS + 1))  # the k-th reach is in the weights of slots 1 .. k
        assert flat(LossConfig(dpace_alpha=alpha)) == pytest.approx(math.log(VOCAB) * weight, rel=1e-6)
    chance = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64)
    teacher = torch.full((DRAFTS, VOCAB), -1e3, dtype=torch.float64)
    teacher[:, :4] = chance.log()
    divergence = math.log(VOCAB) - 1.75 * math.log(2)
    assert flat(LossConfig(ce=0.0, kl=1.0, gamma=0.0), teacher) == pytest.approx(DRAFTS * divergence, rel=1e-6)
    decayed = divergence * (1 - ratio**DRAFTS) / (1 - ratio)
    assert flat(LossConfig(ce=0.0, kl=2.0, gamma=4.0), teacher) == pytest.approx(2 * decayed, rel=1e-6)


def drafter_of(selector: int = 0) -> Drafter:
    torch.manual_seed(0)
    return Drafter(
        DFlashConfig(
            hidden_size=SIZE, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            head_dim=4, vocab_size=VOCAB, num_target_layers=2, taps=(0, 1), mask_token_id=1, selector_top_k=selector,
            selector_rank=selector, block_size=DRAFTS + 1,
        )
    )  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_gradients_reach_the_drafter_alone(config: LossConfig) -> None:
    """Even of a target that nobody froze; and every parameter of the drafter has one."""
    torch.manual_seed(1)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=SIZE, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, tie_word_embeddings=False, initializer_range=0.3,
        )
    )  # fmt: skip
    drafter = drafter_of(selector=4)
    init_drafter(drafter, torch.randn(SIZE), std=0.3)
    assert drafter.selector is not None
    with torch.no_grad():  # its last matrix starts at zero, which would stop gradients
        for weight in drafter.selector.parameters():
            weight.normal_()
    batch = next(stream_of(0, 1))
    loss, _ = make_loss(Target(model, (0, 1)), config)(drafter, batch)
    loss.backward()
    assert all(p.grad is None for p in model.parameters())
    assert [n for n, p in drafter.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_the_selectors_loss_is_the_loop() -> None:
    hidden, head, labels, _ = case()
    hidden, head, drafter = hidden.detach().float(), head.float(), drafter_of(selector=4)
    assert drafter.selector is not None
    with torch.no_grad():
        for weight in drafter.selector.parameters():
            weight.normal_()
    embedding, before = torch.randn(VOCAB, SIZE), torch.randint(VOCAB, (len(labels),))
    values, ids = (hidden @ head.T).topk(4)
    labels = torch.where((labels != IGNORE) & (torch.arange(len(labels)) % 2 == 0), ids[:, 2], labels)
    loss, hits = selector_loss(drafter, embedding, hidden, before, labels, values, ids)
    total, right, seen = torch.zeros(()), 0, 0
    for n in range(len(labels)):
        if labels[n] not in ids[n]:
            continue
        left = drafter.selector.left(embedding[before[n]], hidden[n])
        score = torch.stack([values[n, c] + left @ drafter.selector.right(embedding[ids[n, c]]) for c in range(4)])
        place = ids[n].tolist().index(int(labels[n]))
        total, right, seen = total - score.log_softmax(0)[place], right + (int(score.argmax()) == place), seen + 1
    assert len(labels) > seen > 0
    torch.testing.assert_close(loss, total, rtol=1e-5, atol=1e-5)
    assert int(hits) == right


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


DOCUMENTS = [
    [True] * 7,
    [False, False, True, True, False, True, True, True],  # a masked turn in the middle
    [False] * 6,  # nothing supervised
    [True],
    [False] * 3 + [True] * 14,  # goes on in the next row
    [True] * 2,
]


@pytest.mark.parametrize("drafts", [1, 3, 7])
@pytest.mark.parametrize("tokens", [16, 23])
def test_labels_of_packed_rows_are_the_tokens_that_follow(drafts: int, tokens: int) -> None:
    """Rows of the trainers' own stream, whose every id is unique: the label of slot k is the anchor's id + k."""
    documents = [
        Document(np.arange(100 + 1000 * n, 100 + 1000 * n + len(c), dtype=np.int32), np.array(c))
        for n, c in enumerate(DOCUMENTS)
    ]
    carried = {int(i) for d in documents for i, c in zip(d.ids, d.carries, strict=True) if c}
    ids, labels, positions = next(TrainStream([InMemory("d", documents, 1.0, 0)], tokens, 2, 0, 1)).tensors()
    found = gathered(labels, positions, torch.arange(-1, tokens).expand(2, -1), drafts)
    seen = 0
    for row in range(2):
        assert (found[row, 0] == IGNORE).all(), "anchor -1 is none"
        for anchor in range(tokens):
            alive = True
            for k in range(drafts):
                wanted = int(ids[row, anchor]) + k + 1
                inside = anchor + k < tokens and int(ids[row, anchor + k]) == wanted - 1
                alive = alive and inside and wanted in carried
                assert int(found[row, anchor + 1, k]) == (wanted if alive else IGNORE), (row, anchor, k)
                seen += alive
    assert seen > 10


def stream_of(rank: int, world: int, seed: int = 0) -> AnchorStream:
    rng = np.random.default_rng(1)
    documents = [
        Document(rng.integers(0, VOCAB, size, dtype=np.int32), np.ones(size, bool)) for size in rng.integers(2, 40, 50)
    ]
    return AnchorStream(TrainStream([InMemory("d", documents, 1.0, 0)], 32, 4, rank, world), 8, DRAFTS, seed)


def test_anchors_belong_to_the_row_whoever_draws_it() -> None:
    whole, halves = stream_of(0, 1), [stream_of(rank, 2) for rank in range(2)]
    drawn = []
    for _ in range(3):
        one, parts = next(whole), [next(h) for h in halves]
        for index, tensor in enumerate(one.tensors()):
            assert torch.equal(tensor, torch.cat([p.tensors()[index] for p in parts]))
        assert one.num_targets == sum(p.num_targets for p in parts)
        drawn.append(one.anchors_RA)
    assert len({tuple(r.tolist()) for d in drawn for r in d}) == 12, "every row has its own"
    assert not torch.equal(next(stream_of(0, 1, seed=1)).anchors_RA, drawn[0])


def test_a_resumed_stream_draws_the_same_anchors() -> None:
    whole, again = stream_of(0, 1), stream_of(0, 1)
    next(whole)
    again.load_state_dict(whole.state_dict())
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(next(again).tensors(), next(whole).tensors(), strict=True))
