"""The engine against core's own decoding loop, which shares no code with it, on tiny models of every family."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from core.errors import ConfigError
from core.generate.interface import Prompt
from core.generate.rounds import Round
from infer.request import Request, SamplingParams
from tests import runtime_cases as cases

TOKENS = 24


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Made:
    """A family's folders, its models in core, and their greedy text."""

    def __init__(self, place: Path, family: str, **changes: Any) -> None:
        self.folder, self.drafter_folder, self.model, self.drafter = cases.both_folders(place, family, **changes)
        self.prompts = cases.prompts()
        self.text = cases.greedy(self.model, self.prompts, TOKENS)


@pytest.fixture(scope="module", params=cases.FAMILIES)
def made(request: Any, tmp_path_factory: Any) -> Made:
    return Made(tmp_path_factory.mktemp("made"), request.param)


@pytest.fixture(scope="module")
def mimo(tmp_path_factory: Any) -> Made:
    return Made(tmp_path_factory.mktemp("mimo"), "mimo")


@pytest.mark.parametrize(
    "options", [{}, {"rows": 3, "step_tokens": 7}, {"rows": 6, "kv_tokens": 96, "page_size": 8}],
    ids=("together", "in pieces", "short of pages"),
)  # fmt: skip
def test_greedy_text_is_the_models(made: Made, options: dict[str, Any]) -> None:
    engine = cases.engine(made.folder, **options)
    assert cases.generated(engine, made.prompts, max_tokens=TOKENS) == made.text
    assert engine.stats().kv_used == 0 and (engine.stats().preemptions > 0) == ("kv_tokens" in options)
    if "kv_tokens" not in options:
        assert engine.stats().prompt_tokens == sum(len(p.ids) for p in made.prompts)  # each read once


@pytest.mark.parametrize(
    "options", [{}, {"rows": 2, "step_tokens": 10}, {"rows": 6, "kv_tokens": 96, "page_size": 8}],
    ids=("together", "in pieces", "short of pages"),
)  # fmt: skip
def test_a_drafter_changes_no_greedy_token(made: Made, options: dict[str, Any]) -> None:
    engine = cases.engine(made.folder, made.drafter_folder, **options)
    assert cases.generated(engine, made.prompts, max_tokens=TOKENS) == made.text
    stats = engine.stats()
    assert 0 < stats.accepted < stats.drafted and stats.kv_used == 0
    assert sum(stats.accepted_at) == stats.accepted and (stats.preemptions > 0) == ("kv_tokens" in options)


@pytest.mark.parametrize(
    "changes", [{}, {"causal": True, "selector_top_k": 4, "selector_rank": 8}], ids=("plain", "walk")
)
def test_every_round_is_that_of_the_plain_loop(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Drafts, probabilities, candidates, acceptance: the whole log, but that no draft goes beyond the reply's end."""
    made = Made(tmp_path, "gpt_oss", **changes)
    reference = cases.with_drafter(made.model, made.drafter, made.prompts, TOKENS)
    found: list[Round] = []
    engine = cases.engine(made.folder, made.drafter_folder, adaptive=False, on_round=found.append)
    cases.generated(engine, made.prompts, max_tokens=TOKENS)
    compared = 0
    for prompt in made.prompts:
        own = [r for r in found if r.request == prompt.id]
        for wanted, one in zip(reference[prompt.id].rounds, own, strict=False):
            if one.drafted == wanted.drafted:
                compared += 1
                assert one.probability == pytest.approx(wanted.probability, abs=2e-4)
                for key in ("context", "accepted", "committed", "agree", "hit", "stop", "round"):
                    assert getattr(one, key) == getattr(wanted, key), key
    assert compared > 40


def test_a_prefix_is_read_once_and_the_text_stays_the_same(mimo: Made) -> None:
    engine = cases.engine(mimo.folder, mimo.drafter_folder, page_size=8)
    first = cases.generated(engine, mimo.prompts, max_tokens=TOKENS)
    again = [Prompt(f"again {p.id}", p.ids) for p in mimo.prompts]
    for prompt in again:
        engine.add(Request(prompt.id, prompt.ids, SamplingParams(max_tokens=TOKENS, ignore_eos=True)))
    tokens, last = cases.drained(engine)
    assert [tokens[p.id] for p in again] == [first[p.id] for p in mimo.prompts]
    for prompt in again:
        assert last[prompt.id].cached == (len(prompt.ids) - 1) // 8 * 8  # whole pages, one token left over
    fresh = cases.engine(mimo.folder, prefix_cache=False)
    cases.generated(fresh, mimo.prompts, max_tokens=4)
    assert fresh.stats().prefix_queries == 0 < engine.stats().prefix_hits


@pytest.mark.parametrize("drafter", [False, True])
def test_what_was_read_is_found_again_although_the_reply_ended_at_once(mimo: Made, drafter: bool) -> None:
    """One token a reply, and the pages of a longer reply up to its last token."""
    engine = cases.engine(mimo.folder, mimo.drafter_folder if drafter else None, page_size=8)
    prompt, text = mimo.prompts[5], mimo.text["5"]
    for tokens, more, cached in ((1, 0, 0), (1, 0, 32), (15, 0, 32), (1, 15, 40)):
        engine.add(Request("a", prompt.ids + text[:more], SamplingParams(max_tokens=tokens, ignore_eos=True)))
        found, last = cases.drained(engine)
        assert found["a"] == text[more : more + tokens] and last["a"].cached == cached
    assert engine.stats().kv_used == 0


def test_top_k_is_refused_where_the_device_could_not_hold_it(mimo: Made) -> None:
    """One request beyond int32 would fail a step, and with it everybody else's."""
    with pytest.raises(ConfigError, match="top_k=2147483648: expected"):
        SamplingParams(top_k=2**31)
    engine = cases.engine(mimo.folder)
    engine.add(Request("a", [1], SamplingParams(temperature=1.0, top_k=2**31 - 1, max_tokens=2, ignore_eos=True)))
    assert len(cases.drained(engine)[0]["a"]) == 2


def test_seeds_repeat_whatever_shares_the_batch(mimo: Made) -> None:
    def run(order: int, drafter: Path | None = None, **options: Any) -> dict[str, list[int]]:
        engine = cases.engine(mimo.folder, drafter, **options)
        for p in mimo.prompts[::order]:
            params = SamplingParams(temperature=1.5, top_p=0.95, top_k=40, max_tokens=TOKENS, seed=7, ignore_eos=True)
            engine.add(Request(p.id, p.ids, params))
        return cases.drained(engine)[0]

    plain = run(1)
    assert plain == run(-1, rows=2, step_tokens=5) == run(1, kv_tokens=96, page_size=8, rows=6)
    assert len({tuple(t) for t in plain.values()}) == len(plain)
    drafted = run(1, mimo.drafter_folder)
    assert drafted == run(-1, mimo.drafter_folder, rows=2, step_tokens=10)
    assert drafted == run(1, mimo.drafter_folder, rows=6, kv_tokens=96, page_size=8)


def test_without_a_seed_two_requests_differ(mimo: Made) -> None:
    engine = cases.engine(mimo.folder)
    same = [Prompt(str(i), mimo.prompts[2].ids) for i in range(2)]
    found = cases.generated(engine, same, temperature=2.0, max_tokens=TOKENS)
    assert found["0"] != found["1"]


def test_log_probabilities_are_the_models(mimo: Made) -> None:
    """Also of tokens that came as accepted drafts."""
    prompt = mimo.prompts[3]
    for drafter in (None, mimo.drafter_folder):
        engine = cases.engine(mimo.folder, drafter)
        engine.add(Request("a", prompt.ids, SamplingParams(max_tokens=TOKENS, logprobs=3, ignore_eos=True)))
        found = [lp for output in iter_outputs(engine) for lp in output.logprobs]
        ids = prompt.ids + mimo.text[prompt.id]
        with torch.no_grad():
            logits = mimo.model(input_ids=torch.tensor([ids])).logits[0, len(prompt.ids) - 1 : -1]
        scores = logits.double().log_softmax(-1)
        assert [lp.id for lp in found] == mimo.text[prompt.id]
        for one, row in zip(found, scores, strict=True):
            assert one.logprob == pytest.approx(float(row[one.id]), abs=1e-4)
            best = row.topk(3)
            assert [i for i, _ in one.top] == best.indices.tolist()
            assert [v for _, v in one.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def iter_outputs(engine: Any) -> Iterator[Any]:
    while engine.busy:
        yield from engine.step()


@pytest.mark.parametrize("drafter", [False, True])
def test_ends(mimo: Made, drafter: bool) -> None:
    """At a stop token, which is the last id; at max_tokens; at the context's end."""
    prompt, text = mimo.prompts[4], mimo.text["4"]
    stop = text[7]
    engine = cases.engine(mimo.folder, mimo.drafter_folder if drafter else None, max_length=len(prompt.ids) + 20)
    for name, params in (
        ("stop", SamplingParams(stop_token_ids=(stop,), ignore_eos=True)),
        ("length", SamplingParams(max_tokens=5, ignore_eos=True)),
        ("context", SamplingParams(max_tokens=None, ignore_eos=True)),
    ):
        engine.add(Request(name, prompt.ids, params))
    tokens, last = cases.drained(engine)
    assert tokens["stop"] == text[: text.index(stop) + 1] and last["stop"].finish == "stop"
    assert tokens["length"] == text[:5] and last["length"].finish == "length"
    assert tokens["context"] == text[:20] and last["context"].finish == "length"
    assert engine.stats().running == engine.stats().kv_used == 0


def test_a_stop_inside_an_accepted_draft_ends_the_reply_there(mimo: Made) -> None:
    """With its log probabilities; and no draft is verified beyond a reply's end."""
    rounds: list[Round] = []
    engine = cases.engine(mimo.folder, mimo.drafter_folder, on_round=rounds.append)
    tried = 0
    for p in mimo.prompts:
        text = mimo.text[p.id]
        engine.add(Request(p.id, p.ids, SamplingParams(max_tokens=TOKENS, ignore_eos=True)))
        at = 0
        for output in iter_outputs(engine):
            inner = [i for n, i in enumerate(output.ids[:-1], at) if i not in text[:n]]
            at += len(output.ids)
            if inner:
                tried += 1
                params = SamplingParams(max_tokens=TOKENS, stop_token_ids=(inner[0],), logprobs=0, ignore_eos=True)
                other = cases.engine(mimo.folder, mimo.drafter_folder)
                other.add(Request("s", p.ids, params))
                outputs = list(iter_outputs(other))
                assert [i for o in outputs for i in o.ids] == text[: text.index(inner[0]) + 1]
                assert all([one.id for one in o.logprobs] == list(o.ids) for o in outputs)
                assert outputs[-1].finish == "stop" and other.stats().kv_used == 0
                break
        for _ in iter_outputs(engine):
            pass
    assert tried >= 3
    ends = {p.id: len(p.ids) + TOKENS for p in mimo.prompts}
    assert all(r.context + 1 + r.drafted < ends[r.request] for r in rounds)


def test_the_models_own_end_token_ends_a_reply(mimo: Made) -> None:
    text = mimo.text["4"]
    engine = cases.engine(mimo.folder)
    engine.ends = frozenset({text[3]})
    engine.add(Request("a", mimo.prompts[4].ids, SamplingParams(max_tokens=TOKENS)))
    engine.add(Request("b", mimo.prompts[4].ids, SamplingParams(max_tokens=TOKENS, ignore_eos=True)))
    tokens, last = cases.drained(engine)
    assert tokens["a"] == text[: text.index(text[3]) + 1] and last["a"].finish == "stop"
    assert tokens["b"] == text


def test_cancelled_requests_give_their_pages_back(mimo: Made) -> None:
    engine = cases.engine(mimo.folder, mimo.drafter_folder, rows=2)
    for p in mimo.prompts:
        engine.add(Request(p.id, p.ids, SamplingParams(max_tokens=TOKENS, ignore_eos=True)))
    first = {o.id: list(o.ids) for o in engine.step()}
    engine.cancel("0")  # runs
    engine.cancel("5")  # waits
    engine.cancel("nobody")
    assert engine.busy
    tokens, last = cases.drained(engine)
    assert last["0"].finish == last["5"].finish == "cancelled"
    assert {i: first.get(i, []) + tokens[i] for i in "1234"} == {i: mimo.text[i] for i in "1234"}
    assert engine.stats().kv_used == 0 and not engine.busy and engine.step() == []


def test_the_end_of_a_cancelled_request_is_not_that_of_the_next_one_of_its_name(mimo: Made) -> None:
    engine = cases.engine(mimo.folder)
    engine.add(Request("a", mimo.prompts[3].ids, SamplingParams(max_tokens=5, ignore_eos=True)))
    engine.step()
    engine.cancel("a")
    engine.add(Request("a", mimo.prompts[4].ids, SamplingParams(max_tokens=5, ignore_eos=True)))
    outputs = list(iter_outputs(engine))
    assert [i for o in outputs for i in o.ids] == mimo.text["4"][:5]
    assert [o.finish for o in outputs if o.finish] == ["length"]


def test_what_cannot_be_queued_is_refused_in_one_line(mimo: Made) -> None:
    engine = cases.engine(mimo.folder, max_length=40)
    engine.add(Request("a", [1, 2]))
    for request, words in (
        (Request("a", [1]), "in use"),
        (Request("b", []), "no prompt token"),
        (Request("b", [64]), "vocabulary of 64"),
        (Request("b", [-1]), "vocabulary"),
        (Request("b", [1] * 40), "the prompt has 40 tokens and the context 40"),
    ):
        with pytest.raises(ConfigError, match=words) as caught:
            engine.add(request)
        assert "\n" not in str(caught.value)
    assert engine.stats().waiting == 1


def test_a_context_that_the_cache_cannot_hold_is_known_beforehand(mimo: Made) -> None:
    """The largest request that is accepted can always run alone, however small the cache."""
    for tokens in (24, 40, 64):
        engine = cases.engine(mimo.folder, mimo.drafter_folder, kv_tokens=tokens, page_size=8, rows=1)
        assert engine.max_length < tokens
        prompt = (mimo.prompts[5].ids * 3)[: engine.max_length - 1]
        engine.add(Request("a", prompt, SamplingParams(max_tokens=None, ignore_eos=True)))
        assert len(cases.drained(engine)[0]["a"]) == 1
        engine.add(Request("b", prompt[:2], SamplingParams(max_tokens=None, ignore_eos=True)))
        assert len(cases.drained(engine)[0]["b"]) == engine.max_length - 2
    with pytest.raises(ConfigError, match="less than two tokens"):
        cases.engine(mimo.folder, mimo.drafter_folder, kv_tokens=8, page_size=8)


def test_not_a_number_fails_its_request_and_nothing_else(mimo: Made) -> None:
    engine = cases.engine(mimo.folder)
    engine.runner.model.weights.embedding[63] = float("nan")
    for p in (*mimo.prompts, Prompt("bad", [1, 63, 2])):
        ids = [i if i != 63 or p.id == "bad" else 62 for i in p.ids]
        engine.add(Request(p.id, ids, SamplingParams(max_tokens=4, ignore_eos=True, stop_token_ids=(63,))))
    _, last = cases.drained(engine)
    assert last["bad"].finish == "failed" and "not a number" in last["bad"].error
    assert all(o.finish in ("length", "stop") for i, o in last.items() if i != "bad")
    assert engine.stats().kv_used == 0


def test_a_drafter_that_is_never_right_drafts_less(mimo: Made) -> None:
    """Adaptive length: two drafts of four after a while, none lost for a drafter that is always right."""
    torch.manual_seed(0)
    engine = cases.engine(mimo.folder, mimo.drafter_folder)
    assert engine.runner.drafter is not None
    for layer in engine.runner.drafter.layers:
        layer.down.data.normal_()
    cases.generated(engine, mimo.prompts[:3], max_tokens=60)
    stats = engine.stats()
    assert stats.accepted / stats.rounds < 0.5
    assert stats.drafted / stats.rounds < 3
