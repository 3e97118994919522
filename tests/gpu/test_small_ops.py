"""kernels.rms_norm, linear, qkv_rope and router on a GPU: what the CPU tests assert, and 1,000 replays bit for bit."""

import pytest
import torch
from torch import Tensor

from kernels.linear import linear
from kernels.qkv_rope import qkv_rope
from kernels.rms_norm import rms_norm
from kernels.router import route
from tests import small_ops_cases as cases

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
DTYPES = pytest.mark.parametrize("dtype", cases.DTYPES, ids=("bf16", "fp32"))


@DTYPES
@pytest.mark.parametrize(("rows", "size"), [(1, 64), (3, 33), (33, 6144), (65, 2880)])
def test_rms_norm(rows: int, size: int, dtype: torch.dtype) -> None:
    cases.check_rms_norm(rows, size, dtype, "triton", "cuda")


@DTYPES
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "sizes"), [(1, (128, 33)), (31, (31, 16)), (33, (2880, 200)), (65, (512, 17000))])
def test_linear(rows: int, sizes: tuple[int, int], bias: bool, dtype: torch.dtype) -> None:
    cases.check_linear(rows, sizes, dtype, bias, "triton", "cuda")


@DTYPES
@pytest.mark.parametrize("rows", [1, 7, 33])
@pytest.mark.parametrize("name", cases.HEADS)
def test_qkv_rope(name: str, rows: int, dtype: torch.dtype) -> None:
    cases.check_qkv_rope(name, rows, dtype, "triton", "cuda")


@DTYPES
def test_write_kv(dtype: torch.dtype) -> None:
    cases.check_write_kv(dtype, "triton", "cuda")


@pytest.mark.parametrize("rows", [1, 31])
@pytest.mark.parametrize("name", cases.RULES)
def test_router(name: str, rows: int) -> None:
    cases.check_router(name, rows, "triton", "cuda")


def test_router_ties() -> None:
    cases.check_router_ties("triton", "cuda")


def test_thousand_replays_have_the_same_bits() -> None:
    given = {"dtype": torch.bfloat16, "device": "cuda"}
    x, weight = cases.values(9, 2048, **given), cases.values(1024, 2048, seed=1, **given)
    heads = cases.HEADS["qwen"]
    qkv, ones = cases.values(heads.width, 2048, seed=2, **given), torch.ones(heads.head_dim, **given)
    cos, sin = cases.tables(heads, "cuda")
    place = torch.arange(9, device="cuda")
    k_cache, v_cache = (torch.zeros(3, 4, 2, 16, **given) for _ in range(2))
    rule, experts = cases.RULES["mimo"]
    logits = cases.values(9, experts, dtype=torch.float32, device="cuda")

    def once() -> list[Tensor]:
        y = rms_norm(x, weight[0], 1e-6)
        q = qkv_rope(x, qkv, None, cos, sin, place, place, k_cache, v_cache, heads, q_norm=ones, k_norm=ones)
        assert isinstance(y, Tensor)
        return [y, linear(x, weight), q, k_cache, v_cache, *route(logits, rule, None)]

    for _ in range(3):
        once()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = once()
    graph.replay()
    torch.cuda.synchronize()
    first = [t.clone() for t in outputs]
    same = torch.ones((), dtype=torch.bool, device="cuda")
    for _ in range(1000):
        graph.replay()
        for one, other in zip(first, outputs, strict=True):
            same &= (one == other).all()
    assert bool(same)
