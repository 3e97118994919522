"""Every Triton kernel compiled for Hopper without a GPU: what speed, exactness and equal bits rest on.

Covers kernels.linear, kernels.rms_norm, kernels.qkv_rope, kernels.router and every other package whose kernel.py names
its launches in `compile_cases()`.
"""

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles, so not interpreted")

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
OWN_TEST = {"mxfp4_snap"}  # compiled in test_mxfp4_kernel.py
PACKAGES = sorted({path.parent.name for path in KERNELS.glob("*/kernel.py")} - OWN_TEST)
SHARED = 227 * 1024  # bytes that one program can have on an H100 or H200
SPILLED = 64  # bytes, stores and loads; the experts' gate_up has 44, every other kernel none
PRODUCT = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"


def compiled(function: Any, signature: dict[str, str], constants: dict[str, Any], options: dict[str, Any]) -> Any:
    """For sm_90, with pointers that are multiples of 16 bytes, as torch's are."""
    from triton.backends.compiler import GPUTarget

    index = {name: (function.arg_names.index(name),) for name in signature}
    aligned = {index[n]: [["tt.divisibility", 16]] for n, kind in signature.items() if kind.startswith("*")}
    source = triton.compiler.ASTSource(function, signature, {index[n]: v for n, v in constants.items()}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def spilled(ptx: str, folder: Path) -> int:
    """Bytes of registers that ptxas has to store and load again."""
    from triton.backends.nvidia.compiler import get_ptxas

    source = folder / "kernel.ptx"
    source.write_text(ptx)
    command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", str(source), "-o", os.devnull]
    log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    found = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert found, log
    return sum(int(number) for pair in found for number in pair)


@pytest.mark.parametrize("package", PACKAGES)
def test_compiles_without_wgmma_fits_and_spills_next_to_nothing(package: str, tmp_path: Path) -> None:
    """wgmma's register operands are miscompiled by every ptxas before 13.3, so no kernel may have any."""
    cases = importlib.import_module(f"kernels.{package}.kernel").compile_cases()
    assert cases
    for name, function, signature, constants, options in cases:
        code = compiled(function, signature, constants, options)
        assert "wgmma" not in code.asm["ptx"], name
        assert code.metadata.shared <= SHARED, name
        assert spilled(code.asm["ptx"], tmp_path) <= SPILLED, name


def test_every_tile_of_a_linear_layer_adds_in_one_way() -> None:
    """Equal bits for one row and for a prefill: one instruction and operand layout for BF16, fused additions for FP32.

    And 16-byte asynchronous copies, which decoding lives on.
    """
    from kernels.linear.kernel import compile_cases

    layouts = set()
    for name, function, signature, constants, options in compile_cases():
        code = compiled(function, signature, constants, options)
        ptx, layout = code.asm["ptx"], code.asm["ttgir"]
        assert ".ftz" not in ptx, name
        assert re.search(r"cp\.async\.cg\.shared\.global .*0x10", ptx), name
        if signature["x"] == "*fp32":
            assert "mma.sync" not in ptx and "tf32" not in ptx, name
            assert ptx.count("fma.rn.f32") >= 1, name
            continue
        assert set(re.findall(r"mma\.sync[\w.]+", ptx)) == {PRODUCT}, name
        layouts.add((*set(re.findall(r"kWidth = \d+", layout)), *set(re.findall(r"instrShape = \[[\d, ]+\]", layout))))
    assert len(layouts) == 1 and len(layouts.pop()) == 2


def test_norms_and_copies_move_16_bytes_an_access_and_flush_nothing() -> None:
    for package in ("rms_norm", "qkv_rope", "router"):
        for name, *case in importlib.import_module(f"kernels.{package}.kernel").compile_cases():
            ptx = compiled(*case).asm["ptx"]
            assert ".ftz" not in ptx, name
            if name.startswith(("rms_norm", "write_kv")):
                assert "ld.global.v4.b32" in ptx and "st.global.v4.b32" in ptx, name


STANDALONE = {"mxfp4_snap", "all_reduce"}  # no part of a chain of small kernels; one that waits for other GPUs


def test_every_kernel_of_a_step_waits_before_anything_else() -> None:
    """One that did not could end before its predecessor, and the next would begin on half-written memory."""
    seen = 0
    for path in sorted(KERNELS.glob("*/*.py")):
        if path.parent.name in STANDALONE:
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                assert ast.unparse(body[0]) == "follow()", f"{path}: {node.name}"
                seen += 1
    assert seen >= 20


FOLLOWING = """
from kernels.rms_norm.kernel import compile_cases
from tests.unit.test_kernels_compile import compiled
for name, function, signature, constants, options in compile_cases():
    ptx = compiled(function, signature, constants, options | {"launch_pdl": True}).asm["ptx"]
    first = min(ptx.index(word) for word in ("ld.global", "st.global"))
    assert ptx.index("griddepcontrol.launch_dependents") < ptx.index("griddepcontrol.wait") < first, name
"""


def test_nothing_is_read_or_written_before_the_wait() -> None:
    environment = os.environ | {"FP4FLASH_PDL": "1"}
    subprocess.run([sys.executable, "-c", FOLLOWING], check=True, env=environment, cwd=KERNELS.parent)
