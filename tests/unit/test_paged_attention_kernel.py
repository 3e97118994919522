"""kernels.paged_attention without a GPU: the definition against float64 and transformers, the Triton source under the
interpreter, and the compiled code for Hopper.

Triton chooses its interpreter when it is imported, and other tests import it first. So this file runs the plain-torch
cases here, and itself once more in a child process under TRITON_INTERPRET=1, which adds the Triton cases.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from core.errors import FormatError, UnsupportedError
from kernels.paged_attention import Batch, paged_attention
from tests import paged_attention_cases as cases
from tests.paged_attention_cases import Layer, Request

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["reference", "triton"] if INTERPRETED else ["reference"]
interpreted = pytest.mark.skipif(not INTERPRETED, reason="in the child process under the interpreter")
compiled = pytest.mark.skipif(INTERPRETED, reason="compiles, or needs no interpreter")

if INTERPRETED:
    import triton
    import triton.language as tl

    from kernels.paged_attention.kernel import piece_begin, piece_of

    @triton.jit
    def ask(key, piece, begin, end):
        """The piece of each key, and its first key and the next one's."""
        found = piece_of(tl.load(key + tl.program_id(0)))
        tl.store(piece + tl.program_id(0), found)
        tl.store(begin + tl.program_id(0), piece_begin(found))
        tl.store(end + tl.program_id(0), piece_begin(found + 1))


@pytest.mark.skipif(INTERPRETED, reason="this is the run under the interpreter")
def test_everything_again_under_the_triton_interpreter() -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).resolve())]
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    child = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600)
    assert child.returncode == 0, child.stdout[-8000:] + child.stderr[-2000:]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layer", cases.LAYERS.values(), ids=cases.LAYERS)
def test_against_float64(layer: Layer, backend: str) -> None:
    """Everything a step must not read is NaN."""
    cases.assert_matches_formula(layer, cases.MIXED, backend=backend, free_rows=2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [1, 31, 33])
def test_odd_lengths(length: int, backend: str) -> None:
    for layer in (Layer(heads=2), Layer(heads=2, window=7, page=8), Layer(heads=2, causal=False, sinks=True)):
        for queries in {1, min(length, 3), length}:
            cases.assert_matches_formula(layer, [Request(length, queries, 3)], backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_and_sinks_neither_overflow_nor_vanish(backend: str) -> None:
    """Scores of +-2,000 and sinks far above and below all of them."""
    q = torch.full((1, 2, 16), 30.0)
    keys = torch.linspace(-30, 30, 300).view(300, 1, 1).expand(300, 1, 16)
    k, v = torch.zeros(19, 16, 1, 16), torch.zeros(19, 16, 1, 16)
    k.flatten(0, 1)[:300], v.flatten(0, 1)[:300] = keys, keys
    table, length, start = (torch.tensor(x, dtype=torch.int32) for x in ([list(range(19))], [300], [0, 1]))
    batch = Batch(table, length, start, longest_query=1, longest_key=300)
    sinks = torch.tensor([-1e4, 1e4])
    out = paged_attention(q, k, v, batch, scale=0.14, sinks=sinks, backend=backend)
    assert torch.allclose(out[0, 0], torch.full((16,), 30.0)) and not out[0, 1].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_output_is_rounded_to_nearest_even(backend: str) -> None:
    """Queries of zeros: the output is the mean of two values, exact in FP32 and rounded once."""
    q, k = torch.zeros(1, 1, 16, dtype=torch.bfloat16), torch.zeros(1, 16, 1, 16, dtype=torch.bfloat16)
    v = torch.randn(1, 16, 1, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    table, length, start = (torch.tensor(x, dtype=torch.int32) for x in ([[0]], [2], [0, 1]))
    batch = Batch(table, length, start, longest_query=1, longest_key=2)
    out = paged_attention(q, k, v, batch, scale=1.0, backend=backend)
    assert torch.equal(out[0, 0], ((v[0, 0, 0].float() + v[0, 1, 0].float()) / 2).to(torch.bfloat16))


@interpreted
@pytest.mark.parametrize("layer", cases.INVARIANT.values(), ids=cases.INVARIANT)
def test_bits_of_a_query_are_its_own(layer: Layer) -> None:
    cases.assert_bits_of_a_query_are_its_own(layer, 620, "triton", "cpu")


@interpreted
def test_pieces_are_numbered_without_gaps() -> None:
    """Up to a million keys: every key lies in one piece, and the host counts as the kernels do."""
    from kernels.paged_attention.launch import pieces_of

    edges = [256 * (64 + m) << level for level in range(6) for m in (0, 1, 63)]
    key = torch.tensor([0, 255, 256, *(e + d for e in edges for d in (-1, 0))], dtype=torch.int32)
    piece, begin, end = (torch.zeros_like(key) for _ in range(3))
    ask[(len(key),)](key, piece, begin, end)
    assert ((begin <= key) & (key < end)).all()
    assert [pieces_of(k + 1) - 1 for k in key.tolist()] == piece.tolist()
    assert piece.max() < 64 * 8


@compiled
def test_equals_gpt_oss_attention() -> None:
    """One prompt: transformers' eager attention with sinks, its mask made from the window."""
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    layer, request = Layer(heads=6, kv_heads=2, window=9, sinks=True, dtype=torch.float32), Request(40, 40, 4)
    ours = cases.run(layer, [request], backend="reference")[0]
    q, k, v = (x.transpose(0, 1)[None] for x in cases.content(layer, request))
    index = torch.arange(40)
    seen = (index <= index[:, None]) & (index > index[:, None] - 9)
    module = torch.nn.Module()
    module.num_key_value_groups, module.sinks, module.training = 3, cases.sink_logits(layer), False
    mask = torch.zeros(40, 40).masked_fill(~seen, -torch.inf)[None, None]
    theirs = eager_attention_forward(module, q, k, v, mask, scaling=layer.scale, dropout=0.0)[0][0]
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def small(**changes: Any) -> dict[str, Any]:
    """Arguments of a valid call, changed."""
    table, length, start = (torch.tensor(x, dtype=torch.int32) for x in ([[0]], [3], [0, 2]))
    arguments = {"q": torch.zeros(2, 4, 16), "k_cache": torch.zeros(1, 16, 2, 16), "v_cache": torch.zeros(1, 16, 2, 8)}
    return arguments | {"batch": Batch(table, length, start, longest_query=2, longest_key=3), "scale": 1.0} | changes


def bad_calls() -> Iterator[Any]:
    batch = small()["batch"]
    for name, changes in {
        "want 3, 4, 4 dims": {"q": torch.zeros(2, 64)},
        "for all three": {"k_cache": torch.zeros(1, 16, 2, 16, dtype=torch.bfloat16)},
        "differ before the last": {"v_cache": torch.zeros(2, 16, 2, 8)},
        "pages of 12 keys": {"k_cache": torch.zeros(1, 12, 2, 16), "v_cache": torch.zeros(1, 12, 2, 8)},
        "want a multiple": {"q": torch.zeros(2, 3, 16)},
        "multiples of 8": {"v_cache": torch.zeros(1, 16, 2, 7)},
        "contiguous along": {"q": torch.zeros(2, 16, 4).transpose(1, 2)},
        "window=0": {"window": 0},
        "scale=-1.0": {"scale": -1.0},
        "want floats": {"sinks": torch.zeros(3)},
        "page_table is torch.int64": {"batch": replace(batch, page_table=batch.page_table.long())},
        "want \\[R, P\\]": {"batch": replace(batch, start=batch.start[:1])},
        "longest_key=2": {"batch": replace(batch, longest_key=2)},
        "ascending": {"batch": replace(batch, start=torch.tensor([1, 2], dtype=torch.int32))},
        "own \\[2\\] tokens": {"batch": replace(batch, length=torch.tensor([1], dtype=torch.int32))},
    }.items():
        yield pytest.param(name, changes, id=name)


@compiled
@pytest.mark.parametrize(("message", "changes"), bad_calls())
def test_bad_calls_are_refused_in_one_line(message: str, changes: dict[str, Any]) -> None:
    assert not paged_attention(**small()).any()
    with pytest.raises(FormatError, match=message) as caught:
        paged_attention(**small(**changes))
    assert "\n" not in str(caught.value)


@compiled
def test_backends_by_name() -> None:
    with pytest.raises(UnsupportedError, match="not one of"):
        paged_attention(**small(), backend="cuda")
    with pytest.raises(UnsupportedError, match="needs a CUDA tensor"):
        paged_attention(**small(), backend="triton")


@compiled
def test_hopper_code_is_what_speed_and_invariance_rest_on() -> None:
    """Asynchronous 16-byte copies, no wgmma, products that flush nothing, one instruction, and it fits."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    from kernels.paged_attention.kernel import compile_cases

    layouts = set()
    for name, function, signature, constants, options in compile_cases():
        index = {n: (function.arg_names.index(n),) for n in signature}
        aligned = {index[n]: [["tt.divisibility", 16]] for n, kind in signature.items() if kind.startswith("*")}
        ast = triton.compiler.ASTSource(function, signature, {index[n]: v for n, v in constants.items()}, aligned)
        code = triton.compile(ast, target=GPUTarget("cuda", 90, 32), options=options)
        ptx, layout = code.asm["ptx"], code.asm["ttgir"]
        assert "wgmma" not in ptx and not re.search(r"(mul|add|fma)[.\w]*\.ftz", ptx), name
        assert code.metadata.shared <= 227 * 1024, name
        if name != "merge":
            assert re.search(r"cp\.async\.cg\.shared\.global .*0x10", ptx), name
            layouts.add(
                (*re.findall(r"kWidth = \d+", layout)[:1], *set(re.findall(r"instrShape = \[[\d, ]+\]", layout)))
            )
    assert len(layouts) == 1 and len(layouts.pop()) == 2
