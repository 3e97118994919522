"""The chunked losses against plain full-logit references in float64, and the four teachers."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from core.errors import ConfigError, DataError, UnsupportedError
from core.train.batch import IGNORE, Batch
from core.train.engine import Shard
from qat.config import LossConfig
from qat.config import Teacher as Kind
from qat.losses import ChunkedLoss, make_loss
from qat.teacher import Dense, ModelTeacher, TopK, frozen_copy, last_hidden, make_teacher
from qat.topk import TopKTeacher, precompute_topk

N, G, V = 33, 16, 50


def plain(hidden: Tensor, head: Tensor, labels: Tensor, soft: Tensor | None, kl: float, ce: float) -> Tensor:
    """All logits at once: sum over labelled positions of kl * KL + ce * CE."""
    log_q = torch.log_softmax(hidden @ head.T, -1)
    carries = labels != IGNORE
    loss = -ce * (log_q.gather(1, labels.clamp(min=0)[:, None])[:, 0] * carries).sum()
    if soft is not None:
        log_p = torch.log_softmax(soft, -1)
        loss = loss + kl * ((log_p.exp() * (log_p - log_q)).sum(-1) * carries).sum()
    return loss


def inputs(dtype: torch.dtype, ignore: str = "some") -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, G, generator=generator).to(dtype).requires_grad_()
    head = torch.randn(V, G, generator=generator).to(dtype).requires_grad_()
    soft = torch.randn(N, G, generator=generator).to(dtype)
    soft_head = torch.randn(V, G, generator=generator).to(dtype)
    labels = torch.randint(V, (N,), generator=generator)
    labels[{"none": slice(0, 0), "some": slice(3, 20, 2), "all": slice(None)}[ignore]] = IGNORE
    return hidden, head, labels, soft, soft_head


def double(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().double().requires_grad_() for t in tensors]


@pytest.mark.parametrize("chunk", [1, 31, 33, 2048])
@pytest.mark.parametrize(("kl", "ce"), [(1.0, 0.0), (0.0, 1.0), (0.7, 0.3)])
@pytest.mark.parametrize("ignore", ["none", "some", "all"])
def test_values_and_gradients(chunk: int, kl: float, ce: float, ignore: str) -> None:
    hidden, head, labels, soft, soft_head = inputs(torch.float32, ignore)
    targets = Dense(soft, soft_head) if kl else None
    loss, kl_sum, ce_sum, correct = ChunkedLoss.apply(hidden, head, labels, targets, kl, ce, chunk)
    (loss * 0.125).backward()
    hidden64, head64 = double(hidden, head)
    expected = plain(hidden64, head64, labels, (soft.double() @ soft_head.double().T) if kl else None, kl, ce)
    (expected * 0.125).backward()
    # FP32 sums of 33 x 50 terms of size ~10: 1e-5 is ten times the rounding
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kl * kl_sum + ce * ce_sum, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(hidden.grad.double(), hidden64.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(head.grad.double(), head64.grad, rtol=1e-4, atol=1e-5)
    right = ((hidden @ head.T).argmax(-1) == labels).sum()
    assert int(correct) == int(right)


def test_bf16_is_no_worse_than_the_plain_path() -> None:
    hidden, head, labels, soft, soft_head = inputs(torch.bfloat16)
    ChunkedLoss.apply(hidden, head, labels, Dense(soft, soft_head), 1.0, 0.5, 8)[0].backward()
    exact = double(hidden, head)
    plain(*exact, labels, soft.double() @ soft_head.double().T, 1.0, 0.5).backward()
    simple = [t.detach().clone().requires_grad_() for t in (hidden, head)]
    log_q = torch.log_softmax((simple[0] @ simple[1].T).float(), -1)
    log_p = torch.log_softmax((soft @ soft_head.T).float(), -1)
    carries = labels != IGNORE
    terms = (log_p.exp() * (log_p - log_q)).sum(-1) - 0.5 * log_q.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    (terms * carries).sum().backward()
    for ours, theirs, best in zip((hidden, head), simple, exact, strict=True):
        error = (ours.grad.double() - best.grad).norm() / best.grad.norm()
        assert error <= 1.05 * (theirs.grad.double() - best.grad).norm() / best.grad.norm()


def test_a_frozen_head_costs_no_gradient() -> None:
    hidden, head, labels, _, _ = inputs(torch.float32)
    frozen = head.detach()
    ChunkedLoss.apply(hidden, frozen, labels, None, 0.0, 1.0, 7)[0].backward()
    assert frozen.grad is None and hidden.grad is not None


class CountingTargets(Dense):
    """Records how many tokens' teacher logits are asked for at once."""

    def logits(self, part: slice) -> Tensor:
        asked.append(len(range(N)[part]))
        return super().logits(part)


asked: list[int] = []


def test_logits_exist_for_one_chunk_at_a_time() -> None:
    asked.clear()
    hidden, head, labels, soft, soft_head = inputs(torch.float32)
    ChunkedLoss.apply(hidden, head, labels, CountingTargets(soft, soft_head), 1.0, 0.0, 10)
    assert asked == [10, 10, 10, 3]


@pytest.mark.parametrize("k", [1, 7, V])
def test_topk_is_kl_over_k_and_one_classes(k: int) -> None:
    hidden, head, labels, soft, soft_head = inputs(torch.float32)
    top = torch.log_softmax(soft @ soft_head.T, -1).topk(k, -1)
    loss = ChunkedLoss.apply(hidden, head, labels, TopK(top.values, top.indices), 1.0, 0.2, 10)[0]
    loss.backward()
    hidden64, head64 = double(hidden, head)
    q = torch.softmax(hidden64 @ head64.T, -1)
    p_k, q_k = top.values.double().exp(), q.gather(1, top.indices)
    p_rest, q_rest = 1 - p_k.sum(-1), 1 - q_k.sum(-1)
    buckets = (p_k * (p_k / q_k).log()).sum(-1)
    if k < V:
        buckets = buckets + p_rest * (p_rest / q_rest).log()
    ce = -q.gather(1, labels.clamp(min=0)[:, None])[:, 0].log()
    expected = ((buckets + 0.2 * ce) * (labels != IGNORE)).sum()
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden.grad.double(), hidden64.grad, rtol=2e-3, atol=2e-4)  # 1 - sum(q) cancels in FP32
    torch.testing.assert_close(head.grad.double(), head64.grad, rtol=2e-3, atol=2e-4)
    exact = plain(hidden64.detach(), head64.detach(), labels, (soft @ soft_head.T).double(), 1.0, 0.2)
    assert loss <= exact + 1e-4, "fewer classes never raise KL"
    if k == V:
        torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=1e-4)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def batch() -> Batch:
    ids = torch.randint(V, (2, 12), generator=torch.Generator().manual_seed(1))
    labels = ids.roll(-1, 1)
    labels[:, -1] = IGNORE
    return Batch(ids, labels, torch.arange(12).expand(2, 12).contiguous())


def test_base_teacher_shares_what_is_not_trained() -> None:
    model = llama()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" in name)
    teacher = frozen_copy(model)
    ours = dict(model.named_parameters())
    for name, parameter in teacher.named_parameters():
        assert (parameter.data_ptr() == ours[name].data_ptr()) == ("mlp" not in name), name
        assert torch.equal(parameter, ours[name])


def test_kl_to_an_untrained_student_is_zero_and_grows_when_it_moves() -> None:
    model = llama()
    teacher = make_teacher(LossConfig(), model, [])
    loss_fn = make_loss(LossConfig(chunk_tokens=5), teacher)
    loss, stats = loss_fn(model, batch())
    loss.backward()
    assert loss == 0.0 and all(p.grad is None or not p.grad.any() for p in model.parameters())
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    loss, stats = loss_fn(model, batch())
    assert loss > 0 and stats["kl"] == loss and stats["ce"] > 0 and not stats["kl"].requires_grad


def test_loss_fn_equals_transformers_cross_entropy() -> None:
    model, data = llama(), batch()
    loss, _ = make_loss(LossConfig(kl=0.0, ce=1.0), None)(model, data)
    loss.backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    logits = model(input_ids=data.input_ids_BT, use_cache=False).logits
    expected = nn.functional.cross_entropy(
        logits.flatten(0, 1), data.labels_BT.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for name, parameter in model.named_parameters():  # tied head: embedding and output gradients add up
        torch.testing.assert_close(ours[name], parameter.grad, msg=name)


class TinyEngine:
    """What MastersTeacher needs of an engine."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.masters = {n: p.detach().float().clone() for n, p in model.named_parameters()}

    def working_shards(self, names: list[str]) -> Iterator[Shard]:
        yield from (Shard(n, p.shape, 0, p.data.view(-1)) for n, p in self.model.named_parameters() if n in names)

    def master_shards(self, names: list[str]) -> Iterator[Shard]:
        yield from (Shard(n, m.shape, 0, m.view(-1)) for n, m in self.masters.items() if n in names)


def test_masters_teacher_sees_the_masters_and_puts_the_student_back() -> None:
    model = llama().to(torch.bfloat16)
    reference = ModelTeacher(frozen_copy(model)).targets(batch())
    engine = TinyEngine(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    teacher = make_teacher(LossConfig(teacher=Kind.masters), model, [engine])
    model.train()
    targets = teacher.targets(batch())
    assert torch.equal(targets.hidden, reference.hidden) and torch.equal(targets.head, reference.head)
    assert model.training and all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    loss, _ = make_loss(LossConfig(teacher=Kind.masters), teacher)(model, batch())
    loss.backward()  # autograd would refuse if a weight it saved had changed


def test_masters_teacher_refuses_fake_quantisation() -> None:
    model = llama()
    model.config._experts_implementation_internal = "fp4flash_fake_quant"
    teacher = make_teacher(LossConfig(teacher=Kind.masters), model, [TinyEngine(model)])
    with pytest.raises(UnsupportedError, match="qat=fake_quant"):
        teacher.targets(batch())


def test_topk_files(tmp_path: Path) -> None:
    model, data = llama(), batch()
    teacher = frozen_copy(model).eval()
    assert precompute_topk(teacher, [data], V, tmp_path) == 2
    swapped = Batch(*(t.flip(0) for t in data.tensors()))  # other order, other batch
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(3)
    loss, _ = make_loss(LossConfig(teacher=Kind.topk), TopKTeacher(tmp_path))(model, swapped)
    expected, _ = make_loss(LossConfig(), ModelTeacher(teacher))(model, data)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    strange = Batch(data.input_ids_BT + 1, data.labels_BT, data.position_ids_BT)
    with pytest.raises(DataError, match="row 0 of a batch is not in"):
        TopKTeacher(tmp_path).targets(strange)
    (tmp_path / "rows-000000.safetensors").write_bytes(b"broken")
    with pytest.raises(DataError, match="damaged or missing"):
        TopKTeacher(tmp_path).targets(data)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        TopKTeacher(tmp_path)


def test_teachers_that_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"loss\.teacher_path=DIR"):
        make_teacher(LossConfig(teacher=Kind.path), llama(), [])
    with pytest.raises(ConfigError, match=r"loss\.topk_path=DIR"):
        make_teacher(LossConfig(teacher=Kind.topk), llama(), [])
    with pytest.raises(DataError, match=r"no index\.json"):
        make_teacher(LossConfig(teacher=Kind.topk, topk_path=str(tmp_path)), llama(), [])
    with pytest.raises(ConfigError, match="between 1 and the vocabulary"):
        precompute_topk(llama(), [], V + 1, tmp_path)
    assert make_teacher(LossConfig(kl=0.0, ce=1.0, teacher=Kind.path), llama(), []) is None


@pytest.mark.parametrize("on", [True, False])
def test_router_auxiliary_loss_is_the_models_own(on: bool) -> None:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=V, hidden_size=32, intermediate_size=32, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2,
        router_aux_loss_coef=0.1, output_router_logits=on,
    )  # fmt: skip
    model, data = Qwen3MoeForCausalLM(config), batch()
    loss, stats = make_loss(LossConfig(kl=0.0, ce=1.0), None)(model, data)
    assert ("aux" in stats) == on
    if on:
        out = model(input_ids=data.input_ids_BT, labels=data.input_ids_BT, use_cache=False)
        targets = data.num_targets
        torch.testing.assert_close(stats["aux"], 0.1 * out.aux_loss * targets)
        torch.testing.assert_close(loss, stats["ce"] + stats["aux"])
        (loss / targets).backward()
        assert model.model.layers[0].mlp.gate.weight.grad is not None


def test_last_hidden_keeps_documents_apart() -> None:
    model, data = llama().eval(), batch()
    split = Batch(data.input_ids_BT, data.labels_BT, torch.arange(6).repeat(2).expand(2, 12).contiguous())
    alone = last_hidden(model, Batch(data.input_ids_BT[:, 6:], data.labels_BT[:, 6:], data.position_ids_BT[:, :6]))
    packed = last_hidden(model, split).view(2, 12, -1)[:, 6:].flatten(0, 1)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
