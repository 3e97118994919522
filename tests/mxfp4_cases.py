"""MXFP4 cases shared by the CPU tests (torch definition, Triton interpreter) and the GPU tests."""

import json
from pathlib import Path

import torch
from torch import Tensor

import kernels.mxfp4_snap as ops
from core import mxfp4
from core.mxfp4 import BLOCK, ScaleRule

RULES = list(ScaleRule)
INT = {torch.bfloat16: torch.int16, torch.float32: torch.int32}

# BF16 bits of block maxima: smallest subnormal, subnormals, the edges of scale byte 0 and 1, every rule's switching
# points at an everyday exponent, and the top of the range (0x7F5F is the largest that EVEN and RCEIL can snap).
AMAX_BITS = (
    0x0001, 0x0040, 0x007F, 0x0080, 0x00E0, 0x00FF, 0x0100, 0x0160, 0x01C0, 0x0200, 0x0280,
    0x3F80, 0x3FC0, 0x3FC1, 0x3FDF, 0x3FE0, 0x3FFF, 0x40C0, 0x7200, 0x7F00, 0x7F40, 0x7F41, 0x7F5F,
)  # fmt: skip


def golden_cases() -> list[dict]:
    path = Path(__file__).parent / "golden" / "mxfp4.json"
    return json.loads(path.read_text())["cases"]


def from_bits(bits: list[int] | Tensor) -> Tensor:
    """BF16 tensor of 16-bit patterns."""
    return torch.as_tensor(bits, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality that tells -0 from 0 (and never excuses a NaN)."""
    return a.dtype == b.dtype and torch.equal(a.view(INT[a.dtype]), b.view(INT[b.dtype]))


def every_pattern(amax_bits: int) -> Tensor:
    """[N, 32] BF16: all 2 * (amax_bits + 1) finite patterns of magnitude <= amax, amax itself once in every block."""
    magnitude = torch.arange(amax_bits + 1)
    patterns = torch.cat((magnitude, magnitude + 0x8000))
    generator = torch.Generator().manual_seed(amax_bits)
    patterns = patterns[torch.randperm(len(patterns), generator=generator)]
    rows = -(-len(patterns) // (BLOCK - 1))
    block = torch.full((rows * (BLOCK - 1),), amax_bits)
    block[: len(patterns)] = patterns
    sign = 0x8000 * (torch.arange(rows) % 2)
    return from_bits(torch.cat((block.view(rows, -1), (amax_bits + sign)[:, None]), dim=1))


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


def assert_all_equal_core(weight: Tensor, rule: ScaleRule, device: str, backend: str) -> None:
    """snap_, snap_from, encode and decode give core.mxfp4's bytes for `weight` (all blocks can be snapped)."""
    expected = mxfp4.encode(weight, rule)
    values = mxfp4.decode(expected, weight.dtype)
    moved = weight.to(device)
    packed = ops.encode(moved, rule, backend=backend)
    assert torch.equal(packed.codes.cpu(), expected.codes)
    assert torch.equal(packed.scales.cpu(), expected.scales)
    assert same_bits(ops.decode(packed, weight.dtype, backend=backend).cpu(), values)
    out = torch.empty_like(moved, dtype=torch.bfloat16)
    assert same_bits(ops.snap_from(moved, out, rule, backend=backend).cpu(), values.to(torch.bfloat16))
    result = ops.snap_(moved, rule, backend=backend)
    assert result is moved
    assert same_bits(moved.cpu(), values)


def assert_golden(rule: ScaleRule, device: str, backend: str) -> None:
    cases = golden_cases()
    weight = from_bits([case["bf16_bits"] for case in cases])
    packed = ops.encode(weight.to(device), rule, backend=backend)
    for case, codes, scale in zip(cases, packed.codes.tolist(), packed.scales.flatten().tolist(), strict=True):
        assert (case["name"], codes, scale) == (case["name"], case[rule.value]["packed"], case[rule.value]["scale"])


def assert_flag_protocol(device: str, backend: str) -> None:
    """One flag over several tensors: bad blocks stay as they were, all others are snapped, nothing raises inside."""
    for bad in (float("nan"), float("inf"), float("-inf"), 3.3e38):
        for dtype in (torch.bfloat16, torch.float32):
            flag = ops.new_flag(device)
            clean = gaussian(3, 64, dtype=dtype).to(device)
            dirty = gaussian(5, 64, seed=1, dtype=dtype).to(device)
            dirty[3, 40] = bad
            before = dirty.clone()
            ops.snap_(clean, flag=flag, backend=backend)
            assert flag.item() == 0
            ops.snap_(dirty, flag=flag, backend=backend)
            ops.snap_(clean, flag=flag, backend=backend)
            assert flag.item() == 1, "a later clean tensor must not clear the flag"
            assert same_bits(dirty[3, 32:], before[3, 32:])
            before[3, 32:] = dirty[3, 32:] = 0
            assert same_bits(dirty, mxfp4.snap(before))


def assert_packed_flags(device: str, backend: str) -> None:
    """encode turns a bad block into zeros, decode a NaN scale or an overflow into NaN, and both raise the flag."""
    weight = gaussian(4, 64).to(device)
    weight[2, 0] = float("nan")
    flag = ops.new_flag(device)
    packed = ops.encode(weight, flag=flag, backend=backend)
    assert flag.item() == 1
    assert packed.scales[2, 0] == 0 and not packed.codes[2, :16].any()
    for byte, code, bad in ((255, 0, True), (254, 4, True), (254, 3, False), (253, 6, True), (253, 5, False)):
        flag.zero_()
        packed.codes[1, 16:] = code << 4
        packed.scales[1, 1] = byte
        value = ops.decode(packed, flag=flag, backend=backend)
        assert flag.item() == int(bad)
        assert bool(value[1, 32:].isnan().all()) is bad
        assert value[1, :32].isfinite().all()
