"""The plan's sums against real parameters, published totals, and each other."""

import pytest
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from core.errors import ConfigError
from core.train.config import Offload, OptimConfig, ParallelConfig, ParallelMode, TrainConfig
from qat.config import LayerwiseConfig, LossConfig, Method, ModelConfig, QATConfig, QuantConfig, Teacher
from qat.plan import GB, Assumptions, make_plan, planned_model


def tiny() -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        num_experts=4,
        num_experts_per_tok=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        tie_word_embeddings=False,
    )
    return Qwen3MoeForCausalLM(config)


def config(**parts: object) -> QATConfig:
    return QATConfig(**({"model": ModelConfig(name="mimo_v2_5_pro")} | parts))


@pytest.fixture(scope="module")
def pro_model() -> nn.Module:
    return planned_model(config())


@pytest.mark.parametrize(
    ("name", "total", "active"),  # published, in billions
    [("mimo_v2_flash", 309, 15.5), ("qwen3_30b_a3b", 30.5, 3.3), ("gpt_oss_20b", 20.9, None)],
)
def test_presets_have_their_published_sizes(name: str, total: float, active: float | None) -> None:
    facts = make_plan(config(model=ModelConfig(name=name))).facts
    assert facts.total == pytest.approx(total * GB, rel=0.005)
    assert active is None or facts.active == pytest.approx(active * GB, rel=0.02)


def test_an_unknown_model_is_one_clear_error() -> None:
    with pytest.raises(ConfigError, match="no geometry named mimo_v9"):
        make_plan(config(model=ModelConfig(name="mimo_v9")))


def test_pro_totals_are_the_published_ones(pro_model) -> None:
    facts = make_plan(config(), pro_model).facts
    mtp = 3 * (6144 * 12288 + 27136 * 6144 + 6144 * 16384 + 3 * 16384 * 6144)  # carried through, not computed
    assert facts.total + mtp == pytest.approx(1023.18 * GB, rel=1e-4)
    assert facts.experts / facts.total == pytest.approx(0.978, abs=2e-3)
    assert facts.active == pytest.approx(41.9 * GB, rel=0.01)
    assert facts.layer_trained == 384 * 3 * 6144 * 2048
    assert facts.quantised == facts.experts == 69 * facts.layer_trained


def test_sums_equal_real_parameters() -> None:
    model = tiny()
    facts = make_plan(config(), model).facts
    assert facts.total == sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for n, p in model.named_parameters() if "experts." in n)
    assert facts.experts == facts.trained == facts.quantised == experts
    assert facts.active == facts.total - experts / 2
    assert facts.layer == sum(p.numel() for p in model.model.layers[0].parameters())


@pytest.mark.parametrize("world", [8, 64])
def test_zero3_shards_sum_to_the_whole(pro_model, world: int) -> None:
    plan = make_plan(config(train=TrainConfig(batch_size=64, micro_batch_size=1)), pro_model)
    whole, shard = plan.memory[ParallelMode.none, 1], plan.memory[ParallelMode.zero3, world]
    whole, shard = dict(whole.parts), dict(shard.parts)
    for part in ("FP32 masters", "optimiser moments", "teacher"):
        assert shard[part] * world == pytest.approx(whole[part])
    gathered = 2 * 2 * plan.facts.layer
    assert (shard["working weights, BF16"] - gathered) * world == pytest.approx(whole["working weights, BF16"])
    assert (shard["gradients"] - GB) * world == pytest.approx(whole["gradients"])


def test_offload_moves_the_optimiser_to_the_host(pro_model) -> None:
    on_gpu = make_plan(config(), pro_model).memory[ParallelMode.zero3, 8]
    off = make_plan(config(parallel=ParallelConfig(offload_optimizer=Offload.cpu)), pro_model).memory[
        ParallelMode.zero3, 8
    ]
    assert off.total + off.host == pytest.approx(on_gpu.total)


def test_pro_layerwise_fits_one_gpu_where_whole_training_does_not(pro_model) -> None:
    plan = make_plan(config(qat=Method.layerwise, layerwise=LayerwiseConfig(batch_size=8)), pro_model, world=4)
    slices, memory = plan.layerwise[141]
    assert slices > 1 and memory.total < 141 * GB
    assert plan.memory[ParallelMode.zero3, 8].total > 192 * GB
    text = plan.render()
    assert str(plan) == text
    for piece in (
        "memory per GPU",
        "on 141 GB: fits",
        "does not fit",
        "1,021.25B",
        "97.9%",
        "zero3",
        "4 GPUs",
        "min a layer",
    ):
        assert piece in text, piece


def test_whole_model_text_and_teachers() -> None:
    plan = make_plan(config(train=TrainConfig(batch_size=8)), tiny())
    assert "memory per GPU" in plan.render() and "fits 80 GB" in plan.render()
    size = {}
    for teacher in (Teacher.base, Teacher.path, Teacher.masters):
        made = make_plan(config(loss=LossConfig(teacher=teacher)), tiny())
        size[teacher] = dict(made.memory[ParallelMode.none, 1].parts)["teacher"]
    assert size[Teacher.path] == 2 * plan.facts.total
    assert size[Teacher.base] == 2 * plan.facts.trained
    assert size[Teacher.masters] == 0


def test_time_scales_with_rate_and_gpus(pro_model) -> None:
    slow = make_plan(config(optim=OptimConfig()), tiny(), Assumptions(tflops=100)).days
    fast = make_plan(config(), tiny(), Assumptions(tflops=200)).days
    assert slow[0][1] == pytest.approx(2 * fast[0][1])
    assert fast[0][1] == pytest.approx(8 * fast[1][1])
    assert not make_plan(config(), pro_model).days, "no time for what fits nowhere"


def test_loading_counts() -> None:
    """Every process reads the whole model and clones the teacher's part of it before ZeRO divides them."""
    plan = make_plan(config(), tiny())
    memory = plan.memory[ParallelMode.zero3, 64]
    assert memory.loading == 2 * (plan.facts.total + plan.facts.trained)
    assert memory.peak == max(memory.total, memory.loading)


def test_activation_checkpointing_and_dense_selection() -> None:
    select = QuantConfig(select=["experts", "model.layers.*.self_attn.o_proj.weight"])
    plan = make_plan(config(quant=select), tiny())
    assert plan.facts.quantised == plan.facts.experts + 3 * 64 * 64
    light = make_plan(config(train=TrainConfig(activation_checkpointing=True)), tiny())
    assert light.memory[ParallelMode.none, 1].total < plan.memory[ParallelMode.none, 1].total


def test_a_plan_that_fits_nowhere_names_the_way_out(pro_model) -> None:
    assert "set qat=layerwise" in make_plan(config(), pro_model).render()
    assert "set qat=layerwise" not in make_plan(config(), tiny()).render()
