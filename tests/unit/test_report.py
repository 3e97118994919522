"""Evaluation sums against plain logits; shares, intervals and files of the report on arms with a known answer."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from core.run import Run
from core.train.batch import IGNORE, Batch
from qat.config import EvalConfig
from qat.evaluate import Arm, Rows, arm_sums, bf16_sums
from qat.plots import plot_curves
from qat.report import mean_kl, recovery_table, removed, removed_by_domain, write_report
from qat.select import CoverageRow, Selection

CPU = torch.device("cpu")


def llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    return LlamaForCausalLM(config)


def batch(rows: int, seed: int) -> Batch:
    ids = torch.randint(50, (rows, 13), generator=torch.Generator().manual_seed(seed))
    labels = ids.roll(-1, 1)
    labels[:, -1] = IGNORE
    labels[0, :5] = IGNORE
    return Batch(ids, labels, torch.arange(13).expand(rows, 13).contiguous())


def test_row_sums_equal_plain_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    import qat.evaluate

    monkeypatch.setattr(qat.evaluate, "CHUNK", 7)
    model, reference, data = llama(0), llama(1), [batch(2, 0), batch(1, 1)]
    found = arm_sums(model, reference, {"x": data}, CPU)["x"]
    at = 0
    for one in data:
        with torch.no_grad():
            q, p = (torch.log_softmax(m(input_ids=one.input_ids_BT).logits.double(), -1) for m in (model, reference))
        for row in range(len(one.input_ids_BT)):
            carries = one.labels_BT[row] != IGNORE
            labels = one.labels_BT[row][carries]
            ce = -q[row][carries].gather(1, labels[:, None]).sum()
            kl = (p[row].exp() * (p[row] - q[row])).sum(-1)[carries].sum()
            agree = (p[row].argmax(-1) == q[row].argmax(-1))[carries].sum()
            assert found.tokens[at] == carries.sum() and found.agree[at] == agree
            assert float(found.ce[at]) == pytest.approx(float(ce), rel=1e-5)
            assert float(found.kl[at]) == pytest.approx(float(kl), rel=1e-4)
            at += 1
    assert at == len(found.tokens) == 3


def test_the_bf16_arm_has_no_kl() -> None:
    found = bf16_sums(llama(0), {"x": [batch(2, 0)]}, CPU)["x"]
    assert torch.equal(found.kl, torch.zeros(2, dtype=torch.float64)) and torch.equal(found.agree, found.tokens)


def arm(**kl_per_row: list[float]) -> Arm:
    """Rows of 10 tokens with the given KL sums."""
    found = {}
    for domain, values in kl_per_row.items():
        kl = torch.tensor(values, dtype=torch.float64)
        tokens = torch.full_like(kl, 10)
        found[domain] = Rows(tokens=tokens, ce=2 * tokens, kl=kl, agree=tokens)
    return found


def test_share_is_of_the_mean_over_domains() -> None:
    ptq, qat = arm(a=[4.0, 4.0], b=[1.0]), arm(a=[1.0, 1.0], b=[0.5])
    assert mean_kl(ptq) == pytest.approx((0.4 + 0.1) / 2)
    share = removed(ptq, qat, 50)
    assert share.value == pytest.approx(1 - (0.1 + 0.05) / (0.4 + 0.1))
    assert (share.low, share.high) == pytest.approx((share.value, share.value))  # rows of a domain are alike
    by_domain = removed_by_domain(ptq, qat, 50)
    assert by_domain["a"].value == pytest.approx(0.75) and by_domain["b"].value == pytest.approx(0.5)


def test_interval_is_paired_reproducible_and_of_the_right_width() -> None:
    generator = torch.Generator().manual_seed(3)
    ptq_rows = (1 + torch.rand(400, generator=generator, dtype=torch.float64)).tolist()
    noise = torch.rand(400, generator=generator, dtype=torch.float64) * 0.4
    ptq, scaled = arm(a=ptq_rows), arm(a=[0.2 * x for x in ptq_rows])
    exact = removed(ptq, scaled, 200)
    assert exact.low == pytest.approx(0.8) and exact.high == pytest.approx(0.8)  # the same rows for both arms
    noisy = arm(a=noise.tolist())
    share = removed(ptq, noisy, 2000)
    assert share == removed(ptq, noisy, 2000) and share != removed(ptq, noisy, 2000, seed=1)
    # delta method for a ratio of means r: var(noise - r * ptq) / (n * mean(ptq)^2)
    rows = torch.tensor(ptq_rows, dtype=torch.float64)
    spread = (noise - (1 - share.value) * rows).std() / (math.sqrt(400) * rows.mean())
    assert share.low < share.value < share.high
    assert share.high - share.low == pytest.approx(2 * 1.96 * float(spread), rel=0.1)


def test_ptq_that_costs_nothing_has_no_share() -> None:
    assert math.isnan(removed(arm(a=[0.0]), arm(a=[0.0]), 5).value)
    assert math.isnan(removed(arm(a=[1.0]), arm(a=[0.5]), 0).low)  # eval.bootstrap=0: no interval


def test_report_files(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for step in range(1, 4):
        run.log(
            step=step, loss=1 / step, kl=1 / step, grad_norm=1.0, lr=0.1, flip_rate=0.1 / step, oscillation_rate=0.0
        )
    run.log(step=3, val_loss_a=2.0, val_loss_b=3.0)
    arms = {
        "BF16": arm(a=[0.0, 0.0], b=[0.0]), "PTQ": arm(a=[4.0, 4.0], b=[1.0]),
        "QAT": arm(a=[1.0, 1.0], b=[0.5]), "CE": arm(a=[3.0, 5.0], b=[2.0]),
    }  # fmt: skip
    selection = Selection((), (CoverageRow("quantised", 2, 64, 128, 34.0), CoverageRow("kept", 1, 32, 64, 64)))
    extra = {
        "quant": {"clip_rate": 0.01, "starved": ["model.layers.1.mlp.experts[2]: 0 tokens"]},
        "tasks": [{"arm": "QAT", "task": "gsm8k", "accuracy": 0.5, "low": 0.3, "high": 0.7, "count": 20}],
    }
    text = write_report(run, arms, selection, EvalConfig(bootstrap=20), extra)
    wanted = ("QAT removes 70.0%", "CE removes -20.0%", "experts[2]", "gsm8k", "flip rate 3.333%", "clip rate 1.000%")
    assert not [part for part in wanted if part not in text]
    assert recovery_table(arms, {}) in text
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["schema"] == 1 and report["kl_removed"]["QAT"]["value"] == pytest.approx(0.7)
    assert report["kl_removed_by_domain"]["QAT"]["b"]["value"] == pytest.approx(0.5)
    assert report["arms"]["PTQ"]["a"]["kl"] == pytest.approx(0.4) and report["last_step"]["flip_rate"] == pytest.approx(
        0.1 / 3
    )
    assert report["selection"][0]["part"] == "quantised"
    assert "QAT removes" in (tmp_path / "report.md").read_text()
    for name in ("curves.png", "recovery.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_run_without_metrics_has_no_curves(tmp_path: Path) -> None:
    plot_curves([], tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()
