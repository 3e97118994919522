"""kernels.all_reduce compiled: on one GPU the sum and norm, on two the exchange, late ranks and replays."""

import os
from pathlib import Path

import pytest
import torch

from kernels.all_reduce import Peers, all_reduce_norm
from tests import all_reduce_cases as cases

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("hidden", [96, 2880, 6144])
def test_one_gpu(hidden: int, backend: str) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        peers = Peers(None, cases.TOKENS, hidden, torch.device("cuda"), dtype)
        for seed, rows in enumerate(cases.ROWS):
            cases.assert_call(peers, rows, seed, backend)


def test_memory_that_is_not_aligned_to_16_bytes() -> None:
    hidden = 2880
    peers = Peers(None, 4, hidden, torch.device("cuda"))
    x, residual, weight = torch.randn(3, 4 * hidden, device="cuda").to(torch.bfloat16)
    weight = weight[:hidden].contiguous()
    expected = all_reduce_norm(x.view(4, -1), peers, residual=residual.view(4, -1), weight=weight, eps=cases.EPS)
    for shift in (1, 4):

        def moved(t: torch.Tensor, shift: int = shift) -> torch.Tensor:
            return torch.cat((t.new_zeros(shift), t))[shift:]

        found = all_reduce_norm(
            moved(x).view(4, -1), peers, residual=moved(residual).view(4, -1), weight=moved(weight), eps=cases.EPS
        )
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_a_thousand_replays_on_one_gpu() -> None:
    cases.thousand_replays(Peers(None, cases.TOKENS, 6144, torch.device("cuda")))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("world", [2, 4, 8])
def test_gpus_meet(world: int, tmp_path: Path) -> None:
    """Every rank's bits, ranks that are late by turns, and 1,000 replays of a graph of three calls."""
    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} GPUs")
    cases.assert_group(world, tmp_path, "cuda", dict(os.environ))
