"""The 14 checks by which an implementation of the DFlash drafter is known to compute what it should.

Truth is tests/dflash_reference.py, a second drafter in float64, and the rules of visibility written out as loops here.
Every check runs on the three ways a block is computed: packed training rows with the written-out mask (`dense`), the
same with the block mask of flex_attention (`sparse`), and one block at a time over the decoding cache (`cache`).
"""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import GptOssConfig, GptOssForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from core.errors import CheckpointError, ConfigError, Fp4FlashError, UnsupportedError
from core.generate.decode import PlainGenerator
from core.generate.dflash import DFlashProposer
from core.generate.interface import Prompt
from core.generate.sampling import Sampling
from core.generate.slots import SlotCache
from core.generate.target import Target
from core.models import ops
from core.models.dflash import Drafter, init_drafter
from core.models.dflash_config import FULL, SLIDING, DFlashConfig
from core.models.dflash_io import load_drafter, save_drafter
from core.models.dflash_mask import TILE, decoding, dense, sparse
from core.models.mimo_v2 import MiMoV2ForCausalLM
from core.models.mimo_v2_config import MiMoV2Config
from draft_training.anchors import gathered
from draft_training.replay import hidden_at, replay, rounds_along
from tests.dflash_reference import Facts, draft_block

VOCAB, SIZE = 32, 32
BASE: dict[str, Any] = {
    "hidden_size": SIZE, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": VOCAB, "num_target_layers": 6, "taps": (1, 3),
    "mask_token_id": 2, "block_size": 4, "window": 6,
}  # fmt: skip
MIXED = BASE | {"layer_types": (SLIDING, FULL), "sinks": True, "value_scale": 0.6, "partial_rotary_factor": 0.5}
SAME = {"atol": 2e-5, "rtol": 0.0}  # hidden states are O(1) behind a norm; FP32 against float64 measured below 3e-6
DENSE_TARGET: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": SIZE, "intermediate_size": 64, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.3,
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny tensors; a busy machine is slower with more
    yield
    torch.set_num_threads(before)


pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture(autouse=True)
def uncompiled_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "compiled_flex", lambda: flex_attention)


def drafter_of(**config: Any) -> Drafter:
    """Every parameter random, norms and sinks too, so that none can be left out unnoticed."""
    drafter = Drafter(DFlashConfig(**BASE | config)).eval()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in drafter.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * values if "norm" in name else 0.3 * values if parameter.dim() == 2 else values)
    return drafter


def facts_of(c: DFlashConfig) -> Facts:
    windows = tuple(c.window if kind == SLIDING else None for kind in c.layer_types)
    return Facts(
        c.num_attention_heads, c.num_key_value_heads, windows, c.block_size,
        round(c.head_dim * c.partial_rotary_factor), c.rope_theta, c.rms_norm_eps, c.causal, c.value_scale,
    )  # fmt: skip


class Text:
    """A packed row: documents of these lengths, random tokens and features; `embedding` is the target's."""

    def __init__(self, *lengths: int, taps: int = 2) -> None:
        generator = torch.Generator().manual_seed(5)
        self.position = torch.cat([torch.arange(n) for n in lengths])[None]
        self.ids = torch.randint(0, VOCAB, self.position.shape, generator=generator)
        self.features = torch.randn(1, sum(lengths), taps * SIZE, generator=generator)
        self.embedding = nn.Embedding(VOCAB, SIZE)
        with torch.no_grad():
            self.embedding.weight.copy_(torch.randn(VOCAB, SIZE, generator=generator))

    @property
    def target(self) -> Any:
        return SimpleNamespace(embedding=self.embedding)

    def truth(self, drafter: Drafter, anchor: int) -> Tensor:
        """[B, G] of the block at this index along the row."""
        place = int(self.position[0, anchor])
        features = self.features[0, anchor - place : anchor]
        embed = self.embedding.weight[self.ids[0, anchor]].detach()
        return draft_block(drafter.state_dict(), facts_of(drafter.config), features, embed)


@torch.no_grad()
def by_dense(drafter: Drafter, text: Text, anchors: list[int]) -> Tensor:
    """[A, B, G]."""
    drafter.ops = ops.EAGER
    return hidden_at(drafter, text.target, text.ids, text.position, text.features, torch.tensor([anchors]))[0]


@torch.no_grad()
def by_sparse(drafter: Drafter, text: Text, anchors: list[int]) -> Tensor:
    drafter.ops = ops.FLEX
    return hidden_at(drafter, text.target, text.ids, text.position, text.features, torch.tensor([anchors]))[0]


@torch.no_grad()
def by_cache(drafter: Drafter, text: Text, anchors: list[int]) -> Tensor:
    """One row an anchor; the cache also holds the rest of the document, as it does after rejected drafts. Slot 0 is
    not handed out there; it comes back as NaN."""
    drafter.ops = ops.EAGER
    out = []
    for anchor in anchors:
        place = int(text.position[0, anchor])
        following = [*text.position[0, anchor:].tolist(), 0]
        length = place + next(i for i, p in enumerate(following) if i and p == 0)
        row = slice(anchor - place, anchor - place + length)
        proposer = DFlashProposer(drafter, text.target)
        proposer.start(1, length + 3)
        proposer.extend(text.ids[:, row], text.features[:, row], text.position[:, row], length)
        hidden = proposer.hidden(text.ids[:, anchor], text.position[:, anchor])[0]
        out.append(torch.cat((torch.full_like(hidden[:1], float("nan")), hidden)))
    return torch.stack(out)


WAYS = {"dense": by_dense, "sparse": by_sparse, "cache": by_cache}
Way = Callable[[Drafter, Text, list[int]], Tensor]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Way:
    return WAYS[request.param]


def matches(found: Tensor, wanted: Tensor) -> None:
    first = 1 if bool(found[..., 0, :].isnan().any()) else 0
    torch.testing.assert_close(found[..., first:, :].double(), wanted[..., first:, :], **SAME)


def differs(a: Tensor, b: Tensor) -> bool:
    """Any slot, beyond rounding."""
    return bool(((a - b).abs().nan_to_num() > 1e-4).any())


VARIANTS: dict[str, dict[str, Any]] = {
    "sliding": {},
    "full": {"layer_types": (FULL, FULL)},
    "causal": {"causal": True},
    "mixed causal": {"layer_types": (FULL, SLIDING), "causal": True},
    "sinks": {"sinks": True},
    "value scale": {"value_scale": 0.612},
    "a quarter rotated": {"partial_rotary_factor": 0.25, "rope_theta": 1e6},
    "half rotated": {"partial_rotary_factor": 0.5, "rope_theta": 100.0},
    "everything": MIXED | {"causal": True, "block_size": 7, "window": 9},
    "pairs": {"block_size": 2, "window": 2},
    "one key-value head": {"num_key_value_heads": 1, "head_dim": 32},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_option_equals_the_second_implementation(variant: str, way: Way) -> None:
    drafter, text = drafter_of(**VARIANTS[variant]), Text(14, 9)
    anchors = [1, 6, 13, 15, 22]  # one token of context, a full window, ends of documents
    matches(way(drafter, text, anchors), torch.stack([text.truth(drafter, a) for a in anchors]))


def test_01_context_is_strictly_before_the_anchor(way: Way) -> None:
    drafter, text, anchor = drafter_of(**MIXED), Text(12), 7
    before = way(drafter, text, [anchor])
    text.features[:, anchor:] += 3
    assert torch.equal(way(drafter, text, [anchor]).nan_to_num(), before.nan_to_num())
    text.features[:, anchor - 1] += 3
    assert differs(way(drafter, text, [anchor]), before)


def test_02_slot_k_is_the_token_k_after_the_anchor() -> None:
    """A drafter that answers with the token standing at the position it is asked for is right everywhere."""
    model = target_model("llama")
    target = Target(model, (1, 3))
    prompt, limit = [3, 9, 4], 20
    text = [*prompt, *stepwise(model, prompt, limit)]
    drafter = drafter_of()
    behind = dict(enumerate(text))
    # the head is square here: its inverse turns a token into the hidden state that says it
    says = torch.linalg.inv(target.head.weight.detach().double()).float() * 30

    def answer(x: Tensor, position: Tensor, context: Any, masks: Any) -> Tensor:
        return torch.stack([torch.stack([says[:, behind.get(int(p), 0)] for p in row]) for row in position])

    drafter.forward = answer  # type: ignore[method-assign]
    reply = next(PlainGenerator(target, DFlashProposer(drafter, target)).generate(
        [Prompt("p", prompt)], Sampling(max_new_tokens=limit)))  # fmt: skip
    assert reply.ids == text[len(prompt) :]
    assert [r.committed for r in reply.rounds] == [4, 4, 4, 4, 3], "20 tokens: one of prefill, four full rounds, a cut"
    assert [r.context for r in reply.rounds] == [3, 7, 11, 15, 19]
    replayed = next(replay(target, drafter, [(Prompt("p", prompt), reply)]))
    assert replayed.tokens[:16].tolist() == [text[a + 1 : a + 4] for a in range(3, 19)]
    # labels of training: labels_T[t] is the token at t + 1
    ids, position = torch.tensor([text]), torch.arange(len(text))[None]
    shifted = F.pad(ids[:, 1:], (0, 1), value=-100)
    labels = gathered(shifted, position, torch.tensor([[-1, 4, 21]]), 3)
    assert labels.tolist() == [[[-100] * 3, text[5:8], [text[22], -100, -100]]]


def target_model(family: str, **changes: Any) -> Any:
    torch.manual_seed(2)
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**DENSE_TARGET | changes)).eval()
    if family == "qwen3":
        sliding = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3}
        return Qwen3ForCausalLM(Qwen3Config(**DENSE_TARGET | sliding | changes)).eval()
    if family == "gpt-oss":
        experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5}
        return GptOssForCausalLM(GptOssConfig(**DENSE_TARGET | experts | changes)).eval()
    geometry = {
        "v_head_dim": 8, "num_key_value_heads": 1, "swa_num_key_value_heads": 2, "moe_intermediate_size": 32,
        "n_routed_experts": 8, "num_experts_per_tok": 2, "sliding_window": 6,
    }  # fmt: skip
    return MiMoV2ForCausalLM(MiMoV2Config(**DENSE_TARGET | geometry | changes)).eval()


FAMILIES = ("llama", "qwen3", "gpt-oss", "mimo")


@torch.no_grad()
def stepwise(model: Any, prompt: list[int], count: int) -> list[int]:
    """Greedy text by full forwards."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_03_tap_is_the_output_of_its_layer(family: str) -> None:
    model = target_model(family)
    ids = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    position = torch.arange(9).expand(2, -1)
    with torch.no_grad():
        hidden = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    taps = (0, 2, 4)
    wanted = torch.cat([hidden[t + 1] for t in taps], dim=-1)
    _, packed = Target(model, taps).packed(ids, position)
    torch.testing.assert_close(packed, wanted, atol=1e-5, rtol=1e-5)
    _, stepped = Target(model, taps).step(ids, position, SlotCache(2, 12), 9)
    torch.testing.assert_close(stepped, wanted, atol=1e-5, rtol=1e-5)
    # hidden_states ends behind the final norm; the last layer's tap does not
    last, raw = Target(model, (5,)).packed(ids, position)
    torch.testing.assert_close(model.model.norm(raw), last, atol=1e-6, rtol=1e-6)
    with pytest.raises(ConfigError, match=r"^draft.taps has layer 6; the target has layers 0 to 5$"):
        Target(model, (1, 6))


def test_04_context_gets_k_norm_and_rope_but_no_input_layernorm(way: Way) -> None:
    drafter, text = drafter_of(**MIXED), Text(12)
    kv = drafter.context(text.features, text.position)
    layer = drafter.layers[0]
    saved = {n: p.detach().clone() for n, p in drafter.named_parameters()}

    def changed(name: str) -> tuple[bool, bool]:
        with torch.no_grad():
            parameter = drafter.get_parameter(name)
            parameter.mul_(1.5)
            k, v = drafter.context(text.features, text.position)[0]
            parameter.copy_(saved[name])
        return differs(k, kv[0][0]), differs(v, kv[0][1])

    assert changed("layers.0.self_attn.k_norm.weight") == (True, False)
    assert changed("layers.0.self_attn.q_norm.weight") == (False, False)
    assert changed("layers.0.input_layernorm.weight") == (False, False)
    assert changed("hidden_norm.weight")[1]
    moved = drafter.context(text.features, text.position + 1)[0]
    assert differs(moved[0], kv[0][0]) and torch.equal(moved[1], kv[0][1])
    with torch.no_grad():  # and the block's own input does go through input_layernorm
        before = way(drafter, text, [7])
        layer.input_layernorm.weight.mul_(torch.linspace(0.5, 2, SIZE))
    after = way(drafter, text, [7])
    assert differs(after, before)
    matches(after, text.truth(drafter, 7)[None])


def test_05_slot_0_is_the_embedding_of_the_anchor(way: Way) -> None:
    drafter, text = drafter_of(**MIXED), Text(12)
    before = way(drafter, text, [7])
    text.ids[0, 7] = (text.ids[0, 7] + 1) % VOCAB
    anchor = int(text.ids[0, 7])
    after = way(drafter, text, [7])
    assert all(differs(after[:, k], before[:, k]) for k in range(1, 4))
    matches(after, text.truth(drafter, 7)[None])
    with torch.no_grad():  # no other token's embedding is read: not the mask token's, not the context's
        text.embedding.weight[torch.arange(VOCAB) != anchor] += 1
    assert torch.equal(way(drafter, text, [7]).nan_to_num(), after.nan_to_num())


def test_06_mask_embedding_is_used_shipped_and_not_near_zero(tmp_path: Path, way: Way) -> None:
    drafter, text = drafter_of(**MIXED), Text(12)
    before = way(drafter, text, [7])
    with torch.no_grad():
        drafter.mask_embedding.mul_(-1)
    after = way(drafter, text, [7])
    assert all(differs(after[:, k], before[:, k]) for k in range(1, 4))
    matches(after, text.truth(drafter, 7)[None])
    for learned in (True, False):
        drafter = drafter_of(learned_mask=learned)
        assert drafter.mask_embedding.requires_grad is learned
        save_drafter(drafter.state_dict(), drafter.config, tmp_path / "drafter", {"target": {}})
        stored = load_file(tmp_path / "drafter" / "model.safetensors")["mask_embedding"]
        assert torch.equal(stored, drafter.mask_embedding)
        loaded = load_drafter(tmp_path / "drafter", dtype=torch.float32)
        assert torch.equal(loaded.mask_embedding, stored) and loaded.mask_embedding.requires_grad is learned
        assert loaded.config == drafter.config
    for value in (0.0, 1e-8, float("nan")):
        tensors = drafter.state_dict() | {"mask_embedding": torch.full((SIZE,), value)}
        save_drafter(tensors, drafter.config, tmp_path / "dead", {})
        with pytest.raises(CheckpointError, match="mask_embedding has root mean square") as error:
            load_drafter(tmp_path / "dead")
        assert "\n" not in str(error.value) and "draft.learned_mask=true" in str(error.value)


@pytest.mark.parametrize(("factor", "theta"), [(1.0, 1e4), (1.0, 5e6), (0.5, 1e4), (0.25, 320.0)])
def test_07_theta_and_partial_rotary_are_as_configured(factor: float, theta: float, way: Way) -> None:
    drafter = drafter_of(partial_rotary_factor=factor, rope_theta=theta, window=64)
    text = Text(40)
    matches(way(drafter, text, [38]), text.truth(drafter, 38)[None])
    key = drafter.context(text.features, text.position)[0][0]
    still = drafter.context(text.features, torch.zeros_like(text.position))[0][0]
    turned = (key - still).abs().amax(dim=(0, 1, 2)) > 1e-6
    assert turned.tolist() == [dim < factor * 16 for dim in range(16)], "leading dims turn, the rest stays"
    other = drafter_of(partial_rotary_factor=factor, rope_theta=theta * 3, window=64)
    assert differs(way(drafter, text, [38]), way(other, text, [38]))


@pytest.mark.parametrize("kind", [SLIDING, FULL])
@pytest.mark.parametrize("causal", [False, True])
def test_08_causality_is_explicit_and_holds_in_every_layer(kind: str, causal: bool, tmp_path: Path, way: Way) -> None:
    drafter = drafter_of(layer_types=(kind, kind), causal=causal)
    text = Text(12)
    before = way(drafter, text, [7])
    block = drafter.block

    def other_last(anchor_embed: Tensor) -> Tensor:
        x = block(anchor_embed)
        return torch.cat((x[..., :2, :], x[..., 2:, :] + 1), dim=-2)

    drafter.block = other_last  # type: ignore[method-assign]
    after = way(drafter, text, [7])
    assert differs(after[:, 1], before[:, 1]) is not causal, "slot 1 sees slots 2 and 3"
    assert differs(after[:, 2], before[:, 2])
    save_drafter(drafter.state_dict(), drafter.config, tmp_path / "drafter", {})
    path = tmp_path / "drafter" / "config.json"
    raw = json.loads(path.read_text())
    assert raw.pop("causal") is causal
    path.write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"config.json: key 'causal' is missing$"):
        load_drafter(tmp_path / "drafter")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("distance", ["W-1", "W", "W+1"])
@pytest.mark.parametrize("slot", [0, 3])
def test_09_window_counts_the_query_itself(slot: int, distance: str, causal: bool, way: Way) -> None:
    """A query sees keys up to W - 1 positions behind it; one layer, so that nothing reaches a slot through another."""
    drafter, text, anchor = drafter_of(num_hidden_layers=1, causal=causal), Text(16), 12
    if slot == 0 and way is by_cache:
        seen = decoding(drafter.config, SLIDING, torch.tensor([anchor]), 16)[0, 0, 0]
        assert seen.nonzero().flatten().tolist() == [7, 8, 9, 10, 11, 16, *([] if causal else [17, 18, 19])]
        return
    key = anchor + slot - {"W-1": 5, "W": 6, "W+1": 7}[distance]
    before = way(drafter, text, [anchor])
    text.features[0, key] += 2
    after = way(drafter, text, [anchor])
    assert differs(after[:, slot], before[:, slot]) is (distance == "W-1")
    matches(after, text.truth(drafter, anchor)[None])


def test_10_float16_is_refused_in_one_line(tmp_path: Path, way: Way) -> None:
    line = r"^the drafter computes in float16, whose range it exceeds; use bfloat16 or float32$"
    for half in (True, False):  # a drafter in float16, or one beside a target in float16
        drafter, text = drafter_of(), Text(12)
        text.embedding.half()
        text.features = text.features.half()
        with pytest.raises(UnsupportedError, match=line):
            way(drafter.half() if half else drafter, text, [7])
    save_drafter(drafter.state_dict(), drafter.config, tmp_path / "drafter", {})
    with pytest.raises(UnsupportedError, match=line):
        load_drafter(tmp_path / "drafter", dtype=torch.float16)
    drafter, text = drafter_of().bfloat16(), Text(12)
    text.embedding.bfloat16()
    text.features = text.features.bfloat16()
    assert way(drafter, text, [7]).dtype == torch.bfloat16


@pytest.mark.parametrize("family", FAMILIES)
def test_11_features_of_a_prefill_are_those_of_single_steps(family: str) -> None:
    """FP32, values O(10): 1e-5 of them. Chunks of other sizes, rows that advance unevenly, rejected drafts between."""
    model = target_model(family)
    target = Target(model, (0, 3, 5))
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCAB, (2, 17), generator=generator)
    position = torch.arange(17).expand(2, -1)
    last, wanted = target.packed(ids, position)
    cache, logits, features = SlotCache(2, 24), [], []
    at = 0
    for size, rejected in ((5, 3), (1, 0), (2, 2), (8, 0), (1, 0)):
        chunk = torch.cat((ids[:, at : at + size], torch.randint(0, VOCAB, (2, rejected), generator=generator)), 1)
        place = torch.arange(at, at + size + rejected).expand(2, -1)
        found = target.step(chunk, place, cache, at + size + rejected)
        logits.append(found[0][:, :size])
        features.append(found[1][:, :size])
        at += size
    torch.testing.assert_close(torch.cat(features, 1), wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0)
    expected = target.head(last).detach()
    torch.testing.assert_close(torch.cat(logits, 1), expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


def overfit(drafter: Drafter, target: Target, text: list[int], first: int) -> None:
    """Until every draft that stands in the text is right; cross-entropy of slots 1 .. B-1 over all anchors."""
    size = drafter.config.block_size
    ids, position = torch.tensor([text]), torch.arange(len(text))[None]
    _, features = target.packed(ids, position)
    anchors = torch.arange(first, len(text) - 1)[None]
    padded = F.pad(ids[0], (0, size), value=-100)
    labels = torch.stack([padded[a + 1 : a + size] for a in anchors[0].tolist()])
    optimiser = torch.optim.AdamW(drafter.parameters(), lr=3e-3)
    for _ in range(400):
        hidden = hidden_at(drafter, target, ids, position, features, anchors)[0, :, 1:]
        logits = target.head(hidden)
        if bool(((logits.argmax(-1) == labels) | (labels == -100)).all()):
            return
        optimiser.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        optimiser.step()
    raise AssertionError("one short text was not learnt in 400 steps")


@pytest.mark.parametrize("family", ["llama", "mimo"])
def test_12_one_sample_learnt_by_heart_is_accepted_in_full_blocks(family: str, monkeypatch: Any) -> None:
    model, prompt, limit = target_model(family), [5, 17, 3, 8], 32
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    target = Target(model, (1, 3))
    text = [*prompt, *stepwise(model, prompt, limit)]
    drafter = Drafter(DFlashConfig(**MIXED | {"window": 12}))
    init_drafter(drafter, target.embedding.weight[2], std=0.1)
    overfit(drafter, target, text, len(prompt))
    generator = PlainGenerator(target, DFlashProposer(drafter.eval(), target))
    reply = next(generator.generate([Prompt("p", prompt)], Sampling(max_new_tokens=limit)))
    assert reply.ids == text[len(prompt) :]
    assert [r.committed for r in reply.rounds] == [4] * 7 + [3], "31 tokens behind the first: tau = B but in the cut"
    assert [r.accepted for r in reply.rounds[:-1]] == [3] * 7
    for way in (ops.EAGER, ops.FLEX):
        drafter.ops = way
        replayed = next(replay(target, drafter, [(Prompt("p", prompt), reply)]))
        assert [r.committed for r in rounds_along(replayed)] == [4] * 7 + [3]


def test_13_packed_documents_do_not_see_each_other(way: Way) -> None:
    drafter, text = drafter_of(**MIXED | {"window": 20}), Text(9, 8, 7)
    anchors = [10, 16, 17 + 3]  # early in the second document, its last token, the third
    before = way(drafter, text, anchors)
    matches(before, torch.stack([text.truth(drafter, a) for a in anchors]))
    text.features[:, :9] += 2
    text.ids[:, :9] = (text.ids[:, :9] + 1) % VOCAB
    first = way(drafter, text, anchors)
    assert torch.equal(first.nan_to_num(), before.nan_to_num())
    text.features[:, 9:17] += 2
    second = way(drafter, text, anchors)
    assert torch.equal(second[2].nan_to_num(), before[2].nan_to_num())
    assert differs(second[0], before[0]) and differs(second[1], before[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_13_features_of_a_packed_document_are_those_of_it_alone(family: str) -> None:
    model = target_model(family)
    if family == "gpt-oss":
        from core.models.packing import separate_documents

        separate_documents(model)
    target, text = Target(model, (0, 3)), Text(9, 8)
    _, packed = target.packed(text.ids, text.position)
    _, alone = target.packed(text.ids[:, 9:], text.position[:, 9:])
    torch.testing.assert_close(packed[:, 9:], alone, atol=1e-5 * float(alone.abs().max()), rtol=0)


def named(count: Tensor | None, which: Tensor | None) -> Tensor:
    """Boolean, as `which` [R, 1, tiles, tiles of the other side] without its second dim: the first `count` names."""
    assert count is not None and which is not None
    listed = torch.zeros(which.shape[0], *which.shape[2:], dtype=torch.bool)
    for r, tile in torch.cartesian_prod(torch.arange(which.shape[0]), torch.arange(which.shape[2])).tolist():
        names = which[r, 0, tile, : int(count[r, 0, tile])].tolist()
        assert len(set(names)) == len(names) and all(0 <= n < which.shape[3] for n in names)
        listed[r, tile, names] = True
    return listed


def part_and_full(mask: BlockMask) -> tuple[Tensor, Tensor]:
    """Boolean [R, query tiles, key tiles]: tiles masked pair by pair, and tiles that are not masked at all."""
    return (
        named(mask.kv_num_blocks, mask.kv_indices),
        named(mask.full_kv_num_blocks, mask.full_kv_indices),
    )


def tiles(mask: BlockMask) -> Tensor:
    """Boolean [R, query tiles, key tiles]: which are read."""
    part, full = part_and_full(mask)
    assert not bool((part & full).any()), "a tile read twice counts twice"
    return part | full


def spread_out(tiles_RQK: Tensor, queries: int, keys: int) -> Tensor:
    """Tile by tile -> pair by pair."""
    return tiles_RQK.repeat_interleave(TILE, 1)[:, :queries].repeat_interleave(TILE, 2)[:, :, :keys]


@pytest.mark.parametrize(("size", "window"), [(8, 128), (8, 512), (7, 200), (16, 100)])
def test_14_cost_per_anchor_is_flat_in_context_length(size: int, window: int) -> None:
    """Key tiles of a query tile, at one anchor every eight tokens."""
    config = DFlashConfig(**BASE | {"block_size": size, "window": window})

    def cost(kind: str, tokens: int, documents: int = 1) -> Tensor:
        document = (torch.arange(tokens) // -(-tokens // documents))[None]
        return tiles(sparse(config, kind, document, torch.arange(4, tokens, 8)[None])).sum(-1)

    near, far = cost(SLIDING, 1024), cost(SLIDING, 16384)
    assert far.max() <= near.max()
    # the window and the span of the anchors of one query tile, off the grid by one; then the tiles of their own blocks
    span, own = window + (TILE // size + 2) * 8, 1 if TILE % size == 0 else 3
    assert far.max() <= -(-span // TILE) + 1 + own
    assert cost(FULL, 16384).max() > 4 * cost(FULL, 1024).max(), "full layers do grow: that is what the window is for"


def test_14_absent_anchors_cost_nothing_in_front_of_a_long_context() -> None:
    config = DFlashConfig(**BASE | {"block_size": 8, "window": 128})

    def most(tokens: int) -> int:
        anchors = torch.cat((torch.full((40,), -1), torch.arange(tokens - 400, tokens, 4)))[None]
        return int(tiles(sparse(config, SLIDING, torch.zeros(1, tokens, dtype=torch.int64), anchors)).sum(-1).max())

    assert most(16384) == most(1024)


def brute(config: DFlashConfig, kind: str, document: list[int], anchors: list[int], query: int, key: int) -> bool:
    """The rule of visibility for query and key numbers along [context, blocks]."""
    tokens, size = len(document), config.block_size
    anchor, slot = anchors[query // size], query % size
    if key >= tokens:
        other, other_slot = divmod(key - tokens, size)
        return other == query // size and (other_slot <= slot or not config.causal)
    if anchor < 0 or key >= anchor or document[key] != document[anchor]:
        return False
    return kind == FULL or (anchor + slot) - key <= config.window - 1


def drawn(rng: random.Random, tokens: int, most: int) -> tuple[DFlashConfig, str, Tensor, Tensor]:
    """A configuration, a layer kind, documents [2, T] and ascending anchors [2, A], absent ones first, some twice."""
    size = rng.choice([2, 7, 8, 16])
    config = DFlashConfig(
        **BASE | {"block_size": size, "window": rng.randint(max(8, size), 200), "causal": rng.random() < 0.5}
    )
    count = rng.randint(1, most)
    document, anchors = [], []
    for _ in range(2):
        ends = sorted(rng.sample(range(1, tokens), min(tokens - 1, rng.choice([0, 1, 3, 9]))))
        document.append([sum(e <= t for e in ends) for t in range(tokens)])
        absent = rng.choice([0, 0, 1, count // 2, count])
        anchors.append([-1] * absent + sorted(rng.choices(range(tokens), k=count - absent)))
    return config, rng.choice([SLIDING, SLIDING, FULL]), torch.tensor(document), torch.tensor(anchors)


def test_the_dense_mask_is_the_rule() -> None:
    rng = random.Random(0)
    for _ in range(25):
        config, kind, document, anchor = drawn(rng, rng.randint(2, 60), 4)
        if rng.random() < 0.5:  # dense takes them in any order
            anchor = anchor[:, torch.randperm(anchor.shape[1])]
        if rng.random() < 0.7:
            config = DFlashConfig(**BASE | {"block_size": config.block_size, "window": config.block_size + 3})
        found = dense(config, kind, document, anchor)
        queries = anchor.shape[1] * config.block_size
        for r in range(2):
            rows, marks = document[r].tolist(), anchor[r].tolist()
            keys = range(len(rows) + queries)
            wanted = [[brute(config, kind, rows, marks, q, k) for k in keys] for q in range(queries)]
            assert torch.equal(found[r, 0], torch.tensor(wanted))


@pytest.mark.parametrize("seed", range(4))
def test_the_block_mask_is_the_dense_one(seed: int) -> None:
    """Both what flex_attention computes (listed tiles, and in them the mask function) and the function alone, so no
    visible pair lies outside the tiles; and the tiles by key, which the backward pass reads."""
    rng = random.Random(seed)
    for _ in range(30):
        config, kind, document, anchor = drawn(rng, rng.choice([2, 127, 128, 129, 256, rng.randint(2, 700)]), 50)
        mask = sparse(config, kind, document, anchor)
        wanted = dense(config, kind, document, anchor)[:, 0]
        rows, queries, keys = wanted.shape
        assert mask.seq_lengths == (queries, keys)
        r, q, k = torch.arange(rows)[:, None, None], torch.arange(queries)[:, None], torch.arange(keys)
        function = mask.mask_mod(r, torch.zeros_like(r), q, k).expand_as(wanted)
        assert torch.equal(function, wanted)
        (part, full), listed = part_and_full(mask), tiles(mask)
        assert not bool((wanted & ~spread_out(listed, queries, keys)).any())
        assert bool(wanted[spread_out(full, queries, keys)].all()), "what is not masked is all visible"
        assert torch.equal(named(mask.q_num_blocks, mask.q_indices).mT, part)
        assert torch.equal(named(mask.full_q_num_blocks, mask.full_q_indices).mT, full)


def test_tiles_inside_the_window_of_all_their_queries_are_not_masked() -> None:
    """16 anchors a tile of queries, 2 tokens apart, and a window of 512: two or three of its tiles are seen by all."""
    config = DFlashConfig(**BASE | {"block_size": 8, "window": 512})
    mask = sparse(config, SLIDING, torch.zeros(1, 2048, dtype=torch.int64), torch.arange(1, 2048, 2)[None])
    part, full = (t.sum(-1)[0, 32:] for t in part_and_full(mask))
    assert set(full.tolist()) == {2, 3} and int(part.max()) <= 4


def test_the_decoding_mask_is_the_rule() -> None:
    rng = random.Random(1)
    for _ in range(40):
        config, kind, _, _ = drawn(rng, 2, 1)
        slots = rng.randint(4, 260)
        anchors = [rng.randint(1, slots) for _ in range(3)]
        found = decoding(config, kind, torch.tensor(anchors), slots)
        for r, anchor in enumerate(anchors):
            document = [0] * (max(slots, anchor) + 1)
            for slot in range(config.block_size):
                wanted = [brute(config, kind, document, [anchor], slot, k) for k in range(slots)]
                wanted += [brute(config, kind, document, [anchor], slot, len(document) + o)
                           for o in range(config.block_size)]  # fmt: skip
                assert found[r, 0, slot].tolist() == wanted


def damage_config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        raw = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(change(raw)))

    return apply


def damage_tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        save_file(change(tensors), folder / "model.safetensors")

    return apply


def without(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda d: {k: v for k, v in d.items() if k != name}


def cut(name: str, keep: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:keep]) and None


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing key": (damage_config(without("window")), r"config.json: key 'window' is missing"),
    "unknown key": (damage_config(lambda d: d | {"horizon": 3}), r"config.json: key 'horizon' is unknown"),
    "another model": (damage_config(lambda d: d | {"model_type": "qwen3"}), r"config.json: model_type='qwen3'"),
    "no mapping": (damage_config(lambda d: [d]), r"config.json"),
    "wrong type": (damage_config(lambda d: d | {"window": "8"}), r"drafter window='8': expected int"),
    "not a list": (damage_config(lambda d: d | {"taps": 3}), r"config.json: taps"),
    "broken rule": (damage_config(lambda d: d | {"window": 3}), r"drafter window=3: expected at least block_size=4"),
    "half a config": (cut("config.json", 50), r"config.json cannot be read"),
    "no config": (lambda f: (f / "config.json").unlink(), r"config.json cannot be read"),
    "missing tensor": (
        damage_tensors(without("fc.weight")), r"model.safetensors: fc.weight is None; the config wants \(32, 64\)"
    ),
    "extra tensor": (
        damage_tensors(lambda d: d | {"extra": torch.zeros(2)}), r"extra is \(2,\); the config wants None"
    ),
    "wrong shape": (
        damage_tensors(lambda d: d | {"norm.weight": torch.ones(31)}),
        r"norm.weight is \(31,\); the config wants \(32,\)",
    ),
    "no mask embedding": (damage_tensors(without("mask_embedding")), r"mask_embedding is None"),
    "truncated weights": (cut("model.safetensors", 9000), r"model.safetensors"),
    "truncated header": (cut("model.safetensors", 40), r"model.safetensors"),
    "empty weights": (cut("model.safetensors", 0), r"model.safetensors"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"model.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder_is_one_line(name: str, tmp_path: Path) -> None:
    drafter = drafter_of()
    save_drafter(drafter.state_dict(), drafter.config, tmp_path / "drafter", {})
    load_drafter(tmp_path / "drafter")
    apply, pattern = DAMAGE[name]
    apply(tmp_path / "drafter")
    with pytest.raises(Fp4FlashError, match=pattern) as error:
        load_drafter(tmp_path / "drafter")
    assert "\n" not in str(error.value)
