"""Flips, oscillation and clipping on hand-made weights; tokens per expert on every supported family."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV3Config, GptOssConfig, MiMoV2FlashConfig, Qwen3MoeConfig

from core.models.experts import find_experts
from core.mxfp4 import ScaleRule
from qat.metrics import SAMPLE_BLOCKS, WINDOW, CodeTracker, ExpertCounter, clip_rate, sample

SIZE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
FAMILIES = {
    "mimo_v2": MiMoV2FlashConfig(
        **SIZE, num_key_value_heads=1, moe_intermediate_size=32, head_dim=24, v_head_dim=16, n_routed_experts=4,
        num_experts_per_tok=2, sliding_window=5, layer_types=["full_attention", "sliding_attention"],
    ),
    "qwen3_moe": Qwen3MoeConfig(
        **SIZE, num_key_value_heads=1, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, head_dim=16
    ),
    "gpt_oss": GptOssConfig(**SIZE, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, head_dim=16),
    "deepseek_v3": DeepseekV3Config(
        **SIZE, num_key_value_heads=4, moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2, n_group=2,
        topk_group=1, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
        v_head_dim=16,
    ),
}  # fmt: skip


def weights(*values: float) -> Tensor:
    """One block of 32 with the given first values, the rest 4 (so that the scale never changes)."""
    return torch.tensor([*values, *[4.0] * (32 - len(values))], dtype=torch.bfloat16)


def run(tracker: CodeTracker, steps: list[Tensor], first: int = 0) -> dict[str, float]:
    for step, tensor in enumerate(steps, first):
        tracker.update("w", tensor, step)
    return tracker.metrics()


def test_flips_and_returns_are_counted_exactly() -> None:
    # value 0: 1 -> 2 -> 1 (a flip and a return); value 1: 1 -> 2 -> 3 (two flips); value 2: rests
    found = run(CodeTracker(ScaleRule.even), [weights(1, 1, 1), weights(2, 2, 1), weights(1, 3, 1)])
    assert found == {"flip_rate": 4 / 64, "oscillation_rate": 1 / 64}


def test_a_return_counts_within_the_window_only() -> None:
    for rest, returns in ((WINDOW - 1, 1), (WINDOW, 0)):
        steps = [weights(1), weights(2), *[weights(2)] * rest, weights(1)]
        found = run(CodeTracker(ScaleRule.even), steps)
        assert round(found["oscillation_rate"] * 32 * (len(steps) - 1)) == returns
        assert round(found["flip_rate"] * 32 * (len(steps) - 1)) == 2


def test_rates_start_anew_after_each_reading() -> None:
    tracker = CodeTracker(ScaleRule.even)
    assert run(tracker, [weights(1)]) == {}
    assert run(tracker, [weights(2)], first=1)["flip_rate"] == 1 / 32
    assert run(tracker, [weights(2)], first=2)["flip_rate"] == 0
    assert tracker.metrics() == {}


def test_resumed_tracker_reports_what_an_uninterrupted_one_does() -> None:
    steps = [weights(1, 1), weights(2, 1), weights(1, 2), weights(2, 2), weights(2, 1)]
    whole = run(CodeTracker(ScaleRule.even), steps)
    first = CodeTracker(ScaleRule.even)
    for step, tensor in enumerate(steps[:3]):
        first.update("w", tensor, step)
    second = CodeTracker(ScaleRule.even)
    second.load_state_dict(first.state_dict())
    second.update("w", steps[2], 2)  # the loop snaps once more after a restore
    assert run(second, steps[3:], first=3) == whole


def test_a_tensor_that_joins_later_starts_a_new_baseline() -> None:
    tracker = CodeTracker(ScaleRule.even)
    run(tracker, [weights(1)])
    tracker.update("w", weights(2), 1)
    tracker.update("v", weights(3), 1)
    assert tracker.metrics() == {}
    tracker.update("w", weights(1), 2)
    tracker.update("v", weights(3), 2)
    assert tracker.metrics()["flip_rate"] == 1 / 64


def test_unsnapped_tensors_are_compared_on_the_grid() -> None:
    tracker = CodeTracker(ScaleRule.even, snapped=False)
    found = run(tracker, [weights(1.0), weights(1.1), weights(1.3)])  # 1.1 stays code 1.0, 1.3 rounds to 1.5
    assert found["flip_rate"] == 1 / 64


def test_sample_takes_whole_blocks_over_the_whole_tensor() -> None:
    flat = torch.arange(32 * SAMPLE_BLOCKS * 3, dtype=torch.float32)
    found = sample(flat)
    assert found.shape == (SAMPLE_BLOCKS, 32) and found[-1, 0] == 32 * 3 * (SAMPLE_BLOCKS - 1)
    assert sample(flat[:40]).shape == (1, 32)


@pytest.mark.parametrize(("rule", "share"), [(ScaleRule.floor, 1 / 32), (ScaleRule.rceil, 0.0), (ScaleRule.even, 0.0)])
def test_clip_rate(rule: ScaleRule, share: float) -> None:
    block = weights(7.0)  # floor: scale 1, 7 lies above 6; even and rceil take scale 2
    assert clip_rate(block, rule) == share


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_per_expert(family: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family])
    counter = ExpertCounter(model)
    layers = {e.module_name for e in find_experts(model)}
    ids = torch.randint(64, (2, 9))
    model.eval()(input_ids=ids, use_cache=False)
    assert counter.table() == {}, "evaluation is not counted"
    model.train()(input_ids=ids, use_cache=False)
    model(input_ids=ids, use_cache=False)
    table = counter.table()
    assert set(table) == layers and all(sum(c) == 2 * 18 * 2 and len(c) == 4 for c in table.values())
    other = ExpertCounter(model)
    other.load_state_dict(counter.state_dict())
    assert other.table() == table


def test_a_starved_expert_is_named() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES["qwen3_moe"])
    counter = ExpertCounter(model)
    router = model.model.layers[1].mlp.gate
    assert isinstance(router.weight, Tensor)

    def avoid(_module: Any, _args: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        logits, scores, index = output
        return logits, scores, torch.where(index == 2, 3, index)

    router.register_forward_hook(avoid)
    model.train()(input_ids=torch.randint(64, (4, 50)), use_cache=False)
    named = [s for s in counter.starved() if s.startswith("model.layers.1.")]
    assert named == ["model.layers.1.mlp.experts[2]: 0 tokens"]
