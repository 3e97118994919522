"""Our MiMo-V2 class: against transformers' class where that one is right, against a float64 reference elsewhere."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MiMoV2FlashConfig, MiMoV2FlashForCausalLM

from core.errors import ConfigError, UnsupportedError
from core.models import ops
from core.models.mimo_v2 import MiMoV2ForCausalLM
from core.models.mimo_v2_config import MiMoV2Config
from core.train.batch import document_ids

TINY: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 1, "head_dim": 24, "v_head_dim": 16, "moe_intermediate_size": 32, "n_routed_experts": 8,
    "num_experts_per_tok": 2, "sliding_window": 5,
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    "mlp_layer_types": ["dense", "sparse", "sparse"],
}  # fmt: skip
PRO = TINY | {
    "num_attention_heads": 16, "num_key_value_heads": 8, "swa_num_key_value_heads": 8, "head_dim": 12, "v_head_dim": 8,
    "attention_value_scale": 0.612,
}  # fmt: skip


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "norm" not in name:
                tensor.normal_(std=1.0 if "sinks" in name else 0.2)
    return model


def ours(config: dict[str, Any] = TINY, attention: str = "auto", experts: str = "fp4flash") -> MiMoV2ForCausalLM:
    model = randomise(MiMoV2ForCausalLM(MiMoV2Config(**config)))
    model.set_attention(attention)
    model.set_experts_implementation(experts)
    return model


def tokens(rows: int = 2, length: int = 17) -> Tensor:
    return torch.randint(0, TINY["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(1))


def packed(*lengths: int) -> Tensor:
    return torch.cat([torch.arange(n) for n in lengths])[None]


@pytest.mark.parametrize(
    ("attention", "experts", "tolerance"),
    [
        ("eager", "grouped_mm", 0.0),  # the same operations in the same order
        ("eager", "fp4flash", 1e-7),  # forward equal; gradients of one token's experts summed in another order
        ("sdpa", "fp4flash", 3e-6),  # fused softmax; logits are O(1) and FP32 holds 1.2e-7
    ],
)
def test_equals_transformers_on_flash_geometry(attention: str, experts: str, tolerance: float) -> None:
    theirs = randomise(MiMoV2FlashForCausalLM(MiMoV2FlashConfig(**TINY)))
    theirs.set_experts_implementation("grouped_mm")
    model = ours(attention=attention, experts=experts)
    model.load_state_dict(theirs.state_dict())
    ids, positions = tokens(), torch.cat((packed(9, 8), packed(17)))
    expected = theirs(input_ids=ids, position_ids=positions, use_cache=False).logits
    found = model(input_ids=ids, position_ids=positions).logits
    for logits in (expected, found):
        logits.square().mean().backward()
    assert (found - expected).abs().max() <= tolerance
    parameters = dict(model.named_parameters())
    for name, parameter in theirs.named_parameters():
        assert (parameters[name].grad - parameter.grad).abs().max() <= tolerance, name


def test_generates_what_transformers_generates() -> None:
    theirs = randomise(MiMoV2FlashForCausalLM(MiMoV2FlashConfig(**TINY)))
    model = ours()
    model.load_state_dict(theirs.state_dict())
    ids, mask = tokens(2, 8), torch.ones(2, 8, dtype=torch.int64)
    mask[0, :3] = 0  # left padding
    arguments = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = theirs.eval().generate(ids, **arguments)
    assert torch.equal(model.eval().generate(ids, **arguments), expected)
    assert torch.equal(model.generate(ids, use_cache=False, **arguments), expected)


class Reference:
    """The model written down once more, in float64, with loops over rows, heads, tokens and experts."""

    def __init__(self, model: MiMoV2ForCausalLM) -> None:
        self.config = model.config
        self.w = {name: tensor.detach().double() for name, tensor in model.state_dict().items()}

    def norm(self, x: Tensor, name: str) -> Tensor:
        return torch.stack([v / math.sqrt(float(v @ v) / len(v) + self.config.rms_norm_eps) for v in x]) * self.w[name]

    def turn(self, head: Tensor, position: int, theta: float) -> Tensor:
        size = int(self.config.head_dim * 0.334)
        out = head.clone()
        for i in range(size // 2):
            angle = position * theta ** (-2 * i / size)
            a, b = head[i], head[i + size // 2]
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + size // 2] = b * math.cos(angle) + a * math.sin(angle)
        return out

    def attend(self, x: Tensor, positions: list[int], layer: int) -> Tensor:
        c, p = self.config, f"model.layers.{layer}.self_attn."
        near = c.layer_types[layer] == "sliding_attention"
        theta, kv_heads = (1e4, c.swa_num_key_value_heads) if near else (5e6, c.num_key_value_heads)
        q = (x @ self.w[p + "q_proj.weight"].T).unflatten(-1, (-1, c.head_dim))
        k = (x @ self.w[p + "k_proj.weight"].T).unflatten(-1, (-1, c.head_dim))
        v = (x @ self.w[p + "v_proj.weight"].T).unflatten(-1, (-1, c.v_head_dim)) * c.attention_value_scale
        starts = [max(s for s in range(t + 1) if positions[s] == 0) for t in range(len(x))]
        out = torch.zeros(len(x), c.num_attention_heads, c.v_head_dim, dtype=torch.float64)
        for t in range(len(x)):
            for h in range(c.num_attention_heads):
                g = h // (c.num_attention_heads // kv_heads)
                seen = [s for s in range(starts[t], t + 1) if not near or t - s < c.sliding_window]
                mine = self.turn(q[t, h], positions[t], theta)
                score = [float(mine @ self.turn(k[s, g], positions[s], theta)) / math.sqrt(c.head_dim) for s in seen]
                total = sum(math.exp(a) for a in score) + (math.exp(self.w[p + "sinks"][h]) if near else 0)
                out[t, h] = sum(math.exp(a) / total * v[s, g] for a, s in zip(score, seen, strict=True))
        return out.flatten(1) @ self.w[p + "o_proj.weight"].T

    def mlp(self, x: Tensor, layer: int) -> Tensor:
        p = f"model.layers.{layer}.mlp."
        if p + "gate.weight" not in self.w:
            gate, up = x @ self.w[p + "gate_proj.weight"].T, x @ self.w[p + "up_proj.weight"].T
            return (gate / (1 + (-gate).exp()) * up) @ self.w[p + "down_proj.weight"].T
        rows = []
        for token in x:
            score = 1 / (1 + (-(self.w[p + "gate.weight"] @ token)).exp())
            ranked = score + self.w[p + "gate.e_score_correction_bias"]
            chosen = sorted(range(len(score)), key=lambda e: -float(ranked[e]))[: self.config.num_experts_per_tok]
            row = torch.zeros_like(token)
            for e in chosen:
                gate, up = (self.w[p + "experts.gate_up_proj"][e] @ token).chunk(2)
                hidden = gate / (1 + (-gate).exp()) * up
                row += score[e] / sum(score[i] for i in chosen) * (self.w[p + "experts.down_proj"][e] @ hidden)
            rows.append(row)
        return torch.stack(rows)

    def __call__(self, ids: Tensor, positions: list[int]) -> Tensor:
        x = self.w["model.embed_tokens.weight"][ids]
        for layer in range(self.config.num_hidden_layers):
            p = f"model.layers.{layer}."
            x = x + self.attend(self.norm(x, p + "input_layernorm.weight"), positions, layer)
            x = x + self.mlp(self.norm(x, p + "post_attention_layernorm.weight"), layer)
        return self.norm(x, "model.norm.weight") @ self.w["lm_head.weight"].T


@pytest.mark.parametrize("window", [4, 5, 6])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_equals_a_float64_reference_on_pro_geometry(attention: str, window: int) -> None:
    model = ours(PRO | {"sliding_window": window}, attention)
    ids, positions = tokens(1, 11), packed(8, 3)
    with torch.no_grad():
        found = model(input_ids=ids, position_ids=positions).logits[0].double()
    expected = Reference(model)(ids[0], positions[0].tolist())
    assert (found - expected).abs().max() < 2e-5  # FP32 model, logits of O(1), three layers


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_window_counts_the_query_itself(attention: str) -> None:
    window = 5
    one = {"num_hidden_layers": 1, "layer_types": ["sliding_attention"], "mlp_layer_types": ["dense"]}
    model = ours(TINY | one, attention)
    first, second = tokens(1, 9), tokens(1, 9)
    second[0, 0] = (first[0, 0] + 1) % 64
    with torch.no_grad():
        moved = (model(first).logits - model(second).logits).abs().amax((0, 2)) > 1e-6
    assert moved.tolist() == [distance < window for distance in range(9)]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_packed_row_equals_its_documents(attention: str) -> None:
    model, ids = ours(PRO, attention), tokens(1, 40)
    with torch.no_grad():
        together = model(input_ids=ids, position_ids=packed(13, 1, 26)).logits
        apart = torch.cat([model(input_ids=part).logits for part in ids.split([13, 1, 26], dim=1)], dim=1)
    assert (together - apart).abs().max() < 2e-5


@pytest.mark.parametrize("length", [1, 31, 33, 300])
@pytest.mark.parametrize("window", [None, 5, 128, 129])
def test_masks_say_the_same_in_all_forms(length: int, window: int | None) -> None:
    starts = torch.zeros(3, length, dtype=torch.int64)
    starts[0, length // 3], starts[1, length // 2] = 1, 1
    documents = starts.cumsum(-1)
    seen = ops.visible(documents, window)[:, 0]
    block = ops.flex_mask(documents, window, torch.float32)
    b, q, k = (torch.arange(n) for n in (3, length, length))
    pairs = block.mask_mod(b[:, None, None], None, q[None, :, None], k[None, None, :])
    assert torch.equal(pairs, seen)
    blocks = -(-length // ops.FLEX_BLOCK)
    for row in range(3):
        for i in range(blocks):
            some = set(block.kv_indices[row, 0, i, : block.kv_num_blocks[row, 0, i]].tolist())
            full = set(block.full_kv_indices[row, 0, i, : block.full_kv_num_blocks[row, 0, i]].tolist())
            assert not some & full
            for j in range(blocks):
                part = seen[row, i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
                assert not part.any() or j in some | full
                assert j not in full or part.all()


def test_flex_equals_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """The uncompiled form of flex_attention: the same masks, sinks and grouping, written out by torch."""
    monkeypatch.setattr(ops, "compiled_flex", lambda: ops.flex_attention)
    ids, positions = tokens(2, 150), torch.cat((packed(97, 53), packed(150)))
    with torch.no_grad():
        expected = ours(PRO, "eager")(input_ids=ids, position_ids=positions).logits
        found = ours(PRO, "flex_attention")(input_ids=ids, position_ids=positions).logits
    assert (found - expected).abs().max() < 2e-5


@pytest.mark.parametrize("length", [1, 31, 33])
@pytest.mark.parametrize("bias", ["none", "one expert"])
def test_experts_agree_whatever_the_load(length: int, bias: str) -> None:
    """All tokens on the same two experts, others empty: same result from every implementation."""
    ids, losses, grads = tokens(1, length), [], []
    for experts in ("eager", "grouped_mm", "fp4flash"):
        model = ours(experts=experts)
        if bias != "none":
            for layer in model.model.layers[1:]:
                layer.mlp.gate.e_score_correction_bias[2:4] = 100.0
        loss = model(ids).logits.square().mean()
        loss.backward()
        losses.append(float(loss.detach()))
        grads.append(model.model.layers[1].mlp.experts.gate_up_proj.grad)
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    assert all((g - grads[0]).abs().max() < 1e-6 for g in grads)
    if bias != "none":
        assert not grads[2][[0, 1, 4, 5, 6, 7]].any()


def test_grouped_output_has_the_bits_of_transformers_in_bf16() -> None:
    outputs = []
    for experts in ("grouped_mm", "fp4flash"):
        model = ours(experts=experts).to(torch.bfloat16)
        with torch.no_grad():
            outputs.append(model(tokens(2, 33)).logits)
    assert torch.equal(*outputs)


def test_gradient_checkpointing_changes_nothing() -> None:
    grads = []
    for on in (False, True):
        model = ours().train()
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(tokens()).logits.square().mean().backward()
        grads.append(model.model.layers[2].self_attn.sinks.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
def test_layers_compile_without_a_graph_break(attention: str) -> None:
    torch._dynamo.reset()
    model = ours(TINY | {"head_dim": 32}, attention)
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend="eager")
    with torch.set_grad_enabled(attention == "sdpa"):
        for _ in range(2):
            model(tokens(1, 256)).logits.sum()
    torch._dynamo.reset()


def test_the_correction_bias_survives_casts_in_fp32() -> None:
    model = MiMoV2ForCausalLM(MiMoV2Config(**TINY))
    gate = model.model.layers[1].mlp.gate
    gate.e_score_correction_bias[0] = 0.123456789
    model.to(torch.bfloat16)
    assert gate.weight.dtype == torch.bfloat16
    assert gate.e_score_correction_bias[0] == torch.tensor(0.123456789)


HUB = {
    "hybrid_layer_pattern": [0, 1, 1], "moe_layer_freq": [0, 1, 1], "layernorm_epsilon": 1e-6, "rope_theta": 1e7,
    "swa_rope_theta": 1e4, "partial_rotary_factor": 0.334, "num_hidden_layers": 3, "sliding_window": 128,
    "sliding_window_size": 128, "attention_chunk_size": 128, "routed_scaling_factor": None,
    "swa_num_key_value_heads": 8, "num_key_value_heads": 8, "num_attention_heads": 64, "swa_num_attention_heads": 64,
}  # fmt: skip


def test_reads_the_hubs_spelling() -> None:
    config = MiMoV2Config(**HUB)
    assert config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    assert config.mlp_layer_types == ["dense", "sparse", "sparse"]
    assert (config.rms_norm_eps, config.routed_scaling_factor, config.sliding_window) == (1e-6, 1.0, 128)
    assert [config.kv_heads(i) for i in range(3)] == [8, 8, 8]
    assert config.rope_parameters["full_attention"]["rope_theta"] == 1e7
    again = MiMoV2Config.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()


@pytest.mark.parametrize(
    "change",
    [
        {"layer_types": ["full_attention"] * 3},
        {"rms_norm_eps": 1e-5},
        {"sliding_window": 64},
        {"rope_parameters": {"full_attention": {"rope_theta": 5e6}}},
        {"swa_head_dim": 64},
        {"n_shared_experts": 1},
        {"scoring_func": "softmax"},
        {"moe_layer_freq": [0, 1]},
        {"swa_num_key_value_heads": 7},
        {"add_full_attention_sink_bias": True},
    ],
)
def test_refuses_two_spellings_that_disagree(change: dict[str, Any]) -> None:
    with pytest.raises((ConfigError, UnsupportedError)) as caught:
        MiMoV2Config(**HUB | change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "keys"),
    [
        ({"sliding_window": 128}, 128),
        ({"sliding_window_size": 128}, 128),  # the hub's 128 keys; transformers would make 129 of it
        ({"sliding_window": 129, "sliding_window_size": 128}, 129),  # what transformers writes after reading that
    ],
)
def test_window_spellings(fields: dict[str, int], keys: int) -> None:
    assert MiMoV2Config(num_hidden_layers=2, **fields).sliding_window == keys


def test_documents_start_where_positions_do() -> None:
    assert document_ids(packed(2, 1, 3)).tolist() == [[0, 0, 1, 2, 2, 2]]
