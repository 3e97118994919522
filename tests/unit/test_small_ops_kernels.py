"""kernels.rms_norm, kernels.linear, kernels.qkv_rope and kernels.router without a GPU.

The definitions against float64 and the models' own modules, and Triton under its interpreter against the same. Triton
chooses its interpreter when it is imported; so this file runs itself once more in a child process.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import GptOssConfig, MiMoV2FlashConfig, Qwen3MoeConfig
from transformers.models.gpt_oss import modeling_gpt_oss as oss
from transformers.models.mimo_v2_flash import modeling_mimo_v2_flash as mimo
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen

from core.errors import ConfigError, FormatError, UnsupportedError
from kernels.linear import linear
from kernels.qkv_rope import Heads, qkv_rope
from kernels.rms_norm import rms_norm
from kernels.router import Rule, route
from tests import small_ops_cases as cases

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKEND = "triton" if INTERPRETED else "reference"
DTYPES = pytest.mark.parametrize("dtype", cases.DTYPES, ids=("bf16", "fp32"))
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:overflow encountered")


@pytest.mark.skipif(INTERPRETED, reason="this is the run under the interpreter")
def test_everything_again_under_the_triton_interpreter() -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).resolve())]
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    child = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600)
    assert child.returncode == 0, child.stdout[-8000:] + child.stderr[-2000:]


@DTYPES
@pytest.mark.parametrize(("rows", "size"), [(1, 64), (3, 33), (33, 96), (2, 1000), (31, 1)])
def test_rms_norm(rows: int, size: int, dtype: torch.dtype) -> None:
    cases.check_rms_norm(rows, size, dtype, BACKEND, "cpu")


@DTYPES
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "sizes"), [(1, (128, 33)), (3, (31, 16)), (33, (160, 40)), (2, (1, 1))])
def test_linear(rows: int, sizes: tuple[int, int], bias: bool, dtype: torch.dtype) -> None:
    cases.check_linear(rows, sizes, dtype, bias, BACKEND, "cpu")


@DTYPES
@pytest.mark.parametrize("rows", [1, 7, 33])
@pytest.mark.parametrize("name", cases.HEADS)
def test_qkv_rope(name: str, rows: int, dtype: torch.dtype) -> None:
    cases.check_qkv_rope(name, rows, dtype, BACKEND, "cpu")


@DTYPES
def test_write_kv(dtype: torch.dtype) -> None:
    cases.check_write_kv(dtype, BACKEND, "cpu")


@pytest.mark.parametrize("rows", [1, 31])
@pytest.mark.parametrize("name", cases.RULES)
def test_router(name: str, rows: int) -> None:
    cases.check_router(name, rows, BACKEND, "cpu")


def test_router_ties() -> None:
    cases.check_router_ties(BACKEND, "cpu")


def test_no_rows_at_all() -> None:
    none = torch.zeros(0, 32)
    assert rms_norm(none, torch.ones(32), 1e-6, backend=BACKEND).shape == (0, 32)
    assert linear(none, torch.ones(5, 32), backend=BACKEND).shape == (0, 5)
    assert route(none, Rule("softmax_topk", 2), None, backend=BACKEND)[0].shape == (0, 2)


@DTYPES
@pytest.mark.parametrize("module", [mimo.MiMoV2FlashRMSNorm, oss.GptOssRMSNorm, qwen.Qwen3MoeRMSNorm])
def test_rms_norm_is_the_models(module: type[nn.Module], dtype: torch.dtype) -> None:
    theirs = module(48, eps=1e-5).to(dtype)
    theirs.weight.data = cases.values(48, dtype=dtype, device="cpu", seed=2)
    x = cases.values(9, 48, dtype=dtype, device="cpu")
    found, wanted = rms_norm(x, theirs.weight.data, 1e-5, backend=BACKEND), theirs(x)
    cases.near(found, wanted.double(), dtype, 2)
    if BACKEND == "reference" and module is not oss.GptOssRMSNorm:  # which rounds once
        assert torch.equal(found, wanted)


MIMO = MiMoV2FlashConfig(
    hidden_size=32, n_routed_experts=12, num_experts_per_tok=3, n_group=4, topk_group=2, routed_scaling_factor=2.5,
    num_attention_heads=4, num_key_value_heads=2, head_dim=24, v_head_dim=16, num_hidden_layers=2,
    layer_types=["full_attention", "sliding_attention"], mlp_layer_types=["sparse", "sparse"],
    max_position_embeddings=64,
)  # fmt: skip
QWEN = Qwen3MoeConfig(
    hidden_size=32, num_experts=12, num_experts_per_tok=3, norm_topk_prob=True, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
)  # fmt: skip
OSS = GptOssConfig(
    hidden_size=32, num_local_experts=12, num_experts_per_tok=4, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, num_hidden_layers=2,
)  # fmt: skip


def filled(module: nn.Module) -> nn.Module:
    """Every parameter and correction bias random; weights small enough that scores spread."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if "inv_freq" not in name:
            nn.init.normal_(tensor, std=0.3, generator=generator)
    return module.eval()


@pytest.mark.parametrize(
    ("module", "rule"),
    [
        (mimo.MiMoV2FlashTopkRouter(MIMO), Rule("sigmoid_bias", 3, groups=4, top_groups=2, scaling=2.5)),
        (qwen.Qwen3MoeTopKRouter(QWEN), Rule("softmax_topk", 3)),
        (oss.GptOssTopKRouter(OSS), Rule("topk_softmax", 4)),
    ],
    ids=("mimo", "qwen", "gpt-oss"),
)
@torch.no_grad()
def test_routers_are_the_models(module: nn.Module, rule: Rule) -> None:
    """As one vector of weights a token, since MiMo-V2's module returns its experts in no order."""
    x = cases.values(17, 32, dtype=torch.float32, device="cpu")
    _, their_weight, theirs = filled(module)(x)
    logits = linear(x, module.weight, getattr(module, "bias", None), backend=BACKEND)
    chosen, weight = route(logits, rule, getattr(module, "e_score_correction_bias", None), backend=BACKEND)
    found, wanted = (torch.full((17, 12), -1.0) for _ in range(2))
    found.scatter_(1, chosen.long(), weight)
    wanted.scatter_(1, theirs, their_weight)
    assert torch.allclose(found, wanted, atol=1e-6)


ROPES = {
    "mimo": (mimo, mimo.MiMoV2FlashAttention(MIMO, 1), mimo.MiMoV2FlashRotaryEmbedding(MIMO), ("sliding_attention",)),
    "qwen": (qwen, qwen.Qwen3MoeAttention(QWEN, 0), qwen.Qwen3MoeRotaryEmbedding(QWEN), ()),
    "gpt-oss": (oss, oss.GptOssAttention(OSS, 0), oss.GptOssRotaryEmbedding(OSS), ()),
}


@pytest.mark.parametrize("name", ROPES)
@torch.no_grad()
def test_queries_keys_and_values_are_the_models(name: str) -> None:
    """In FP32, from the modules' projections, norms and rotation; MiMo-V2 turns 8 of 24 dims, GPT-OSS has YaRN."""
    family, module, rotary, layer = ROPES[name]
    filled(module)
    x, position = cases.values(7, 32, dtype=torch.float32, device="cpu"), torch.arange(7) * 9
    cos, sin = rotary(x, position[None], *layer)
    value_dim, scale = getattr(module, "v_head_dim", module.head_dim), getattr(module, "v_scale", 1.0)
    q, k = (project(x).unflatten(1, (-1, module.head_dim)) for project in (module.q_proj, module.k_proj))
    v = module.v_proj(x).unflatten(1, (-1, value_dim)) * scale
    q_norm = k_norm = None
    if name == "qwen":
        q, k, q_norm, k_norm = module.q_norm(q), module.k_norm(k), module.q_norm.weight, module.k_norm.weight
    q, k = (t[0] for t in family.apply_rotary_pos_emb(q[None], k[None], cos, sin, unsqueeze_dim=2))

    half = cos.shape[-1] if name == "gpt-oss" else cos.shape[-1] // 2
    table = [torch.zeros(64, half).index_copy(0, position, t[0, :, :half]) for t in (cos, sin)]
    heads = Heads(4, k.shape[1], module.head_dim, value_dim, 2 * half, scale)
    projections = (module.q_proj, module.k_proj, module.v_proj)
    weight = torch.cat([p.weight for p in projections])
    bias = torch.cat([p.bias for p in projections]) if name == "gpt-oss" else None
    k_cache, v_cache = torch.zeros(2, 4, *k.shape[1:]), torch.zeros(2, 4, *v.shape[1:])
    found = qkv_rope(
        x, weight, bias, *table, position, torch.arange(7), k_cache, v_cache, heads, q_norm=q_norm, k_norm=k_norm,
        backend=BACKEND,
    )  # fmt: skip
    for ours, theirs in ((found, q), (k_cache.flatten(0, 1)[:7], k), (v_cache.flatten(0, 1)[:7], v)):
        assert torch.allclose(ours, theirs, atol=2e-6)


def test_a_position_beyond_the_tables_and_a_slot_beyond_the_cache_are_refused() -> None:
    heads = Heads(1, 1, 4, 4, 4)
    weight, cos, cache = torch.ones(heads.width, 8), torch.ones(5, 2), torch.zeros(2, 4, 1, 4)
    for position, slot, word in ((5, 0, "position"), (0, 8, "slot"), (-1, 0, "position")):
        with pytest.raises(FormatError, match=word):
            qkv_rope(torch.ones(1, 8), weight, None, cos, cos, torch.tensor([position]), torch.tensor([slot]), cache,
                     cache.clone(), heads, backend=BACKEND)  # fmt: skip


def test_arguments_that_do_not_fit_are_named() -> None:
    x, weight = torch.ones(2, 8), torch.ones(3, 8)
    with pytest.raises(FormatError, match="weight is"):
        linear(x, weight.to(torch.bfloat16))
    with pytest.raises(FormatError, match="float16"):
        linear(x.half(), weight.half())
    with pytest.raises(FormatError, match="residual"):
        rms_norm(x, torch.ones(8), 1e-6, residual=torch.ones(1, 8))
    with pytest.raises(FormatError, match="eps"):
        rms_norm(x, torch.ones(8), float("nan"))
    with pytest.raises(UnsupportedError, match="rotary_pairs"):
        qkv_rope(x, weight, None, x, x, x, x, x, x, Heads(1, 1, 1, 1, 0), rotary_pairs="interleaved")
    for wrong in ({"kind": "other", "top_k": 1}, {"kind": "softmax_topk", "top_k": 0},
                  {"kind": "softmax_topk", "top_k": 1, "groups": 2}):  # fmt: skip
        with pytest.raises(ConfigError):
            Rule(**wrong)
    with pytest.raises(FormatError, match="top_k=5"):
        route(torch.zeros(1, 4), Rule("softmax_topk", 5), None)
    with pytest.raises(ConfigError, match="rotary_dims=3"):
        Heads(1, 1, 4, 4, 3)
    if not INTERPRETED:
        with pytest.raises(UnsupportedError, match="CUDA"):
            linear(x, weight, backend="triton")
