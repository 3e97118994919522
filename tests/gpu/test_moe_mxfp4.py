"""kernels.moe_mxfp4 compiled: the assertions that the interpreter passes, and what only a GPU can show."""

import pytest
import torch

import kernels.moe_mxfp4 as ops
from kernels.moe_mxfp4 import reference
from tests import moe_cases as cases
from tests.moe_cases import Case

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

# Real proportions: a rank of eight of MiMo-V2.5-Pro, Qwen3-30B-A3B, gpt-oss-120b (fewer experts).
SHAPES = (
    Case(24, 256, 6144, 8, 8),
    Case(16, 768, 2048, 16, 8),
    Case(6, 2880, 2880, 8, 4, "clamped", bias=True),
)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_against_float64(case: Case, backend: str) -> None:
    cases.assert_right(case, "cuda", backend)


@pytest.mark.parametrize("columns", [32, 256, 288])
def test_every_scale_byte_and_code_exactly(columns: int) -> None:
    """Includes BF16 subnormals (scale byte 0) as operands of the tensor cores."""
    cases.assert_every_scale_and_code(columns, "cuda", "triton")


def test_routing() -> None:
    cases.assert_routing("cuda")


def test_same_bits_in_any_company() -> None:
    from kernels.moe_mxfp4.kernel import DECODE, LONG, PREFILL, SINGLE, SPREAD, Tile

    tiles = [DECODE, LONG, SPREAD, SINGLE, PREFILL, Tile(pairs=16), Tile(rows=32, num_warps=1), Tile(num_stages=2)]
    cases.assert_same_bits_in_any_company("cuda", tiles)


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_real_shapes_against_the_definition_and_1000_equal_replays(case: Case) -> None:
    """One graph, captured once: other routings and other tokens replay in it; a thousand replays give the same bits."""
    weights, act = cases.move(cases.make_weights(case), "cuda"), cases.ACTIVATIONS[case.kind]
    x, chosen, weight = (t.cuda() for t in cases.make_tokens(case))
    ops.experts(x, weights, chosen, weight, act)  # compile first
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.experts(x, weights, chosen, weight, act)
    for seed in range(3):
        for static, fresh in zip((x, chosen, weight), cases.make_tokens(case, seed=seed), strict=True):
            static.copy_(fresh)
        graph.replay()
        expected = reference.experts(x, weights, chosen, weight, act)
        error = (out.double() - expected.double()).norm() / expected.double().norm()
        assert error < 2.0**-9  # only the order of FP32 sums differs, so few BF16 roundings flip
    first = out.clone()
    differs = torch.zeros((), dtype=torch.bool, device="cuda")
    for _ in range(1000):
        graph.replay()
        differs |= (out != first).any()
    assert not differs.item()


@pytest.mark.parametrize("tokens", [1, 31, 64, 200])
def test_many_tokens_have_the_bits_of_few(tokens: int) -> None:
    """Across the tiles and both ways of routing (200 tokens x 8 slots are sorted by torch)."""
    case = Case(16, 768, 2048, tokens, 8)
    weights, act = cases.move(cases.make_weights(case), "cuda"), cases.ACTIVATIONS["silu"]
    x, chosen, weight = (t.cuda() for t in cases.make_tokens(case))
    whole = ops.experts(x, weights, chosen, weight, act)
    for start in range(0, tokens, 7):
        part = slice(start, start + 7)
        assert torch.equal(ops.experts(x[part], weights, chosen[part], weight[part], act), whole[part])


def test_no_host_synchronisation() -> None:
    for tokens in (3, 200):
        case = Case(8, 64, 96, tokens, 4)
        weights = cases.move(cases.make_weights(case), "cuda")
        x, chosen, weight = (t.cuda() for t in cases.make_tokens(case))
        ops.experts(x, weights, chosen, weight, cases.ACTIVATIONS["silu"])
        torch.cuda.set_sync_debug_mode("error")
        try:
            ops.experts(x, weights, chosen, weight, cases.ACTIVATIONS["silu"])
        finally:
            torch.cuda.set_sync_debug_mode("default")
