"""kernels.mxfp4_snap compiled: the assertions that the interpreter passes, and what only a GPU can show."""

import pytest
import torch

import kernels.mxfp4_snap as ops
from core import mxfp4
from core.mxfp4 import ScaleRule
from tests import mxfp4_cases as cases

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.mark.parametrize("rule", cases.RULES)
def test_golden_bytes(rule: ScaleRule) -> None:
    cases.assert_golden(rule, "cuda", "triton")


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("rule", cases.RULES)
def test_every_bf16_pattern(rule: ScaleRule, backend: str) -> None:
    """Includes FP32 subnormals (scale byte 0), which a flush to zero would lose; also the torch definition on CUDA."""
    for amax_bits in cases.AMAX_BITS:
        cases.assert_all_equal_core(cases.every_pattern(amax_bits), rule, "cuda", backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(32,), (31 * 32,), (33, 32), (2, 3, 33 * 32), (257, 32), (8, 512, 2048)])
def test_shapes_and_dtypes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for rule in cases.RULES:
        cases.assert_all_equal_core(cases.gaussian(*shape, dtype=dtype), rule, "cuda", "triton")


def test_memory_that_is_not_aligned_to_16_bytes() -> None:
    """A shard that begins at any element of a larger buffer; its neighbours must not change."""
    for shift in (1, 2, 4, 7):
        buffer = cases.gaussian(3 * 1024).cuda()
        before = buffer.clone()
        ops.snap_(buffer[shift : shift + 2048])
        assert cases.same_bits(buffer[shift : shift + 2048], mxfp4.snap(before[shift : shift + 2048]))
        assert cases.same_bits(buffer[:shift], before[:shift])
        assert cases.same_bits(buffer[shift + 2048 :], before[shift + 2048 :])


def test_flag_protocol() -> None:
    cases.assert_flag_protocol("cuda", "triton")
    cases.assert_packed_flags("cuda", "triton")


def test_no_host_synchronisation_with_a_flag() -> None:
    weight, flag = cases.gaussian(4, 64).cuda(), ops.new_flag("cuda")
    out = torch.empty_like(weight)
    ops.snap_(weight, flag=flag)  # compile first
    ops.snap_from(weight, out, flag=flag)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.snap_(weight, flag=flag)
        ops.snap_from(weight, out, flag=flag)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_capture_in_a_cuda_graph() -> None:
    static, flag = cases.gaussian(64, 256).cuda(), ops.new_flag("cuda")
    ops.snap_(static.clone(), flag=flag)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.snap_(static, flag=flag)
    fresh = cases.gaussian(64, 256, seed=5).cuda()
    static.copy_(fresh)
    graph.replay()
    assert cases.same_bits(static, mxfp4.snap(fresh))


def test_more_than_2_to_the_31_elements() -> None:
    elements = 2**31 + 64 * 32
    if torch.cuda.mem_get_info()[0] < 3 * 2 * elements:
        pytest.skip("needs 13 GB of free GPU memory")
    weight = torch.zeros(elements, dtype=torch.bfloat16, device="cuda")
    tail = cases.gaussian(128 * 32).cuda()
    weight[-len(tail) :] = tail
    ops.snap_(weight)
    assert cases.same_bits(weight[-len(tail) :], mxfp4.snap(tail))
    weight[-len(tail) :] = tail
    packed = ops.encode(weight)
    expected = mxfp4.encode(tail)
    assert torch.equal(packed.codes[-len(expected.codes) :], expected.codes)
    assert torch.equal(packed.scales[-len(expected.scales) :], expected.scales)
    del weight
    assert cases.same_bits(ops.decode(packed)[-len(tail) :], mxfp4.snap(tail))
