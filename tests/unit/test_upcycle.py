"""A dense Llama as a MiMo-V2 MoE: the same function with every expert on, and routing that holds what it promises."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from convert.dense_to_moe import Split, calibrate, every_expert_on, geometry, held_out, moe_config, upcycled
from convert.split_ffn import FFNStats, assign, balanced_clusters, group_neurons, router
from convert.upcycle import main
from core.models.load import load_model, save_model
from core.models.mimo_v2_config import MiMoV2Config
from core.train.batch import IGNORE, Batch
from core.train.tokenizer import train_tokenizer

# 3 heads and 1 KV head: twice the KV heads, what window layers would have, does not divide the heads
SIZE: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 3,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 1024, "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 3e4}, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
SPLIT = Split(always_on=2, routed=4, top_k=2, router_scale=0.05)
FLAGS = ["--always-on", "2", "--routed", "4", "--top-k", "2"]


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZE | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.1)  # norms too: the router sees what is behind them
    return model


def batches(count: int) -> list[Batch]:
    ids = torch.randint(300, (count, 1, 50), generator=torch.Generator().manual_seed(1))
    labels = ids.roll(-1, 2)
    labels[..., -1] = IGNORE
    return [Batch(i, label, torch.arange(50)[None]) for i, label in zip(ids, labels, strict=True)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense checkpoint folder with a tokenizer."""
    root = tmp_path_factory.mktemp("dense")
    tokenizer = train_tokenizer(["def f(x):\n    return x\n"] * 9, 300, root / "tokenizer")
    model = llama()
    tensors = {n: t.to(torch.bfloat16) for n, t in model.state_dict().items()}
    save_model(tensors.items(), model.config, root / "llama", tokenizer=tokenizer)
    return root / "llama"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    lines = [json.dumps({"text": " ".join(str(n * k) for n in range(99))}) for k in range(1, 60)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("tied", [True, False])
def test_with_every_expert_on_it_is_the_dense_model(tied: bool) -> None:
    dense = llama(tie_word_embeddings=tied)
    model = upcycled(dense, moe_config(dense.config, SPLIT), SPLIT, calibrate(dense, batches(4)))
    found = held_out({"all": every_expert_on(model), "shipped": model}, dense, batches(3))
    with torch.no_grad():
        ids = batches(1)[0].input_ids_BT
        ours, theirs = (m(input_ids=ids).logits for m in (every_expert_on(model), dense))
    # FP32: sums over neurons in another order
    torch.testing.assert_close(ours, theirs, atol=1e-6 * float(theirs.abs().max()), rtol=1e-6)
    assert abs(found["all"]["kl"]) < 1e-6 and found["shipped"]["kl"] > 1e-4  # routing is not free, so the test can fail


def test_every_neuron_is_in_exactly_one_expert_and_the_most_active_are_always_on() -> None:
    gate_FH = torch.randn(192, 16, generator=torch.Generator().manual_seed(0))
    importance_F = torch.rand(192, generator=torch.Generator().manual_seed(1))
    experts_EW = group_neurons(gate_FH, importance_F, 2, 4, seed=0)
    assert experts_EW.shape == (6, 32)
    assert torch.equal(experts_EW.flatten().sort().values, torch.arange(192))
    assert importance_F[experts_EW[0]].min() >= importance_F[experts_EW[1]].max()
    assert importance_F[experts_EW[1]].min() >= importance_F[experts_EW[2:]].max()


def test_clusters_find_planted_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    directions = F.normalize(torch.randn(5, 40, generator=generator, dtype=torch.float64), dim=1)
    owner = torch.arange(5).repeat(8)[torch.randperm(40, generator=generator)]
    noise = torch.randn(40, 40, generator=generator, dtype=torch.float64)
    found = balanced_clusters(F.normalize(directions[owner] + 0.02 * noise, dim=1), 5, seed=3)
    assert sorted(sorted({int(owner[i]) for i in row}) for row in found) == [[0], [1], [2], [3], [4]]
    assert found.shape == (5, 8)
    shapeless = F.normalize(noise, dim=1)
    assert not torch.equal(balanced_clusters(shapeless, 5, seed=0), balanced_clusters(shapeless, 5, seed=1))


@pytest.mark.parametrize("seed", range(5))
def test_assignment_is_the_greedy_one(seed: int) -> None:
    closeness = torch.rand(24, 4, generator=torch.Generator().manual_seed(seed))
    owner, room = {}, [6] * 4
    for point, cluster in sorted(itertools.product(range(24), range(4)), key=lambda pair: -closeness[pair]):
        if point not in owner and room[cluster]:
            owner[point] = cluster
            room[cluster] -= 1
    assert assign(closeness, 6).tolist() == [owner[p] for p in range(24)]


def test_logits_have_the_stated_standard_deviation() -> None:
    generator = torch.Generator().manual_seed(0)
    x_TH = torch.randn(500, 16, generator=generator) * torch.linspace(0.1, 3, 16) + 0.5
    gate_FH, up_FH = torch.randn(2, 192, 16, generator=generator)
    stats = FFNStats.empty(192, 16)
    for part in x_TH.split(77):
        stats.add(part, gate_FH, up_FH)
    experts_EW = group_neurons(gate_FH, stats.importance_F(torch.ones(16, 192)), 2, 4, seed=0)
    weight_EH, bias_E = router(gate_FH, experts_EW, 2, stats, scale=0.3)
    logits_TE = x_TH.double() @ weight_EH.T
    assert torch.equal(logits_TE[:, :2], torch.zeros(500, 2, dtype=torch.float64))
    torch.testing.assert_close(logits_TE[:, 2:].std(0, correction=0), torch.full((4,), 0.3, dtype=torch.float64),
                               rtol=1e-4, atol=0)  # fmt: skip  # sums of squares in FP32
    ranked_TE = logits_TE.sigmoid() + bias_E
    assert logits_TE[:, 2:].mean(0).abs().max() > 0.2  # offsets that would decide every choice
    torch.testing.assert_close(ranked_TE[:, 2:].mean(0), torch.full((4,), 0.5, dtype=torch.float64), atol=0.01, rtol=0)
    assert (ranked_TE[:, :2].min(1).values > ranked_TE[:, 2:].max(1).values).all()


@pytest.mark.parametrize("scale", [0.05, 5.0])
def test_always_on_experts_are_always_chosen_and_weigh_one(scale: float) -> None:
    split = Split(2, 4, 2, router_scale=scale)
    dense = llama()
    model = upcycled(dense, moe_config(dense.config, split), split, calibrate(dense, batches(2)))
    seen = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _m, _i, out: seen.append(out[1:]))
    with torch.no_grad():
        model(input_ids=batches(3)[2].input_ids_BT)
    assert len(seen) == 2
    for weights, chosen in seen:
        assert chosen.shape == (50, 4)
        always = chosen < 2
        assert (always.sum(1) == 2).all() and (chosen.sort(1).values[:, :2] == torch.arange(2)).all()
        assert (weights[always] == 1).all()
        assert len(chosen[~always].unique()) > 1  # routing is live


def test_transformers_loads_the_result(folder: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "moe"
    assert main(["--from", str(folder), *FLAGS, "--data", str(text), "--tokens", "999", "--out", str(out)]) == 0
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert type(theirs).__name__ == "MiMoV2FlashForCausalLM"
    ours = load_model(out, dtype=torch.float32)
    ids = batches(1)[0].input_ids_BT
    with torch.no_grad():
        a, b = ours.model(input_ids=ids).logits, theirs(input_ids=ids).logits
    torch.testing.assert_close(a, b, atol=1e-6 * float(b.abs().max()), rtol=1e-5)  # FP32, other kernels
    assert (ours.config.n_routed_experts, ours.config.num_experts_per_tok) == (6, 4)
    assert AutoTokenizer.from_pretrained(out)("return x").input_ids == ours.tokenizer("return x").input_ids
    notes = json.loads((out / "upcycle.json").read_text())
    assert (notes["always_on"], notes["routed"], notes["top_k"], notes["seed"]) == (2, 4, 2, 0)
    assert notes["calibration_tokens"] == 1024 and abs(notes["held_out"]["all on, scale 0"]["kl"]) < 1e-6


def test_the_same_seed_gives_the_same_bytes(folder: Path, text: Path, tmp_path: Path) -> None:
    def weights(name: str, seed: str) -> bytes:
        words = ["--from", str(folder), *FLAGS, "--data", str(text.parent), "--tokens", "1", "--seed", seed]
        assert main([*words, "--out", str(tmp_path / name)]) == 0
        return (tmp_path / name / "model.safetensors").read_bytes()

    first = weights("a", "0")
    assert weights("b", "0") == first and weights("c", "1") != first


def test_dry_run_reads_only_the_configuration(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert main(["--from", str(tmp_path), *FLAGS, "--dry-run"]) == 0
    said = capsys.readouterr().out
    config = moe_config(LlamaConfig(**SIZE), SPLIT)
    dense = sum(p.numel() for p in llama().parameters())
    routers, idle = 2 * 6 * 96, 2 * 2 * 3 * 96 * 32
    assert geometry(config, SPLIT) in said and "6 experts of width 32: 2 always on, 2 of 4 routed" in said
    assert f"{(dense + routers) / 1e6:,.1f}M parameters, {(dense + routers - idle) / 1e6:,.1f}M active" in said


def test_the_real_geometry_fits_transformers() -> None:
    """SmolLM2-135M: 9 heads and 3 KV heads, so window layers (6) would be refused, but there are none."""
    smol = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    config = moe_config(smol, Split(8, 16, 8, 0.05))
    # 134.5M of the dense model and 30 routers of 24 x 576; 8 idle experts of 3 x 576 x 64 in each of 30 layers
    assert "134.9M parameters, 108.4M active" in geometry(config, Split(8, 16, 8, 0.05))
    assert config.fits_transformers and config.moe_intermediate_size == 64 and config.num_experts_per_tok == 16
    with pytest.raises(Exception, match="swa_num_key_value_heads=6 does not divide"):
        MiMoV2Config(num_attention_heads=9, num_key_value_heads=3)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--always-on", "1", "--routed", "4", "--top-k", "2"], ["intermediate_size=192", "= 5"]),
        (["--always-on", "4", "--routed", "8", "--top-k", "2"], ["width 16", "multiple of 32"]),
        (["--always-on", "2", "--routed", "4", "--top-k", "5"], ["--top-k 5", "--routed 4"]),
        (["--always-on", "-1", "--routed", "4", "--top-k", "2"], ["--always-on -1"]),
        ([*FLAGS, "--tokens", "0"], ["--tokens 0"]),
        ([*FLAGS, "--data", "nowhere.jsonl"], ["nowhere.jsonl", "no file"]),
        ([*FLAGS, "--tokens", "500000", "--data", "TEXT"], ["too short", "--tokens 500000"]),
        ([*FLAGS, "--out", "FULL"], ["not an empty folder"]),
        ([*FLAGS, "--from", "nowhere"], ["nowhere", "config.json"]),
        ([*FLAGS, "CONFIG", "model_type=qwen3"], ["model_type=qwen3", "llama"]),
        ([*FLAGS, "CONFIG", "mlp_bias=true"], ["mlp_bias=True"]),
        ([*FLAGS, "CONFIG", "hidden_act=gelu"], ["hidden_act=gelu"]),
        (
            [*FLAGS, "CONFIG", 'rope_parameters={"rope_type":"linear","factor":2.0,"rope_theta":1e4}'],
            ["rope_type=linear"],
        ),
    ],
)
def test_errors_are_one_line(
    words: list[str], says: list[str], folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    source = folder
    if "CONFIG" in words:
        key, value = words[-1].split("=", 1)
        raw = json.loads((folder / "config.json").read_text())
        raw[key] = {"qwen3": "qwen3", "gelu": "gelu"}.get(value) or json.loads(value)
        source, words = tmp_path, words[:-2]
        (tmp_path / "config.json").write_text(json.dumps(raw))
    words = [{"FULL": str(tmp_path / "full"), "TEXT": str(text)}.get(w, w) for w in words]
    assert main(["--from", str(source), "--out", str(tmp_path / "out"), *words]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("convert.upcycle: ") and not (tmp_path / "out").exists()
    for word in says:
        assert word in said, said
