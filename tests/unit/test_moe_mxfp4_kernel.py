"""kernels.moe_mxfp4 without a GPU: the definition against float64 and other libraries' modules, the Triton source under
the interpreter, and what the compiled code for Hopper looks like.

Triton chooses its interpreter when it is imported, and other tests import it first. So this file runs the plain-torch
cases here, and itself once more in a child process under TRITON_INTERPRET=1, which adds the Triton cases.
"""

import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from torch import Tensor

import kernels.moe_mxfp4 as ops
from core import mxfp4
from core.errors import FormatError, UnsupportedError
from core.mxfp4 import Packed
from kernels.moe_mxfp4 import Activation, DenseWeights, ExpertWeights, reference
from kernels.moe_mxfp4.routing import most_items
from tests import moe_cases as cases
from tests.moe_cases import Case

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["reference", "triton"] if INTERPRETED else ["reference"]
interpreted = pytest.mark.skipif(not INTERPRETED, reason="in the child process under the interpreter")
compiled = pytest.mark.skipif(INTERPRETED, reason="compiles, or needs no interpreter")

# numpy reports the overflow of a tile that is then multiplied again in the wide form, and the companions' NaN.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")


@pytest.mark.skipif(INTERPRETED, reason="this is the run under the interpreter")
def test_everything_again_under_the_triton_interpreter() -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).resolve())]
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    child = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stdout[-8000:] + child.stderr[-2000:]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_against_float64(case: Case, backend: str) -> None:
    cases.assert_right(case, "cpu", backend)


@compiled
@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_reference_in_fp32_against_float64(case: Case) -> None:
    cases.assert_right(case, "cpu", "reference", torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("columns", [32, 256, 288])
def test_every_scale_byte_and_code_exactly(columns: int, backend: str) -> None:
    cases.assert_every_scale_and_code(columns, "cpu", backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("byte", [1, 127, 128, 129, 200])
def test_scales_through_both_halves(byte: int, backend: str) -> None:
    """A layer whose scale bytes are all `byte` or one less, and x scaled back by as much: below, at, above the fold."""
    case = Case(2, 64, 96, 3, 2)
    weights = cases.make_weights(case)
    for packed in (weights.gate_up, weights.down):
        packed.scales.fill_(byte)
        packed.scales[:, ::2] = byte - 1
    x, chosen, weight = cases.make_tokens(case)
    x = x * 2.0 ** (120 - byte)
    h = ops.gate_up(x, weights, chosen, cases.ACTIVATIONS["silu"], backend=backend)
    expected, bound = cases.gate_up_bounds(x, weights, chosen, cases.ACTIVATIONS["silu"])
    assert ((h.double() - expected).abs() <= bound).all()
    out = ops.down(h * 2.0 ** (120 - byte), weights, chosen, weight, backend=backend)
    expected, bound = cases.down_bounds(h * 2.0 ** (120 - byte), weights, chosen, weight)
    assert ((out.double() - expected).abs() <= bound).all() and out.isfinite().all()


@interpreted
def test_same_bits_in_any_company() -> None:
    from kernels.moe_mxfp4.kernel import DECODE, LONG, PREFILL, SINGLE, SPREAD, Tile

    cases.assert_same_bits_in_any_company("cpu", [DECODE, LONG, SPREAD, SINGLE, PREFILL, Tile(pairs=16)])


@interpreted
def test_more_pairs_than_are_routed_in_one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's sort instead of `route` the result has the same bits."""
    from kernels.moe_mxfp4 import prepare

    case = Case(4, 64, 64, 9, 3)
    weights, inputs = cases.make_weights(case), cases.make_tokens(case)
    one_program = ops.experts(inputs[0], weights, *inputs[1:], Activation(), backend="triton")
    monkeypatch.setattr(prepare, "ROUTED", 8)
    assert torch.equal(ops.experts(inputs[0], weights, *inputs[1:], Activation(), backend="triton"), one_program)


@interpreted
def test_routing() -> None:
    cases.assert_routing("cpu")


@compiled
def test_the_grid_holds_every_routing_and_some_routing_fills_it() -> None:
    for pairs in range(1, 40):
        for experts in (1, 3, 8, 64):
            for tile in (2, 8):
                active = min(experts, pairs)
                # One pair for each expert, and the rest for one of them: the worst there is.
                worst = active - 1 + -(-(pairs - active + 1) // tile)
                assert worst == most_items(pairs, experts, tile)
                counts = torch.bincount(torch.randint(experts, (pairs,)), minlength=experts)
                assert int(((counts + tile - 1) // tile).sum()) <= worst


@pytest.mark.parametrize("backend", BACKENDS)
def test_absent_tokens_and_all_tokens_to_one_expert(backend: str) -> None:
    case = Case(4, 32, 64, 33, 2)
    weights, (x, chosen, weight) = cases.make_weights(case), cases.make_tokens(case)
    nobody = ops.experts(x, weights, torch.full_like(chosen, -1), weight, Activation(), backend=backend)
    assert torch.equal(nobody, torch.zeros_like(x))
    one = ops.experts(x, weights, torch.full_like(chosen, 2), weight, Activation(), backend=backend)
    alone = ExpertWeights(*(Packed(p.codes[2:3], p.scales[2:3]) for p in (weights.gate_up, weights.down)))
    assert torch.equal(one, ops.experts(x, alone, torch.zeros_like(chosen), weight, Activation(), backend=backend))


def dense(packed: Packed) -> Tensor:
    return mxfp4.decode(packed, torch.float32)


def close(ours: Tensor, theirs: Tensor) -> bool:
    """FP32 both, the same formula with other orders of summation."""
    return torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


def chosen_once(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """FP32 tokens whose ids are valid: these modules know no absent slot."""
    x, chosen, weight = cases.make_tokens(case, torch.float32)
    return x, chosen.clamp(min=0), weight


@compiled
def test_equals_qwen3_moe_and_mimo_experts() -> None:
    from transformers.models.qwen3_moe import modeling_qwen3_moe
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig

    from core.models.mimo_v2 import Experts
    from core.models.mimo_v2_config import MiMoV2Config

    case = Case(5, 64, 96, 33, 3)
    weights, (x, chosen, weight) = cases.make_weights(case), chosen_once(case)
    qwen = modeling_qwen3_moe.Qwen3MoeExperts(
        Qwen3MoeConfig(num_experts=5, hidden_size=96, moe_intermediate_size=64, experts_implementation="eager")
    )
    mimo = Experts(MiMoV2Config(n_routed_experts=5, hidden_size=96, moe_intermediate_size=64))
    ours = ops.experts(x, weights, chosen, weight, Activation("silu"), backend="reference")
    unpacked = DenseWeights(dense(weights.gate_up), dense(weights.down))
    assert torch.equal(ops.experts_dense(x, unpacked, chosen, weight, Activation("silu")), ours)
    for module in (qwen, mimo):
        with torch.no_grad():
            module.gate_up_proj.copy_(unpacked.gate_up)
            module.down_proj.copy_(unpacked.down)
            assert close(ours, type(module).forward(module, x, chosen, weight))


@compiled
def test_equals_gpt_oss_experts() -> None:
    from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    case = Case(5, 64, 96, 33, 3, "clamped", bias=True)
    weights, (x, chosen, weight) = cases.make_weights(case), chosen_once(case)
    x = x * 5  # so that the clamp acts
    config = GptOssConfig(num_local_experts=5, hidden_size=96, intermediate_size=64, experts_implementation="eager")
    module = GptOssExperts(config)
    interleaved = torch.arange(128).view(2, 64).T.flatten()  # gate 0, up 0, gate 1, ...
    with torch.no_grad():
        module.gate_up_proj.copy_(dense(weights.gate_up)[:, interleaved].transpose(1, 2))
        module.gate_up_proj_bias.copy_(weights.gate_up_bias[:, interleaved])
        module.down_proj.copy_(dense(weights.down).transpose(1, 2))
        module.down_proj_bias.copy_(weights.down_bias)
        theirs = module(x, chosen, weight)
    act = Activation("clamped", alpha=module.alpha, limit=module.limit)
    ours = ops.experts(x, weights, chosen, weight, act, backend="reference")
    assert close(ours, theirs)
    unpacked = DenseWeights(dense(weights.gate_up), dense(weights.down), weights.gate_up_bias, weights.down_bias)
    assert torch.equal(ops.experts_dense(x, unpacked, chosen, weight, act), ours)


@compiled
def test_checks() -> None:
    case = Case(2, 32, 64, 3, 2)
    weights, (x, chosen, weight) = cases.make_weights(case), cases.make_tokens(case)
    act, up, down = Activation(), weights.gate_up, weights.down
    for bad, message in (
        (
            ExpertWeights(up, Packed(down.codes[:1], down.scales)),
            r"down.codes is torch.uint8 \(1, 64, 16\).*need contiguous uint8 \(2, 64, 16\)",
        ),
        (ExpertWeights(up, Packed(down.codes, down.scales[..., :0])), r"down.scales is torch.uint8 \(2, 64, 0\)"),
        (ExpertWeights(Packed(up.codes.mT, up.scales), down), "gate_up.codes is"),
        (ExpertWeights(Packed(up.codes.int(), up.scales), down), "gate_up.codes is torch.int32"),
        (ExpertWeights(Packed(up.codes[0], up.scales[0]), down), "three dimensions"),
        (ExpertWeights(up, down, gate_up_bias=torch.zeros(2, 32)), r"gate_up_bias is .*\(2, 64\)"),
        (ExpertWeights(up, down, down_bias=torch.zeros(2, 64).half()), "down_bias is torch.float16"),
    ):
        with pytest.raises(FormatError, match=message):
            ops.experts(x, bad, chosen, weight, act)
    for arguments, message in (
        ((x.half(), chosen, weight), "x is torch.float16"),
        ((x[:, :32], chosen, weight), r"x is torch.bfloat16 \(3, 32\)"),
        ((x, chosen[:2], weight), "one row a token"),
        ((x, chosen.float(), weight), "chosen is torch.float32"),
        ((x, chosen, weight.to(torch.bfloat16)), "the routing weights are float32"),
        ((x, chosen, weight[:, :1]), r"weight is torch.float32 \(3, 1\)"),
    ):
        with pytest.raises(FormatError, match=message):
            ops.experts(arguments[0], weights, *arguments[1:], act)
    with pytest.raises(FormatError, match="h is"):
        ops.down(x, weights, chosen, weight)
    with pytest.raises(UnsupportedError, match="'relu' is not one of"):
        Activation("relu")
    with pytest.raises(UnsupportedError, match="limit is 0"):
        Activation("clamped", limit=0)
    with pytest.raises(UnsupportedError, match="'cuda' is not one of"):
        ops.experts(x, weights, chosen, weight, act, backend="cuda")
    with pytest.raises(FormatError, match="not one layer's"):
        ops.experts_dense(x, DenseWeights(torch.zeros(2, 64, 64), torch.zeros(2, 64, 64)), chosen, weight, act)


def test_backend_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1, 32, dtype=torch.bfloat16)
    if INTERPRETED:
        assert ops.implementation(x, "auto").__name__ == "kernels.moe_mxfp4.kernel"
        assert ops.implementation(x.float(), "auto") is reference
        with pytest.raises(UnsupportedError, match=r"takes bfloat16 activations, not torch\.float32"):
            ops.implementation(x.float(), "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert ops.implementation(x, "auto") is reference
    with pytest.raises(UnsupportedError, match="needs a CUDA tensor"):
        ops.implementation(x, "triton")


@compiled
def test_hopper_code_is_what_speed_and_invariance_rest_on() -> None:
    """Without a GPU: asynchronous 16-byte copies, nothing flushed to zero, no wgmma, pairs of weights multiplied in one
    register, and one operand layout for all tiles over the same K."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    from kernels.moe_mxfp4.kernel import compile_cases

    layouts = defaultdict(set)
    for name, function, signature, constants, options in compile_cases():
        if not name.startswith("gate_up"):
            continue
        index = {n: (function.arg_names.index(n),) for n in signature}
        aligned = {index[n]: [["tt.divisibility", 16]] for n, kind in signature.items() if kind.startswith("*")}
        ast = triton.compiler.ASTSource(function, signature, {index[n]: v for n, v in constants.items()}, aligned)
        code = triton.compile(ast, target=GPUTarget("cuda", 90, 32), options=options)
        ptx, layout = code.asm["ptx"], code.asm["ttgir"]
        assert "wgmma" not in ptx and ".ftz" not in ptx, name
        assert re.search(r"cp\.async\.cg\.shared\.global .*0x10", ptx), name
        assert "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" in ptx, name
        assert code.metadata.shared <= 227 * 1024, name
        assert "fma.rn.bf16x2" in ptx and not re.search(r"(mul|fma)\S*\.bf16\s", ptx), name
        layouts[constants["HIDDEN"]].update(re.findall(r"kWidth = \d+|instrShape = \[[\d, ]+\]", layout))
    assert len(layouts) == 2 and all(len(found) == 2 for found in layouts.values())
