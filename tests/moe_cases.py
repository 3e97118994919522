"""Cases of kernels.moe_mxfp4 shared by the CPU tests (torch definition, Triton interpreter) and the GPU tests.

Errors are held against float64 of the decoded weights. The bounds have no free constant: BF16 rounds a stage's result
by at most 2^-8 of it, and a sum of n products in FP32, in any order, is off by at most n * 2^-24 of the sum of their
magnitudes (twice that is allowed: tensor cores truncate where they align addends).

Legend: E experts, I intermediate size, H hidden size, T tokens, k slots.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

import kernels.moe_mxfp4 as ops
from core import mxfp4
from core.mxfp4 import Packed
from kernels.moe_mxfp4 import Activation, ExpertWeights

BF16_HALF_ULP = 2.0**-8
FP32_ULP = 2.0**-23
ACTIVATIONS = {"silu": Activation("silu"), "clamped": Activation("clamped", alpha=1.702, limit=7.0)}


@dataclass(frozen=True)
class Case:
    """One layer and how many tokens go through it."""

    experts: int
    intermediate: int
    hidden: int
    tokens: int
    slots: int
    kind: str = "silu"
    bias: bool = False


# K below, at and above one step of 256; odd multiples of 32; T = 0, 1, 31, 33; one expert; one slot.
CASES = (
    Case(5, 32, 32, 0, 2),
    Case(5, 32, 96, 1, 2),
    Case(1, 96, 32, 31, 1, "clamped", bias=True),
    Case(7, 96, 288, 33, 3, "clamped", bias=True),
    Case(4, 256, 512, 3, 2, bias=True),
    Case(6, 288, 160, 31, 1),
)


def make_weights(case: Case, seed: int = 0) -> ExpertWeights:
    generator = torch.Generator().manual_seed(seed)

    def packed(*shape: int) -> Packed:
        return mxfp4.encode(torch.randn(*shape, generator=generator) * shape[-1] ** -0.5)

    def bias(*shape: int) -> Tensor | None:
        return torch.randn(*shape, generator=generator).to(torch.bfloat16) if case.bias else None

    e, i, h = case.experts, case.intermediate, case.hidden
    return ExpertWeights(packed(e, 2 * i, h), packed(e, h, i), bias(e, 2 * i), bias(e, h))


def make_tokens(case: Case, dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """x, chosen and weight; about a tenth of the ids is negative, and ids repeat within a token."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(case.tokens, case.hidden, generator=generator).to(dtype) * 3
    chosen = torch.randint(0, case.experts, (case.tokens, case.slots), generator=generator)
    absent = torch.rand(chosen.shape, generator=generator) < 0.1
    return x, chosen.masked_fill(absent, -1), torch.rand(chosen.shape, generator=generator)


def move(weights: ExpertWeights, device: str) -> ExpertWeights:
    def packed(p: Packed) -> Packed:
        return Packed(p.codes.to(device), p.scales.to(device))

    bias = (b if b is None else b.to(device) for b in (weights.gate_up_bias, weights.down_bias))
    return ExpertWeights(packed(weights.gate_up), packed(weights.down), *bias)


def exact(packed: Packed, chosen: Tensor) -> Tensor:
    """float64 matrices [T, k, rows, K] of the chosen experts (expert 0 for negative ids)."""
    decoded = [mxfp4.decode(Packed(c, s), torch.float32) for c, s in zip(packed.codes, packed.scales, strict=True)]
    return torch.stack(decoded).double()[chosen.clamp(min=0)]


def exact_bias(bias: Tensor | None, chosen: Tensor, width: int) -> Tensor:
    if bias is None:
        return torch.zeros(*chosen.shape, width, dtype=torch.float64)
    return bias.double()[chosen.clamp(min=0)]


def gate_up_bounds(x: Tensor, weights: ExpertWeights, chosen: Tensor, act: Activation) -> tuple[Tensor, Tensor]:
    """float64 h [T, k, I] and how far a right implementation may be from it."""
    matrix = exact(weights.gate_up, chosen)
    bias = exact_bias(weights.gate_up_bias, chosen, 2 * weights.intermediate)
    value = torch.einsum("tskh,th->tsk", matrix, x.double()) + bias
    size = torch.einsum("tskh,th->tsk", matrix.abs(), x.double().abs()) + bias.abs()
    (gate, up), (gate_error, up_error) = value.chunk(2, -1), (size * weights.hidden * FP32_ULP).chunk(2, -1)
    alpha = 1.0
    if act.kind == "clamped":
        gate, up, alpha = gate.clamp(max=act.limit), up.clamp(-act.limit, act.limit) + 1, act.alpha
    sigmoid = torch.sigmoid(alpha * gate)
    h = gate * sigmoid * up
    # Taylor of gate * sigmoid(alpha * gate), whose second derivative is below 1; 2^-18 covers exponential and quotient.
    slope = (sigmoid + alpha * gate * sigmoid * (1 - sigmoid)).abs() + gate_error
    error = up.abs() * slope * gate_error + ((gate * sigmoid).abs() + gate_error) * up_error + h.abs() * 2.0**-18
    here = (chosen >= 0)[..., None]
    rounding = BF16_HALF_ULP if x.dtype == torch.bfloat16 else FP32_ULP
    return h * here, (error + rounding * (h.abs() + error) + 1e-30) * here


def down_bounds(h: Tensor, weights: ExpertWeights, chosen: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """float64 out [T, H] and how far a right implementation may be from it."""
    matrix, bias = exact(weights.down, chosen), exact_bias(weights.down_bias, chosen, weights.hidden)
    scale = weight.double().masked_fill(chosen < 0, 0)
    out = torch.einsum("tskh,tsh,ts->tk", matrix, h.double(), scale) + torch.einsum("tsk,ts->tk", bias, scale)
    size = torch.einsum("tskh,tsh,ts->tk", matrix.abs(), h.double().abs(), scale)
    size += torch.einsum("tsk,ts->tk", bias.abs(), scale)
    error = size * (weights.intermediate + chosen.shape[1] + 2) * FP32_ULP
    rounding = BF16_HALF_ULP if h.dtype == torch.bfloat16 else FP32_ULP
    return out, error + rounding * (out.abs() + error) + 1e-30


def assert_right(case: Case, device: str, backend: str, dtype: torch.dtype = torch.bfloat16) -> None:
    """Both halves within their bounds (negative slots: exact zeros), and the whole equal to the halves bit for bit."""
    weights, act = make_weights(case), ACTIVATIONS[case.kind]
    x, chosen, weight = make_tokens(case, dtype)
    there, inputs = move(weights, device), [t.to(device) for t in (x, chosen, weight)]
    h = ops.gate_up(inputs[0], there, inputs[1], act, backend=backend)
    assert h.shape == (case.tokens, case.slots, case.intermediate) and h.dtype == dtype
    expected, bound = gate_up_bounds(x, weights, chosen, act)
    assert ((h.cpu().double() - expected).abs() <= bound).all()
    out = ops.down(h, there, inputs[1], inputs[2], backend=backend)
    assert out.shape == x.shape and out.dtype == dtype
    expected, bound = down_bounds(h.cpu(), weights, chosen, weight)
    assert ((out.cpu().double() - expected).abs() <= bound).all()
    assert torch.equal(ops.experts(inputs[0], there, inputs[1], inputs[2], act, backend=backend), out)


def every_scale(columns: int) -> ExpertWeights:
    """One expert, hidden 256, whose row r of down has scale byte r (0 from 253 on) and all 16 codes in every block."""
    code = torch.arange(256 * columns).reshape(256, columns) * 7 + torch.arange(256)[:, None]
    code = (code % 16).to(torch.uint8)
    byte = torch.arange(256).masked_fill(torch.arange(256) >= mxfp4.SCALE_OVERFLOW, 0).to(torch.uint8)
    down = Packed(code[:, ::2] | code[:, 1::2] << 4, byte[:, None].expand(256, columns // 32).contiguous())
    gate_up = mxfp4.encode(torch.zeros(2 * columns, 256))
    return ExpertWeights(*(Packed(p.codes[None], p.scales[None]) for p in (gate_up, down)))


def assert_every_scale_and_code(columns: int, device: str, backend: str) -> None:
    """h = rows of the identity: out must be core.mxfp4's decoded columns exactly, every scale byte with every code."""
    weights = every_scale(columns)
    h = torch.eye(columns, dtype=torch.bfloat16)[:, None].to(device)
    chosen, weight = torch.zeros(columns, 1, dtype=torch.int64), torch.ones(columns, 1)
    out = ops.down(h, move(weights, device), chosen.to(device), weight.to(device), backend=backend)
    expected = mxfp4.decode(Packed(weights.down.codes[0], weights.down.scales[0]))
    assert torch.equal(out.cpu().T, expected)


def assert_same_bits_in_any_company(device: str, tiles: "list[object]", *, tokens: int = 33) -> None:
    """A token alone, in every tile, and among others in any order: the same bits (kernel only)."""
    from kernels.moe_mxfp4 import kernel

    case = Case(3, 96, 288, tokens, 2, "clamped", bias=True)
    weights, act = move(make_weights(case), device), ACTIVATIONS[case.kind]
    x, chosen, weight = (t.to(device) for t in make_tokens(case))
    whole = kernel.experts(x, weights, chosen, weight, act, tiles[0])
    for tile in tiles[1:]:
        assert torch.equal(kernel.experts(x, weights, chosen, weight, act, tile), whole)
    for some in ([0], [5, 1], list(range(tokens - 1, -1, -1)), [7] * 3):
        part = kernel.experts(x[some], weights, chosen[some], weight[some], act)
        assert torch.equal(part, whole[some])
    noisy = x.clone()
    noisy[1:] = float("nan")  # whatever the companions hold
    assert torch.equal(kernel.experts(noisy, weights, chosen, weight, act)[0], whole[0])


def assert_routing(device: str) -> None:
    """`prepare` and `sort_pairs` make the same items, and every pair with an expert stands in exactly one."""
    from kernels.moe_mxfp4.prepare import ROUTED, prepare
    from kernels.moe_mxfp4.routing import most_items, sort_pairs

    generator = torch.Generator().manual_seed(3)
    for experts, tokens, slots, tile in ((1, 1, 1, 8), (5, 3, 2, 8), (4, 33, 2, 8), (300, 9, 8, 8), (6, 31, 3, 16)):
        for kind in ("random", "one expert", "nobody"):
            chosen = torch.randint(-1, experts, (tokens, slots), generator=generator)
            chosen = {"random": chosen, "one expert": chosen * 0 + experts - 1, "nobody": chosen * 0 - 3}[kind]
            assert chosen.numel() <= ROUTED
            x = torch.zeros(tokens, 32, dtype=torch.bfloat16, device=device)
            found = []
            for table in (
                prepare(x, chosen.to(device), experts, tile)[1],
                sort_pairs(chosen.to(device), experts, tile),
            ):
                assert len(table.expert) == most_items(chosen.numel(), experts, tile)
                order = table.order.tolist()
                items = torch.stack((table.expert, table.first, table.count), dim=1).tolist()
                found.append(sorted((e, *order[first : first + count]) for e, first, count in items if e >= 0))
            assert found[0] == found[1]
            placed = sorted((pair, e) for e, *pairs in found[0] for pair in pairs)
            assert placed == [(p, e) for p, e in enumerate(chosen.flatten().tolist()) if e >= 0]
            assert all(1 <= len(item) - 1 <= tile for item in found[0])
