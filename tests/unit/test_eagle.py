"""The EAGLE drafter: one chain against a second writing of it, training against decoding, served text, folders."""

import dataclasses
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask, flex_attention

from core.config import load
from core.errors import CheckpointError, ConfigError, UnsupportedError
from core.generate.decode import PlainGenerator
from core.generate.eagle import EagleProposer
from core.generate.interface import Prompt, Reply
from core.generate.sampling import Sampling
from core.generate.target import Target
from core.models import ops
from core.models.dflash_io import load_drafter, save_drafter
from core.models.dflash_mask import TILE, additive
from core.models.drafters import load_any
from core.models.eagle import EagleDrafter
from core.models.eagle_config import EagleConfig
from core.models.eagle_io import load_eagle
from core.models.eagle_mask import dense, sparse
from core.models.ops import EAGER, FLEX, eager_attention
from core.train.batch import IGNORE
from core.train.config import OptimConfig
from core.train.local import LocalEngine
from draft_training.anchors import DraftBatch
from draft_training.config import Labels, LossConfig
from draft_training.drafters import eagle, open_drafter
from draft_training.eagle import trained_chains
from draft_training.losses import make_loss
from draft_training.replay import replay, rounds_along
from draft_training.train import COMMAND
from tests.eagle_cases import TAPS, VOCAB, Slow, eagle_of
from tests.unit.test_generate import FAMILIES, LENGTHS, NEW, by_id, drafter_of, model_of, one_line, prompts_of, stepwise

GREEDY = Sampling()


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def features_of(target: Target, ids: list[int]) -> Tensor:
    """[tokens, F] of one text."""
    return target.packed(torch.tensor([ids]), torch.arange(len(ids))[None])[1][0]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("window", [0, 6])
@torch.no_grad()
def test_drafts_are_those_of_the_chain_written_out(window: int) -> None:
    """Rows of 1 to 12 tokens, then a round each in which 0 to K drafts are kept, then rows dropped: tokens,
    probabilities and candidates of every step."""
    model, drafter = model_of("llama"), eagle_of(window=window)
    target, slow = Target(model, TAPS), Slow(drafter, model.get_input_embeddings().weight)
    proposer, head = EagleProposer(drafter, target), model.lm_head.weight
    texts = [draw(n + 1, seed=n).tolist() for n in LENGTHS]
    proposer.start(len(texts), 12 + 4 * 6)

    def read(places: list[int], count: int) -> None:
        """The target reads `count` tokens of each text from `places` on; behind a text's end stand other tokens."""
        rows = [[*text, *draw(30, seed=99).tolist()] for text in texts]
        ids = torch.tensor([row[p : p + count] for row, p in zip(rows, places, strict=True)])
        features = torch.stack([features_of(target, row[: p + count])[p:] for row, p in zip(rows, places, strict=True)])
        position = torch.tensor(places)[:, None] + torch.arange(count)
        proposer.extend(ids, features, position, max(places) + count)

    def compare() -> None:
        anchors = torch.tensor([text[-1] for text in texts])
        places = torch.tensor([len(text) - 1 for text in texts])
        draft = proposer.propose(anchors, places, GREEDY, torch.Generator())
        assert draft.q is None and draft.candidates is not None
        for row, text in enumerate(texts):
            for step, logits in enumerate(slow.chain(text, features_of(target, text[:-1]), head)):
                assert int(draft.tokens[row, step]) == int(logits.argmax())
                assert float(draft.probability[row, step]) == pytest.approx(float(logits.softmax(-1).max()), rel=1e-3)
                best = logits[draft.candidates[row, step]]  # two of nearly the same value may change places
                torch.testing.assert_close(best, logits.topk(16).values, atol=1e-4, rtol=1e-4)

    read([0] * len(texts), 12)
    compare()
    for turn in range(2):
        places = [len(text) - 1 for text in texts]
        read(places, 5)
        for row in range(len(texts)):
            texts[row] += draw((row + turn) % 5 + 1, seed=99).tolist()  # what the target read there, and one more
            texts[row][-1] = (texts[row][-1] + 1 + row) % VOCAB  # which is another than the rejected draft
        compare()
    kept = [0, 2, 5]
    proposer.keep(torch.tensor(kept))
    texts = [texts[row] for row in kept]
    compare()


def packed(*lengths: int) -> tuple[Tensor, Tensor]:
    """ids and positions [1, T] of documents behind one another."""
    position = torch.cat([torch.arange(n) for n in lengths])[None]
    return draw(1, position.shape[1], seed=4), position


class PackedTarget(Target):
    """Documents are computed one by one, so that the features are right whatever the model's masks are."""

    def packed(self, ids_RT: Tensor, position_RT: Tensor) -> tuple[Tensor, Tensor]:
        starts = [*(position_RT[0] == 0).nonzero()[:, 0].tolist(), ids_RT.shape[1]]
        parts = [super(PackedTarget, self).packed(ids_RT[:, a:b], position_RT[:, a:b]) for a, b in pairwise(starts)]
        return torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts], 1)


@pytest.mark.parametrize("window", [0, 6])
@torch.no_grad()
def test_training_computes_what_decoding_does(window: int) -> None:
    """Packed documents whose tokens after an anchor are what the proposer drafts there: the hidden states that the loss
    scores give, at every step, the proposer's tokens and probabilities; and along any text the written-out chain's."""
    model, drafter = model_of("llama"), eagle_of(window=window)
    target, slow, head = PackedTarget(model, TAPS), Slow(drafter, model.get_input_embeddings().weight), model.lm_head
    lengths, places = (9, 14, 12), [1, 4, 10, 16, 18, 24, 31]
    ids, position = packed(*lengths)
    begins = {a: a - int(position[0, a]) for a in places}
    for anchor in (4, 16, 24):  # far enough apart for none to lie in the chain of another
        text = ids[0, begins[anchor] : anchor + 1].tolist()
        proposer = EagleProposer(drafter, target)
        proposer.start(1, 40)
        proposer.extend(torch.tensor([text[:-1]]), features_of(target, text[:-1])[None],
                        torch.arange(len(text) - 1)[None], len(text) - 1)  # fmt: skip
        draft = proposer.propose(torch.tensor([text[-1]]), torch.tensor([len(text) - 1]), GREEDY, torch.Generator())
        ids[0, anchor + 1 : anchor + 5] = draft.tokens[0]
        features = target.packed(ids, position)[1]
        hidden = trained_chains(drafter, target, ids, position, features, torch.tensor([[-1, *places]]))
        prob, token = head(hidden[0, 1 + places.index(anchor)]).softmax(-1).max(-1)
        assert token.tolist() == draft.tokens[0].tolist()
        torch.testing.assert_close(prob, draft.probability[0], atol=1e-5, rtol=1e-4)
    hidden = trained_chains(drafter, target, ids, position, features, torch.tensor([[-1, *places]]))
    for n, anchor in enumerate(places):
        text = ids[0, begins[anchor] : anchor + 1].tolist()
        fed = ids[0, anchor + 1 : anchor + 4].tolist()
        wanted = slow.chain(text, features[0, begins[anchor] : anchor], head.weight, fed)
        steps = 4 if anchor + 4 <= ids.shape[1] else ids.shape[1] - anchor
        torch.testing.assert_close(head(hidden[0, 1 + n, :steps]), torch.stack(wanted)[:steps], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_the_targets_own(family: str) -> None:
    model, prompts = model_of(family), prompts_of(*LENGTHS)
    wanted = {p.id: stepwise(model, p, NEW) for p in prompts}
    target = Target(model, TAPS)
    for drafter in (eagle_of(), eagle_of(window=5)):
        for rows in (4, 64):
            generator = PlainGenerator(target, EagleProposer(drafter, target), rows=rows)
            found = by_id(generator.generate(prompts, Sampling(max_new_tokens=NEW)))
            assert {i: r.ids for i, r in found.items()} == wanted
            assert {sum(x.committed for x in r.rounds) for r in found.values()} == {NEW - 1}


def test_sampled_drafts_are_greedy_and_the_text_ends() -> None:
    model, prompts = model_of("llama"), prompts_of(*LENGTHS)
    target = Target(model, TAPS)
    proposer = EagleProposer(eagle_of(), target)
    generator = PlainGenerator(target, proposer, rows=4)
    found = by_id(generator.generate(prompts, Sampling(temperature=1.0, max_new_tokens=NEW)))
    assert all(len(r.ids) == NEW for r in found.values())


@pytest.mark.parametrize("window", [0, 7])
def test_replay_says_what_serving_did(window: int) -> None:
    """Greedy: the teacher-forced rounds are the served ones, all K drafts of each, whatever the text says."""
    model, prompts = model_of("qwen3, sliding"), prompts_of(*LENGTHS)
    target, drafter = Target(model, TAPS), eagle_of(window=window)
    taught(drafter, target, [[*p.ids, *stepwise(model, p, 40)] for p in prompts[:2]], 12)
    served = by_id(PlainGenerator(target, EagleProposer(drafter, target), rows=3).generate(
        prompts, Sampling(max_new_tokens=40)))  # fmt: skip
    assert sum(r.accepted for reply in served.values() for r in reply.rounds) > 0, "some draft is right"
    for one in replay(target, drafter, [(p, served[p.id]) for p in prompts], row_tokens=100, anchors=7):
        forced, rounds = rounds_along(one), served[one.id].rounds
        for a, b in zip(forced[:-1], rounds[:-1], strict=True):
            assert (a.context, a.accepted, a.committed) == (b.context, b.accepted, b.committed)
            kept = b.accepted + 1
            assert a.agree[:kept] == b.agree[:kept] and a.hit[:kept] == b.hit
            assert a.probability == pytest.approx(b.probability, abs=2e-4), "also behind the first miss"
        assert (forced[-1].context, forced[-1].committed) == (rounds[-1].context, rounds[-1].committed)


def batch_of(texts: list[list[int]], anchors: Tensor, drafts: int) -> DraftBatch:
    ids = torch.tensor(texts)
    labels = torch.roll(ids, -1, 1)
    labels[:, -1] = IGNORE
    position = torch.arange(ids.shape[1]).expand(len(ids), -1)
    return DraftBatch(ids, labels, position, anchors.expand(len(ids), -1), torch.full((len(ids),), drafts))


def taught(drafter: EagleDrafter, target: Target, texts: list[list[int]], steps: int) -> list[float]:
    """The product's loss and engine on whole texts; the loss of every step."""
    length = min(len(t) for t in texts)
    batch = batch_of([t[:length] for t in texts], torch.arange(1, length - 1), drafter.config.drafts)
    engine = LocalEngine(drafter, make_loss(target, LossConfig()), OptimConfig(lr=5e-3, clip_grad_norm=1.0),
                         micro_batches=1, device=torch.device("cpu"))  # fmt: skip
    found = []
    for _ in range(steps):
        stats = engine.forward_backward(batch, 1.0 / batch.num_targets, last=True)
        engine.step(1.0)
        found.append(float(stats["loss"]) / batch.num_targets)
    return found


def test_one_text_is_learnt_to_full_chains() -> None:
    """Trained by the product's loss, engine and anchors on one reply: served on it, every draft is accepted."""
    model = model_of("llama").requires_grad_(False)
    target, prompt = Target(model, TAPS), prompts_of(5)[0]
    drafter = eagle_of(std=0.1)
    losses = taught(drafter, target, [[*prompt.ids, *stepwise(model, prompt, 40)]], 80)
    assert losses[-1] < 0.05 * losses[0]
    made = PlainGenerator(target, EagleProposer(drafter, target)).generate([prompt], Sampling(max_new_tokens=41))
    rounds = next(iter(made)).rounds
    assert [r.accepted for r in rounds] == [4] * 8 and sum(r.committed for r in rounds) == 40


@pytest.mark.parametrize("config", [LossConfig(), LossConfig(dpace_alpha=0.5), LossConfig(ce=0.0, kl=1.0),
                                    LossConfig(labels=Labels.target)], ids=str)  # fmt: skip
def test_the_loss_is_the_formula_over_the_written_out_chains(config: LossConfig) -> None:
    model = model_of("llama").requires_grad_(False)
    target, drafter = Target(model, TAPS), eagle_of()
    slow, head = Slow(drafter, model.get_input_embeddings().weight), model.lm_head.weight
    text, places = draw(15, seed=3).tolist(), [2, 7, 12]
    loss, stats = make_loss(target, config)(drafter, batch_of([text], torch.tensor([-1, *places]), 4))
    last, features = target.packed(torch.tensor([text]), torch.arange(15)[None])
    total, count = torch.zeros(()), 0
    for anchor in places:
        rows = slow.chain(text[: anchor + 1], features[0, :anchor], head, text[anchor + 1 : anchor + 5])
        truth = text[anchor + 1 : anchor + 5]
        soft = [head @ last[0, anchor + k] for k in range(len(truth))]
        if config.labels is Labels.target:
            truth = [int(s.argmax()) for s in soft]
        q = [float(row.softmax(-1)[t]) for row, t in zip(rows, truth, strict=False)] + [0.0] * (4 - len(truth))
        for k, label in enumerate(truth):
            weight = float(torch.exp(torch.tensor(-k / config.gamma)))
            if config.dpace_alpha is not None:
                a = config.dpace_alpha
                weight = sum(float(torch.tensor([(1 - a) * p + a for p in q[: j + 1]]).prod()) for j in range(k, 4))
            log_q, log_p = rows[k].log_softmax(-1), soft[k].log_softmax(-1)
            total = total - config.ce * weight * log_q[label]
            total = total + config.kl * weight * (log_p.exp() * (log_p - log_q)).sum()
            count += 1
    assert count == 10 and int(stats["blocks"]) == 3
    torch.testing.assert_close(loss, total, atol=1e-3, rtol=1e-4)


def test_gradients_go_through_the_chain() -> None:
    """Of the last step alone: every weight has one, and a small step of `fc` along its own changes what it says it
    changes, which it does not where hidden states are fed back as constants."""
    model = model_of("llama").requires_grad_(False)
    target, drafter = Target(model, TAPS), eagle_of(std=0.15)
    ids, position = draw(1, 12, seed=2), torch.arange(12)[None]
    features = target.packed(ids, position)[1]
    mix = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))

    def last(anchors: list[int]) -> Tensor:
        return trained_chains(drafter, target, ids, position, features, torch.tensor([anchors]))[0, :, -1]

    (last([2, 5]) * mix).sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().max() > 0) for p in drafter.parameters())
    gradient = drafter.fc.weight.grad
    assert gradient is not None
    size, sides = float(gradient.norm()), []
    with torch.no_grad():
        for sign in (1, -2):  # one step up, then two down
            drafter.fc.weight.add_(gradient / size, alpha=sign * 2e-3)
            sides.append(float((last([2, 5]) * mix).sum()))
        assert (sides[0] - sides[1]) / 4e-3 == pytest.approx(size, rel=0.02)
        torch.testing.assert_close(last([2, 5])[1:], last([5]), atol=1e-5, rtol=1e-4)


# masks


def rule(config: EagleConfig, step: int, position: Tensor, anchor: Tensor) -> Tensor:
    """Boolean [A, T + K * A], by loops."""
    tokens, anchors = position.shape[1], anchor.shape[1]
    found = torch.zeros(anchors, tokens + config.drafts * anchors, dtype=torch.bool)
    for a, at in enumerate(anchor[0].tolist()):
        begin = at - int(position[0, at]) if at >= 0 else 0
        for j in range(begin + 1, at):
            found[a, j] = not config.window or at + step - j < config.window
        for k in range(step + 1):
            found[a, tokens + k * anchors + a] = True
    return found


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [0, 5, 40])
@pytest.mark.parametrize(("lengths", "anchors"), [((7, 30, 1, 12), 9), ((300,), 150), ((100, 160), 129)])
def test_masks_are_the_rule(window: int, lengths: tuple[int, ...], anchors: int) -> None:
    """Written out, and for flex_attention: its function alone, and that the listed tiles hold every visible pair and
    no tile without one near; the attention over them is the plain one."""
    config = eagle_of(window=window).config
    _, position = packed(*lengths)
    document = (position == 0).cumsum(-1) - 1
    able = (position[0] > 0).nonzero()[:, 0]
    chosen = able[torch.randperm(len(able), generator=torch.Generator().manual_seed(1))[: anchors - 2]].sort().values
    anchor = torch.cat((torch.tensor([-1, -1]), chosen))[None]
    queries, keys = anchor.shape[1], position.shape[1] + 4 * anchor.shape[1]
    for step in range(4):
        wanted = rule(config, step, position, anchor)
        assert torch.equal(dense(config, step, document, position, anchor)[0, 0], wanted)
        mask = sparse(config, step, document, position, anchor)
        assert torch.equal(create_mask(mask.mask_mod, 1, 1, queries, keys, device="cpu")[0, 0], wanted)
        padded = F.pad(wanted, (0, -keys % TILE, 0, -queries % TILE))
        needed = padded.unflatten(0, (-1, TILE)).unflatten(2, (-1, TILE)).any(3).any(1)
        listed = mask.to_dense()[0, 0].bool()
        assert not bool((needed & ~listed).any())
        q, k, v = (torch.randn(1, h, n, 16) for h, n in ((4, queries), (2, keys), (2, keys)))
        plain = eager_attention(q, k, v, scale=0.25, mask=additive(wanted, q.dtype), sinks=None)
        out: Any = flex_attention(q, k, v, block_mask=mask, scale=0.25, enable_gqa=True)
        torch.testing.assert_close(out, plain, atol=1e-5, rtol=1e-4)


def test_a_window_bounds_the_tiles_of_an_anchor() -> None:
    """Anchors ascend: with a window, tiles a query tile reads do not grow with the length of the context."""

    def most(tokens: int, window: int) -> int:
        position = torch.arange(tokens)[None]
        config = eagle_of(window=window).config
        anchor = torch.arange(3, tokens, 4)[None]
        return int(sparse(config, 3, torch.zeros_like(position), position, anchor).kv_num_blocks.max())

    assert most(1024, 64) == most(4096, 64)
    assert most(4096, 0) > 2 * most(1024, 0)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_block_sparse_chains_are_the_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "compiled_flex", lambda: flex_attention)
    drafter, target = eagle_of(), PackedTarget(model_of("llama"), TAPS)
    ids, position = packed(9, 14, 12)
    features = target.packed(ids, position)[1]
    found = {}
    for name, way in (("plain", EAGER), ("sparse", FLEX)):
        drafter.ops = way
        with torch.no_grad():
            found[name] = trained_chains(drafter, target, ids, position, features, torch.tensor([[-1, 3, 11, 30]]))
    torch.testing.assert_close(found["sparse"][:, 1:], found["plain"][:, 1:], atol=1e-5, rtol=1e-4)


# folders and input


def stored(folder: Path, drafter: EagleDrafter | None = None) -> Path:
    drafter = drafter or eagle_of()
    save_drafter(drafter.state_dict(), drafter.config, folder, {"target": {}, "steps": 3})
    return folder


def test_a_folder_comes_back_as_it_was(tmp_path: Path) -> None:
    drafter = eagle_of(window=9)
    folder = stored(tmp_path / "d", drafter)
    raw = json.loads((folder / "config.json").read_text())
    assert raw["model_type"] == "fp4flash_eagle" and raw["window"] == 9 and len(raw) == 13
    for found in (load_eagle(folder, dtype=torch.float32), load_any(folder, dtype=torch.float32)):
        assert isinstance(found, EagleDrafter) and found.config == drafter.config and not found.training
        for name, tensor in found.state_dict().items():
            assert torch.equal(tensor, drafter.state_dict()[name])
    other = drafter_of()
    save_drafter(other.state_dict(), other.config, tmp_path / "dflash", {})
    assert load_any(tmp_path / "dflash", dtype=torch.float32).config == other.config


def test_acceptance_opens_either_kind(tmp_path: Path) -> None:
    model = model_of("llama")
    opened = open_drafter(stored(tmp_path / "d"), model)
    assert opened.facts["kind"] == "eagle" and opened.drafts == 4 and opened.taps == TAPS and opened.replayed
    assert "window" not in opened.facts and opened.windowed and opened.windowed(6).facts["window"] == 6
    target, prompt = Target(model, opened.taps), prompts_of(6)[0]
    reply = Reply(prompt.id, stepwise(model, prompt, 20), "length")
    (whole,) = opened.replayed(target, [(prompt, reply)])
    (near,) = opened.windowed(5).replayed(target, [(prompt, reply)])  # type: ignore[misc]
    assert not torch.equal(whole.probability, near.probability), "the window is looked at"
    assert eagle("x", eagle_of(window=5), model).replayed is not None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.pop("window"), "key 'window' is missing"),
        (lambda c: c.update(sinks=True), "key 'sinks' is unknown"),
        (lambda c: c.update(model_type="fp4flash_dflash"), "model_type='fp4flash_dflash', expected fp4flash_eagle"),
        (lambda c: c.update(taps=3), "taps is no list"),
        (lambda c: c.update(taps=[2, 0]), r"taps=\(2, 0\): expected ascending"),
        (lambda c: c.update(drafts=0), "drafts=0: expected at least 1"),
        (lambda c: c.update(window=4), r"window=4: expected 0 \(all keys\), or above drafts=4"),
        (lambda c: c.update(head_dim=15), "head_dim=15: expected an even"),
        (lambda c: c.update(num_key_value_heads=3), "num_key_value_heads=3: expected a divisor"),
        (lambda c: c.update(hidden_size="32"), "hidden_size='32': expected int"),
        (lambda c: c.update(intermediate_size=65), "down_proj.weight"),
    ],
)
def test_a_wrong_folder_is_refused(tmp_path: Path, change: Any, says: str) -> None:
    folder = stored(tmp_path / "d")
    raw = json.loads((folder / "config.json").read_text())
    change(raw)
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises((CheckpointError, ConfigError), match=says) as error:
        load_eagle(folder)
    assert one_line(error)


def test_damage_and_the_wrong_kind_are_refused(tmp_path: Path) -> None:
    folder = stored(tmp_path / "d")
    with pytest.raises(UnsupportedError, match="float16"):
        load_eagle(folder, dtype=torch.float16)
    with pytest.raises(CheckpointError, match="model_type='fp4flash_eagle', expected fp4flash_dflash") as error:
        load_drafter(folder)
    assert one_line(error)
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if n != "norm.weight"}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"norm\.weight is None"):
        load_eagle(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(
        CheckpointError, match="model_type='llama', expected fp4flash_dflash or fp4flash_eagle"
    ) as other:
        load_any(folder)
    assert one_line(other)
    with pytest.raises(ConfigError, match="vocabulary 61 and width 32; this one has 60 and 32"):
        EagleProposer(eagle_of(vocab_size=61), Target(model_of("llama"), TAPS))
    with pytest.raises(ConfigError, match="the target is tapped at"):
        target = Target(model_of("llama"), (1, 3))
        PlainGenerator(target, EagleProposer(eagle_of(), target))
    with pytest.raises(UnsupportedError, match="float16"):
        eagle_of().fuse(torch.zeros(1, 1, 64, dtype=torch.float16))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["draft.kind=medusa"], ["draft.kind", "medusa", "dflash", "eagle"]),
        (["draft.kind=eagle"], ["draft.num_hidden_layers=5", "draft=eagle"]),
        (["draft=eagle", "draft.sinks=true"], ["draft.sinks=True", "draft.kind=eagle"]),
        (["draft=eagle", "draft.selector_top_k=4"], ["draft.selector_top_k=4", "draft.kind=eagle"]),
        (["draft=mimo", "draft.kind=eagle", "draft.num_hidden_layers=1"], ["draft.sinks=True"]),
    ],
)
def test_wrong_draft_configurations_are_refused(words: list[str], says: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load(COMMAND, words)
    assert one_line(error) and all(s in str(error.value) for s in says), str(error.value)


def leaves(config: Any, prefix: str = "") -> dict[str, Any]:
    if not dataclasses.is_dataclass(config):
        return {prefix: config}
    parts = [leaves(getattr(config, f.name), f"{prefix}.{f.name}".lstrip(".")) for f in dataclasses.fields(config)]
    return {key: value for part in parts for key, value in part.items()}


@pytest.mark.parametrize("pair", ["mimo", "smollm2"])
def test_baseline_and_drafter_have_the_same_data_and_budget(pair: str) -> None:
    """Only the drafter and its rates differ; taps and K are the same."""
    theirs, ours = (leaves(load(COMMAND, [f"+experiment={pair}_{kind}"])[0]) for kind in ("eagle", "dflash"))
    differ = {key for key in ours if ours[key] != theirs[key]}
    assert differ - {"optim.lr", "optim.muon_lr"} and not {"draft.taps", "draft.tap_count", "draft.block_size"} & differ
    assert all(key.startswith("draft.") or key in {"optim.lr", "optim.muon_lr"} for key in differ), differ


def test_an_anchor_behind_a_prompt_of_one_token() -> None:
    """It stands at position 1 and sees only its own chain."""
    model = model_of("llama")
    target, prompt = Target(model, TAPS), Prompt("one", [7])
    reply = Reply("one", stepwise(model, prompt, 6), "length")
    drafter = eagle_of()
    (found,) = replay(target, drafter, [(prompt, reply)])
    slow = Slow(drafter, model.get_input_embeddings().weight)
    text = [7, reply.ids[0]]
    wanted = [int(x.argmax()) for x in slow.chain(text, features_of(target, text[:-1]), model.lm_head.weight)]
    assert found.first == 1 and found.tokens[0].tolist() == wanted
