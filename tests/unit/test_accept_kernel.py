"""kernels.accept without a GPU: the rule's distribution, its exact cases, and Triton against the definition.

Triton chooses its interpreter when it is imported, and other tests import it first. So this file runs the plain-torch
cases here, and itself once more in a child process under TRITON_INTERPRET=1, which adds the Triton cases.

The distribution is tested on the reference alone: Triton gives the same bits.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import kernels.sampling as sampling
from core.errors import ConfigError, UnsupportedError
from draft_training.distribution import g_test
from kernels.accept import accept, implementation, reference
from kernels.sampling.reference import noise, pick, probabilities, sample, share, weights
from tests import accept_cases as cases
from tests.sampling_cases import logits_of, params_of, rows_of

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["reference", "triton"] if INTERPRETED else ["reference"]
SAMPLES = 50_000

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


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter's run")
@pytest.mark.parametrize(
    ("size", "drafts", "given", "dtype"),
    [
        (1, 1, True, torch.float32), (33, 3, False, torch.float32), (33, 3, True, torch.bfloat16),
        (4097, 1, True, torch.float32), (4097, 1, False, torch.bfloat16),
    ],
)  # fmt: skip
def test_triton_equals_the_reference(size: int, drafts: int, given: bool, dtype: torch.dtype) -> None:
    accepted = cases.assert_equal_reference(cases.round_of(size, drafts, given, dtype=dtype), "cpu")
    assert size == 1 or len(accepted.unique()) > 1, "every row ended at the same slot: nothing was compared"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_without_drafts_is_sample(backend: str) -> None:
    cases.assert_no_drafts_is_sample("cpu", backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_greedy_rows_keep_the_drafts_that_equal_the_argmax(backend: str) -> None:
    cases.assert_greedy_rows_keep_equal_drafts("cpu", backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_probability_is_never_accepted(backend: str) -> None:
    cases.assert_zero_probability_is_never_accepted("cpu", backend, 3 if backend == "triton" else 2000)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_do_not_meet(backend: str) -> None:
    cases.assert_rows_do_not_meet("cpu", backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_unusable_logits_are_marked(backend: str) -> None:
    cases.assert_unusable_logits_are_marked("cpu", backend)


Verifier = Callable[[cases.Round], tuple[Tensor, Tensor]]


def exact(one: cases.Round) -> tuple[Tensor, Tensor]:
    return one.verdict("reference")


def biased(one: cases.Round) -> tuple[Tensor, Tensor]:
    """Wrong on purpose: the first draft is accepted 1.1 times as often as the rule says."""
    accepted, token = exact(one)
    weight = weights(one.logits[:, 0], one.params)
    q = None if one.q is None else one.q[:, 0]
    taken = reference.taken_of(weight.sum(-1), one.draft[:, 0], q, one.logits.shape[-1])
    here = reference.at(weight, one.draft[:, 0])
    word = noise(one.params.seed, one.position, sampling.ACCEPT)
    hit = share(word, reference.at(taken, one.draft[:, 0])) < (here.double() * 1.1).long()
    return torch.where(hit, accepted.clamp(min=1), accepted), token


def no_residual(one: cases.Round) -> tuple[Tensor, Tensor]:
    """Wrong on purpose: after a rejection it draws from p."""
    accepted, token = exact(one)
    again = pick(weights(one.logits[:, 0], one.params), noise(one.params.seed, one.position, sampling.RESIDUAL))
    return accepted, torch.where(accepted == 0, again, token)


def shared_noise(one: cases.Round) -> tuple[Tensor, Tensor]:
    """Wrong on purpose: the residual is drawn by the noise of the test that failed, which is known to be large."""
    accepted, token = exact(one)
    weight = weights(one.logits[:, 0], one.params)
    q = None if one.q is None else one.q[:, 0]
    taken = reference.taken_of(weight.sum(-1), one.draft[:, 0], q, one.logits.shape[-1])
    again = pick((weight - taken).clamp(min=0), noise(one.params.seed, one.position, sampling.ACCEPT))
    return accepted, torch.where(accepted == 0, again, token)


def many_rounds(given: bool, setting: tuple[float, float, int], seed: int) -> tuple[cases.Round, Tensor]:
    """(SAMPLES rounds of one prefix, drafts from the drafter's own stream; target probabilities [K + 1, V])."""
    size, drafts = 12, 2
    logits = logits_of(drafts + 1, size, seed) / 3
    drafter = logits[:-1] + torch.randn(drafts, size, generator=torch.Generator().manual_seed(seed))
    row = torch.zeros(SAMPLES, dtype=torch.int64)
    params = rows_of(params_of([setting], "cpu"), row)
    position = torch.arange(SAMPLES) * (drafts + 1)
    if given:
        own = rows_of(params_of([(1.0, 1.0, 0)], "cpu"), row)
        wide = [drafter[k : k + 1].expand(SAMPLES, -1) for k in range(drafts)]
        draft = torch.stack([sample(wide[k], own, position + k, sampling.DRAFT) for k in range(drafts)], dim=1)
        q = torch.stack([probabilities(w, own) for w in wide], dim=1)
    else:
        draft, q = drafter.argmax(-1).expand(SAMPLES, -1).contiguous(), None
    whole = logits.expand(SAMPLES, -1, -1).contiguous()
    drafted = torch.full((SAMPLES,), drafts, dtype=torch.int32)
    prob = probabilities(logits, rows_of(params_of([setting], "cpu"), row[: drafts + 1]))
    return cases.Round(draft, q, whole, params, position, drafted), prob


def p_values(one: cases.Round, prob: Tensor, verify: Verifier) -> list[float]:
    """G-tests of the first token, and of the second among rounds that have one, against the target."""
    accepted, token = verify(one)
    first = torch.where(accepted > 0, one.draft[:, 0], token)
    second = torch.where(accepted > 1, one.draft[:, 1], token)[accepted > 0]
    third = token[accepted == 2]
    return [
        g_test(torch.bincount(seen, minlength=prob.shape[1]), prob[slot])[2]
        for slot, seen in enumerate((first, second, third))
        if len(seen) > 1000
    ]


@pytest.mark.parametrize("setting", [(1.0, 1.0, 0), (0.8, 0.9, 0), (1.3, 0.95, 6)])
@pytest.mark.parametrize("given", [False, True])
def test_tokens_have_the_targets_distribution(given: bool, setting: tuple[float, float, int]) -> None:
    """50,000 rounds; each position of the round by itself. Wrong verifiers on the same rounds must be found out."""
    one, prob = many_rounds(given, setting, seed=5)
    found = p_values(one, prob, exact)
    assert len(found) >= 2 and min(found) > 1e-3 / len(found), found
    for wrong in (biased, no_residual, shared_noise):
        assert min(p_values(one, prob, wrong)) < 1e-6, f"no power: {wrong.__name__} would have passed"


def test_the_drafters_own_distribution_is_always_accepted() -> None:
    """p = q: a rejection has no more probability than the rounding of q."""
    logits = logits_of(1, 30, seed=1).expand(4000, 2, -1).contiguous()
    params = rows_of(params_of([(0.9, 0.95, 0)], "cpu"), torch.zeros(4000, dtype=torch.int64))
    position = torch.arange(4000) * 3
    draft = sample(logits[:, 0], params, position, sampling.DRAFT)[:, None]
    q = probabilities(logits[:, 0], params)[:, None]
    accepted, _ = reference.accept(draft, q, logits, params, position, torch.ones(4000, dtype=torch.int32))
    assert accepted.sum() == 4000


def test_checks() -> None:
    one = cases.round_of(9, 2, given=True)
    assert one.q is not None
    rows = len(one.draft)
    for change, message in (
        ({"draft": one.draft.int()}, r"draft is torch.int32"),
        ({"draft": one.draft[:, :1].contiguous()}, rf"logits are .*: expected contiguous .* \[{rows}, 2, V\]"),
        ({"logits": one.logits.half()}, "logits are torch.float16"),
        ({"q": one.q[:, :1]}, r"q is torch.float32 .*expected contiguous"),
        ({"q": one.q.double()}, "q is torch.float64"),
        ({"position": one.position.int()}, "position is torch.int32"),
        ({"drafted": one.drafted.long()}, "drafted is torch.int64"),
    ):
        with pytest.raises(ConfigError, match=message):
            accept(**{**vars(one), **change})
    with pytest.raises(UnsupportedError, match="'cuda' is not one of"):
        one.verdict("cuda")


def test_backend_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    value = torch.zeros(1)
    if INTERPRETED:
        assert implementation(value, "auto").__name__ == "kernels.accept.kernel"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert implementation(value, "auto") is reference
    with pytest.raises(UnsupportedError, match="needs a CUDA tensor"):
        implementation(value, "triton")
