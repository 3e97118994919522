"""The engine behind core's generation interface: the plain generator's replies and rounds, and the target's law."""

from pathlib import Path
from typing import Any

import pytest
import torch

from core.errors import ConfigError
from core.generate.interface import Generator, Prompt
from core.generate.sampling import Sampling
from draft_training.distribution import g_test
from infer.generator import EngineGenerator, RoundLog
from tests import runtime_cases as cases


@pytest.fixture(scope="module")
def made(tmp_path_factory: Any) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield cases.both_folders(tmp_path_factory.mktemp("generator"), "mimo pro")
    torch.set_num_threads(before)


def generator(folder: Path, drafter: Path | None, **options: Any) -> Generator:
    log = RoundLog()
    return EngineGenerator(cases.engine(folder, drafter, adaptive=False, on_round=log.take, **options), log)


def test_greedy_replies_and_rounds_are_the_plain_generators(made: Any) -> None:
    folder, drafter, model, module = made
    sampling = Sampling(max_new_tokens=20)
    wanted = cases.with_drafter(model, module, cases.prompts(), 20)
    for reply in generator(folder, drafter).generate(cases.prompts(), sampling):
        assert (reply.ids, reply.stop) == (wanted[reply.id].ids, wanted[reply.id].stop)
        own, other = reply.rounds, wanted[reply.id].rounds
        assert len(own) == len(other) and sum(r.committed for r in own) == sum(r.committed for r in other) == 19
        assert [r.accepted for r in own[:-1]] == [r.accepted for r in other[:-1]]
        assert own[-1].stop == "length"


@pytest.mark.parametrize("drafter", [False, True])
def test_sampled_tokens_have_the_targets_distribution(made: Any, drafter: bool) -> None:
    """Second token after fixed first ones, over 3,000 replies: with a drafter it went through acceptance."""
    folder, drafter_folder, model, _ = made
    prompt = cases.prompts()[2].ids
    count = 3000
    engine = generator(folder, drafter_folder if drafter else None, rows=256, step_tokens=4096)
    given = [Prompt(str(i), prompt) for i in range(count)]
    replies = [r.ids for r in engine.generate(given, Sampling(temperature=0.7, max_new_tokens=2, seed=1))]
    with torch.no_grad():
        first = (model(input_ids=torch.tensor([prompt])).logits[0, -1] / 0.7).softmax(-1)
    assert g_test(torch.bincount(torch.tensor([r[0] for r in replies]), minlength=64), first)[2] > 1e-3
    common = int(first.argmax())
    with torch.no_grad():
        second = (model(input_ids=torch.tensor([[*prompt, common]])).logits[0, -1] / 0.7).softmax(-1)
    seconds = torch.tensor([r[1] for r in replies if r[0] == common])
    assert len(seconds) > 300
    assert g_test(torch.bincount(seconds, minlength=64), second)[2] > 1e-3


def test_faults_are_named_and_leave_nothing_behind(made: Any) -> None:
    folder, drafter, *_ = made
    engine = cases.engine(folder, drafter)
    made_by = EngineGenerator(engine)
    for given in ([Prompt("a", [])], [Prompt("a", [1]), Prompt("a", [2])]):
        with pytest.raises(ConfigError):
            list(made_by.generate(given, Sampling(max_new_tokens=2)))
    replies = made_by.generate(cases.prompts(), Sampling(max_new_tokens=50))
    next(iter(replies))
    replies.close()  # type: ignore[attr-defined]
    engine.step()
    assert engine.stats().running == engine.stats().waiting == 0 and engine.stats().kv_used == 0


def test_rounds_of_an_abandoned_reply_are_not_the_next_ones(made: Any) -> None:
    folder, drafter, *_ = made
    log = RoundLog()
    made_by = EngineGenerator(cases.engine(folder, drafter, adaptive=False, on_round=log.take), log)
    sampling = Sampling(max_new_tokens=30)
    fresh = {r.id: r.rounds for r in made_by.generate(cases.prompts(), sampling)}
    replies = made_by.generate(cases.prompts(), sampling)
    next(iter(replies))
    replies.close()  # type: ignore[attr-defined]
    assert not log.found
    assert {r.id: r.rounds for r in made_by.generate(cases.prompts(), sampling)} == fresh
