"""kernels.paged_attention compiled: the assertions that the interpreter passes, and what only a GPU can show."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.paged_attention import Batch, paged_attention
from tests import paged_attention_cases as cases
from tests.paged_attention_cases import Layer, Request

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

# Real proportions: a rank of eight of MiMo-V2.5-Pro, full and window; gpt-oss; Qwen3-MoE; the drafter's block.
SHAPES = {
    "mimo full": Layer(heads=16, kv_heads=1, head_dim=192, value_dim=128, page=64),
    "mimo window": Layer(heads=16, kv_heads=1, head_dim=192, value_dim=128, page=64, window=128, sinks=True),
    "gpt-oss": Layer(heads=64, kv_heads=8, head_dim=64, value_dim=64, page=32, sinks=True),
    "qwen3": Layer(heads=32, kv_heads=4, head_dim=128, value_dim=128, page=64),
    "block": Layer(heads=16, kv_heads=2, head_dim=128, value_dim=128, page=16, causal=False, window=1024),
    "256": Layer(heads=8, kv_heads=2, head_dim=256, value_dim=256, page=32),
}


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("layer", cases.LAYERS.values(), ids=cases.LAYERS)
def test_against_float64(layer: Layer, backend: str) -> None:
    """Everything a step must not read is NaN."""
    cases.assert_matches_formula(layer, cases.MIXED, backend=backend, device="cuda", free_rows=2)


@pytest.mark.parametrize("layer", SHAPES.values(), ids=SHAPES)
def test_real_shapes_against_float64(layer: Layer) -> None:
    """Split, and a batch of both kinds: split beside a folded chunk of prefill."""
    small = replace(layer, heads=2 * layer.kv_heads)
    cases.assert_matches_formula(layer, [Request(1500, 8, 1)], backend="triton", device="cuda")
    cases.assert_matches_formula(small, [Request(700, 1, 2), Request(300, 200, 3)], backend="triton", device="cuda")


@pytest.mark.parametrize("length", [1, 31, 33])
def test_odd_lengths(length: int) -> None:
    for layer in (Layer(), Layer(window=7, page=8), Layer(causal=False, sinks=True)):
        for queries in {1, min(length, 3), length}:
            cases.assert_matches_formula(layer, [Request(length, queries, 3)], backend="triton", device="cuda")


@pytest.mark.parametrize("length", [620, 40_000])
@pytest.mark.parametrize("layer", cases.INVARIANT.values(), ids=cases.INVARIANT)
def test_bits_of_a_query_are_its_own(layer: Layer, length: int) -> None:
    cases.assert_bits_of_a_query_are_its_own(layer, length, "triton", "cuda")


@pytest.mark.parametrize("layer", SHAPES.values(), ids=SHAPES)
def test_bits_of_a_query_are_its_own_in_real_shapes(layer: Layer) -> None:
    cases.assert_bits_of_a_query_are_its_own(layer, 3001, "triton", "cuda")


class Captured:
    """One call as a graph whose tensors can be refilled: two requests of at most 8 queries and `longest` keys."""

    def __init__(self, layer: Layer, longest: int) -> None:
        self.layer, self.width = layer, -(-longest // layer.page)
        shape = (2 * self.width + 1, layer.page, layer.kv_heads)
        self.k, self.v = (
            torch.randn(*shape, width, device="cuda").to(layer.dtype) for width in (layer.head_dim, layer.value_dim)
        )
        self.q = torch.randn(16, layer.heads, layer.head_dim, device="cuda").to(layer.dtype)
        sinks = cases.sink_logits(layer)
        self.sinks = None if sinks is None else sinks.cuda()
        table, length = torch.zeros(2, self.width, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
        start = torch.zeros(3, dtype=torch.int32)
        self.batch = Batch(table.cuda(), length.cuda(), start.cuda(), longest_query=8, longest_key=longest)
        self.set([longest, 9], [8, 1])
        self.call()  # compile first
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.out = self.call()

    def set(self, lengths: list[int], queries: list[int]) -> None:
        """Another step: lengths and numbers of queries, on other pages."""
        order = torch.randperm(2 * self.width + 1)[: 2 * self.width].view(2, -1)
        self.batch.page_table.copy_(order)
        self.batch.length.copy_(torch.tensor(lengths))
        self.batch.start.copy_(torch.tensor([0, queries[0], sum(queries)]))

    def call(self, backend: str = "triton") -> Tensor:
        layer = self.layer
        return paged_attention(
            self.q, self.k, self.v, self.batch, scale=layer.scale, window=layer.window, sinks=self.sinks,
            causal=layer.causal, backend=backend,
        )  # fmt: skip


@pytest.mark.parametrize("layer", SHAPES.values(), ids=SHAPES)
def test_one_graph_serves_every_step_and_1000_replays_are_equal(layer: Layer) -> None:
    captured = Captured(layer, 9000)
    for lengths, queries in (([9000, 9], [8, 1]), ([4097, 8999], [1, 8]), ([8, 0], [8, 0]), ([8191, 300], [3, 7])):
        captured.set(lengths, queries)
        captured.graph.replay()
        wanted = captured.call("reference")
        assert (captured.out.double() - wanted.double()).norm() < 2.0**-8 * wanted.double().norm()
        assert not captured.out[sum(queries) :].any()
    first = captured.out.clone()
    differs = torch.zeros((), dtype=torch.bool, device="cuda")
    for _ in range(1000):
        captured.graph.replay()
        differs |= (captured.out != first).any()
    assert not differs.item()


def test_no_host_synchronisation() -> None:
    captured = Captured(SHAPES["mimo full"], 2000)
    torch.cuda.set_sync_debug_mode("error")
    try:
        captured.call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
