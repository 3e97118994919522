"""The engine on a GPU: against the definitions, with and without a drafter, in any company, and replayed."""

from typing import Any

import pytest
import torch

from infer.request import Request, SamplingParams
from tests import runtime_cases as cases

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

GPU: dict[str, Any] = {"device": "cuda", "dtype": "bfloat16", "kv_tokens": 16384}


@pytest.fixture(scope="module", params=cases.FAMILIES)
def made(request: Any, tmp_path_factory: Any) -> Any:
    return cases.both_folders(tmp_path_factory.mktemp("runtime"), request.param)


def test_logits_are_the_reference_backends(made: Any) -> None:
    """BF16 on the GPU against FP32 in plain torch on the CPU: no further than plain BF16 on the CPU is, at the median
    position. Where rounding turns a choice of experts, which differs between any two BF16 runs, one position has more
    error than all others together, so a norm over positions would compare those."""
    from infer.score import scored

    ids = torch.randint(0, 64, (90,), generator=torch.Generator().manual_seed(1)).tolist()

    def logits(**options: Any) -> torch.Tensor:
        return torch.cat([part.float().cpu() for _, part in scored(cases.engine(made[0], **options), ids)])

    exact = logits(device="cpu", backend="reference")
    rounded = logits(device="cpu", backend="reference", dtype="bfloat16")
    found = logits(**GPU)
    assert (found - exact).norm(dim=1).median() <= 1.25 * (rounded - exact).norm(dim=1).median()


@pytest.mark.parametrize("graphs", [False, True])
def test_a_drafter_changes_no_token(made: Any, graphs: bool) -> None:
    """10,000 greedy tokens with a drafter and without, in any company, launched and recorded: identical."""
    model, drafter, _, _ = made
    given = cases.prompts(50)
    options: dict[str, Any] = GPU | {"graphs": graphs}
    alone = {
        p.id: cases.generated(cases.engine(model, rows=1, **options), [p], max_tokens=200)[p.id] for p in given[:3]
    }
    plain = cases.generated(cases.engine(model, **options), given, max_tokens=200)
    drafted = cases.engine(model, drafter, rows=16, **options)
    assert cases.generated(drafted, given, max_tokens=200) == plain
    assert sum(map(len, plain.values())) == 10_000 and drafted.stats().accepted > 0
    assert {i: plain[i] for i in alone} == alone


def test_a_step_replays_a_thousand_times_in_the_same_bits(made: Any) -> None:
    """Every graph that serving recorded: a step of decoding or verification writes what it wrote before."""
    model, drafter, _, _ = made
    for drafts in (None, drafter):
        running = cases.engine(model, drafts, rows=8, **GPU)
        cases.generated(running, cases.prompts(8), max_tokens=40)
        assert running.runner.graphs.recorded
        for one in running.runner.graphs.recorded.values():
            one.graph.replay()
            results = [one.outcome.logits, one.outcome.token, one.outcome.accepted]
            results += [one.outcome.walked.tokens] if one.outcome.walked else []
            first, changed = [t.clone() for t in results], torch.zeros((), dtype=torch.int64, device="cuda")
            for _ in range(1000):
                one.graph.replay()
                changed += sum((a != b).sum() for a, b in zip(first, results, strict=True))
            assert first[0].isfinite().all() and changed.item() == 0


def test_seeds_repeat_in_any_company(made: Any) -> None:
    model, drafter, _, _ = made
    given = cases.prompts(12)
    options = GPU

    def run(rows: int, order: int) -> dict[str, list[int]]:
        engine = cases.engine(model, drafter, rows=rows, **options)
        for prompt in given[::order]:
            params = SamplingParams(temperature=1.0, top_p=0.9, max_tokens=60, seed=int(prompt.id), ignore_eos=True)
            engine.add(Request(prompt.id, prompt.ids, params))
        return cases.drained(engine)[0]

    assert run(12, 1) == run(3, -1)
