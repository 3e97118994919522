"""kernels.all_reduce without a GPU: two and three processes over gloo, then again through Triton's interpreter.

The interpreter's processes exchange through files that all of them map, so the kernel's own flags and halves work as
they do between GPUs. Triton chooses its interpreter when it is imported: only child processes have it.
"""

import os
from pathlib import Path

import pytest
import torch

from core.errors import ConfigError, UnsupportedError
from kernels.all_reduce import Peers, all_reduce, all_reduce_norm, implementation, reference
from tests import all_reduce_cases as cases

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ["cpu", "interpreter"])
@pytest.mark.parametrize("world", [2, 3])
def test_every_rank_has_the_ordered_sum(world: int, kind: str, tmp_path: Path) -> None:
    if kind == "interpreter":
        pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    cases.assert_order_shows()
    cases.assert_group(
        world, tmp_path, kind, environment | ({"TRITON_INTERPRET": "1"} if kind == "interpreter" else {})
    )


def test_one_rank_needs_no_group() -> None:
    peers = Peers(None, cases.TOKENS, cases.HIDDEN, CPU)
    cases.assert_call(peers, 5, 0, "reference")


def test_checks() -> None:
    peers = Peers(None, 4, 8, CPU)
    x, weight = torch.zeros(2, 8), torch.ones(8)
    for bad, message in (
        (x.half(), "x is torch.float16"),
        (x[:, ::2], r"expected contiguous"),
        (x[0], r"x is torch.float32 \(8,\)"),
        (x.to("meta"), "x is on meta, the peers on cpu"),
    ):
        with pytest.raises(ConfigError, match=message):
            all_reduce(bad, peers)
    for change, message in (
        ({"residual": x[:1]}, r"residual is \(1, 8\)"),
        ({"residual": x.half()}, "residual is torch.float16"),
        ({"weight": weight[:7]}, r"weight is torch.float32 \(7,\)"),
        ({"weight": weight.to(torch.bfloat16)}, "weight is torch.bfloat16"),
    ):
        with pytest.raises(ConfigError, match=message):
            all_reduce_norm(x, peers, **{"residual": x, "weight": weight, "eps": 1e-6} | change)
    with pytest.raises(ConfigError, match="tokens=0"):
        Peers(None, 0, 8, CPU)
    with pytest.raises(UnsupportedError, match="'nccl' is not one of"):
        all_reduce(x, peers, backend="nccl")


def test_buffers_have_a_size() -> None:
    """Of a group that exchanges through memory, whose buffers were made for the largest call."""
    peers = Peers(None, 4, 8, CPU, torch.float32)
    peers.symmetric = True
    for x in (torch.zeros(5, 8), torch.zeros(4, 9), torch.zeros(4, 8, dtype=torch.bfloat16)):
        with pytest.raises(ConfigError, match=r"the peers hold torch.float32 up to \(4, 8\)"):
            all_reduce(x, peers)


def test_backend_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    value = torch.zeros(1)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert implementation(value, "auto") is reference
    with pytest.raises(UnsupportedError, match="needs a CUDA tensor"):
        implementation(value, "triton")
