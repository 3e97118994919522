"""Assertions on kernels.sampling that hold for the reference, under the interpreter and on a GPU."""

import torch
from torch import Tensor

import kernels.sampling as ops
from core.generate.sampling import Sampling
from core.generate.sampling import probabilities as core_probabilities
from kernels.sampling import Params, reference

# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, words.
PUBLISHED = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]

# temperature, top_p, top_k: greedy, plain, each cut, both, edges of their ranges.
SETTINGS = [
    (0.0, 1.0, 0), (1.0, 1.0, 0), (0.7, 0.9, 0), (1.3, 1.0, 5), (0.8, 0.6, 20), (1.0, 1e-6, 0), (2.0, 0.999, 1),
    (1e-4, 0.5, 0), (1e-40, 1.0, 0), (0.0, 0.5, 3), (50.0, 0.95, 10**6), (0.3, 1.0, 1),
]  # fmt: skip


def params_of(settings: list[tuple[float, float, int]], device: str, seed: int = 7, cut: bool = True) -> Params:
    temperature, top_p, top_k = zip(*settings, strict=True)
    return Params(
        torch.tensor(temperature, dtype=torch.float32, device=device),
        torch.tensor(top_p, dtype=torch.float32, device=device),
        torch.tensor(top_k, dtype=torch.int32, device=device),
        torch.arange(len(settings), device=device) * 1_000_003 + seed,
        cut,
    )


def rows_of(params: Params, index: Tensor) -> Params:
    return Params(params.temperature[index], params.top_p[index], params.top_k[index], params.seed[index], params.cut)


def logits_of(rows: int, size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Like a model's: most far below a few; some equal, some excluded, both zeros."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, size, generator=generator) * 4
    logits = torch.where(torch.rand(rows, size, generator=generator) < 0.2, logits.round(), logits)
    logits = torch.where(torch.rand(rows, size, generator=generator) < 0.05, float("-inf"), logits)
    logits[:, -1] = 0.5  # at least one is finite
    if size > 8:
        logits[:, 3], logits[:, 5] = 0.0, -0.0
    return logits.to(dtype)


def assert_equal_reference(size: int, device: str, dtype: torch.dtype, seed: int = 0) -> None:
    """Weights, hence probabilities and tokens, are the CPU reference's bit for bit, for every setting at once."""
    logits = logits_of(len(SETTINGS), size, seed, dtype)
    for cut in (True, False):
        params = params_of(SETTINGS, "cpu", seed, cut)
        there = params_of(SETTINGS, device, seed, cut)
        expected = reference.probabilities(logits, params)
        for backend in ("triton", "reference"):
            found = ops.probabilities(logits.to(device), there, backend=backend).cpu()
            assert torch.equal(found, expected), f"{backend}, cut={cut}"
        at = torch.arange(len(SETTINGS)) * 17 + seed
        token = reference.sample(logits, params, at, stream=ops.DRAFT)
        for backend in ("triton", "reference"):
            found = ops.sample(logits.to(device), there, at.to(device), stream=ops.DRAFT, backend=backend)
            assert torch.equal(found.cpu(), token), f"{backend}, cut={cut}"


def assert_means_the_same_as_core(size: int, device: str, backend: str) -> None:
    """Without equal logits at top-p's edge, where both definitions leave a choice."""
    generator = torch.Generator().manual_seed(size)
    logits = torch.randn(len(SETTINGS), size, generator=generator) * 3
    found = ops.probabilities(logits.to(device), params_of(SETTINGS, device), backend=backend).cpu()
    for row, (temperature, top_p, top_k) in enumerate(SETTINGS):
        if temperature == 0:
            expected = torch.nn.functional.one_hot(logits[row].argmax(), size).float()
        elif temperature < 1e-30:
            continue  # core divides by it and has no finite logit left
        else:
            expected = core_probabilities(logits[row], Sampling(temperature, top_p, top_k))
        torch.testing.assert_close(found[row], expected, rtol=2e-5, atol=1e-6)
        assert int((found[row] > 1e-9).sum()) == int((expected > 1e-9).sum()), SETTINGS[row]


def assert_rows_do_not_meet(size: int, device: str, backend: str) -> None:
    """Alone, in any order, among any others: a row keeps its bits."""
    logits, params = logits_of(len(SETTINGS), size).to(device), params_of(SETTINGS, device)
    position = torch.arange(len(SETTINGS), device=device) * 11
    prob = ops.probabilities(logits, params, backend=backend)
    token = ops.sample(logits, params, position, backend=backend)
    for index in ([4], [11, 4, 4, 0, 8]):
        some = torch.tensor(index, device=device)
        assert torch.equal(ops.probabilities(logits[some], rows_of(params, some), backend=backend), prob[some])
        assert torch.equal(
            ops.sample(logits[some], rows_of(params, some), position[some], backend=backend), token[some]
        )


def assert_unusable_rows_are_marked(device: str, backend: str) -> None:
    logits = torch.zeros(5, 7, device=device)
    logits[0, 2], logits[1, 6] = float("nan"), float("inf")
    logits[2] = float("-inf")
    logits[3, :6] = float("-inf")
    logits[0, 3] = -float("nan")
    for temperature in (0.0, 1.0):
        params = params_of([(temperature, 0.9, 3)] * 5, device)
        found = ops.sample(logits, params, torch.arange(5, device=device), backend=backend).tolist()
        assert found[:4] == [-1, -1, -1, 6]
        assert 0 <= found[4] < 7
        prob = ops.probabilities(logits, params, backend=backend)
        assert prob[:3].isnan().all()
        assert prob[3].tolist() == [0.0] * 6 + [1.0]


def assert_ties(device: str, backend: str) -> None:
    """Greedy takes the lowest id; equal logits at an edge are all kept; zeros of both signs are equal."""
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0, 2.0, 0.0, -0.0]], device=device)

    def kept(temperature: float, top_p: float, top_k: int, values: Tensor = logits) -> list[int]:
        params = params_of([(temperature, top_p, top_k)], device)
        return ops.probabilities(values, params, backend=backend)[0].nonzero().flatten().tolist()

    assert kept(0.0, 1.0, 0) == [1]
    assert kept(1.0, 1.0, 1) == [1, 3]
    assert kept(1.0, 1.0, 3) == [1, 2, 3, 4, 5]
    assert kept(1.0, 1e-9, 0) == [1, 3]
    assert kept(1.0, 0.7, 0) == [1, 2, 3, 4, 5]
    assert kept(1.0, 1.0, 7) == list(range(8))
    assert kept(0.0, 1.0, 0, logits[:, 6:].flip(1).contiguous()) == [0]
    # A share that is met exactly needs no further token: two of four equal halves' worth.
    even = torch.tensor([[0.0, 0.0, -100.0, -100.0]], device=device)
    assert kept(1.0, 1.0, 0, even) == [0, 1]
    halves = torch.log2(torch.tensor([[1.0, 0.5, 0.25, 0.25]], device=device))
    assert kept(1 / 0.6931471805599453, 0.75, 0, halves) == [0, 1]
    assert kept(1 / 0.6931471805599453, 0.7500001, 0, halves) == [0, 1, 2, 3]
