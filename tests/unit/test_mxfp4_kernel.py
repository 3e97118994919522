"""kernels.mxfp4_snap without a GPU: the Triton source under the interpreter, its plain-torch twin, and the checks.

Triton chooses its interpreter when it is imported, and other tests import it first. So this file runs the plain-torch
cases here, and itself once more in a child process under TRITON_INTERPRET=1, which adds the Triton cases.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels.mxfp4_snap as ops
from core import mxfp4
from core.errors import FormatError, UnsupportedError
from core.mxfp4 import AMAX_CARRY, BLOCK, E2M1_EMAX, E2M1_MAX, ScaleRule
from kernels.mxfp4_snap import reference
from tests import mxfp4_cases as cases

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["reference", "triton"] if INTERPRETED else ["reference"]

# The interpreter computes refused rows too, and numpy reports their overflow; nothing of them is stored.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")


@pytest.mark.skipif(INTERPRETED, reason="this is the run under the interpreter")
def test_everything_again_under_the_triton_interpreter() -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).resolve())]
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    child = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stdout[-8000:] + child.stderr[-2000:]


@pytest.mark.skipif(INTERPRETED, reason="compiles, so not under the interpreter")
@pytest.mark.parametrize("source", ["*i16", "*i32"])
def test_compiles_to_wide_accesses_that_keep_subnormals(source: str) -> None:
    """What speed and exactness rest on, seen without a GPU: 16-byte accesses, and nothing that flushes to zero."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    from kernels.mxfp4_snap.kernel import DEFAULT_TILE, snap_kernel

    constants = {"REFUSED": 0x7F800000, "CARRY": AMAX_CARRY[ScaleRule.even], "EMAX": E2M1_EMAX, "MAX": E2M1_MAX}
    constants |= {"BLOCK": BLOCK, "ROWS": DEFAULT_TILE.rows}
    signature = {"source": source, "out": "*i16", "flag": "*i32", "rows": "i32"} | dict.fromkeys(constants, "constexpr")
    index = {name: (snap_kernel.arg_names.index(name),) for name in signature}
    aligned = {index[name]: [["tt.divisibility", 16]] for name in ("source", "out", "flag")}
    ast = triton.compiler.ASTSource(snap_kernel, signature, {index[n]: v for n, v in constants.items()}, aligned)
    options = {"num_warps": DEFAULT_TILE.num_warps}
    ptx = triton.compile(ast, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    assert "ld.global.v4.b32" in ptx and "st.global.v4.b32" in ptx
    assert ".ftz" not in ptx


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", cases.RULES)
def test_golden_bytes(rule: ScaleRule, backend: str) -> None:
    cases.assert_golden(rule, "cpu", backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", cases.RULES)
def test_every_bf16_pattern(rule: ScaleRule, backend: str) -> None:
    for amax_bits in cases.AMAX_BITS:
        cases.assert_all_equal_core(cases.every_pattern(amax_bits), rule, "cpu", backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(32,), (31 * 32,), (33, 32), (2, 3, 33 * 32), (257, 32), (0, 64)])
def test_shapes_and_dtypes(shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    """Flat shards, odd block counts, and counts around the tile of 128 blocks."""
    for rule in cases.RULES:
        cases.assert_all_equal_core(cases.gaussian(*shape, dtype=dtype), rule, "cpu", backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp32_casts_round_to_even(backend: str) -> None:
    """FP32 halfway between two BF16 values, both parities, the smallest subnormals and the largest finite value."""
    upper = torch.tensor([0x0000, 0x0001, 0x007F, 0x0080, 0x3F80, 0x3F81, 0x3FDF, 0x40A0, 0x7F5E])
    lower = torch.tensor([0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = ((upper[:, None] << 16) | lower[None, :]).to(torch.int32).flatten()
    for amax in bits.tolist():
        block = torch.zeros(32, dtype=torch.int32)
        block[:31] = bits[(bits <= amax).nonzero().flatten()[-31:]].repeat(31)[:31]
        block[31] = amax
        weight = torch.stack((block.view(torch.float32), -block.view(torch.float32)))
        cases.assert_all_equal_core(weight, ScaleRule.floor, "cpu", backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_flag_protocol(backend: str) -> None:
    cases.assert_flag_protocol("cpu", backend)
    cases.assert_packed_flags("cpu", backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("payload", [0x7F800000, 0x7F800001, 0x7FFFFFFF, 0x7F7FFFFF])
def test_every_kind_of_nan_is_seen_in_fp32(payload: int, backend: str) -> None:
    """A signalling NaN, and one whose rounding carry would wrap the sign bit, stay NaN; a rounded-up Inf is bad too."""
    weight = cases.gaussian(2, 32, dtype=torch.float32)
    weight.view(torch.int32)[1, 7] = payload
    flag = ops.new_flag()
    ops.snap_from(weight, torch.zeros(2, 32, dtype=torch.bfloat16), flag=flag, backend=backend)
    assert flag.item() == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_check_a_step_names_the_block(backend: str) -> None:
    flag = ops.new_flag()
    clean, dirty = cases.gaussian(4, 64), cases.gaussian(4, 64)
    ops.raise_if_flagged(flag, "anything")
    dirty[1, 33] = float("nan")
    for weight in (clean, dirty):
        ops.snap_(weight, flag=flag, backend=backend)
    ops.raise_if_flagged(flag, "clean", clean)
    with pytest.raises(FormatError, match=r"^experts\.3 has a NaN.* in block \(1, 1\); .*optim\.lr"):
        ops.raise_if_flagged(flag, "experts.3", dirty)
    with pytest.raises(FormatError, match=r"^a weight at step 7 has a NaN"):
        ops.raise_if_flagged(flag, "a weight at step 7")


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_flag_the_call_itself_raises(backend: str) -> None:
    weight = cases.gaussian(2, 32)
    weight[1, 0] = float("inf")
    with pytest.raises(FormatError, match=r"^up has .* in block \(1, 0\)"):
        ops.snap_(weight, name="up", backend=backend)
    with pytest.raises(FormatError, match=r"^up has .* in block \(1, 0\)"):
        ops.encode(weight, name="up", backend=backend)
    packed = ops.encode(cases.gaussian(2, 32), backend=backend)
    packed.scales[0] = 255
    with pytest.raises(FormatError, match=r"^up has a NaN"):
        ops.decode(packed, name="up", backend=backend)


@pytest.mark.parametrize("rule", cases.RULES)
def test_refusal_begins_exactly_where_the_value_leaves_bf16(rule: ScaleRule) -> None:
    first = reference.refused_from(rule)
    largest = cases.from_bits([first - 1] + [0] * 31)
    assert mxfp4.decode(mxfp4.encode(largest, rule)).isfinite().all()
    if first < reference.INF_BITS:
        with pytest.raises(FormatError, match=r"2\^128"):
            mxfp4.snap(cases.from_bits([first] + [0] * 31), rule)


def test_checks() -> None:
    weight = cases.gaussian(4, 64)
    for bad, message in (
        (weight.half(), "is torch.float16"),
        (weight.t(), "not contiguous"),
        (weight[:, :48].contiguous(), "48, which is not a positive multiple"),
        (weight[0, 0], "not a positive multiple"),
    ):
        with pytest.raises(FormatError, match=message):
            ops.snap_(bad, name="down")
    with pytest.raises(FormatError, match="differ"):
        ops.snap_from(weight, weight[:2].clone())
    with pytest.raises(FormatError, match="must be one int32"):
        ops.snap_(weight, flag=torch.zeros(1))
    with pytest.raises(FormatError, match="are not one tensor"):
        ops.decode(mxfp4.Packed(torch.zeros(2, 16, dtype=torch.uint8), torch.zeros(2, 2, dtype=torch.uint8)))
    with pytest.raises(UnsupportedError, match="'cuda' is not one of"):
        ops.snap_(weight, backend="cuda")


def test_backend_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = cases.gaussian(1, 32)
    if INTERPRETED:
        assert ops.implementation(weight, "auto").__name__ == "kernels.mxfp4_snap.kernel"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert ops.implementation(weight, "auto") is reference
    with pytest.raises(UnsupportedError, match="needs a CUDA tensor"):
        ops.snap_(weight, backend="triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_autograd_sees_the_write(backend: str) -> None:
    weight = torch.nn.Parameter(cases.gaussian(2, 32, dtype=torch.float32))
    loss = weight.square().sum()
    ops.snap_(weight, backend=backend)
    assert weight.requires_grad and weight.is_leaf and mxfp4.on_grid(weight.detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        assert mxfp4.on_grid(ops.snap_(cases.gaussian(2, 32), backend=backend))
