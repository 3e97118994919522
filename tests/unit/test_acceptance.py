"""Acceptance: estimators on rounds counted by hand, controls, replay against serving, distribution test, reports."""

import dataclasses
import gzip
import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from core.config import entry, load
from core.errors import ConfigError, DataError
from core.generate.decode import PlainGenerator
from core.generate.interface import Prompt, Reply
from core.generate.rounds import Round, read_rounds
from core.generate.sampling import Sampling
from core.generate.slots import SlotCache
from core.generate.target import Target
from core.models.dflash import Drafter, init_drafter
from core.models.dflash_config import DFlashConfig
from core.models.dflash_io import save_drafter, target_identity
from core.models.fingerprint import fingerprint
from core.models.load import load_model
from core.train.tokenizer import train_tokenizer
from draft_training.acceptance import COMMAND, main, overrides
from draft_training.acceptance_report import Arm, Found, as_json, summarise
from draft_training.acceptance_run import target_facts
from draft_training.acceptance_text import latency_text, report_text
from draft_training.controls import OracleProposer, RandomProposer
from draft_training.distribution import (
    GTest,
    Prefix,
    chi_square_tail,
    distribution,
    exact_verifier,
    g_test,
    holm,
    tally,
)
from draft_training.drafters import dflash, eagle, open_drafter, pairs_of
from draft_training.estimators import Bootstrap, difference, figures, is_cut, kept, pooled
from draft_training.latency import Clock, TimedProposer, TimedTarget, latency
from draft_training.measure import decode, log_of, plain_text, same_text, served, teacher_forced
from draft_training.replay import Replayed, rounds_along
from draft_training.round_graph import Graphed, fixed_round
from tests.convert_cases import checkpoint, exported
from tests.eagle_cases import eagle_of

VOCABULARY = 100


def llama(vocabulary: int = VOCABULARY, spread: float = 0.3) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=spread, max_position_embeddings=512,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def drafter_of(vocabulary: int = VOCABULARY, seed: int = 1, std: float = 0.3, **changed: object) -> Drafter:
    values = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": vocabulary, "num_target_layers": 4, "taps": (1, 3),
        "mask_token_id": 2, "window": 8, "block_size": 5,
    }  # fmt: skip
    torch.manual_seed(seed)
    drafter = Drafter(DFlashConfig(**(values | changed)))
    init_drafter(drafter, torch.randn(32), std=std)
    return drafter.eval()


def prompts_of(lengths: tuple[int, ...] = (3, 7, 2, 12, 5)) -> list[Prompt]:
    generator = torch.Generator().manual_seed(3)
    return [Prompt(f"d/{i}", torch.randint(3, 99, (n,), generator=generator).tolist()) for i, n in enumerate(lengths)]


def a_round(accepted: int, committed: int | None = None, context: int = 10, hit: tuple[int, ...] = ()) -> Round:
    return Round("x", 0, context, 3, accepted, accepted + 1 if committed is None else committed, hit=list(hit))


# estimators

BY_HAND = {  # K = 3. a: 4 + 1 + 2 of 3 rounds, the last one cut; b: 1 of 1; c: nothing
    "a": [a_round(3, hit=(0, 1, 5)), a_round(0, context=256, hit=(-1, 0, 2)), a_round(3, 2, context=301, hit=(0, 0))],
    "b": [a_round(0)],
    "c": [],
}


def test_figures_counted_by_hand() -> None:
    f = figures(BY_HAND, Bootstrap(["d"] * 3, 200), None, ranks=True)
    assert (f.prompts, f.rounds, f.committed, f.cut) == (3, 4, 8, 1)
    assert f.tau_pooled.value == 8 / 4
    assert f.tau_request.value == pytest.approx((7 / 3 + 1) / 2)  # c has no round and no mean
    assert [e.value for e in f.position] == [2 / 4, 2 / 4, 1 / 4]
    assert [e.value for e in f.conditional] == [2 / 4, 1.0, 1.0]  # the cut round says nothing about position 3
    assert [(a, b, n, e.value) for a, b, n, e in f.context] == [(0, 256, 2, 2.5), (256, 512, 2, 1.5)]
    assert [e.value for e in f.recall[0]] == pytest.approx([2 / 3] * 5)
    assert [e.value for e in f.recall[1]] == pytest.approx([2 / 3, 1, 1, 1, 1])
    assert [e.value for e in f.recall[2]] == pytest.approx([0, 0, 1 / 2, 1, 1])


def test_pooled_tau_is_one_plus_the_positions_and_the_cut() -> None:
    """The identity of pooled counts: tau = 1 + sum of unconditional acceptance, less the share of cut rounds."""
    f = figures(BY_HAND, Bootstrap(["d"] * 3, 10), None)
    assert f.tau_pooled.value == pytest.approx(1 + sum(e.value for e in f.position) - f.cut / f.rounds)


def test_domains_are_apart_and_pooled_by_rounds() -> None:
    rounds = {"a": [a_round(2)], "b": [a_round(0), a_round(0), a_round(0)]}
    boot = Bootstrap(["x", "y"], 50)
    assert [figures(rounds, boot, d).tau_pooled.value for d in ("x", "y", None)] == [3, 1, 6 / 4]
    assert figures(rounds, boot, None).tau_request.value == 2


def test_a_log_of_other_prompts_is_refused() -> None:
    with pytest.raises(DataError, match="2 requests for 3 prompts"):
        figures({"a": [], "b": []}, Bootstrap(["d"] * 3, 5), None)


def test_intervals_cover_the_truth_and_shrink() -> None:
    """Rounds of a prompt share its own rate. About 57 of 60 intervals hold the mean; resampling rounds as if they were
    independent would hold it in half of them."""
    generator = torch.Generator().manual_seed(0)
    inside, widths = 0, {}
    for prompts in (30, 120):
        for trial in range(60):
            rounds = {}
            for i in range(prompts):
                rate = torch.rand(1, generator=generator)
                hits = (torch.rand(20, generator=generator) < rate).long().tolist()
                rounds[str(i)] = [a_round(h) for h in hits]
            e = Bootstrap(["d"] * prompts, 300, seed=trial).estimate(pooled(rounds))
            inside += prompts == 120 and e.low <= 1.5 <= e.high
            widths.setdefault(prompts, []).append(e.high - e.low)
    assert 52 <= inside <= 60
    assert sum(widths[120]) < 0.6 * sum(widths[30])


def test_domains_are_resampled_within() -> None:
    """Domains that differ but have no spread of their own leave no interval."""
    rounds = {str(i): [a_round(0 if i < 5 else 3)] for i in range(10)}
    e = figures(rounds, Bootstrap(["low"] * 5 + ["high"] * 5, 100), None).tau_pooled
    assert (e.low, e.value, e.high) == (2.5, 2.5, 2.5)


def test_paired_differences_see_what_separate_intervals_do_not() -> None:
    first = {str(i): [a_round(i % 4)] for i in range(24)}
    second = {str(i): [a_round(i % 4), a_round(min(3, i % 4 + 1))] for i in range(24)}
    boot = Bootstrap(["d"] * 24, 500)
    d = difference(second, first, boot)
    assert d.tau_pooled.value == pytest.approx(0.375) and d.tau_pooled.low > 0 and d.fault
    assert d.tau_request.value == pytest.approx(0.375)
    a, b = (figures(x, boot, None).tau_pooled for x in (first, second))
    assert b.low < a.high  # the two intervals overlap
    same = difference(first, first, boot)
    assert (same.tau_pooled.value, same.tau_pooled.low, same.equal) == (0, 0, 24) and not same.fault


# served, replayed, controls


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return llama()


def test_replay_equals_serving_and_cuts_where_serving_does(model: LlamaForCausalLM) -> None:
    prompts, sampling = prompts_of(), Sampling(max_new_tokens=20)
    opened = dflash("d", drafter_of(), model)
    free = plain_text(model, prompts, sampling, 3, (), "text")
    eos = (free["d/1"].ids[9],)
    text = plain_text(model, prompts, sampling, 3, eos, "text")
    assert text["d/1"].stop == "eos" and len(text["d/1"].ids) <= 10
    replies = served(model, opened, prompts, sampling, 3, eos, "served")
    assert same_text(text, replies).equal == len(prompts)
    forced = teacher_forced(model, opened, prompts, text, "forced")
    for i, reply in replies.items():
        assert sum(r.committed for r in reply.rounds) == len(reply.ids) - 1  # the prefill token belongs to no round
        assert [(r.context, kept(r), r.committed, r.stop) for r in forced[i]] == [
            (r.context, kept(r), r.committed, r.stop) for r in reply.rounds
        ]
    d = difference(log_of(replies), forced, Bootstrap(["d"] * len(prompts), 50))
    assert (d.tau_pooled.value, d.equal) == (0, len(prompts))


def test_a_gap_beyond_its_interval_is_a_fault_that_names_checks() -> None:
    right = {str(i): [a_round(2) for _ in range(9)] for i in range(8)}
    wrong = {str(i): [a_round(1 + (i % 4 == 0)) for _ in range(9)] for i in range(8)}
    for log, word in ((right, False), (wrong, True)):
        text = report_text(summarise(found_of(log, right)))
        assert ("FAULT" in text) == word
        assert ("9 window at W - 1, W, W + 1" in text) == word


SETUP = {
    "target": {"folder": "t", "model_type": "llama", "dtype": "float32", "stored_quantisation": "none",
               "fingerprint": "f" * 64},
    "drafter": {"folder": "d", "made_for_this_target": None, "K": 3, "B": 4, "window": 8},
    "temperatures": [0.0], "top_p": 1.0, "top_k": 0, "max_new_tokens": 20, "seed": 0, "prompts": 8,
    "prompt_hash": "p" * 64, "template_hash": None, "kv_dtype": "float32", "device": "cpu",
    "replies_cut": 5,
}  # fmt: skip


def found_of(log: dict, forced: dict) -> Found:
    return Found(Bootstrap(["d"] * len(log), 100), SETUP, {"drafter": Arm("d", {}, None, {0.0: log}, forced)})


def test_no_rounds_is_inconclusive() -> None:
    empty = {"a": [], "b": []}
    done = summarise(found_of(empty, empty))
    value = as_json(done)
    assert not value["conclusive"] and value["served"]["drafter"]["0"]["all"]["state"] == "inconclusive"
    assert value["served"]["drafter"]["0"]["all"]["tau_pooled"]["value"] is None
    assert "inconclusive: there is no round" in report_text(done) and "nan" not in report_text(done)
    json.dumps(value, allow_nan=False)


@pytest.mark.parametrize("rows", [1, 3])
def test_controls(model: LlamaForCausalLM, rows: int) -> None:
    """Random drafts commit one token a round, the text itself B, up to the cut last round."""
    prompts, sampling, drafts = prompts_of(), Sampling(max_new_tokens=23), 4
    text = plain_text(model, prompts, sampling, 3, (), "text")
    boot = Bootstrap(["d"] * len(prompts), 10)

    def log(proposer: object) -> dict:
        found = decode(PlainGenerator(Target(model), proposer, rows=rows), prompts, sampling, "control")
        assert same_text(text, found).equal == len(prompts)
        return log_of(found)

    known = log(OracleProposer(pairs_of(prompts, text), drafts))
    for rounds in known.values():
        assert [r.committed for r in rounds] == [5, 5, 5, 5, 2]  # 22 tokens behind the first
    f = figures(known, boot, None)
    assert f.cut == len(prompts) and all(e.value == 1 for e in f.conditional)
    assert figures(log(RandomProposer(VOCABULARY, drafts)), boot, None).tau_pooled.value == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("at_eos", [False, True])
def test_the_text_as_drafts_is_cut_alike_served_and_replayed(model: LlamaForCausalLM, at_eos: bool) -> None:
    prompts, sampling, drafts = prompts_of(), Sampling(max_new_tokens=18), 4
    eos = (plain_text(model, prompts, sampling, 3, (), "text")["d/3"].ids[8],) if at_eos else ()
    text = plain_text(model, prompts, sampling, 3, eos, "text")
    proposer = OracleProposer(pairs_of(prompts, text), drafts)
    found = decode(PlainGenerator(Target(model), proposer, rows=3, eos=eos), prompts, sampling, "served")
    for prompt in prompts:
        reply, whole = text[prompt.id], [*prompt.ids, *text[prompt.id].ids]
        padded = [*whole, *[0] * drafts]
        tokens = [padded[at + 1 : at + 1 + drafts] for at in range(len(prompt.ids), len(whole))]
        known = torch.tensor(tokens)
        one = Replayed(prompt.id, whole, len(prompt.ids), known, torch.ones(known.shape), known[..., None])
        shapes = [
            [(r.context, kept(r), r.committed, is_cut(r), r.stop) for r in rounds]
            for rounds in (found[prompt.id].rounds, rounds_along(one, reply.stop))
        ]
        assert shapes[0] == shapes[1] and sum(r[2] for r in shapes[0]) == len(reply.ids) - 1
    assert any(reply.stop == "eos" for reply in text.values()) == at_eos
    assert any(is_cut(r) for reply in found.values() for r in reply.rounds)


def test_same_text_says_where_replies_part() -> None:
    own = {"a": Reply("a", [1, 2, 3]), "b": Reply("b", [1, 2, 3]), "c": Reply("c", [1, 2])}
    other = {"a": Reply("a", [1, 2, 3]), "b": Reply("b", [1, 9, 3]), "c": Reply("c", [1, 2, 3])}
    found = same_text(own, other)
    assert (found.equal, found.total, dict(found.first)) == (1, 3, {"b": 1, "c": 2})


@pytest.mark.parametrize("kind", ["dflash", "eagle"])
def test_room_behind_texts_changes_no_draft(kind: str, model: LlamaForCausalLM) -> None:
    """On a GPU rows are longer than their texts, and more than there are texts."""

    class Roomy(Target):
        compiles_shapes = True

    prompts = prompts_of((9, 14, 11))
    opened = (
        dflash("d", drafter_of(), model) if kind == "dflash" else eagle("e", eagle_of(vocab_size=VOCABULARY), model)
    )
    pairs = pairs_of(prompts, plain_text(model, prompts, Sampling(max_new_tokens=24), 4, (), "text"))
    exact, roomy = (
        {one.id: one for one in opened.replayed(made(model, opened.taps), pairs)} for made in (Target, Roomy)
    )
    assert {i: one.tokens.tolist() for i, one in exact.items()} == {i: one.tokens.tolist() for i, one in roomy.items()}
    sizes = set()
    with torch.no_grad():
        hook = model.model.embed_tokens.register_forward_hook(lambda _m, given, _out: sizes.add(tuple(given[0].shape)))
        list(opened.replayed(Roomy(model, opened.taps), pairs))
        hook.remove()
    assert (4096 // 128, 128) in sizes


def test_windows_change_the_drafts_and_their_own_is_the_same(model: LlamaForCausalLM) -> None:
    prompts = prompts_of((9, 14, 11, 20))
    opened = dflash("d", drafter_of(window=8), model)
    text = plain_text(model, prompts, Sampling(max_new_tokens=24), 4, (), "text")

    def drafted(changed: object) -> list:
        return [one.tokens.tolist() for one in changed.replayed(Target(model, changed.taps), pairs_of(prompts, text))]

    own = drafted(opened)
    assert drafted(opened.windowed(8)) == own != drafted(opened.windowed(64))
    assert drafted(opened) == own and opened.windowed(64).facts["window"] == 64


def test_time_is_split_and_plain_decoding_drafts_nothing(model: LlamaForCausalLM) -> None:
    prompts, sampling = prompts_of((3, 7)), Sampling(max_new_tokens=8)
    fast = latency(model, dflash("d", drafter_of(), model), prompts, sampling, ())
    assert min(fast.draft_ms, fast.verify_ms, fast.prefill_ms, fast.tokens_s) > 0 and fast.rest_ms >= 0
    plain = latency(model, None, prompts, sampling, ())
    assert plain.draft_ms == 0 and plain.rounds == 14
    assert latency(model, None, prompts, Sampling(max_new_tokens=1), ()) is None


@pytest.mark.parametrize("kind", ["dflash", "eagle"])
def test_the_round_that_is_recorded_is_a_round_of_serving(kind: str, model: LlamaForCausalLM) -> None:
    """Same drafts and same choices of the target as served after the same context; again and again the same."""
    opened = (
        dflash("d", drafter_of(), model) if kind == "dflash" else eagle("e", eagle_of(vocab_size=VOCABULARY), model)
    )
    prompts = prompts_of((9, 14))
    text = [i for p in prompts for i in p.ids]
    fixed = fixed_round(model, opened, prompts, 12)
    first = fixed.draft(), fixed.verify()
    target = Target(model, opened.taps)
    ids = torch.tensor([text[: 13 + opened.drafts]])
    logits, _ = target.step(ids, torch.arange(ids.shape[1])[None], SlotCache(1, ids.shape[1]), ids.shape[1])
    assert torch.equal(first[1], logits[:, 12:].argmax(-1))
    reply = Reply("p", text[12 : 13 + opened.drafts], "length")
    replayed = next(iter(opened.replayed(target, [(Prompt("p", text[:12]), reply)])))
    assert replayed.tokens[0].tolist() == first[0][0].tolist()
    assert torch.equal(fixed.draft(), first[0]) and torch.equal(fixed.verify(), first[1])
    with pytest.raises(DataError, match=r"latency.context=40 needs"):
        fixed_round(model, opened, prompts, 40)
    assert fixed_round(model, None, prompts, 12).draft is None


def test_rounds_recorded_are_told_beside_launched_ones_or_why_not(model: LlamaForCausalLM) -> None:
    one = latency(model, None, prompts_of((3, 7)), Sampling(max_new_tokens=4), (), 4)
    assert one.graphed is None and "not measured (needs a CUDA GPU)" in latency_text({"plain": one})
    fast = dataclasses.replace(one, graphed=Graphed(4, 1.0, 3.0), tokens_a_round=2.0)
    plain = dataclasses.replace(one, graphed=Graphed(4, 0.0, 2.0), tokens_a_round=1.0)
    said = latency_text({"plain": plain, "drafter": fast})
    assert fast.graphed_tokens_s == 500 and "500 tokens/s at 2.00 tokens a round, 1.00x plain" in said


def test_reading_the_prompt_is_no_part_of_a_round(model: LlamaForCausalLM) -> None:
    opened, clock = dflash("d", drafter_of(), model), Clock(torch.device("cpu"))
    target = TimedTarget(model, opened.taps, clock)
    generator = PlainGenerator(target, TimedProposer(opened.proposer(target), target, clock), rows=1)
    rounds = sum(len(r.rounds) for r in generator.generate(prompts_of((3, 7)), Sampling(max_new_tokens=8)))
    assert clock.calls == {"prefill": 4, "verify": rounds, "draft": 2 * rounds}  # two calls each: target and drafter


# the distribution test


def test_chi_square_tail_against_known_values() -> None:
    for value, freedom, tail in ((3.841, 1, 0.05), (18.307, 10, 0.05), (23.209, 10, 0.01), (124.342, 100, 0.05)):
        assert chi_square_tail(value, freedom) == pytest.approx(tail, rel=2e-3)


def test_g_test_cells() -> None:
    prob = torch.tensor([0.5, 0.3, 0.19, 0.005, 0.005])
    cells, g, p = g_test(torch.tensor([50, 30, 19, 1, 0]), prob)
    assert (cells, p) == (3, pytest.approx(1, abs=0.05)) and abs(g) < 0.1  # the two rare ones join the smallest
    assert g_test(torch.tensor([80, 10, 10, 0, 0]), prob)[2] < 1e-6
    assert g_test(torch.tensor([50, 49, 0, 0, 1]), torch.tensor([0.5, 0.5, 0, 0, 0]))[2] == 0.0
    assert g_test(torch.tensor([9, 0, 0, 0, 0]), torch.tensor([1.0, 0, 0, 0, 0])) == (1, 0.0, 1.0)


def test_holm_by_hand() -> None:
    tests = [GTest("x", "first", 9, 2, 0.0, p) for p in (0.04, 0.01, 0.03)]
    assert [t.adjusted for t in holm(tests)] == pytest.approx([0.06, 0.03, 0.06])


@pytest.mark.parametrize("selector", [0, 6])
def test_distribution_of_the_exact_rule_and_of_a_biased_one(selector: int) -> None:
    """Argmax drafts and drafts drawn by the selector's walk: the right rule passes, 1.15 times too often does not."""
    flat = llama(vocabulary=8, spread=0.1)
    opened = dflash("d", drafter_of(vocabulary=8, seed=5, selector_top_k=selector, selector_rank=selector), flat)
    prompts = [Prompt(str(n), [3 + n, 7, 5, 7 - n]) for n in range(2)]
    found = distribution(flat, opened, prompts, Sampling(temperature=1.0, seed=4), 24_000, rows=2000)
    assert found.p > 0.01 and found.biased_p < 0.01 and found.verdict == "passed"
    assert {t.token for t in found.tests} == {"first", "second"} and found.total_variation < 1e-4
    assert all(t.cells > 2 for t in found.tests)


def test_drafts_from_another_distribution_than_they_say_are_found_out() -> None:
    """A drafter whose q is not what it drew from breaks the rule; the test sees it."""
    flat = llama(vocabulary=12, spread=0.1)
    opened = dflash("d", drafter_of(vocabulary=12, selector_top_k=6, selector_rank=6), flat)
    target = Target(flat, opened.taps)
    prefix = Prefix(target, opened.proposer(target), Prompt("p", [3, 7, 5, 9]), 2000)

    def lying(draft: object, *rest: object) -> object:
        draft.q[:] = draft.q.roll(1, -1)
        return exact_verifier(draft, *rest)

    sampling = Sampling(temperature=0.5)
    assert g_test(*first_of(tally(prefix, exact_verifier, sampling, 20_000, 0)))[2] > 0.01
    assert g_test(*first_of(tally(prefix, lying, sampling, 20_000, 0)))[2] < 1e-4


def first_of(seen: object) -> tuple:
    return seen.first, seen.first_prob


# the command


def test_a_report_says_how_the_target_is_stored(tmp_path: Path) -> None:
    """Loaded, a packed folder and a plain one are the same model."""
    plain = checkpoint(tmp_path / "plain", "qwen3_moe")
    packed = exported(plain, "hf", tmp_path / "packed")
    facts = [target_facts(load_model(folder)) for folder in (plain, packed)]
    assert [f["stored_quantisation"] for f in facts] == ["none", "compressed-tensors mxfp4-pack-quantized"]
    assert facts[0]["fingerprint"] == facts[1]["fingerprint"]


def save(drafter: Drafter, folder: Path, model: LlamaForCausalLM) -> Path:
    pairing = {"target": target_identity(model, fingerprint(model))}
    save_drafter(drafter.state_dict(), drafter.config, folder, pairing)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two targets of 300 tokens, one of 320, drafters, and a bundle of two domains."""
    root = tmp_path_factory.mktemp("acceptance")
    for name, size, spread in (("target", 300, 0.3), ("second", 300, 0.31), ("wide", 320, 0.3)):
        made = llama(size, spread)
        made.save_pretrained(root / name)
        made.config.eos_token_id = None
        train_tokenizer(["some text to learn bytes from"] * 3, 300, root / "tokens")
        for file in (root / "tokens").iterdir():
            (root / name / file.name).write_bytes(file.read_bytes())
    target = llama(300)
    save(drafter_of(300), root / "drafter", target)
    save(drafter_of(300, seed=5), root / "better", target)
    save(drafter_of(300), root / "stranger", llama(300, 0.31))
    (root / "eval").mkdir()
    mute = {"messages": [{"role": "assistant", "content": "nobody asked"}]}
    (root / "eval" / "mute.jsonl.gz").write_bytes(gzip.compress(json.dumps(mute).encode()))
    (root / "eval" / "empty.jsonl.gz").write_bytes(gzip.compress(b""))
    for domain in ("code", "math"):
        lines = [
            {"id": f"{domain}{i}", "messages": [{"role": "user", "content": f"{domain} {i * 7}?"},
                                                {"role": "assistant", "content": "no"}]}
            for i in range(4)
        ]  # fmt: skip
        text = "\n".join(json.dumps(line) for line in [*lines, {**lines[0], "id": f"{domain}0"}])
        (root / "eval" / f"{domain}.jsonl").write_text(text)
    return root


def arguments(place: Path, *more: str) -> list[str]:
    for domain in ("code", "math"):
        packed = place / "eval" / f"{domain}.jsonl.gz"
        packed.write_bytes(gzip.compress((place / "eval" / f"{domain}.jsonl").read_bytes()))
    given = [
        "--target", str(place / "target"), "--drafter", str(place / "drafter"), "--eval", "code,math",
        f"prompts.root={place}", "sampling.max_new_tokens=12", "prompts.max_tokens=60", "bootstrap=100",
        "target.dtype=float32", "device=cpu", f"run.root={place / 'runs'}", *more,
    ]  # fmt: skip
    return overrides(given)


def test_flags_are_overrides() -> None:
    given = [
        "--target",
        "a b='c'",
        "--drafter=d",
        "--eval",
        "code,math",
        "--sweep",
        "window=64,128",
        "seed=1",
        "--eval",
    ]
    found = overrides(given)
    assert found == ["target.path='a b=\\'c\\''", "drafter.path='d'", "eval=[code,math]", "sweep.window=[64,128]",
                     "seed=1", "--eval"]  # fmt: skip
    config, _ = load(COMMAND, found[:-1])
    assert config.target.path == "a b='c'" and config.eval == ["code", "math"] and config.sweep.window == [64, 128]


def test_report_files(place: Path, capsys: pytest.CaptureFixture) -> None:
    more = ["run.name=all", "--sweep", "window=5,8", "sampling.temperatures=[0,1]", "controls=3", "latency.prompts=1",
            "distribution.prefixes=1", "distribution.samples=64", f"drafter.other={place / 'better'}",
            f"target.other={place / 'second'}"]  # fmt: skip
    assert entry(COMMAND, main, arguments(place, *more)) == 0
    folder, printed = place / "runs" / "all", capsys.readouterr().out
    value = json.loads((folder / "report.json").read_text())
    assert value["conclusive"] and value["bonus_token_included"]
    first = value["served"]["drafter"]["0"]
    assert set(first) == {"code", "math", "all"} and first["all"]["prompts"] == 10
    log = list(read_rounds(folder / "rounds.jsonl"))
    assert first["all"]["tau_pooled"]["value"] == sum(r.committed for r in log) / len(log)
    assert value["served_minus_teacher_forced"]["drafter"]["by_domain"]["all"]["equal_requests"] == 10
    assert value["same_text"]["drafter"]["equal"] == 10
    assert set(value["window_sweep"]) == {"5", "8"} and len(value["comparisons"]) == 5
    own = value["window_sweep_change"]["8"]["by_domain"]["all"]["tau_pooled"]
    assert (own["value"], own["low"], own["high"]) == (0, 0, 0)
    assert value["controls"]["the text itself"]["tau_pooled"]["value"] > 3
    assert value["setup"]["drafter"]["made_for_this_target"] is True and value["setup"]["drafter"]["K"] == 4
    assert len(value["setup"]["prompt_hash"]) == 64 and len(value["setup"]["template_hash"]) == 64
    assert set(value["latency"]) == {"plain", "drafter", "other drafter"} and value["distribution"]["verdict"]
    for name in ("report.md", "tau.png", "position.png", "context.png", "recall.png", "window.png"):
        assert (folder / name).stat().st_size > 500, name
    for word in ("bonus token", "cut to the tokens emitted", "belongs to no round", "paired by prompt", "W=5"):
        assert word in printed and word in (folder / "report.md").read_text()
    assert json.loads((folder / "run.json").read_text())["state"] == "finished"


def test_one_token_replies_are_inconclusive_not_a_pass(place: Path, capsys: pytest.CaptureFixture) -> None:
    assert entry(COMMAND, main, arguments(place, "sampling.max_new_tokens=1", "run.name=none")) == 0
    assert "inconclusive" in capsys.readouterr().out
    assert not json.loads((place / "runs" / "none" / "report.json").read_text())["conclusive"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--drafter", "/nowhere"], ["drafter.path=/nowhere", "no config.json"]),
        (["drafter.path=null"], ["drafter.path has no value"]),
        (["--target", "/nowhere"], ["target.path=/nowhere"]),
        (["--target", "{wide}"], ["vocabulary 300", "320"]),
        (["--target", "{second}"], ["{drafter}", "{second}", "{own}", "{strange}", "drafter.force=true"]),
        (["drafter.other={stranger}"], ["drafter.other={stranger}", "{own}", "{strange}", "drafter.force=true"]),
        (["target.dtype=float16"], ["target.dtype='float16'", "bfloat16"]),
        (["eval=[mute]"], ["eval/mute.jsonl.gz", "no usable prompt"]),
        (["eval=[empty]"], ["empty.jsonl.gz", "is empty"]),
        (["target.other={wide}"], ["target.other", "320", "300"]),
        (["--drafter", "{target}"], ["model_type='llama'", "fp4flash_dflash"]),
        (["eval=[poems]"], ["poems", "matches no file"]),
        (["eval=[]"], ["eval=[]"]),
        (["--sweep", "window=3"], ["window=3", "block_size=5"]),
        (["sampling.temperatures=[-1]"], ["temperature=-1"]),
        (["--evil"], ["--evil is not an option"]),
        (["--drafter"], ["--drafter is not an option"]),
        (["run.resume=x"], ["run.resume=x"]),
    ],
)
def test_errors_in_one_line(place: Path, more: list[str], words: list[str], capsys: pytest.CaptureFixture) -> None:
    own, strange = (fingerprint(llama(300, spread))[:12] for spread in (0.3, 0.31))
    names = {n: place / n for n in ("wide", "target", "second", "drafter", "stranger")}
    names |= {"own": own, "strange": strange}
    filled = [w.format(**names) for w in more]
    assert entry(COMMAND, main, arguments(place, *filled)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    lines = [line for line in lines if line.startswith("draft_training.acceptance:")]
    assert len(lines) == 1
    for word in words:
        assert word.format(**names) in lines[0]


def test_a_drafter_of_another_target_is_measured_where_it_is_asked_for(
    place: Path, capsys: pytest.CaptureFixture
) -> None:
    more = ["--target", str(place / "second"), "drafter.force=true", "run.name=forced", "eval=[code]"]
    assert entry(COMMAND, main, arguments(place, *more)) == 0
    assert "ANOTHER target's than this" in capsys.readouterr().out


def test_a_target_that_never_ends_its_replies_is_said_to_be_one(place: Path, capsys: pytest.CaptureFixture) -> None:
    assert entry(COMMAND, main, arguments(place, "run.name=cut", "eval=[code]")) == 0
    log = list(read_rounds(place / "runs" / "cut" / "rounds.jsonl"))
    never = sum(r.stop == "length" for r in log)
    assert never == 5 and "the target never ended 5 of its replies: they are cut" in capsys.readouterr().out


def test_a_drafter_of_another_target_is_said_to_be_one(place: Path) -> None:
    assert open_drafter(place / "drafter", llama(300)).made_for_this is True
    assert open_drafter(place / "drafter", llama(300, 0.31)).made_for_this is False
    with pytest.raises(ConfigError, match="vocabulary 300"):
        open_drafter(place / "drafter", llama(320))
