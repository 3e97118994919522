"""The engine on a GPU: against the definitions, with and without a drafter, in any company, and replayed."""

from typing import Any

import pytest
import torch

from infer.request import Request, SamplingParams
from tests import runtime_cases as cases

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(scope="module", params=cases.FAMILIES)
def made(request: Any, tmp_path_factory: Any) -> Any:
    return cases.both_folders(tmp_path_factory.mktemp("runtime"), request.param)


def test_logits_are_the_reference_backends(made: Any) -> None:
    """BF16 on the GPU against FP32 in plain torch on the CPU: no further than plain BF16 on the CPU is."""
    from infer.score import scored

    ids = torch.randint(0, 64, (90,), generator=torch.Generator().manual_seed(1)).tolist()

    def logits(**options: Any) -> torch.Tensor:
        return torch.cat([part.float().cpu() for _, part in scored(cases.engine(made[0], **options), ids)])

    exact = logits(device="cpu", backend="reference")
    rounded = logits(device="cpu", backend="reference", dtype="bfloat16")
    found = logits(device="cuda", dtype="bfloat16")
    assert (found - exact).norm() <= 1.25 * (rounded - exact).norm()


@pytest.mark.parametrize("graphs", [False, True])
def test_a_drafter_changes_no_token(made: Any, graphs: bool) -> None:
    """Greedy and sampled without a drafter once; greedy with it in several companies: identical."""
    model, drafter, _, _ = made
    given = cases.prompts(24)
    options: dict[str, Any] = {"device": "cuda", "dtype": "bfloat16", "graphs": graphs}
    alone = {
        p.id: cases.generated(cases.engine(model, rows=1, **options), [p], max_tokens=100)[p.id] for p in given[:6]
    }
    plain = cases.generated(cases.engine(model, **options), given, max_tokens=100)
    drafted = cases.engine(model, drafter, rows=16, **options)
    assert cases.generated(drafted, given, max_tokens=100) == plain
    assert drafted.stats().accepted > 0
    assert {i: plain[i] for i in alone} == alone


def test_seeds_repeat_in_any_company(made: Any) -> None:
    model, drafter, _, _ = made
    given = cases.prompts(12)
    options: dict[str, Any] = {"device": "cuda", "dtype": "bfloat16"}

    def run(rows: int, order: int) -> dict[str, list[int]]:
        engine = cases.engine(model, drafter, rows=rows, **options)
        for prompt in given[::order]:
            params = SamplingParams(temperature=1.0, top_p=0.9, max_tokens=60, seed=int(prompt.id), ignore_eos=True)
            engine.add(Request(prompt.id, prompt.ids, params))
        return cases.drained(engine)[0]

    assert run(12, 1) == run(3, -1)
