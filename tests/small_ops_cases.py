"""Assertions about kernels.rms_norm, kernels.linear, kernels.qkv_rope and kernels.router, for any device."""

from typing import Any

import torch
from torch import Tensor

from kernels.linear import linear
from kernels.qkv_rope import Heads, qkv_rope, write_kv
from kernels.rms_norm import rms_norm
from kernels.router import Rule, route

ROWS = (1, 3, 31, 33)
DTYPES = (torch.bfloat16, torch.float32)
HEADS = {
    "mimo": Heads(4, 2, 24, 16, 8, 0.707),
    "qwen": Heads(6, 2, 16, 16, 16),
    "context": Heads(0, 2, 16, 16, 8, 0.612),
    "odd": Heads(3, 1, 20, 12, 20),
}
RULES = {
    "mimo": (Rule("sigmoid_bias", 3, scaling=2.5), 20),
    "groups": (Rule("sigmoid_bias", 4, groups=4, top_groups=2), 32),
    "plain sums": (Rule("sigmoid_bias", 2, normalise=False), 7),
    "qwen": (Rule("softmax_topk", 3), 24),
    "qwen, as they are": (Rule("softmax_topk", 3, normalise=False), 24),
    "gpt-oss": (Rule("topk_softmax", 4), 32),
    "all of few": (Rule("topk_softmax", 5), 5),
    "one": (Rule("softmax_topk", 1), 1),
    "odd": (Rule("sigmoid_bias", 7, scaling=2.5), 31),
    "odd groups": (Rule("sigmoid_bias", 5, groups=11, top_groups=3), 33),
}


def near(found: Tensor, wanted: Tensor, dtype: torch.dtype, roundings: int = 1) -> None:
    """Within what so many roundings of `dtype` explain; NaN never."""
    wanted = wanted.to(found.device)
    allowed = roundings * (2.0**-8 if dtype == torch.bfloat16 else 2e-6) * (wanted.abs() + wanted.abs().mean())
    assert ((found.double() - wanted).abs() <= allowed).all(), float((found.double() - wanted).abs().max())


def values(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def rows_alone(together: Tensor, alone: list[Tensor]) -> None:
    """A row's bits are its own."""
    for at, one in enumerate(alone):
        assert torch.equal(together[at], one[0]), f"row {at} depends on the others"


def check_rms_norm(rows: int, size: int, dtype: torch.dtype, backend: str, device: str) -> None:
    x, weight = values(rows, size, dtype=dtype, device=device), values(size, dtype=dtype, device=device, seed=1)
    residual = values(rows, size, dtype=dtype, device=device, seed=2)
    y, summed = rms_norm(x, weight, 1e-5, residual=residual, backend=backend)
    assert torch.equal(summed, x + residual)
    s = summed.double()
    inner = (s / (s.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()).to(dtype).double()
    near(y, inner * weight.double(), dtype)
    assert torch.equal(rms_norm(summed, weight, 1e-5, backend=backend), y)
    rows_alone(y, [rms_norm(summed[i : i + 1], weight, 1e-5, backend=backend) for i in range(rows)])


def check_linear(rows: int, sizes: tuple[int, int], dtype: torch.dtype, bias: bool, backend: str, device: str) -> None:
    inputs, outputs = sizes
    x, weight = (values(n, inputs, dtype=dtype, device=device, seed=n) for n in (rows, outputs))
    added = values(outputs, dtype=dtype, device=device, seed=5) if bias else None
    wanted = x.double() @ weight.double().T + (added.double() if added is not None else 0)
    found = linear(x, weight, added, backend=backend)
    assert found.dtype == dtype
    if dtype == torch.bfloat16:
        near(found, wanted, dtype)
    wide = linear(x, weight, added, out_dtype=torch.float32, backend=backend)
    assert wide.dtype == torch.float32
    assert ((wide.double() - wanted).abs() <= 1e-5 * (inputs**0.5 + wanted.abs())).all()
    rows_alone(
        wide, [linear(x[i : i + 1], weight, added, out_dtype=torch.float32, backend=backend) for i in range(rows)]
    )


def tables(heads: Heads, device: str) -> tuple[Tensor, Tensor]:
    angle = torch.arange(50)[:, None] * torch.rand(heads.rotary_dims // 2, generator=torch.Generator().manual_seed(9))
    return angle.cos().to(device), angle.sin().to(device)


def check_qkv_rope(name: str, rows: int, dtype: torch.dtype, backend: str, device: str) -> None:
    heads, norm = HEADS[name], name in ("qwen", "context")
    given: dict[str, Any] = {"dtype": dtype, "device": device}
    x, weight = values(rows, 32, **given), values(heads.width, 32, seed=1, **given) * 0.2
    bias = values(heads.width, seed=2, **given) if name == "odd" else None
    q_norm = values(heads.head_dim, seed=3, **given) if norm and heads.heads else None
    k_norm = values(heads.head_dim, seed=4, **given) if norm else None
    cos, sin = tables(heads, device)
    position = (torch.arange(rows, device=device) * 7) % 50
    slot = torch.randperm(48, generator=torch.Generator().manual_seed(1))[:rows].to(device)
    slot[rows // 2] = -1  # writes nothing

    def caches() -> tuple[Tensor, Tensor]:
        shape = (12, 4, heads.kv_heads)
        return torch.full((*shape, heads.head_dim), 7.0, **given), torch.full((*shape, heads.value_dim), 7.0, **given)

    def run(which: slice, k: Tensor, v: Tensor) -> Tensor:
        return qkv_rope(
            x[which], weight, bias, cos, sin, position[which].contiguous(), slot[which].contiguous(), k, v, heads,
            q_norm=q_norm, k_norm=k_norm, backend=backend,
        )  # fmt: skip

    k_cache, v_cache = caches()
    q = run(slice(None), k_cache, v_cache)
    assert q.shape == (rows, heads.heads, heads.head_dim)
    projected = linear(x, weight, bias, backend=backend).double()
    sizes = [heads.heads * heads.head_dim, heads.kv_heads * heads.head_dim, heads.kv_heads * heads.value_dim]
    dims = (heads.head_dim, heads.head_dim, heads.value_dim)
    parts = [p.unflatten(1, (-1, d)) for p, d in zip(projected.split(sizes, 1), dims, strict=True)]
    wanted_q, wanted_k = (
        rotated(normed(part, weight_), cos[position], sin[position], heads)
        for part, weight_ in ((parts[0], q_norm), (parts[1], k_norm))
    )
    near(q, wanted_q, dtype, 3)
    written = slot >= 0
    near(k_cache.flatten(0, 1)[slot[written]], wanted_k[written], dtype, 3)
    near(v_cache.flatten(0, 1)[slot[written]], parts[2][written] * heads.value_scale, dtype)
    untouched = torch.ones(48, dtype=torch.bool, device=device)
    untouched[slot[written]] = False
    assert (k_cache.flatten(0, 1)[untouched] == 7).all() and (v_cache.flatten(0, 1)[untouched] == 7).all()
    again_k, again_v = caches()
    rows_alone(q, [run(slice(i, i + 1), again_k, again_v) for i in range(rows)])
    assert torch.equal(again_k, k_cache) and torch.equal(again_v, v_cache)


def normed(x: Tensor, weight: Tensor | None) -> Tensor:
    """[T, H, D]; the rounding inside the norm is within the tolerance."""
    return x if weight is None else x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()


def rotated(x: Tensor, cos: Tensor, sin: Tensor, heads: Heads) -> Tensor:
    half = heads.rotary_dims // 2
    c, s = cos.double()[:, None], sin.double()[:, None]
    left, right = x[..., :half], x[..., half : 2 * half]
    return torch.cat((left * c - right * s, right * c + left * s, x[..., 2 * half :]), dim=-1)


def check_write_kv(dtype: torch.dtype, backend: str, device: str) -> None:
    k, v = values(5, 2, 6, dtype=dtype, device=device), values(5, 2, 3, dtype=dtype, device=device, seed=1)
    slot = torch.tensor([3, -1, 0, 7, 5], device=device)
    k_cache, v_cache = (
        torch.zeros(2, 4, 2, 6, dtype=dtype, device=device),
        torch.zeros(2, 4, 2, 3, dtype=dtype, device=device),
    )
    write_kv(k, v, slot, k_cache, v_cache, backend=backend)
    for place, row in ((3, 0), (0, 2), (7, 3), (5, 4)):
        assert torch.equal(k_cache.flatten(0, 1)[place], k[row]) and torch.equal(v_cache.flatten(0, 1)[place], v[row])
    assert not k_cache.flatten(0, 1)[[1, 2, 4, 6]].any() and not v_cache.flatten(0, 1)[[1, 2, 4, 6]].any()


def by_hand(logits: Tensor, rule: Rule, bias: Tensor | None) -> tuple[list[int], Tensor]:
    """One token, float64, written from the families' papers: experts in order and their weights."""
    row = logits.double()
    score = {"sigmoid_bias": row.sigmoid(), "softmax_topk": row.softmax(-1), "topk_softmax": row}[rule.kind]
    rank = score + bias.double() if bias is not None else score
    if rule.groups > 1:
        size = len(row) // rule.groups
        sums = [sum(sorted(rank[g * size : (g + 1) * size].tolist())[-2:]) for g in range(rule.groups)]
        best = sorted(range(rule.groups), key=lambda g: (-sums[g], g))[: rule.top_groups]
        rank = torch.tensor([r if i // size in best else float("-inf") for i, r in enumerate(rank.tolist())])
    order = sorted(range(len(row)), key=lambda i: (-float(rank[i]), i))[: rule.top_k]
    chosen = score[order]
    if rule.kind == "topk_softmax":
        chosen = chosen.softmax(-1)
    elif rule.normalise:
        chosen = chosen / (chosen.sum() + (1e-20 if rule.kind == "sigmoid_bias" else 0))
    return order, chosen * rule.scaling


def check_router(name: str, rows: int, backend: str, device: str) -> None:
    rule, experts = RULES[name]
    logits = values(rows, experts, dtype=torch.float32, device=device)
    bias = values(experts, dtype=torch.float32, device=device, seed=3) if rule.kind == "sigmoid_bias" else None
    chosen, weight = route(logits, rule, bias, backend=backend)
    assert chosen.dtype == torch.int32 and weight.dtype == torch.float32
    for row in range(rows):
        order, wanted = by_hand(logits[row].cpu(), rule, None if bias is None else bias.cpu())
        assert chosen[row].tolist() == order
        assert torch.allclose(weight[row].double().cpu(), wanted, rtol=2e-6, atol=1e-9)
    alone = [route(logits[i : i + 1], rule, bias, backend=backend) for i in range(rows)]
    rows_alone(weight, [w for _, w in alone])
    rows_alone(chosen, [c for c, _ in alone])


def check_router_ties(backend: str, device: str) -> None:
    """Equal ranks: the lower index first, also among -0 and 0; NaN last."""
    for rule in (Rule("softmax_topk", 3), Rule("topk_softmax", 3), Rule("sigmoid_bias", 3)):
        logits = torch.tensor([[0.0, -0.0, 1.0, 1.0, float("nan"), 1.0]], device=device)
        chosen, _ = route(logits, rule, None, backend=backend)
        assert chosen.tolist() == [[2, 3, 5]]
    logits = torch.tensor([[float("nan"), float("-inf"), 0.0, float("nan"), float("-inf")]], device=device)
    assert route(logits, Rule("softmax_topk", 5), None, backend=backend)[0].tolist() == [[2, 1, 4, 0, 3]]
