"""core.generate: the target's own text and distribution, with or without a drafter; limits, waves, choices, the log."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from core.errors import ConfigError, DataError, UnsupportedError
from core.generate.decode import PlainGenerator
from core.generate.dflash import DFlashProposer, walk
from core.generate.interface import Draft, Prompt, Reply
from core.generate.rounds import read_rounds, write_rounds
from core.generate.sampling import Sampling, draw, probabilities, verify_greedy, verify_sampled
from core.generate.slots import masks
from core.generate.target import Target
from core.models.dflash import Drafter, init_drafter
from core.models.dflash_config import DFlashConfig
from core.models.mimo_v2 import MiMoV2ForCausalLM
from core.models.mimo_v2_config import MiMoV2Config
from draft_training.replay import replay, rounds_along

VOCAB = 60
DENSE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.3, "pad_token_id": None,
}  # fmt: skip
SLIDING_QWEN = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MIMO = {
    "v_head_dim": 8, "num_key_value_heads": 1, "swa_num_key_value_heads": 2, "moe_intermediate_size": 32,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "sliding_window": 6,
}  # fmt: skip
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**DENSE)),
    "mistral, sliding": lambda: MistralForCausalLM(MistralConfig(**DENSE, sliding_window=5)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**DENSE)),
    "qwen3, sliding": lambda: Qwen3ForCausalLM(Qwen3Config(**DENSE, **SLIDING_QWEN)),
    "qwen3-moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**DENSE, **EXPERTS)),
    "qwen3-moe, sliding": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**DENSE, **EXPERTS, **SLIDING_QWEN)),
    "gpt-oss": lambda: GptOssForCausalLM(GptOssConfig(**DENSE, **EXPERTS, sliding_window=5)),
    "mimo-v2": lambda: MiMoV2ForCausalLM(MiMoV2Config(**DENSE | MIMO)),
}
LENGTHS = (3, 7, 1, 12, 5, 7)
NEW = 16
TAPS = (0, 2)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny tensors; a busy machine is slower with more
    yield
    torch.set_num_threads(before)


def model_of(family: str) -> Any:
    torch.manual_seed(4)
    return FAMILIES[family]().eval()


def prompts_of(*lengths: int) -> list[Prompt]:
    generator = torch.Generator().manual_seed(1)
    return [Prompt(str(i), torch.randint(0, VOCAB, (n,), generator=generator).tolist()) for i, n in enumerate(lengths)]


@torch.no_grad()
def stepwise(model: Any, prompt: Prompt, count: int) -> list[int]:
    """Greedy text by full forwards, no cache."""
    ids = list(prompt.ids)
    for _ in range(count):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt.ids) :]


def drafter_of(selector: int = 0, vocab: int = VOCAB, std: float = 0.1, **config: Any) -> Drafter:
    torch.manual_seed(6)
    base: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": vocab, "num_target_layers": 4, "taps": TAPS,
        "mask_token_id": 2, "block_size": 5, "window": 8, "sinks": True, "selector_top_k": selector,
        "selector_rank": selector,
    }  # fmt: skip
    drafter = Drafter(DFlashConfig(**base | config))
    init_drafter(drafter, torch.randn(32), std=std)
    if drafter.selector is not None:
        torch.nn.init.normal_(drafter.selector.candidate.weight, std=0.1)
    return drafter.eval()


class Scripted:
    """Drafts from the texts that will come: right at (row, position) where `right` says so, else another token.

    Rows are recognised by their prompts, so waves and compaction have to keep them in order.
    """

    taps: tuple[int, ...] = ()

    def __init__(self, texts: list[list[int]], drafts: int, right: Callable[[int, int], bool]) -> None:
        self.texts, self.drafts, self.right = texts, drafts, right
        self.begins = [text[:-NEW] for text in texts]
        self.names: list[int] = []
        self.waves = 0

    def start(self, rows: int, slots: int) -> None:
        self.names, self.waves, self.slots = [], self.waves + 1, slots

    def extend(self, ids_RT: Tensor, features_RTF: Tensor, position_RT: Tensor, used: int) -> None:
        assert used <= self.slots and int(position_RT.max()) < used, "what was promised to `start` holds"
        if not self.names:
            for row in ids_RT.tolist():
                fits = [i for i, b in enumerate(self.begins) if i not in self.names and row[: len(b)] == b]
                self.names.append(max(fits, key=lambda i: len(self.begins[i])))

    def token(self, name: int, position: int) -> int:
        text = self.texts[name]
        token = text[position] if position < len(text) else 0
        return token if self.right(name, position) else (token + 1) % VOCAB

    def propose(self, anchor_R: Tensor, position_R: Tensor, sampling: Sampling, noise: torch.Generator) -> Draft:
        places = zip(self.names, position_R.tolist(), strict=True)
        tokens = torch.tensor([[self.token(n, p + k) for k in range(1, self.drafts + 1)] for n, p in places])
        candidates = torch.stack(((tokens + 1) % VOCAB, tokens, (tokens - 1) % VOCAB), dim=-1)
        return Draft(tokens, None, torch.full(tokens.shape, 0.5), candidates)

    def keep(self, rows: Tensor) -> None:
        self.names = [self.names[r] for r in rows.tolist()]


def by_id(replies: Iterator[Reply]) -> dict[str, Reply]:
    found = list(replies)
    assert len({r.id for r in found}) == len(found), "every reply once"
    return {r.id: r for r in found}


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_the_targets_own(family: str) -> None:
    """Prompts of 1 to 12 tokens in waves of 1, 4 and all; no drafter, drafters without and with selector, and drafts
    that are right about two times in three."""
    model, prompts = model_of(family), prompts_of(*LENGTHS)
    wanted = {p.id: stepwise(model, p, NEW) for p in prompts}
    texts = [[*p.ids, *wanted[p.id]] for p in prompts]
    target = Target(model, TAPS)
    scripted = Scripted(texts, 4, lambda name, position: (7 * name + position) % 3 != 0)
    scripted.taps = TAPS
    proposers = [None, DFlashProposer(drafter_of(), target), DFlashProposer(drafter_of(selector=6), target), scripted]
    for rows, proposer in ((1, None), *((r, p) for r in (4, 64) for p in proposers)):
        found = by_id(PlainGenerator(target, proposer, rows=rows).generate(prompts, Sampling(max_new_tokens=NEW)))
        assert {i: r.ids for i, r in found.items()} == wanted
        assert all(r.stop == "length" for r in found.values())
        committed = {i: sum(x.committed for x in r.rounds) for i, r in found.items()}
        assert set(committed.values()) == ({NEW - 1} if proposer else {0})


def expected_rounds(text: list[int], first: int, drafts: int, right: Callable[[int], bool]) -> list[tuple[int, ...]]:
    """(context, accepted, committed) of every round."""
    rounds, at = [], first
    while at < len(text) - 1:
        accepted = next((k for k in range(drafts) if not right(at + 1 + k)), drafts)
        rounds.append((at, accepted, min(accepted + 1, len(text) - 1 - at)))
        at += accepted + 1
    return rounds


@pytest.mark.parametrize("drafts", [1, 4, 20])
def test_rounds_are_logged_as_they_were(drafts: int) -> None:
    model, prompts = model_of("llama"), prompts_of(*LENGTHS)
    texts = [[*p.ids, *stepwise(model, p, NEW)] for p in prompts]

    def right(name: int, position: int) -> bool:
        return name == 3 or (5 * name + position) % 4 != 0

    proposer = Scripted(texts, drafts, right)
    generator = PlainGenerator(Target(model), proposer, rows=4)
    found = by_id(generator.generate(prompts, Sampling(max_new_tokens=NEW)))
    assert proposer.waves == 2
    for name, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        rounds = found[prompt.id].rounds
        assert found[prompt.id].ids == text[len(prompt.ids) :]
        wanted = expected_rounds(text, len(prompt.ids), drafts, lambda p, n=name: right(n, p))  # type: ignore[misc]
        within = [(r.context, r.accepted, r.committed) for r in rounds]
        assert within[:-1] == wanted[:-1]
        assert (within[-1][0], within[-1][2]) == (wanted[-1][0], wanted[-1][2]), "behind the end drafts are arbitrary"
        assert [r.round for r in rounds] == list(range(len(rounds)))
        assert [r.stop for r in rounds] == [""] * (len(rounds) - 1) + ["length"]
        assert all(r.drafted == drafts and r.probability == [0.5] * drafts for r in rounds)
        for r in rounds[:-1]:
            assert r.agree[: r.accepted] == [True] * r.accepted and not any(r.agree[r.accepted : r.accepted + 1])
            # candidates are (draft + 1, draft, draft - 1); a wrong draft is the right token + 1
            assert r.hit == [1] * r.accepted + [2] * (r.accepted < drafts)


def test_a_row_that_ended_early_needs_no_more_room_than_promised() -> None:
    """The longest prompt's drafts are accepted in full from one token before the limit on; the others go on."""
    model, prompts, limit, drafts = model_of("llama"), prompts_of(3, 3, 3, 12), 10, 7
    texts = [[*p.ids, *stepwise(model, p, NEW + 8)] for p in prompts]
    proposer = Scripted(texts, drafts, lambda name, position: name == 3)
    proposer.begins = [p.ids for p in prompts]
    found = by_id(PlainGenerator(Target(model), proposer).generate(prompts, Sampling(max_new_tokens=limit)))
    assert [r.ids for r in found.values()] == [texts[int(i)][len(prompts[int(i)].ids) :][:limit] for i in found]
    assert [(r.accepted, r.committed) for r in found["3"].rounds] == [(7, 8), (7, 1)]


def test_replay_says_what_serving_did() -> None:
    """Greedy: teacher-forced rounds along the text are the served ones, one for one."""
    model, prompts = model_of("qwen3, sliding"), prompts_of(*LENGTHS)
    target = Target(model, TAPS)
    drafter = drafter_of(std=0.3, learned_mask=False)
    served = by_id(PlainGenerator(target, DFlashProposer(drafter, target), rows=3).generate(
        prompts, Sampling(max_new_tokens=40)))  # fmt: skip
    assert sum(r.accepted for reply in served.values() for r in reply.rounds) > 0, "some draft is right by chance"
    for one in replay(target, drafter, [(p, served[p.id]) for p in prompts], row_tokens=100, anchors=7):
        forced, rounds = rounds_along(one), served[one.id].rounds
        keys = ("context", "accepted", "committed", "agree", "probability")
        for a, b in zip(forced[:-1], rounds[:-1], strict=True):
            assert [getattr(a, k) for k in keys[:3]] == [getattr(b, k) for k in keys[:3]]
            kept = b.accepted + 1
            assert a.agree[:kept] == b.agree[:kept] and a.hit[:kept] == b.hit
            assert a.probability == pytest.approx(b.probability, abs=2e-4)
        assert (forced[-1].context, forced[-1].committed) == (rounds[-1].context, rounds[-1].committed)


@pytest.mark.parametrize("limit", [1, 2, 3, 9])
@pytest.mark.parametrize("drafted", [False, True])
def test_length_limits(limit: int, drafted: bool) -> None:
    model, prompts = model_of("llama"), prompts_of(*LENGTHS)
    wanted = {p.id: stepwise(model, p, NEW) for p in prompts}
    proposer = Scripted([[*p.ids, *wanted[p.id]] for p in prompts], 4, lambda name, position: name % 2 == 0)
    generator = PlainGenerator(Target(model), proposer if drafted else None, rows=4)
    found = by_id(generator.generate(prompts, Sampling(max_new_tokens=limit)))
    assert {i: r.ids for i, r in found.items()} == {i: ids[:limit] for i, ids in wanted.items()}
    assert all(r.stop == "length" for r in found.values())
    assert all(sum(x.committed for x in r.rounds) == (limit - 1 if drafted else 0) for r in found.values())
    assert not list(generator.generate([], Sampling()))


@pytest.mark.parametrize("drafted", [False, True])
@pytest.mark.parametrize("place", [0, 1, 3, 7])
def test_replies_end_with_eos(place: int, drafted: bool) -> None:
    """EOS as the token of the prefill, as a draft, as the token behind the drafts; other rows go on."""
    model, prompts = model_of("llama"), prompts_of(*LENGTHS)
    full = {p.id: stepwise(model, p, NEW) for p in prompts}
    eos = {full["1"][place], full["4"][place + 2]}
    proposer = Scripted([[*p.ids, *full[p.id]] for p in prompts], 4, lambda name, position: name != 0)
    generator = PlainGenerator(Target(model), proposer if drafted else None, eos=eos)
    found = by_id(generator.generate(prompts, Sampling(max_new_tokens=NEW)))
    for i, text in full.items():
        end = next((k for k, t in enumerate(text) if t in eos), None)
        assert found[i].ids == (text if end is None else text[: end + 1])
        assert found[i].stop == ("eos" if end is not None else "length")
        if drafted and found[i].rounds:
            assert found[i].rounds[-1].stop == found[i].stop
            assert sum(r.committed for r in found[i].rounds) == len(found[i].ids) - 1
    assert found["1"].stop == "eos" and len(found["1"].ids) <= place + 1
    ignoring = by_id(generator.generate(prompts, Sampling(max_new_tokens=NEW, ignore_eos=True)))
    assert {i: r.ids for i, r in ignoring.items()} == full


def test_a_wave_shrinks_when_half_of_it_is_done() -> None:
    model, prompts = model_of("llama"), prompts_of(4, 4, 4, 4, 4, 4)
    full = {p.id: stepwise(model, p, NEW) for p in prompts}

    class Counted(Target):
        rows: list[int]

        def step(self, ids_RT: Tensor, *rest: Any, **more: Any) -> tuple[Tensor, Tensor]:
            self.rows.append(len(ids_RT))
            return super().step(ids_RT, *rest, **more)

    target = Counted(model)
    target.rows = []
    eos = {full["0"][2], full["1"][4], full["2"][6], full["5"][9]}
    ends = {i: next((k for k, t in enumerate(text) if t in eos), NEW - 1) for i, text in full.items()}
    order = [r.id for r in PlainGenerator(target, rows=6, eos=eos).generate(prompts, Sampling(max_new_tokens=NEW))]
    sizes, wanted, rows, step = [], [], list(full), 0
    while rows:
        sizes.append(len(rows))
        left = [i for i in rows if ends[i] > step]
        if 2 * len(left) <= len(rows):
            wanted += [i for i in rows if i not in left]
            rows = left
        step += 1
    assert target.rows == sizes and order == wanted
    assert len(set(sizes)) > 2


def chi_square_is_plausible(counts: list[int], chances: list[float]) -> bool:
    """Pearson's statistic below its 99.9 % quantile (Wilson and Hilferty); cells under 5 expected go together."""
    total = sum(counts)
    large = [(c, p * total) for c, p in zip(counts, chances, strict=True) if p * total >= 5]
    small = [(c, p * total) for c, p in zip(counts, chances, strict=True) if p * total < 5]
    assert all(c == 0 for c, e in small if e < 1e-9), "a token came that has no chance"
    if sum(e for _, e in small) >= 1:
        large.append((sum(c for c, _ in small), sum(e for _, e in small)))
    free = len(large) - 1
    statistic = sum((c - e) ** 2 / e for c, e in large)
    return statistic < free * (1 - 2 / (9 * free) + 3.09 * math.sqrt(2 / (9 * free))) ** 3


@pytest.mark.parametrize("chance", [False, True])
def test_the_rejection_rule_keeps_the_distribution(chance: bool) -> None:
    """Two drafts: the first two tokens emitted have the joint chances p1(a) p2(b | a), whatever q is."""
    rows, vocab = 60_000, 4
    generator = torch.Generator().manual_seed(0)
    first, second, third = torch.randn(vocab, generator=generator), *torch.randn(2, vocab, vocab, generator=generator)
    q = (2 * torch.randn(2, vocab, generator=generator)).softmax(-1)
    q[0, 1] = 0  # a token that the drafter never says
    q[0] /= q[0].sum()
    if chance:
        drafts = torch.stack([torch.multinomial(q[k], rows, True, generator=generator) for k in (0, 1)], dim=1)
        given = q.expand(rows, 2, vocab)
    else:
        drafts, given = torch.tensor([2, 3]).expand(rows, 2), None
    logits = torch.stack((first.expand(rows, -1), second[drafts[:, 0]], third[drafts[:, 1]]), dim=1)
    verdict = verify_sampled(drafts, given, logits, Sampling(temperature=0.7), generator)
    # rows that reject the first draft have one token so far; the target draws their second
    one = torch.where(verdict.accepted > 0, drafts[:, 0], verdict.token)
    fresh = torch.multinomial((second[one] / 0.7).softmax(-1), 1, generator=generator)[:, 0]
    two = torch.where(verdict.accepted > 1, drafts[:, 1], torch.where(verdict.accepted == 1, verdict.token, fresh))
    joint = (first / 0.7).softmax(-1)[:, None] * (second / 0.7).softmax(-1)
    counts = torch.bincount(one * vocab + two, minlength=vocab * vocab).tolist()
    assert chi_square_is_plausible(counts, joint.flatten().tolist())
    p, likely = (first / 0.7).softmax(-1), q[0] if chance else torch.eye(vocab)[2]
    share = float(torch.minimum(p, likely).sum())
    assert abs(float((verdict.accepted > 0).float().mean()) - share) < 4 * math.sqrt(share * (1 - share) / rows)


class Chanced:
    """Draws from fixed q, far from the target."""

    taps: tuple[int, ...] = ()
    drafts = 2

    def __init__(self, vocab: int) -> None:
        self.q = (2 * torch.randn(2, vocab, generator=torch.Generator().manual_seed(9))).softmax(-1)
        self.start = self.extend = self.keep = lambda *_: None

    def propose(self, anchor_R: Tensor, position_R: Tensor, sampling: Sampling, noise: torch.Generator) -> Draft:
        q = self.q.expand(len(anchor_R), -1, -1)
        tokens = draw(q, noise)
        return Draft(tokens, q, q.gather(2, tokens[..., None])[..., 0])


@pytest.mark.parametrize("kind", ["no drafter", "argmax drafts", "selector's walk", "fixed q"])
@pytest.mark.parametrize("cut", [{}, {"top_k": 3, "top_p": 0.9}], ids=["whole", "cut"])
def test_sampled_text_has_the_targets_distribution(kind: str, cut: dict[str, Any]) -> None:
    """All texts of three tokens from five, 6,000 draws: the prefill's token and a round's first two."""
    vocab, draws = 5, 6000
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**DENSE | {"vocab_size": vocab, "initializer_range": 0.15})).eval()
    target = Target(model, TAPS if "fixed" not in kind else ())
    proposer: Any = None
    if kind == "argmax drafts":
        proposer = DFlashProposer(drafter_of(vocab=vocab, block_size=3), target)
    elif kind == "selector's walk":
        proposer = DFlashProposer(drafter_of(vocab=vocab, block_size=3, selector=4), target)
    elif kind == "fixed q":
        proposer = Chanced(vocab)
    sampling = Sampling(temperature=0.8, max_new_tokens=3, seed=1, **cut)
    prompts = [Prompt(str(i), [3, 1, 4]) for i in range(draws)]
    replies = list(PlainGenerator(target, proposer, rows=1500).generate(prompts, sampling))
    counts = Counter(tuple(r.ids) for r in replies)
    places = torch.cartesian_prod(*[torch.arange(vocab)] * 3)
    with torch.no_grad():
        ids = torch.cat((torch.tensor([3, 1, 4]).expand(len(places), -1), places), dim=1)
        logits = model(input_ids=ids, use_cache=False).logits[:, 2:5]
    chances = torch.stack([truncated(row, 0.8, **cut) for row in logits.flatten(0, 1)]).view(len(places), 3, vocab)
    joint = chances.gather(2, places[..., None])[..., 0].prod(-1)
    assert chi_square_is_plausible([counts[tuple(p)] for p in places.tolist()], joint.tolist())
    if proposer:
        accepted = sum(x.accepted for r in replies for x in r.rounds) / sum(len(r.rounds) for r in replies)
        assert 0.2 < accepted < 1.8, "both branches of the rule are taken"


def truncated(logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Top-k, then the smallest set of the likeliest that reaches top_p; one token after the other."""
    chance = [math.exp(float(x) / temperature) for x in logits]
    order = sorted(range(len(chance)), key=lambda i: -chance[i])[: top_k or None]
    total, kept, reached = sum(chance[i] for i in order), [], 0.0
    for i in order:
        if reached >= top_p:
            break
        kept.append(i)
        reached += chance[i] / total
    norm = sum(chance[i] for i in kept)
    return torch.tensor([chance[i] / norm if i in kept else 0.0 for i in range(len(chance))])


@pytest.mark.parametrize("top_k", [0, 1, 3, 50])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 1e-6])
def test_top_k_and_top_p(top_k: int, top_p: float) -> None:
    logits = torch.randn(20, 7, generator=torch.Generator().manual_seed(2)) * 2
    found = probabilities(logits, Sampling(temperature=0.6, top_k=top_k, top_p=top_p))
    wanted = torch.stack([truncated(row, 0.6, top_k, top_p) for row in logits])
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    assert bool((found > 0).any(-1).all()), "the likeliest token is always left"
    drawn = draw(found.expand(200, -1, -1), torch.Generator().manual_seed(0))
    assert bool(((wanted > 0).expand(200, -1, -1).gather(2, drawn[..., None])).all())


def test_temperature_goes_from_greedy_to_even() -> None:
    logits = torch.tensor([[0.0, 1.0, 3.0]])
    assert float(probabilities(logits, Sampling(temperature=0.01))[0, 2]) == 1.0
    torch.testing.assert_close(probabilities(logits, Sampling(temperature=1e6)), torch.full((1, 3), 1 / 3))
    assert probabilities(logits.bfloat16(), Sampling(temperature=1.0)).dtype == torch.float32


def test_samples_depend_on_the_seed_alone() -> None:
    target, prompts = Target(model_of("llama"), TAPS), prompts_of(*LENGTHS)
    proposer = DFlashProposer(drafter_of(selector=4), target)

    def texts(seed: int) -> list[list[int]]:
        made = PlainGenerator(target, proposer, rows=4).generate(prompts, Sampling(1.0, seed=seed, max_new_tokens=8))
        return [r.ids for r in made]

    assert texts(1) == texts(1) != texts(2)


def test_greedy_verdicts() -> None:
    logits = torch.nn.functional.one_hot(torch.tensor([[3, 1, 4, 2]] * 4), 6).float()
    drafts = torch.tensor([[3, 1, 4], [3, 1, 0], [0, 1, 4], [3, 0, 4]])
    verdict = verify_greedy(drafts, logits)
    assert verdict.accepted.tolist() == [3, 2, 0, 1] and verdict.token.tolist() == [2, 4, 3, 1]


def walked(drafter: Drafter, target: Target, hidden_KG: Tensor, anchor: int) -> list[tuple[list[int], list[float]]]:
    """Candidates and their chances along the greedy walk, slot by slot, in float64."""
    w = {n.removeprefix("selector."): t.double() for n, t in drafter.state_dict().items() if n.startswith("selector.")}
    head, table = target.head.weight.detach().double(), target.embedding.weight.detach().double()

    def normed(x: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).mean() + drafter.config.rms_norm_eps) * w["norm.weight"]

    before, out = anchor, []
    for hidden in hidden_KG.double():
        logits = head @ hidden
        best = logits.argsort(descending=True)[: drafter.config.selector_top_k].tolist()
        left = torch.nn.functional.silu(w["token.weight"] @ normed(table[before]) + w["state.weight"] @ hidden)
        score = [float(logits[c] + left @ (w["candidate.weight"] @ normed(table[c]))) for c in best]
        total = sum(math.exp(s - max(score)) for s in score)
        out.append((best, [math.exp(s - max(score)) / total for s in score]))
        before = best[score.index(max(score))]
    return out


@torch.no_grad()
def test_the_selector_walks_from_token_to_token() -> None:
    target, drafter = Target(model_of("llama"), TAPS), drafter_of(selector=6)
    with torch.no_grad():
        assert drafter.selector is not None
        for parameter in drafter.selector.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.5 if parameter.dim() == 2 else 1))
    hidden, anchors = torch.randn(9, 4, 32), torch.randint(0, VOCAB, (9,))
    found = walk(drafter, target, hidden, anchors, Sampling(), None)
    assert found.q is None
    moved = 0
    for row in range(9):
        wanted = walked(drafter, target, hidden[row], int(anchors[row]))
        for slot, (best, chances) in enumerate(wanted):
            top = chances.index(max(chances))
            assert found.candidates[row, slot].tolist() == best
            assert int(found.tokens[row, slot]) == best[top]
            assert float(found.probability[row, slot]) == pytest.approx(max(chances), abs=1e-5)
            moved += top != 0
    assert moved > 5, "the pair scores decide something"
    independent = walk(drafter_of(), target, hidden, anchors, Sampling(1.0), torch.Generator())
    logits = target.head(hidden)
    assert independent.q is None and torch.equal(independent.tokens, logits.argmax(-1))
    torch.testing.assert_close(independent.probability, logits.softmax(-1).amax(-1))


@torch.no_grad()
def test_a_drawn_walk_reports_the_chances_it_drew_with() -> None:
    target, drafter = Target(model_of("llama"), TAPS), drafter_of(selector=3)
    rows = 20_000
    hidden, anchor = torch.randn(1, 2, 32).expand(rows, -1, -1), torch.full((rows,), 7)
    found = walk(drafter, target, hidden, anchor, Sampling(temperature=1.3), torch.Generator().manual_seed(0))
    assert found.q is not None and found.q.shape == (rows, 2, VOCAB)
    torch.testing.assert_close(found.q.sum(-1), torch.ones(rows, 2))
    assert int((found.q > 0).sum(-1).max()) <= 3
    torch.testing.assert_close(found.q.gather(2, found.tokens[..., None])[..., 0], found.probability)
    assert len(found.q[:, 1].unique(dim=0)) == 3, "the second slot's chances hang on the first one's token"
    chosen = found.candidates[0, 0].tolist()
    counts = Counter(found.tokens[:, 0].tolist())
    assert chi_square_is_plausible([counts[c] for c in chosen], [float(found.q[0, 0, c]) for c in chosen])
    best, chances = walked(drafter, target, hidden[0] / 1.3, 7)[0]
    assert best == chosen and len(chances) == 3


def one_line(error: pytest.ExceptionInfo[BaseException]) -> bool:
    return "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"), [("temperature", -0.1), ("top_p", 0.0), ("top_p", 1.1), ("top_k", -1), ("max_new_tokens", 0)]
)
def test_wrong_sampling_is_refused(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"^{key}={value}: expected ") as error:
        Sampling(**{key: value})  # type: ignore[arg-type]
    assert one_line(error)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = model_of("llama")
    target, prompts = Target(model, TAPS), [Prompt("fine", [1]), Prompt("bare", [])]
    with pytest.raises(ConfigError, match=r"^prompt 'bare' has no token$"):
        list(PlainGenerator(target).generate(prompts, Sampling()))
    with pytest.raises(ConfigError, match=r"^the drafter reads layers \(0, 2\), the target is tapped at \(1, 3\)$"):
        PlainGenerator(Target(model, (1, 3)), DFlashProposer(drafter_of(), target))
    with pytest.raises(ConfigError, match="vocabulary 61 and width 32; this one has 60 and 32") as error:
        DFlashProposer(drafter_of(vocab=61), target)
    assert one_line(error)
    model.config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(UnsupportedError, match="layers of type chunked_attention") as refused:
        masks(model.config, torch.zeros(1, 1, dtype=torch.int64), 1, torch.float32)
    assert one_line(refused)


def test_the_log_comes_back_as_written(tmp_path: Path) -> None:
    model, prompts = model_of("llama"), prompts_of(3, 5)
    target = Target(model, TAPS)
    replies = PlainGenerator(target, DFlashProposer(drafter_of(), target)).generate(prompts, Sampling(max_new_tokens=5))
    rounds = [r for reply in replies for r in reply.rounds]
    write_rounds(tmp_path / "rounds.jsonl", rounds)
    assert list(read_rounds(tmp_path / "rounds.jsonl")) == rounds and len(list(tmp_path.iterdir())) == 1
    for damage in ("{", '{"request": "0"}', "[1]", '{"unknown": 1}'):
        with (tmp_path / "bad.jsonl").open("w") as file:
            file.write((tmp_path / "rounds.jsonl").read_text() + damage + "\n")
        with pytest.raises(DataError, match=rf"bad.jsonl:{len(rounds) + 1}: not a round of this log") as error:
            list(read_rounds(tmp_path / "bad.jsonl"))
        assert one_line(error)


@pytest.mark.parametrize("kind", [LlamaForCausalLM, MistralForCausalLM])
def test_packed_rows_under_flex_attention_are_those_under_sdpa(kind: Any) -> None:
    """Block masks of ours in place of transformers' own, with documents and, for Mistral, a window of 9."""
    torch.manual_seed(0)
    windowed = {"sliding_window": 9} if kind is MistralForCausalLM else {}
    model = kind(
        kind.config_class(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, **windowed,
        )
    ).eval()  # fmt: skip
    ids = torch.randint(0, 64, (2, 40))
    position = torch.stack((torch.cat((torch.arange(13), torch.arange(27))), torch.arange(40)))
    found = []
    for attention in ("sdpa", "flex_attention"):
        model.set_attn_implementation(attention)
        found.append(Target(model, (0,)).packed(ids, position))
    for sdpa, flex in zip(*found, strict=True):
        torch.testing.assert_close(flex, sdpa, atol=1e-5, rtol=1e-4)
