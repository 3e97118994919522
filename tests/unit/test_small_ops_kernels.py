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
from transformers import GptOssConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm, Qwen3MoeTopKRouter

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
@pytest.mark.parametrize(("rows", "size"), [(1, 64), (3, 33), (33, 96), (2, 1000)])
def test_rms_norm(rows: int, size: int, dtype: torch.dtype) -> None:
    cases.check_rms_norm(rows, size, dtype, BACKEND, "cpu")


@DTYPES
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "sizes"), [(1, (128, 33)), (3, (31, 16)), (33, (160, 40))])
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
def test_rms_norm_is_the_models(dtype: torch.dtype) -> None:
    module = Qwen3MoeRMSNorm(48, eps=1e-5).to(dtype)
    module.weight.data = cases.values(48, dtype=dtype, device="cpu", seed=2)
    x = cases.values(9, 48, dtype=dtype, device="cpu")
    found = rms_norm(x, module.weight.data, 1e-5, backend=BACKEND)
    assert (found.double() - module(x).double()).abs().max() <= (2**-6 if dtype == torch.bfloat16 else 1e-6)


def test_routers_are_the_models() -> None:
    x = cases.values(17, 32, dtype=torch.float32, device="cpu")
    qwen = Qwen3MoeTopKRouter(
        Qwen3MoeConfig(hidden_size=32, num_experts=12, num_experts_per_tok=3, norm_topk_prob=True)
    )
    oss = GptOssTopKRouter(GptOssConfig(hidden_size=32, num_local_experts=12, num_experts_per_tok=4))
    for module, rule in ((qwen, Rule("softmax_topk", 3)), (oss, Rule("topk_softmax", 4))):
        torch.nn.init.normal_(module.weight, generator=torch.Generator().manual_seed(1))
        bias = getattr(module, "bias", None)
        if bias is not None:
            torch.nn.init.normal_(bias, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            _, weight, chosen = module(x)
            logits = torch.nn.functional.linear(x, module.weight, bias)
        found, found_weight = route(logits, rule, None, backend=BACKEND)
        assert torch.equal(found.long(), chosen)
        assert torch.allclose(found_weight, weight, atol=1e-6)


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
