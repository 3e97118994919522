"""One-shot all-reduce in Triton over peer-mapped memory, fused with residual and RMSNorm.

A program owns tokens block, block + 64, ... of every call. It copies its part of them into this rank's buffer, tells
the same program of every rank, waits until all have told it, and sums what lies in the W buffers.

**Telling** is one word to each peer: the program's count of calls, put with release into its flag there. Counts only
grow (and wrap), so nothing is reset. They live on the device, so a call can stand in a CUDA graph.

**Two halves.** Even and odd calls use different halves of the buffer. A half is written again two calls later, behind
the meeting of the call in between; a peer comes to that meeting only after its own reads of the call before. So one
meeting a call is enough.

**Order.** Parts arrive in the buffer's dtype and are added in FP32 in the order of ranks, the own part in its place:
all ranks have the same bits. A token is whole in one program, and the launch shape depends on the hidden size alone, so
the tokens beside it cannot change them either.

Where the parts lie in ordinary memory (one rank, or a CPU, for which the process group gathers them) the meeting is
left out and the same kernel sums.

Legend: W ranks, G hidden size, T tokens.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.all_reduce.peers import BLOCKS, Peers
from kernels.all_reduce.reference import gather
from kernels.bf16 import INTERPRETED, rounded

ALIGNMENT = 16  # bytes of the widest access


@triton.jit
def meet(flags, rank, block, epoch, WORLD: tl.constexpr, RANKS: tl.constexpr):
    """Return when program `block` of every rank is in call `epoch`; what it wrote before is then seen here."""
    rank_W = tl.arange(0, RANKS)
    there_W = rank_W < WORLD
    own = tl.load(flags + rank)
    base_W = tl.load(flags + rank_W, mask=there_W, other=0)
    theirs_W = (base_W + (block * WORLD + rank) * 4).to(tl.pointer_type(tl.int32))
    tl.debug_barrier()  # every thread's copy comes before the flags
    tl.atomic_xchg(theirs_W, tl.zeros((RANKS,), tl.int32) + epoch, mask=there_W, sem="release", scope="sys")
    mine_W = (own + (block * WORLD + rank_W) * 4).to(tl.pointer_type(tl.int32))
    behind = 1
    while behind > 0:
        count_W = tl.load(mine_W, mask=there_W, other=epoch, volatile=True)
        behind = tl.max((count_W - epoch < 0).to(tl.int32), axis=0)  # the difference wraps with the counts
    if not INTERPRETED:  # which has no assembler, and runs one thread on a machine that keeps loads in order
        tl.inline_asm_elementwise(
            "fence.acq_rel.sys; mov.b32 $0, $1;", "=r,r", [behind], dtype=tl.int32, is_pure=False, pack=1
        )
    tl.debug_barrier()  # every thread reads after every thread's fence


@triton.jit
def part_of(data, rank, capacity, KIND: tl.constexpr, SHARED: tl.constexpr):
    """Pointer to rank's parts. SHARED: `data` has addresses; else it is the parts, `capacity` values of each rank."""
    return tl.multiple_of(tl.load(data + rank).to(tl.pointer_type(KIND)), 16) if SHARED else data + rank * capacity


@triton.jit(do_not_specialize=["rows", "rank"])
def reduce_kernel(x, data, flags, epochs, residual, weight, y, out, rows, rank, capacity, eps,
                  G: tl.constexpr, WIDE: tl.constexpr, WORLD: tl.constexpr, RANKS: tl.constexpr, BLOCKS: tl.constexpr,
                  FUSED: tl.constexpr, SHARED: tl.constexpr):  # fmt: skip
    """out [T, G] = sum of parts; FUSED: residual + sum, and y [T, G] = RMSNorm(out)."""
    KIND: tl.constexpr = x.dtype.element_ty
    OUT: tl.constexpr = out.dtype.element_ty
    block, column_G = tl.program_id(0), tl.arange(0, WIDE)
    here_G = column_G < G
    half = tl.zeros((), tl.int64)
    if FUSED:
        weight_G = tl.load(weight + column_G, mask=here_G, other=0.0).to(tl.float32)
    if SHARED:
        epoch = tl.load(epochs + block) + 1
        half += (epoch & 1).to(tl.int64) * capacity
        own = part_of(data, rank, capacity, KIND, SHARED) + half
        for row in range(block, rows, BLOCKS):
            at_G = (tl.program_id(0) * 0 + row).to(tl.int64) * G + column_G
            tl.store(own + at_G, tl.load(x + at_G, mask=here_G), mask=here_G)
        meet(flags, rank, block, epoch, WORLD, RANKS)
        tl.store(epochs + block, epoch)
    for row in range(block, rows, BLOCKS):
        at_G = (tl.program_id(0) * 0 + row).to(tl.int64) * G + column_G
        first = part_of(data, 0, capacity, KIND, SHARED) + half
        sum_G = tl.load(first + at_G, mask=here_G, other=0.0).to(tl.float32)
        for peer in tl.static_range(1, WORLD):
            part = part_of(data, peer, capacity, KIND, SHARED) + half
            sum_G += tl.load(part + at_G, mask=here_G, other=0.0).to(tl.float32)
        if FUSED:
            sum_G = tl.load(residual + at_G, mask=here_G, other=0.0).to(tl.float32) + sum_G
        out_G = rounded(sum_G, OUT)
        tl.store(out + at_G, out_G, mask=here_G)
        if FUSED:
            s_G = out_G.to(tl.float32)
            mean = tl.div_rn(tl.sum(s_G * s_G, axis=0), G * 1.0)
            scale = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
            y_G = rounded(s_G * scale, OUT).to(tl.float32) * weight_G
            tl.store(y + at_G, rounded(y_G, OUT), mask=here_G)


def aligned(tensor: Tensor) -> Tensor:
    """A copy where a row could not be read in the widest accesses: the order of a compiled sum depends on them."""
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor


def warps(wide: int) -> int:
    """Eight BF16 values a thread and access, at most 16 warps."""
    return min(16, max(1, wide // 256))


def launch(
    x: Tensor, peers: Peers, residual: Tensor | None, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(y, out); y is `out` where there is no norm."""
    rows, size = x.shape
    out = torch.empty_like(x if residual is None else residual)
    y = out if residual is None else torch.empty_like(out)
    if x.numel() == 0:
        return y, out
    x = aligned(x)
    if peers.symmetric:
        data, flags, epochs, capacity = peers.data, peers.flags, peers.epochs, peers.tokens * size
    else:
        data = flags = epochs = gather(x, peers)
        capacity = x.numel()
    wide = triton.next_power_of_2(size)
    with torch.cuda.device_of(x):
        reduce_kernel[(min(rows, BLOCKS),)](
            x, data, flags, epochs, x if residual is None else aligned(residual),
            x if weight is None else aligned(weight), y, out, rows, peers.rank, capacity, eps,
            G=size, WIDE=wide, WORLD=peers.world, RANKS=triton.next_power_of_2(peers.world), BLOCKS=BLOCKS,
            FUSED=residual is not None, SHARED=peers.symmetric, num_warps=warps(wide),
        )  # fmt: skip
    return y, out


def all_reduce(x: Tensor, peers: Peers) -> Tensor:
    return launch(x, peers, None, None, 0.0)[1]


def all_reduce_norm(x: Tensor, peers: Peers, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return launch(x, peers, residual, weight, eps)


def compile_cases() -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """(name, kernel, argument types, constants, options): a hidden size of 6,144 over eight GPUs, and on one."""
    types = dict.fromkeys(("x", "residual", "weight", "y", "out"), "*bf16") | {"epochs": "*i32", "eps": "fp32"}
    cases = []
    for world, fused in ((8, True), (8, False), (1, True)):
        fixed = {
            "G": 6144, "WIDE": 8192, "WORLD": world, "RANKS": world, "BLOCKS": BLOCKS, "FUSED": fused,
            "SHARED": world > 1,
        }  # fmt: skip
        own = types | dict.fromkeys(("data", "flags"), "*i64" if world > 1 else "*bf16")
        signature = {a: "constexpr" if a in fixed else own.get(a, "i32") for a in reduce_kernel.arg_names}
        name = f"all_reduce of {world} ranks{', norm' if fused else ''}"
        cases.append((name, reduce_kernel, signature, fixed, {"num_warps": warps(8192)}))
    return cases
