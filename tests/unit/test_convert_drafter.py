"""Drafters in other engines' layouts: transformers drafts what we draft; what a layout cannot say is refused by name.

The referee is transformers' own DFlash loop on the exported folder, in FP32: same drafts and same accepted counts in
every round. Layouts without an engine here are held against the names, shapes and keys of published folders.
"""

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from convert import export, load, verify
from convert.drafter_load import import_drafter
from convert.formats import DRAFTERS
from convert.manifest import check_pair
from core.errors import ConfigError, Fp4FlashError
from core.generate.dflash import DFlashProposer
from core.generate.target import Target
from core.models.dflash import Drafter
from core.models.dflash_config import FULL, SLIDING, DFlashConfig, from_dict
from core.models.dflash_io import load_drafter, read_drafter, read_drafter_config
from tests.convert_cases import digest, edit_json, edit_tensors, exported, manifest_of
from tests.drafter_cases import (
    HIDDEN,
    LAYERS,
    MASK_TOKEN,
    SMALL,
    VOCAB,
    assistant,
    drafter_export,
    fresh,
    generated,
    loaded,
    ours,
    saved,
    target_folder,
    teach,
    theirs,
)  # fmt: skip

MIMO_LIKE = {"sinks": True, "value_scale": 0.612, "partial_rotary_factor": 0.5, "learned_mask": True}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The models are tiny: more threads only wait for one another on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    made = {}
    for family in ("llama", "qwen3", "mimo"):
        folder = target_folder(family, tmp_path_factory.mktemp(family))
        made[family] = folder, loaded(folder)
    return made


@pytest.fixture(scope="module")
def llama(targets: dict[str, tuple[Path, Any]]) -> tuple[Path, Any]:
    return targets["llama"]


@pytest.fixture
def plain(llama: tuple[Path, Any], tmp_path: Path) -> Path:
    """A drafter that every layout can express, BF16."""
    return saved(fresh(llama[1]), llama[1], tmp_path / "drafter", torch.bfloat16)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mimo"])
def test_transformers_drafts_what_we_draft(family: str, targets: Any, tmp_path: Path) -> None:
    folder, model = targets[family]
    noise = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, VOCAB, (n,), generator=noise).tolist() for n in (3, 3, 3, 3, 3, 3, 9, 14, 17, 21)]
    plain = [generated(model, p, 60) for p in prompts]
    drafter = fresh(model, layer_types=(SLIDING, FULL if family == "qwen3" else SLIDING))
    teach(drafter, model, [p + t for p, t in zip(prompts[:6], plain[:6], strict=True)], steps=30)
    source = saved(drafter, model, tmp_path / "drafter")
    assert drafter_export(source, folder, "hf", tmp_path / "hf") == 0
    outside, rounds, accepted = assistant(tmp_path / "hf"), 0, set()
    for prompt, text in zip(prompts, plain, strict=True):
        own, drafts, counts = ours(model, drafter, prompt, 60)
        other, their_drafts, their_counts = theirs(model, outside, prompt, 60)
        assert own == other == text
        # with one token to go transformers takes a plain step, where we draft once more
        committed = 1 + sum(c + 1 for c in counts[:-1])
        assert len(drafts) - len(their_drafts) == (1 if committed == 59 else 0)
        assert drafts[: len(their_drafts)] == their_drafts
        assert counts[: len(their_counts)] == their_counts
        rounds, accepted = rounds + len(their_drafts), accepted | set(their_counts)
    assert rounds >= 200
    assert {0, 4} < accepted, "some rounds keep nothing, some everything, some a part"


def test_a_tap_at_the_last_layer_needs_a_key_in_the_target(llama: Any, tmp_path: Path, capsys) -> None:
    """transformers' hidden_states[-1] is the final norm's output; ours and every other engine's is the layer's."""
    folder, model = llama
    drafter = fresh(model, taps=(0, LAYERS - 1))
    source = saved(drafter, model, tmp_path / "drafter")
    for to in ("hf", "z-lab"):
        assert drafter_export(source, folder, to, tmp_path / to) == 2
        assert "tie_last_hidden_states" in capsys.readouterr().err
    again = target_folder("llama", tmp_path)
    edit_json(again / "config.json", lambda c: c.update(tie_last_hidden_states=False))
    assert drafter_export(source, again, "hf", tmp_path / "hf") == 0
    own, outside = loaded(again), assistant(tmp_path / "hf")
    assert ours(own, drafter, [5, 6, 7], 30)[1][:20] == theirs(own, outside, [5, 6, 7], 30)[1][:20]
    assert ours(own, drafter, [5, 6, 7], 30)[1][:20] != theirs(model, outside, [5, 6, 7], 30)[1][:20]


def block_of(drafter: Drafter, model: Any, features: torch.Tensor, anchor: int) -> torch.Tensor:
    """Our hidden states of one block behind `features`, all slots drafted."""
    proposer = DFlashProposer(drafter, Target(model, drafter.config.taps))
    proposer.start(1, features.shape[1] + 8)
    position = torch.arange(features.shape[1])[None]
    with torch.no_grad():
        proposer.extend(position, features, position, features.shape[1])
        return proposer.hidden(torch.tensor([anchor]), torch.tensor([features.shape[1]]))


def block_of_theirs(outside: Any, drafter: Drafter, model: Any, features: torch.Tensor, anchor: int, parts: list[int]):
    """Theirs, the context given in `parts` with a block of noise after each, as their loop does."""
    from transformers.cache_utils import DFlashCache

    cache = DFlashCache(config=outside.config)
    cache.activate_past_recording()
    noise = model.get_input_embeddings()(torch.tensor([[anchor] + [MASK_TOKEN] * drafter.config.drafts]))
    with torch.no_grad():
        for at, rows in enumerate(features.split(parts, dim=1)):
            cache.set_previous_accepted_tokens(rows.shape[1])
            if at:
                cache.crop(-drafter.config.block_size)
            out = outside(noise_embeds=noise, context_hidden_states=rows, past_key_values=cache)
    return out.last_hidden_state[:, 1:]


@pytest.mark.parametrize("window", [5, 8, 9, 10])
@pytest.mark.parametrize("parts", [[24], [20, 3, 1], [4, 4, 4, 4, 4, 4]])
def test_the_window_at_w_minus_1_w_and_w_plus_1(window: int, parts: list[int], llama: Any, tmp_path: Path) -> None:
    """A key at distance d from a slot changes it iff d < W, in our drafter and in the exported one."""
    folder, model = llama
    drafter = fresh(model, window=window, num_hidden_layers=1)
    torch.nn.init.normal_(drafter.layers[0].self_attn.o_proj.weight, std=0.5)
    source = saved(drafter, model, tmp_path / "drafter")
    assert drafter_export(source, folder, "hf", tmp_path / "hf") == 0
    outside = assistant(tmp_path / "hf")
    features = torch.randn(1, 24, 3 * HIDDEN, generator=torch.Generator().manual_seed(2))

    def both(rows: torch.Tensor) -> list[torch.Tensor]:
        return [block_of(drafter, model, rows, 5), block_of_theirs(outside, drafter, model, rows, 5, parts)]

    before = both(features)
    assert torch.allclose(before[0], before[1], atol=1e-5)  # FP32, sums in another order
    for slot in (1, drafter.config.drafts):
        for distance in (window - 1, window, window + 1):
            place = 24 + slot - distance
            if place >= 24:
                continue  # inside the block
            other = features.clone()
            other[:, place] += 3
            for old, new in zip(before, both(other), strict=True):
                changed = not torch.allclose(old[:, slot - 1], new[:, slot - 1], atol=1e-5)
                assert changed == (distance < window), (slot, distance)


REFUSED = [
    ("hf", {"sinks": True}, "sinks=True"),
    ("hf", {"value_scale": 0.612}, "value_scale=0.612"),
    ("hf", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ("hf", {"causal": True}, "causal=True"),
    ("hf", {"selector_rank": 4, "selector_top_k": 8}, "selector_rank=4"),
    ("hf", {"learned_mask": True}, "learned_mask=True"),
    ("z-lab", {"sinks": True}, "sinks=True"),
    ("z-lab", {"value_scale": 0.612}, "value_scale=0.612"),
    ("z-lab", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ("z-lab", {"learned_mask": True}, "learned_mask=True"),
    ("z-lab", {"selector_rank": 4, "selector_top_k": 8}, "selector_rank=4"),
    ("vllm", {"value_scale": 0.612}, "value_scale=0.612"),
    ("vllm", {"sinks": True, "layer_types": (SLIDING, FULL)}, "sinks=True with full_attention layers"),
    ("vllm", {"selector_rank": 4, "selector_top_k": 8}, "selector_rank=4"),
    ("mimo", {"causal": True}, "causal=True"),
    ("mimo", {"layer_types": (SLIDING, FULL)}, "layer_types=["),
    ("mimo", {"selector_rank": 4, "selector_top_k": 8}, "selector_rank=4"),
]


@pytest.mark.parametrize(("to", "change", "named"), REFUSED, ids=[f"{t} {n}" for t, _, n in REFUSED])
def test_what_a_layout_cannot_say_is_refused_by_name(to, change, named, llama: Any, tmp_path: Path, capsys) -> None:
    folder, model = llama
    drafter = fresh(model, **change)
    if change.get("learned_mask"):
        torch.nn.init.normal_(drafter.mask_embedding)
    source = saved(drafter, model, tmp_path / "drafter", torch.bfloat16)
    assert drafter_export(source, folder, to, tmp_path / "out") == 2
    text = capsys.readouterr().err
    assert f"--to {to} cannot express {named}" in text
    assert "use --to" in text or "train with" in text
    assert not (tmp_path / "out").exists()


def test_a_learned_mask_that_equals_the_row_is_accepted(llama: Any, tmp_path: Path) -> None:
    folder, model = llama
    source = saved(fresh(model, learned_mask=True), model, tmp_path / "drafter")
    assert drafter_export(source, folder, "hf", tmp_path / "hf") == 0


def test_a_mask_that_should_be_the_row_and_is_not_is_refused(llama: Any, tmp_path: Path, capsys) -> None:
    folder, model = llama
    drafter = fresh(model)
    with torch.no_grad():
        drafter.mask_embedding.add_(1)
    source = saved(drafter, model, tmp_path / "drafter")
    assert drafter_export(source, folder, "z-lab", tmp_path / "out") == 2
    assert f"should be row {MASK_TOKEN}" in capsys.readouterr().err


def test_other_dtypes_are_refused(llama: Any, tmp_path: Path, capsys) -> None:
    folder, model = llama
    for dtype, to, named in ((torch.float16, "vllm", "float16"), (torch.float32, "mimo", "BF16")):
        source = saved(fresh(model), model, tmp_path / str(dtype), dtype)
        assert drafter_export(source, folder, to, tmp_path / "out") == 2
        assert named in capsys.readouterr().err


def published(layers: int, hidden: int, heads: int, kv_heads: int, dim: int, width: int, taps: int) -> dict[str, tuple]:
    """Names and shapes of the 63 tensors of MiMo's 48-layer releases, for any sizes."""
    found: dict[str, tuple[int, ...]] = {"fc.weight": (hidden, taps * hidden), "hidden_norm.weight": (hidden,)}
    found["norm.weight"] = (hidden,)
    for i in range(layers):
        attention, mlp = f"layers.{i}.self_attn", f"layers.{i}.mlp"
        found |= {f"layers.{i}.{n}.weight": (hidden,) for n in ("input_layernorm", "post_attention_layernorm")}
        found |= {f"{attention}.{n}_norm.weight": (dim,) for n in "qk"}
        found |= {f"{attention}.{n}_proj.weight": (kv_heads * dim, hidden) for n in "kv"}
        found[f"{attention}.q_proj.weight"] = (heads * dim, hidden)
        found[f"{attention}.o_proj.weight"] = (hidden, heads * dim)
        found[f"{attention}.attention_sink_bias"] = (heads,)
        found |= {f"{mlp}.{n}_proj.weight": (width, hidden) for n in ("gate", "up")}
        found[f"{mlp}.down_proj.weight"] = (hidden, width)
    return found


def mimo_drafter(model: Any, place: Path) -> Path:
    drafter = fresh(model, num_hidden_layers=5, taps=(0, 1, 3), block_size=8, window=16, **MIMO_LIKE)
    for name, parameter in drafter.named_parameters():
        if "sink" in name or name == "mask_embedding":
            torch.nn.init.normal_(parameter)
    return saved(drafter, model, place / "drafter", torch.bfloat16)


def test_mimo_is_the_published_folder(targets: Any, tmp_path: Path) -> None:
    folder, model = targets["mimo"]
    source = mimo_drafter(model, tmp_path)
    assert drafter_export(source, folder, "mimo", tmp_path / "dflash") == 0
    out = tmp_path / "dflash"
    found = load_file(out / "dflash_draft_model.safetensors")
    assert len(found) == 63
    assert {n: tuple(t.shape) for n, t in found.items()} == published(5, HIDDEN, 4, 2, 16, 96, 3)
    assert {t.dtype for t in found.values()} == {torch.bfloat16}
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    assert index["weight_map"] == dict.fromkeys(found, "dflash_draft_model.safetensors")
    mask = torch.load(out / "mask_embedding.pt", weights_only=True)
    assert mask.keys() == {"mask_token_id", "embedding"} and mask["mask_token_id"] == MASK_TOKEN
    assert torch.equal(mask["embedding"], read_drafter(source)[1]["mask_embedding"])
    assert mask["embedding"].untyped_storage().nbytes() == 2 * HIDDEN
    raw = json.loads((out / "config.json").read_text())
    assert raw["architectures"] == ["DFlashDraftModel"] and raw["model_type"] == "qwen3"
    expected = {
        "head_dim": 16, "v_head_dim": 16, "partial_rotary_factor": 0.5, "block_size": 8, "is_causal": False,
        "layer_types": [SLIDING] * 5, "sliding_window": 16, "use_sliding_window": True, "num_target_layers": LAYERS,
        "target_hidden_size": HIDDEN, "vocab_size": VOCAB, "rope_theta": 10000.0, "add_swa_attention_sink_bias": True,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    assert {k: raw[k] for k in expected} == expected
    assert raw["dflash_config"] == {
        "target_layer_ids": [0, 1, 3], "mask_token_id": MASK_TOKEN, "block_size": 8, "causal": False, "use_swa": True,
        "swa_window_size": 16, "attention_sink_bias": True, "attention_value_scale": 0.612,
    }  # fmt: skip


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kinds", [(SLIDING, SLIDING), (SLIDING, FULL), (FULL, FULL)])
@pytest.mark.parametrize("to", ["z-lab", "vllm"])
def test_every_reader_finds_the_same_window_causality_and_taps(to, kinds, causal, llama: Any, tmp_path: Path) -> None:
    """The keys in the order in which the engines look for them (vLLM qwen3_dflash.py, z-lab's and SGLang's readers)."""
    folder, model = llama
    more = {"partial_rotary_factor": 0.5} if to == "vllm" else {}
    source = saved(fresh(model, layer_types=kinds, causal=causal, **more), model, tmp_path / "d", torch.bfloat16)
    assert drafter_export(source, folder, to, tmp_path / "out") == 0
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    inner = raw["dflash_config"]
    assert raw["is_causal"] is causal and inner["causal"] is causal
    assert raw["layer_types"] == list(kinds)
    sliding = SLIDING in kinds
    assert (inner.get("swa_window_size", raw["sliding_window"]) == 9) is sliding
    assert raw["use_sliding_window"] is sliding and raw["sliding_window"] == (9 if sliding else None)
    assert raw["block_size"] == inner["block_size"] == 5
    # vLLM adds 1 to dflash_config.target_layer_ids, and takes these two as they are
    assert inner["target_layer_ids"] == [0, 1, 2]
    assert not raw.keys() & {"eagle_aux_hidden_state_layer_ids", "target_layer_ids", "mask_token_id"}
    assert raw["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0} | more
    assert (tmp_path / "out" / "mask_embedding.pt").exists() is (to == "vllm")
    assert len(load_file(tmp_path / "out" / "model.safetensors")) == 3 + 11 * 2


@pytest.mark.parametrize("to", sorted(DRAFTERS))
def test_a_pair_knows_itself(to: str, plain: Path, llama: Any, targets: Any, tmp_path: Path, capsys) -> None:
    folder, _ = llama
    out = tmp_path / "out"
    assert drafter_export(plain, folder, to, out) == 0
    check_pair(folder, out)
    with pytest.raises(ConfigError, match="trained against"):
        check_pair(targets["qwen3"][0], out)
    manifest = manifest_of(out)
    assert manifest["format"] == to and manifest["target_hash"] == manifest_of(folder)["model_hash"]
    assert manifest["window"] == {"ours": 9, "here": 8 if to == "hf" else 9, "rule": DRAFTERS[to].window_rule}
    assert verify.main([str(out), "--source", str(plain)]) == 0
    assert "bit-equal" in capsys.readouterr().out
    file = out / DRAFTERS[to].weights
    blob = bytearray(file.read_bytes())
    blob[-1] ^= 1
    file.write_bytes(blob)
    assert verify.main([str(out)]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_another_target_is_refused(plain: Path, llama: Any, targets: Any, tmp_path: Path, capsys) -> None:
    """By its sizes, or by its fingerprint where the sizes fit; --force goes on."""
    assert drafter_export(plain, targets["qwen3"][0], "vllm", tmp_path / "out") == 2
    assert "fingerprint" in capsys.readouterr().err
    assert drafter_export(plain, targets["qwen3"][0], "vllm", tmp_path / "out", "--force") == 0
    edit_json(plain / "drafter.json", lambda p: p["target"].update(vocab_size=65))
    assert drafter_export(plain, llama[0], "vllm", tmp_path / "other") == 2
    assert "vocab_size 65 against 64" in capsys.readouterr().err
    bare = target_folder("llama", tmp_path).parent / "model"
    assert drafter_export(plain, bare, "vllm", tmp_path / "other") == 2
    assert "no manifest.json" in capsys.readouterr().err


def test_the_command_says_what_it_needs(plain: Path, llama: Any, tmp_path: Path, capsys) -> None:
    folder, _ = llama
    for words, named in (
        (["--what", "drafter", "--to", "hf", "--from", str(plain), "--out", "x"], "--target"),
        (["--what", "both", "--to", "hf", "--from", str(folder)], "--drafter"),
        (["--to", "z-lab", "--from", str(folder)], "--what drafter"),
        (["--to", "bf16", "--from", str(folder), "--target", "x"], "--target"),
    ):
        assert export.main(words) == 2
        assert named in capsys.readouterr().err
    assert drafter_export(plain, folder, "gguf", tmp_path / "out") == 2
    assert "hf, z-lab, vllm, mimo" in capsys.readouterr().err


def test_a_dry_run_prints_every_tensor_and_writes_nothing(plain: Path, llama: Any, tmp_path: Path, capsys) -> None:
    assert drafter_export(plain, llama[0], "hf", tmp_path / "out", "--dry-run") == 0
    text = capsys.readouterr().out
    assert "fc.weight -> encoder.fc.weight" in text and f"mask_embedding -> row {MASK_TOKEN}" in text
    assert text.count(" -> ") == len(load_file(plain / "model.safetensors"))
    assert "Window 9 (query - key < 9) is written as 8" in text
    assert not (tmp_path / "out").exists()


def test_a_full_folder_is_left_alone(plain: Path, llama: Any, tmp_path: Path, capsys) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    assert drafter_export(plain, llama[0], "hf", tmp_path / "out") == 2
    assert "not empty" in capsys.readouterr().err and [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]


def test_both_at_once(targets: Any, tmp_path: Path) -> None:
    """MiMo's release: the target, and the drafter in dflash/, paired."""
    folder, model = targets["mimo"]
    source = mimo_drafter(model, tmp_path)
    out = exported(folder, "mimo", tmp_path / "out", "--ptq", "even", "--what", "both", "--drafter", str(source))
    check_pair(out, out / "dflash")
    assert verify.main([str(out / "dflash")]) == 0


@pytest.mark.parametrize("to", sorted(DRAFTERS))
def test_it_comes_back(to: str, targets: Any, tmp_path: Path, capsys) -> None:
    folder, model = targets["mimo"]
    source = mimo_drafter(model, tmp_path) if to == "mimo" else None
    if source is None:
        more = {"learned_mask": True} | ({"sinks": True, "partial_rotary_factor": 0.5} if to == "vllm" else {})
        drafter = fresh(model, **(more if to == "vllm" else {}))
        source = saved(drafter, model, tmp_path / "drafter", torch.bfloat16)
    assert drafter_export(source, folder, to, tmp_path / "out") == 0
    words = ["--from", str(tmp_path / "out"), "--out", str(tmp_path / "back")]
    needs = to in ("hf", "z-lab")
    assert load.main([*words[:-1], str(tmp_path / "alone")]) == (2 if needs else 0)
    assert ("--target" in capsys.readouterr().err) is needs
    assert load.main([*words, "--target", str(folder)]) == 0
    first, again = read_drafter(source), read_drafter(tmp_path / "back")
    assert first[0] == again[0]
    assert first[1].keys() == again[1].keys() and all(torch.equal(first[1][n], again[1][n]) for n in first[1])
    load_drafter(tmp_path / "back")


def test_the_keys_of_v2_5_are_read(targets: Any, tmp_path: Path, capsys) -> None:
    """use_swa and swa_window_size without layer_types and is_causal, as V2.5 was published; sliding, bidirectional."""
    folder, model = targets["mimo"]
    source = mimo_drafter(model, tmp_path)
    out = tmp_path / "out"
    assert drafter_export(source, folder, "mimo", out) == 0

    def older(raw: dict[str, Any]) -> None:
        for key in ("layer_types", "is_causal", "use_sliding_window", "rope_parameters", "target_hidden_size"):
            del raw[key]
        del raw["dflash_config"]["causal"]
        raw["dflash_config"]["backbone_rotary_base"] = 5000000

    edit_json(out / "config.json", older)
    assert load.main(["--from", str(out), "--out", str(tmp_path / "back"), "--target", str(folder)]) == 0
    assert read_drafter_config(tmp_path / "back") == read_drafter_config(source)
    edit_json(out / "config.json", lambda raw: raw.update(layer_types=[SLIDING] * 5))
    assert load.main(["--from", str(out), "--out", str(tmp_path / "other")]) == 2
    assert "is_causal" in capsys.readouterr().err


class Evil:
    def __reduce__(self) -> tuple:
        return print, ("ran",)


def test_a_strangers_mask_file_runs_nothing(targets: Any, tmp_path: Path, capsys) -> None:
    folder, model = targets["mimo"]
    out = tmp_path / "out"
    assert drafter_export(mimo_drafter(model, tmp_path), folder, "mimo", out) == 0
    capsys.readouterr()
    words = ["--from", str(out), "--out", str(tmp_path / "back")]
    for content in (pickle.dumps(Evil(), protocol=2), b"", b"not a pickle"):
        (out / "mask_embedding.pt").write_bytes(content)
        assert load.main(words) == 2
        said = capsys.readouterr()
        assert "mask_embedding.pt" in said.err and "ran" not in said.out.split()
    torch.save({"embedding": Evil()}, out / "mask_embedding.pt")
    assert load.main(words) == 2
    (out / "mask_embedding.pt").unlink()
    assert load.main(words) == 2
    assert "lacks mask_embedding.pt" in capsys.readouterr().err
    assert not (tmp_path / "back").exists()


def test_a_tensor_of_another_variant_is_named(plain: Path, llama: Any, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert drafter_export(plain, llama[0], "vllm", out) == 0
    edit_tensors(out, lambda t: t.update({"layers.0.mlp_conv.base_kernel": torch.zeros(2, 2, HIDDEN)}))
    before = digest(out)
    assert load.main(["--from", str(out), "--out", str(tmp_path / "back"), "--target", str(llama[0])]) == 2
    assert "layers.0.mlp_conv.base_kernel" in capsys.readouterr().err
    assert digest(out) == before


def odd_values(raw: dict[str, Any], place: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """(key path, value that no publisher meant); ABSENT deletes."""
    found: list[tuple[tuple[str, ...], Any]] = []
    for key, value in raw.items():
        found += [((*place, key), odd) for odd in (ABSENT, None, -1, 0, 10**12, 1e30, "x", [], {}, [1, "x"], True)]
        if isinstance(value, dict):
            found += odd_values(value, (*place, key))
    return found


ABSENT = object()


@pytest.mark.parametrize("to", ["hf", "mimo"])
def test_a_strangers_config_ends_in_one_line(to: str, targets: Any, tmp_path: Path) -> None:
    """Whatever stands in one key: it is read as a config of ours would be, or refused in one line, at once."""
    folder, model = targets["mimo"]
    made = mimo_drafter(model, tmp_path) if to == "mimo" else saved(fresh(model), model, tmp_path / "drafter")
    out = tmp_path / "out"
    assert drafter_export(made, folder, to, out) == 0
    good, taken = (out / "config.json").read_text(), 0
    cases = odd_values(json.loads(good))
    for path, odd in cases:
        raw = json.loads(good)
        inner = raw
        for key in path[:-1]:
            inner = inner[key]
        if odd is ABSENT:
            del inner[path[-1]]
        else:
            inner[path[-1]] = odd
        (out / "config.json").write_text(json.dumps(raw))
        try:
            config = import_drafter(out, tmp_path / "back", folder, dry_run=True)
            assert from_dict(json.loads(json.dumps(config.to_dict())), "x") == config
            taken += 1
        except Fp4FlashError as error:
            assert "\n" not in str(error), (path, odd)
    assert 0 < taken < len(cases)


@pytest.mark.parametrize(
    ("key", "odd"), [("window", 9.5), ("causal", 1), ("rms_norm_eps", float("nan")), ("taps", "012")]
)
def test_a_value_of_another_type_is_named(key: str, odd: Any) -> None:
    with pytest.raises(ConfigError, match=f"drafter {key}="):
        DFlashConfig(**SMALL | {key: odd})


def test_an_import_keeps_off_what_is_there_and_checks_the_target(
    plain: Path, llama: Any, tmp_path: Path, capsys
) -> None:
    assert drafter_export(plain, llama[0], "z-lab", tmp_path / "out") == 0
    words = ["--from", str(tmp_path / "out"), "--target", str(llama[0]), "--out"]
    before = digest(plain)
    assert load.main([*words, str(plain)]) == 2
    assert "not empty" in capsys.readouterr().err and digest(plain) == before
    edit_json(tmp_path / "out" / "config.json", lambda raw: raw.update(num_target_layers=9))
    assert load.main([*words, str(tmp_path / "back")]) == 2
    assert "num_hidden_layers=9" in capsys.readouterr().err
    assert load.main(["--from", str(llama[0]), "--target", str(llama[0]), "--out", str(tmp_path / "back")]) == 2
    assert "--target is for drafters" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [(SLIDING, SLIDING), (SLIDING, FULL), (FULL, FULL)])
@pytest.mark.parametrize("causal", [False, True])
def test_the_z_lab_package_drafts_what_we_draft(kinds, causal: bool, llama: Any, tmp_path: Path) -> None:
    package = pytest.importorskip("dflash.model", reason="needs z-lab's package: pip install dflash==0.1.0")
    folder, model = llama
    drafter = fresh(model, layer_types=kinds, causal=causal)
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 11, 12]]
    teach(drafter, model, [p[:3] + generated(model, p[:3], 40) for p in prompts], steps=15)
    assert drafter_export(saved(drafter, model, tmp_path / "d"), folder, "z-lab", tmp_path / "out") == 0
    outside = package.DFlashDraftModel.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    for prompt in prompts:
        text, _, accepted = ours(model, drafter, prompt, 80)
        found = outside_rounds(package, outside, model, prompt, 80)
        assert found.output_ids[0, len(prompt) :].tolist() == text
        assert found.acceptance_lengths[:-1] == [a + 1 for a in accepted[: len(found.acceptance_lengths) - 1]]


def outside_rounds(package: Any, outside: Any, model: Any, prompt: list[int], tokens: int) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(package, "_cuda_time", lambda: 0.0)
        return package.dflash_generate(outside, model, torch.tensor([prompt]), tokens, None, return_stats=True)
