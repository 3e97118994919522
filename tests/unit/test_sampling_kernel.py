"""kernels.sampling without a GPU: the definition against published vectors, float64 and core; Triton against it.

Triton chooses its interpreter when it is imported, and other tests import it first. So this file runs the plain-torch
cases here, and itself once more in a child process under TRITON_INTERPRET=1, which adds the Triton cases.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels.sampling as ops
from core.errors import ConfigError, UnsupportedError
from draft_training.distribution import g_test
from kernels.sampling import reference
from tests import sampling_cases as cases

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["reference", "triton"] if INTERPRETED else ["reference"]

# The interpreter's products wrap as the hardware's do, and rows that cannot be used hold NaN; numpy reports both.
pytestmark = pytest.mark.filterwarnings(
    "ignore:overflow encountered", "ignore:invalid value encountered", "ignore:divide by zero encountered"
)


@pytest.mark.skipif(INTERPRETED, reason="this is the run under the interpreter")
def test_everything_again_under_the_triton_interpreter() -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).resolve())]
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    child = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600)
    assert child.returncode == 0, child.stdout[-8000:] + child.stderr[-2000:]


def words(text: str) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([int(w, 16)]) for w in text.split())


@pytest.mark.parametrize(("counter", "key", "expected"), cases.PUBLISHED)
def test_philox_gives_the_published_words(counter: str, key: str, expected: str) -> None:
    assert reference.philox(words(counter), words(key)) == words(expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_uniform_is_the_first_published_word(backend: str) -> None:
    """The counter (position, stream, 0) and the seed's two halves, with the first vector, and every bit of both."""
    zero = torch.zeros(1, dtype=torch.int64)
    assert ops.uniform(zero, zero, 0, backend=backend).item() == (0x6627E8D5 >> 8) * 2.0**-24
    generator = torch.Generator().manual_seed(0)
    seed = torch.randint(-(2**63), 2**63 - 1, (300,), generator=generator)
    position = torch.randint(-(2**63), 2**63 - 1, (300,), generator=generator)
    found = ops.uniform(seed, position, 3, backend=backend)
    assert torch.equal(found, reference.uniform(seed, position, 3))
    halves = (position & 0xFFFFFFFF, position >> 32 & 0xFFFFFFFF, zero + 3, zero)
    word = reference.philox(halves, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))[0]
    assert torch.equal(found.double() * 2**24, (word >> 8).double())
    assert found.min() >= 0 and found.max() < 1
    assert not torch.equal(found, ops.uniform(seed, position, 2, backend=backend))


def test_uniform_is_uniform_and_positions_are_independent() -> None:
    size = 50_000
    value = reference.uniform(torch.full((size,), 42), torch.arange(size), 0)
    counts = torch.bincount((value * 64).long(), minlength=64)
    assert g_test(counts, torch.ones(64))[2] > 1e-3
    other = reference.uniform(torch.full((size,), 43), torch.arange(size), 0)
    for a, b in (
        (value[:-1], value[1:]),
        (value, other),
        (value, reference.uniform(torch.full((size,), 42), torch.arange(size), 1)),
    ):
        pairs = torch.bincount((a * 8).long() * 8 + (b * 8).long(), minlength=64)
        assert g_test(pairs, torch.ones(64))[2] > 1e-3


def test_share_is_exact() -> None:
    generator = torch.Generator().manual_seed(1)
    word = torch.cat((torch.randint(0, 2**32, (500,), generator=generator), torch.tensor([0, 1, 2**32 - 1, 2**32])))
    total = torch.cat(
        (torch.randint(0, 2**58, (500,), generator=generator), torch.tensor([2**58, 2**58, 2**58, 2**58]))
    )
    expected = [w * t >> 32 for w, t in zip(word.tolist(), total.tolist(), strict=True)]
    assert reference.share(word, total).tolist() == expected


def test_weights_are_the_exponentials() -> None:
    """Against float64: 2e-7 of the polynomial, 1e-7 of each of three roundings of an exponent of up to 28."""
    logits = torch.linspace(-27, 0, 4001)[None]
    for temperature in (1.0, 0.7, 3.0):
        found = reference.exponential(logits, torch.tensor([temperature]))[0].double() / 2**40
        exact = (logits[0].double() / float(torch.tensor(temperature))).exp()
        assert ((found - exact).abs() <= exact * 6e-6 + 2.0**-40).all()
    assert reference.exponential(torch.tensor([[0.0, -28.0, -1e30]]), torch.ones(1)).tolist() == [[2**40, 0, 0]]


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter's run")
@pytest.mark.parametrize(
    ("size", "dtype"),
    [(1, torch.float32), (33, torch.float32), (4096, torch.bfloat16), (4097, torch.float32), (8200, torch.bfloat16)],
)
def test_triton_equals_the_reference(size: int, dtype: torch.dtype) -> None:
    cases.assert_equal_reference(size, "cpu", dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1, 31, 300])
def test_means_the_same_as_core(size: int, backend: str) -> None:
    cases.assert_means_the_same_as_core(size, "cpu", backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_do_not_meet(backend: str) -> None:
    cases.assert_rows_do_not_meet(4100 if backend == "triton" else 9000, "cpu", backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_unusable_rows_are_marked(backend: str) -> None:
    cases.assert_unusable_rows_are_marked("cpu", backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties(backend: str) -> None:
    cases.assert_ties("cpu", backend)


@pytest.mark.parametrize("setting", [(1.0, 1.0, 0), (0.7, 0.9, 0), (1.5, 1.0, 6), (0.9, 0.8, 9)])
def test_tokens_have_the_distribution(setting: tuple[float, float, int]) -> None:
    """50,000 positions of one request."""
    rows = 50_000
    logits = cases.logits_of(1, 40, seed=3)
    params = cases.rows_of(cases.params_of([setting], "cpu"), torch.zeros(rows, dtype=torch.int64))
    token = reference.sample(logits.expand(rows, -1), params, torch.arange(rows), ops.SAMPLE)
    counts = torch.bincount(token, minlength=40)
    prob = reference.probabilities(logits, cases.params_of([setting], "cpu"))[0]
    assert g_test(counts, prob)[2] > 1e-3
    other = reference.probabilities(logits, cases.params_of([(setting[0] * 1.05, *setting[1:])], "cpu"))[0]
    assert g_test(counts, other)[2] < 1e-3, "no power: a temperature 5 % off would have passed"


def test_the_vocabulary_may_be_a_slice_of_a_padded_head() -> None:
    padded = cases.logits_of(len(cases.SETTINGS), 130)
    params, position = cases.params_of(cases.SETTINGS, "cpu"), torch.arange(len(cases.SETTINGS))
    for backend in BACKENDS:
        found = ops.sample(padded[:, :100], params, position, backend=backend)
        assert torch.equal(found, ops.sample(padded[:, :100].contiguous(), params, position, backend=backend))


def test_no_rows() -> None:
    params = cases.rows_of(cases.params_of([(1.0, 0.9, 2)], "cpu"), torch.zeros(0, dtype=torch.int64))
    for backend in BACKENDS:
        assert ops.sample(torch.zeros(0, 9), params, torch.zeros(0, dtype=torch.int64), backend=backend).shape == (0,)


def test_checks() -> None:
    logits, params, position = torch.zeros(2, 9), cases.params_of([(1.0, 1.0, 0)] * 2, "cpu"), torch.arange(2)
    for bad, message in (
        (logits.half(), r"logits are torch.float16 \(2, 9\): expected"),
        (logits[0], r"\(9,\): expected"),
        (logits.t()[:2], "must lie beside each other"),
        (torch.zeros(2, 1).expand(2, 2**18 + 1), "vocabulary of 262145: expected 1 to 262144"),
        (torch.zeros(3, 9), r"params.temperature is torch.float32 \(2,\).*\(3,\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            ops.sample(bad, params, position)
    with pytest.raises(ConfigError, match=r"position is torch.int32"):
        ops.sample(logits, params, position.int())
    with pytest.raises(ConfigError, match="stream=-1"):
        ops.sample(logits, params, position, stream=-1)
    with pytest.raises(ConfigError, match="of one shape"):
        ops.uniform(position, position[:1], 0)
    with pytest.raises(UnsupportedError, match="'cuda' is not one of"):
        ops.sample(logits, params, position, backend="cuda")


def test_backend_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    value = torch.zeros(1)
    if INTERPRETED:
        assert ops.implementation(value, "auto").__name__ == "kernels.sampling.kernel"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert ops.implementation(value, "auto") is reference
    with pytest.raises(UnsupportedError, match="needs a CUDA tensor"):
        ops.implementation(value, "triton")
