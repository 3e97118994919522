"""How close the MXFP4 experts come to their bytes.

    python -m benchmarks.moe_mxfp4 [--shape NAME ...] [--tokens N ...] [--sweep] [--json FILE]

One CUDA graph holds a call for each of twelve layers, every layer with weights and a random top-k routing of its own,
as in a model: nothing but x is in the L2 cache when a layer begins. The floor of a call is the bytes of the distinct
experts that its routing hits (codes and scales) over the copy bandwidth measured in the same run (read + write, 4 GiB).
Bar: 55 % of that bandwidth at 8 and 16 tokens. The four launches of a call are also timed apart, each as the graph of
twelve layers with everything before it done; the two products have the floor of their own weights.

Before any speed, kernels.moe_mxfp4 must agree with its plain-torch definition on the first layer, or nothing is
reported. If humming-kernels can be imported, its two indexed products are timed in the same run on the same weights and
routings, each beside ours. Bar: not slower at 1, 8 and 16 tokens. Bias, activation and routing weights are part of our
products, not of its; the sum over slots is part of neither. --sweep times only our two products, in many shapes.
"""

import argparse
import importlib.util
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import gpu_seconds, publish, require_gpu, spread
from core.mxfp4 import BITS_PER_WEIGHT, BLOCK, Packed
from kernels.moe_mxfp4 import Activation, ExpertWeights, reference

LAYERS = 12
TOKENS = (1, 8, 16, 64)
BAR = {8: 0.55, 16: 0.55}
AS_FAST = (1, 8, 16)  # tokens at which no product may be slower than humming-kernels'
PRODUCTS = {"gate_up": 2 / 3, "down": 1 / 3}  # and their share of an expert's bytes
# Rows, warps, registers (None: as many as ptxas wants), steps in flight.
PROGRAMS = ((16, 1, None), (32, 1, None), (32, 2, None), (64, 2, 168), (64, 2, 128), (128, 2, None))
SWEEP = [(*program, stages) for program in PROGRAMS for stages in (2, 3, 4, 6)]


@dataclass(frozen=True)
class Shape:
    """One layer as one GPU sees it."""

    experts: int
    intermediate: int
    hidden: int
    slots: int
    kind: str = "silu"

    def expert_bytes(self) -> float:
        return 3 * self.hidden * self.intermediate * BITS_PER_WEIGHT / 8


SHAPES = {
    "mimo_v2_5_pro_tp8": Shape(384, 256, 6144, 8),
    "qwen3_30b": Shape(128, 768, 2048, 8),
    "mimo_v2_flash": Shape(256, 2048, 4096, 8),
    "gpt_oss_120b": Shape(128, 2880, 2880, 4, "clamped"),
}


@dataclass(frozen=True)
class Call:
    """What one layer is given."""

    x: Tensor
    weights: ExpertWeights
    chosen: Tensor
    weight: Tensor


def random_weights(shape: Shape) -> ExpertWeights:
    """Random codes, scales around 2^-6: every code is as frequent, which no quantiser yields but no kernel minds."""

    def packed(rows: int, columns: int) -> Packed:
        codes = torch.randint(0, 256, (shape.experts, rows, columns // 2), dtype=torch.uint8, device="cuda")
        scales = torch.randint(119, 123, (shape.experts, rows, columns // BLOCK), dtype=torch.uint8, device="cuda")
        return Packed(codes, scales)

    def bias(rows: int) -> Tensor | None:
        return torch.randn(shape.experts, rows, device="cuda").to(torch.bfloat16) if shape.kind == "clamped" else None

    gate_up, down = packed(2 * shape.intermediate, shape.hidden), packed(shape.hidden, shape.intermediate)
    return ExpertWeights(gate_up, down, bias(2 * shape.intermediate), bias(shape.hidden))


def make_calls(shape: Shape, layers: list[ExpertWeights], tokens: int) -> list[Call]:
    calls = []
    for weights in layers:
        x = torch.randn(tokens, shape.hidden, device="cuda").to(torch.bfloat16)
        chosen = torch.rand(tokens, shape.experts, device="cuda").topk(shape.slots).indices.to(torch.int32)
        calls.append(Call(x, weights, chosen, torch.rand(tokens, shape.slots, device="cuda")))
    return calls


def captured(work: Callable[[], object]) -> Callable[[], None]:
    """`work` as the replay of one CUDA graph; called twice before, so that everything is compiled and allocated."""
    for _ in range(2):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def check(call: Call, activation: Activation, tile: Any) -> None:
    """Stop unless the kernel agrees with the definition: only the order of FP32 sums may differ."""
    from kernels.moe_mxfp4 import kernel

    found = kernel.experts(call.x, call.weights, call.chosen, call.weight, activation, tile)
    error = relative_error(found, reference.experts(call.x, call.weights, call.chosen, call.weight, activation))
    if not error < 2.0**-9:
        sys.exit(f"benchmarks.moe_mxfp4: relative error {error:.2e} with {tile}; no speed is reported")


def parts(call: Call, activation: Activation, tile: Any) -> dict[str, Callable[[], object]]:
    """The call and each of its launches, with what the launches before it leave."""
    from kernels.moe_mxfp4 import kernel
    from kernels.moe_mxfp4.prepare import padded, prepare

    weights, chosen = call.weights, call.chosen
    first, second = (tile, tile) if tile else kernel.tiles_for(chosen.numel(), weights)
    placed, table = prepare(call.x, chosen, weights.experts, first.pairs)
    h = torch.empty(chosen.numel(), padded(weights.intermediate), dtype=call.x.dtype, device="cuda")

    def gate_up() -> None:
        kernel.first_half(placed, weights, table, chosen.shape[1], activation, first, h, placed=True)

    gate_up()
    part = kernel.second_half(h, weights, table, call.weight, second)
    return {
        "all": lambda: kernel.experts(call.x, weights, chosen, call.weight, activation, tile),
        "prepare": lambda: prepare(call.x, chosen, weights.experts, first.pairs),
        "gate_up": gate_up,
        "down": lambda: kernel.second_half(h, weights, table, call.weight, second),
        "combine": lambda: kernel.combine(part, chosen, call.x.dtype),
    }


def measure(calls: list[Call], shape: Shape, rate: float, tile: Any, repeats: int) -> list[dict[str, Any]]:
    """A row for the whole call and for each part; for the products only, if a `tile` is given."""
    activation = Activation(shape.kind)
    check(calls[0], activation, tile)
    work = [parts(call, activation, tile) for call in calls]
    names = PRODUCTS if tile else work[0]
    return [row(name, [each[name] for each in work], calls, shape, rate, repeats) for name in names]


def row(
    part: str, work: list[Callable[[], object]], calls: list[Call], shape: Shape, rate: float, repeats: int
) -> dict[str, Any]:
    """Microseconds a call; the floor and the share of the copy bandwidth where weights are read."""
    seconds = gpu_seconds(captured(lambda: [one() for one in work]), repeats)
    hit = [len(call.chosen.unique()) for call in calls]
    floor = sum(hit) * shape.expert_bytes() * PRODUCTS.get(part, float(part == "all")) / rate
    return {
        "part": part,
        "us_a_call": {name: value * 1e6 / len(calls) for name, value in spread(seconds).items()},
        "experts_hit": statistics.mean(hit),
        "floor_us": floor * 1e6 / len(calls),
        "share_of_copy": floor / statistics.median(seconds),
    }


class Humming:
    """humming-kernels' products on one layer's weights: MXFP4 x BF16, indexed MoE, its own tuning tables."""

    def __init__(self, shape: Shape, weights: ExpertWeights) -> None:
        from humming.layer import HummingLayer

        self.layers = []
        for packed in (weights.gate_up, weights.down):
            rows, columns = packed.codes.shape[1], packed.codes.shape[2] * 2
            layer = HummingLayer(
                shape_n=rows,
                shape_k=columns,
                weight_config={"quant_method": "mxfp4"},
                num_experts=shape.experts,
                torch_dtype=torch.bfloat16,
            ).cuda()
            layer.load_from_tensors({"weight": packed.codes, "weight_scale": packed.scales})
            layer.transform()
            self.layers.append(layer)

    def bind(self, call: Call) -> dict[str, Callable[[], Tensor]]:
        """The products of `call`, with routing tables made beforehand; down gets h of the right shape."""
        from humming.testing.data import generate_moe_tensors
        from humming.tune import get_heuristics_config

        tokens, slots = call.chosen.shape
        h = torch.randn(tokens * slots, call.weights.intermediate, device="cuda").to(torch.bfloat16)
        bound = []
        for layer, inputs, chosen in zip(
            self.layers, (call.x, h), (call.chosen, call.chosen.reshape(-1, 1)), strict=True
        ):
            tuning = get_heuristics_config(layer.humming_config, shape_m=tokens * slots, gemm_type="indexed")
            experts = call.weights.experts
            _, _, ids, expert_ids, padded = generate_moe_tensors(chosen, experts, "indexed", tuning["block_shape"][0])
            arguments = {
                "sorted_ids": ids,
                "expert_ids": expert_ids,
                "num_tokens_padded": padded,
                "top_k": chosen.shape[1],
                "compute_config": {"gemm_type": "indexed"},
                "tuning_config": tuning,
            }
            bound.append(lambda layer=layer, inputs=inputs, arguments=arguments: layer(inputs, **arguments))
        return dict(zip(PRODUCTS, bound, strict=True))

    def check(self, call: Call) -> None:
        found = self.bind(call)["gate_up"]().view(*call.chosen.shape, -1)
        matrix, e = reference.packed_matrix(call.weights.gate_up), int(call.chosen[0, 0])
        error = relative_error(found[0, 0], reference.linear(call.x[:1], matrix(e), None, e)[0])
        if not error < 2.0**-7:
            sys.exit(f"benchmarks.moe_mxfp4: humming-kernels' relative error is {error:.2e}; no speed is reported")


def measure_humming(
    peers: list[Humming], calls: list[Call], shape: Shape, rate: float, repeats: int
) -> list[dict[str, Any]]:
    peers[0].check(calls[0])
    work = [peer.bind(call) for peer, call in zip(peers, calls, strict=True)]
    return [row(name, [each[name] for each in work], calls, shape, rate, repeats) for name in PRODUCTS]


def ptxas_version() -> str:
    """Release of the assembler that Triton uses for this GPU."""
    from triton.backends.nvidia.compiler import get_ptxas

    major, minor = torch.cuda.get_device_capability()
    return get_ptxas(major * 10 + minor).version


def copy_bandwidth(repeats: int) -> float:
    source = torch.zeros(2**32, dtype=torch.uint8, device="cuda")
    into = torch.empty_like(source)
    return 2 * source.nbytes / statistics.median(gpu_seconds(lambda: into.copy_(source), repeats))


def bench(name: str, tiles: list[Any], rate: float, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one shape."""
    shape = SHAPES[name]
    layers = [random_weights(shape) for _ in range(LAYERS)]
    peers = [Humming(shape, weights) for weights in layers] if options.humming else []
    rows = []
    for tokens in options.tokens:
        calls = make_calls(shape, layers, tokens)
        found = {str(tile or "ours"): measure(calls, shape, rate, tile, options.repeats) for tile in tiles}
        if peers:
            try:
                found["humming"] = measure_humming(peers, calls, shape, rate, options.repeats)
            except AssertionError:  # its tuning tables do not know the shape (2,880 columns of gpt-oss)
                print(f"{name}, {tokens} tokens: humming-kernels not measured, its tuning has no answer for the shape")
        for what, measured in found.items():
            for each in measured:
                rows.append({"shape": name, "tokens": tokens, "what": what} | each)
                show(rows[-1])
    return rows


def show(found: dict[str, Any]) -> None:
    """One line a row."""
    name = f"{found['shape']:18} {found['tokens']:3} tokens {found['part']:8}"
    floor = f"floor {found['floor_us']:7.1f} us, {found['share_of_copy']:6.1%} of copy" if found["floor_us"] else ""
    print(f"{name} {found['us_a_call']['median']:8.1f} us {found['what']:10} {floor}", flush=True)


def missed(rows: list[dict[str, Any]]) -> list[str]:
    """The bars that `rows` miss."""
    took = {(r["shape"], r["tokens"], r["part"], r["what"]): r["us_a_call"]["median"] for r in rows}
    found = []
    for r in rows:
        at = f"{r['shape']}, {r['tokens']} tokens, {r['part']}"
        if (r["part"], r["what"]) == ("all", "ours") and r["share_of_copy"] < BAR.get(r["tokens"], 0):
            found.append(f"{at}: {r['share_of_copy']:.1%} of copy, the bar is {BAR[r['tokens']]:.0%}")
        ours = took.get((r["shape"], r["tokens"], r["part"], "ours"))
        if r["what"] == "humming" and r["tokens"] in AS_FAST and ours and ours > r["us_a_call"]["median"]:
            found.append(f"{at}: {ours:.1f} us, humming-kernels {r['us_a_call']['median']:.1f} us")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--sweep", action="store_true", help="several launch shapes instead of the default ones")
    parser.add_argument("--no-humming", dest="humming", action="store_false", help="leave the peer out")
    parser.add_argument("--json", help="also write the result to this file")
    options = parser.parse_args()
    require_gpu("benchmarks.moe_mxfp4")
    from kernels.moe_mxfp4.kernel import Tile

    if options.humming and importlib.util.find_spec("humming") is None:
        print("humming-kernels is not installed: no peer in this run")
        options.humming = False
    rate = copy_bandwidth(options.repeats)
    print(f"copy {rate / 1e9:.0f} GB/s; ptxas {ptxas_version()}")
    tiles = [Tile(r, num_warps=w, registers=n, num_stages=s) for r, w, n, s in SWEEP] if options.sweep else [None]
    rows = [row for name in options.shape for row in bench(name, tiles, rate, options)]
    publish("moe_mxfp4", {"copy_GBps": rate / 1e9, "ptxas": ptxas_version(), "rows": rows}, options.json)
    bars = missed(rows)
    print("\n".join(f"missed: {bar}" for bar in bars) or "every bar that these rows can show is met")
    return 1 if bars else 0


if __name__ == "__main__":
    raise SystemExit(main())
