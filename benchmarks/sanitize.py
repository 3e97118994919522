"""Every Triton kernel once, on a small odd case, under NVIDIA's compute-sanitizer.

    python -m benchmarks.sanitize [--tool memcheck racecheck] [--kernel NAME ...] [--json FILE]

memcheck finds accesses outside of an allocation (torch's caching of memory is off, so an allocation is a tensor),
racecheck hazards in shared memory. Each case is a process of its own, and must give what the plain-torch definition
gives. The exit code is 0 if nothing was found, 1 if something was, and 2 if the tool could not run: then nothing is
known, and that is what is printed.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.common import publish, require_gpu
from core.mxfp4 import BLOCK, Packed
from kernels.accept import accept
from kernels.linear import linear
from kernels.moe_mxfp4 import Activation, ExpertWeights, experts
from kernels.mxfp4_snap import decode, encode, snap_
from kernels.paged_attention import Batch, paged_attention
from kernels.qkv_rope import Heads, qkv_rope, write_kv
from kernels.rms_norm import rms_norm
from kernels.router import Rule, route
from kernels.sampling import Params, sample

TOOL, TOOLS = "compute-sanitizer", ("memcheck", "racecheck")
DEVICE = "cuda"
Case = Callable[[str], tuple[Tensor, ...]]  # backend -> results


def normal(*size: int) -> Tensor:
    return torch.randn(size, dtype=torch.bfloat16, device=DEVICE)


def small_norm(backend: str) -> tuple[Tensor, ...]:
    return rms_norm(normal(31, 96), normal(96), 1e-5, residual=normal(31, 96), backend=backend)


def small_linear(backend: str) -> tuple[Tensor, ...]:
    return (linear(normal(5, 160), normal(48, 160), backend=backend),)


def small_place(backend: str) -> tuple[Tensor, ...]:
    heads, caches = Heads(3, 1, 24, 16, 16), (normal(3, 16, 1, 24), normal(3, 16, 1, 16))
    angle = torch.rand(64, 8, device=DEVICE)
    position, slot = torch.arange(7, device=DEVICE) + 20, torch.arange(7, device=DEVICE) * 5
    q = qkv_rope(normal(7, 64), normal(heads.width, 64), None, angle.cos(), angle.sin(), position, slot, *caches, heads,
                 q_norm=normal(24), k_norm=normal(24), backend=backend)  # fmt: skip
    write_kv(normal(2, 1, 24), normal(2, 1, 16), torch.tensor([40, 47], device=DEVICE), *caches, backend=backend)
    return (q, *caches)


def small_route(backend: str) -> tuple[Tensor, ...]:
    logits, bias = torch.randn(33, 24, device=DEVICE), torch.randn(24, device=DEVICE)
    return route(logits, Rule("sigmoid_bias", 3), bias, backend=backend)


def small_experts(backend: str) -> tuple[Tensor, ...]:
    def packed(rows: int, columns: int) -> Packed:
        codes = torch.randint(0, 256, (4, rows, columns // 2), dtype=torch.uint8, device=DEVICE)
        scales = torch.randint(119, 123, (4, rows, columns // BLOCK), dtype=torch.uint8, device=DEVICE)
        return Packed(codes, scales)

    weights = ExpertWeights(packed(2 * 64, 288), packed(288, 64), None, None)
    chosen = torch.rand(31, 4, device=DEVICE).topk(2).indices.to(torch.int32)
    weight = torch.rand(31, 2, device=DEVICE)
    return (experts(normal(31, 288), weights, chosen, weight, Activation("silu"), backend=backend),)


def small_attention(backend: str) -> tuple[Tensor, ...]:
    """Pieces that are merged, and a window that one program folds."""
    keys, page = 1100, 16
    pages = -(-keys // page)
    table = torch.randperm(pages, device=DEVICE).to(torch.int32)[None]
    made = {"dtype": torch.int32, "device": DEVICE}
    batch = Batch(table, torch.tensor([keys], **made), torch.tensor([0, 3], **made), longest_query=3, longest_key=keys)
    given = (normal(3, 6, 24), normal(pages, page, 1, 24), normal(pages, page, 1, 16), batch)
    sinks = torch.randn(6, device=DEVICE)
    return tuple(
        paged_attention(*given, scale=0.2, window=window, sinks=sinks, backend=backend) for window in (None, 40)
    )


def some_params(rows: int) -> Params:
    made = torch.arange(rows, device=DEVICE)
    return Params(made * 0.4, torch.full((rows,), 0.9, device=DEVICE), (made * 5).to(torch.int32), made)


def small_sample(backend: str) -> tuple[Tensor, ...]:
    return (
        sample(torch.randn(5, 301, device=DEVICE), some_params(5), torch.arange(5, device=DEVICE), backend=backend),
    )


def small_accept(backend: str) -> tuple[Tensor, ...]:
    draft, logits = torch.randint(0, 301, (5, 3), device=DEVICE), torch.randn(5, 4, 301, device=DEVICE)
    drafted = torch.tensor([3, 0, 1, 2, 3], dtype=torch.int32, device=DEVICE)
    return accept(draft, None, logits, some_params(5), torch.arange(5, device=DEVICE), drafted, backend=backend)


def small_snap(backend: str) -> tuple[Tensor, ...]:
    weight = normal(33, 96)
    packed = encode(weight, backend=backend)
    snap_(weight, backend=backend)
    return packed.codes, packed.scales, decode(packed, backend=backend), weight


CASES: dict[str, Case] = {
    "rms_norm": small_norm, "linear": small_linear, "qkv_rope": small_place, "router": small_route,
    "moe_mxfp4": small_experts, "paged_attention": small_attention, "sampling": small_sample, "accept": small_accept,
    "mxfp4_snap": small_snap,
}  # fmt: skip


def run_case(name: str) -> None:
    """AssertionError unless Triton gives what the definition gives (BF16: within 2 % of the norm)."""
    found = []
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        found.append(CASES[name](backend))
    for ours, wanted in zip(*found, strict=True):
        error = float((ours.double() - wanted.double()).norm())
        assert error <= 0.02 * float(wanted.double().norm()), f"{name}: {error:.3g} off"


def verdict(tool: str, name: str) -> tuple[str, str]:
    """("clean" | "found" | "not measured", the tool's last line or why)."""
    command = [TOOL, "--tool", tool, "--error-exitcode", "77", sys.executable, "-m", "benchmarks.sanitize",
               "--run", name]  # fmt: skip
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    summary = next((line for line in reversed(lines) if "SUMMARY" in line), None)
    if done.returncode == 77:
        return "found", summary or lines[-1]
    if done.returncode or summary is None:
        return "not measured", lines[-1] if lines else f"{TOOL} ended with {done.returncode}"
    return "clean", summary


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tool", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--kernel", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--json", help="also write the result to this file")
    parser.add_argument("--run", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    require_gpu("benchmarks.sanitize")
    if options.run:
        run_case(options.run)
        torch.cuda.synchronize()
        return 0
    if shutil.which(TOOL) is None:
        print(f"benchmarks.sanitize: {TOOL} is not on PATH; it comes with the CUDA toolkit", file=sys.stderr)
        return 2
    rows = []
    for tool in options.tool:
        for name in options.kernel:
            state, line = verdict(tool, name)
            rows.append({"tool": tool, "kernel": name, "state": state, "line": line})
            print(f"{tool:10} {name:16} {state:13} {line}", flush=True)
    publish("sanitize", {"rows": rows}, options.json)
    states = {row["state"] for row in rows}
    return 1 if "found" in states else 2 if "not measured" in states else 0


if __name__ == "__main__":
    sys.exit(main())
