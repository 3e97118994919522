"""Cases of kernels.paged_attention, for the interpreter and the GPU alike.

A request's keys, values and queries depend on its own number, positions included, so the same request can be put into
different batches. Whatever a step may not read is NaN: pages of nobody, keys out of every window, keys behind the end.

Legend: C queries, S keys, H heads, D head dim, V value dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.paged_attention import Batch, paged_attention


@dataclass(frozen=True)
class Layer:
    heads: int = 4
    kv_heads: int = 1
    head_dim: int = 16
    value_dim: int = 16
    page: int = 16
    window: int | None = None
    sinks: bool = False
    causal: bool = True
    dtype: torch.dtype = torch.bfloat16

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


@dataclass(frozen=True)
class Request:
    """`queries` last positions of the first `length` tokens of text number `seed`, which has `text` tokens."""

    length: int
    queries: int
    seed: int = 0
    text: int = 0  # 0: as many as length


def content(layer: Layer, request: Request) -> tuple[Tensor, Tensor, Tensor]:
    """q [C, H, D] of the last positions, k [S, KH, D] and v [S, KH, V] of all."""
    made = []
    for number, (heads, width) in enumerate(
        ((layer.heads, layer.head_dim), (layer.kv_heads, layer.head_dim), (layer.kv_heads, layer.value_dim))
    ):
        generator = torch.Generator().manual_seed(3 * request.seed + number)
        made.append(torch.randn(request.text or request.length, heads, width, generator=generator).to(layer.dtype))
    q, k, v = (x[: request.length] for x in made)
    return q[request.length - request.queries :], k, v


def sink_logits(layer: Layer) -> Tensor | None:
    return torch.randn(layer.heads, generator=torch.Generator().manual_seed(99)) if layer.sinks else None


def first_seen(layer: Layer, request: Request) -> int:
    return 0 if layer.window is None else max(0, request.length - request.queries - layer.window + 1)


def run(
    layer: Layer,
    requests: list[Request],
    *,
    backend: str,
    device: str = "cpu",
    shuffle: int = 0,
    free_rows: int = 0,
    loose: int = 0,
) -> list[Tensor]:
    """Outputs [C, H, V] of each request, on the CPU. `loose` widens the host's bounds, `free_rows` belong to nobody."""
    width = max([1, *(-(-r.length // layer.page) for r in requests)])
    pages = len(requests) * width + 3
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(shuffle))
    table = order[: len(requests) * width].reshape(len(requests), width).to(torch.int32)
    k_cache = torch.full((pages, layer.page, layer.kv_heads, layer.head_dim), torch.nan, dtype=layer.dtype)
    v_cache = torch.full((pages, layer.page, layer.kv_heads, layer.value_dim), torch.nan, dtype=layer.dtype)
    queries = []
    for row, request in enumerate(requests):
        q, k, v = content(layer, request)
        queries.append(q)
        key = torch.arange(first_seen(layer, request), request.length)
        place = table[row, key // layer.page].long(), key % layer.page
        k_cache[place], v_cache[place] = k[key], v[key]
    free = torch.full((free_rows, layer.heads, layer.head_dim), torch.nan, dtype=layer.dtype)
    start = torch.tensor([0] + [r.queries for r in requests]).cumsum(0).to(torch.int32)
    length = torch.tensor([r.length for r in requests], dtype=torch.int32)
    batch = Batch(
        table.to(device),
        length.to(device),
        start.to(device),
        longest_query=max(r.queries for r in requests) + loose,
        longest_key=max(r.length for r in requests) + loose,
    )
    sinks = sink_logits(layer)
    out = paged_attention(
        torch.cat((*queries, free)).to(device),
        k_cache.to(device),
        v_cache.to(device),
        batch,
        scale=layer.scale,
        window=layer.window,
        sinks=None if sinks is None else sinks.to(device),
        causal=layer.causal,
        backend=backend,
    ).cpu()
    assert out.dtype == layer.dtype
    assert torch.equal(out[int(start[-1]) :], torch.zeros(free_rows, layer.heads, layer.value_dim, dtype=layer.dtype))
    return list(out[: int(start[-1])].split([r.queries for r in requests]))


def exact(layer: Layer, request: Request) -> tuple[Tensor, Tensor]:
    """The formula in float64, one query and head at a time: the output, and sum of weight * |value|, [C, H, V]."""
    q, k, v = (x.double() for x in content(layer, request))
    out, size = (torch.zeros(request.queries, layer.heads, layer.value_dim, dtype=torch.float64) for _ in range(2))
    sinks, group = sink_logits(layer), layer.heads // layer.kv_heads
    for c in range(request.queries):
        place = request.length - request.queries + c
        low = 0 if layer.window is None else max(0, place - layer.window + 1)
        high = place + 1 if layer.causal else request.length
        for h in range(layer.heads):
            weight = (k[low:high, h // group] @ q[c, h] * layer.scale).exp()
            total = weight.sum() + (0 if sinks is None else sinks[h].double().exp())
            out[c, h] = weight @ v[low:high, h // group] / total
            size[c, h] = weight @ v[low:high, h // group].abs() / total
    return out, size


def assert_close(layer: Layer, request: Request, got: Tensor) -> None:
    """Within what rounding allows: weights once in numerator and denominator, the output once; FP32 sums besides."""
    out, size = exact(layer, request)
    unit = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 0.0}[layer.dtype]
    bound = unit * (2 * out.abs() + size) + 3e-6 * size + 1e-7
    assert got.shape == out.shape
    worst = ((got.double() - out).abs() / bound).max().item() if got.numel() else 0.0
    assert worst <= 1, f"{layer} {request}: error is {worst:.2f} of what rounding allows"


def assert_matches_formula(layer: Layer, requests: list[Request], **how: object) -> None:
    for request, got in zip(requests, run(layer, requests, **how), strict=True):
        assert_close(layer, request, got)


MIXED = [Request(513, 1, 1), Request(33, 8, 2), Request(0, 0, 3), Request(31, 31, 4), Request(1, 1, 5)]
"""Decoding, verification, an empty slot, a whole prompt, a first token: in one launch."""

LAYERS = {
    "gqa 4": Layer(),
    "one to one, page 32": Layer(heads=2, kv_heads=2, page=32),
    "192/128": Layer(heads=2, head_dim=192, value_dim=128, page=32),
    "80": Layer(heads=2, head_dim=80, value_dim=80),
    "96/64": Layer(heads=2, head_dim=96, value_dim=64),
    "24/40, groups of 3": Layer(heads=6, kv_heads=2, head_dim=24, value_dim=40),
    "sinks": Layer(sinks=True),
    "window 5": Layer(window=5, page=32),
    "window 40, sinks": Layer(window=40, sinks=True),
    "window 300": Layer(window=300),
    "block": Layer(causal=False),
    "block, window 20": Layer(causal=False, window=20),
    "pages of 64": Layer(page=64, heads=2),
    "pages of 4": Layer(page=4, heads=2),
    "float32": Layer(dtype=torch.float32),
    "float16": Layer(dtype=torch.float16, sinks=True),
}

INVARIANT = {
    "plain": Layer(heads=4, head_dim=24, value_dim=40),
    "sinks, window": Layer(heads=4, window=290, sinks=True),
    "near window": Layer(heads=2, window=20, page=32),
    "groups of 5": Layer(heads=5),
}


def assert_bits_of_a_query_are_its_own(layer: Layer, length: int, backend: str, device: str) -> None:
    """The last positions of a text of `length` > 40 tokens: decoded, verified, in chunks of prefill, in company."""
    how = {"backend": backend, "device": device}
    first = length - 40
    expected = run(layer, [Request(length, 40, 7)], **how)[0]  # more than FEW queries: folded

    def request(queries: int, back: int = 0) -> Request:
        """The step that had `queries` queries, the last of them `back` before the text's end."""
        return Request(length - back, queries, 7, text=length)

    def check(name: str, requests: list[Request], **more: int) -> None:
        step, got = requests[-1], run(layer, requests, **how, **more)[-1]
        want = expected[step.length - step.queries - first : step.length - first]
        assert torch.equal(got.view(torch.int16), want.view(torch.int16)), f"{name}: bits differ"

    for queries, back in ((1, 0), (1, 3), (8, 0), (8, 5), (31, 0), (33, 2)):
        if layer.causal or not back:
            check(f"{queries} queries, {back} earlier", [request(queries, back)])
    check("loose bounds", [request(1)], loose=200)
    check("other pages, rows of nobody", [request(1)], shuffle=5, free_rows=3)
    check("beside others", [Request(9, 9, 2), Request(70, 5, 1), request(8)])
    check("beside a prefill", [Request(90, 50, 1), request(8)])
    check("beside a longer text", [Request(2 * length, 1, 1), request(8)])
    check("in many slots, folded", [*[Request(0, 0)] * 128, request(8)])
