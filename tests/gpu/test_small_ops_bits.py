"""kernels.rms_norm, linear, qkv_rope and router in the sizes of real layers: equal bits in any company and replay."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.linear import linear, reference
from kernels.qkv_rope import Heads, qkv_rope, write_kv
from kernels.rms_norm import rms_norm
from kernels.router import Rule, route
from tests.small_ops_cases import values

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

COUNTS = (1, 8, 16, 17, 32, 33, 64, 65, 200)  # of rows: one for every tile, its edges, and a prefill
HEADS = Heads(16, 1, 192, 128, 64, 0.707)  # a rank of eight of MiMo-V2.5-Pro
HIDDEN, EXPERTS, LENGTH, SLOTS = 6144, 384, 4096, 256
NAMES = ("rms_norm", "linear", "linear, FP32", "qkv_rope", "write_kv", "router")
Work = dict[str, Callable[[Tensor], list[Tensor]]]


def brain(*shape: int, seed: int) -> Tensor:
    return values(*shape, dtype=torch.bfloat16, device="cuda", seed=seed)


def operations() -> Work:
    """By name: what x [T, HIDDEN] becomes, with row t of every result belonging to row t of x."""
    norm, gate = brain(HIDDEN, seed=1), brain(EXPERTS, HIDDEN, seed=2) / HIDDEN**0.5
    weight, head = brain(HEADS.width, HIDDEN, seed=3) / HIDDEN**0.5, brain(17000, HIDDEN, seed=4) / HIDDEN**0.5
    bias, q_norm, k_norm = brain(HEADS.width, seed=5), brain(192, seed=6), brain(192, seed=7)
    angle = torch.arange(LENGTH, device="cuda")[:, None] * torch.linspace(0.01, 1, 32, device="cuda")
    cos, sin, place = angle.cos(), angle.sin(), torch.arange(SLOTS, device="cuda") * 13
    rule, correction = Rule("sigmoid_bias", 8, scaling=2.5), values(EXPERTS, dtype=torch.float32, device="cuda")
    grouped = Rule("sigmoid_bias", 8, groups=8, top_groups=4)

    def caches() -> list[Tensor]:
        return [torch.zeros(SLOTS // 32, 32, 1, size, dtype=torch.bfloat16, device="cuda") for size in (192, 128)]

    def project(x: Tensor) -> list[Tensor]:
        k, v = caches()
        at = torch.arange(len(x), device="cuda")
        q = qkv_rope(x, weight, bias, cos, sin, place[: len(x)], at, k, v, HEADS, q_norm=q_norm, k_norm=k_norm)
        return [q, k.flatten(0, 1)[: len(x)], v.flatten(0, 1)[: len(x)]]

    def copy(x: Tensor) -> list[Tensor]:
        k, v = caches()
        write_kv(x[:, None, :192], x[:, None, 192:320], torch.arange(len(x), device="cuda"), k, v)
        return [k.flatten(0, 1)[: len(x)], v.flatten(0, 1)[: len(x)]]

    def routed(x: Tensor) -> list[Tensor]:
        logits = linear(x, gate, out_dtype=torch.float32)
        return [logits, *route(logits, rule, correction), *route(logits, grouped, correction)]

    return {
        "rms_norm": lambda x: list(rms_norm(x, norm, 1e-5, residual=x.flip(1))),
        "linear": lambda x: [linear(x, weight, bias), linear(x, head, out_dtype=torch.float32)],
        "linear, FP32": lambda x: [linear(x.float(), gate.float())],
        "qkv_rope": project,
        "write_kv": copy,
        "router": routed,
    }


@pytest.fixture(scope="module")
def work() -> Work:
    return operations()


@pytest.mark.parametrize("name", NAMES)
def test_few_rows_have_the_bits_of_many(name: str, work: Work) -> None:
    """Also rows from the end, which thereby change their place in a tile (and their position, so not in qkv_rope)."""
    x = brain(max(COUNTS), HIDDEN, seed=9)
    whole = work[name](x)
    for count in COUNTS:
        for part in (slice(None, count), slice(-count, None)) if name != "qkv_rope" else (slice(None, count),):
            for found, wanted in zip(work[name](x[part]), whole, strict=True):
                assert torch.equal(found, wanted[part]), (count, part)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [1, 8, 33, 200])
def test_1000_replays_have_the_same_bits(name: str, rows: int, work: Work) -> None:
    """One graph that takes new rows, too: it must give what a plain call gives."""
    x = brain(rows, HIDDEN, seed=10)
    for _ in range(2):
        work[name](x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = work[name](x)
    x.copy_(brain(rows, HIDDEN, seed=11))
    graph.replay()
    first = work[name](x)
    differs = torch.zeros((), dtype=torch.bool, device="cuda")
    for _ in range(1000):
        graph.replay()
        for one, other in zip(out, first, strict=True):
            differs |= (one != other).any()
    assert not differs.item()


def test_every_tile_of_a_linear_layer_gives_the_same_bits() -> None:
    from kernels.linear.kernel import PREFILL, TILES, Tile
    from kernels.linear.kernel import linear as tiled

    x, weight, bias = brain(70, 2880, seed=1), brain(520, 2880, seed=2), brain(520, seed=3)
    wanted = reference.linear(x.cpu(), weight.cpu(), bias.cpu(), torch.float32).double()
    first = tiled(x, weight, bias, torch.float32)
    assert float((first.double().cpu() - wanted).norm() / wanted.norm()) < 2.0**-15  # tensor cores truncate sums
    for tile in (*(tile for *_, tile in TILES), PREFILL, Tile(16, 64, 2), Tile(32, 16, 1)):
        assert torch.equal(tiled(x, weight, bias, torch.float32, tile), first), tile


def test_rows_at_an_odd_address_have_the_same_bits(work: Work) -> None:
    x = brain(5, HIDDEN, seed=12)
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype, device="cuda")[1:].view_as(x).copy_(x)
    for name in ("rms_norm", "linear", "qkv_rope", "router"):
        for one, other in zip(work[name](x), work[name](shifted), strict=True):
            assert torch.equal(one, other), name


def test_no_host_synchronisation(work: Work) -> None:
    x = brain(8, HIDDEN, seed=13)
    for name in NAMES:
        work[name](x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for name in NAMES:
            work[name](x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
