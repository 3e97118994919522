"""Layer-by-layer training: quality, the grid, memory of one layer, and resume bit for bit."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from core.errors import ConfigError, DataError, FormatError, UnsupportedError
from core.models.load import load_model, save_model
from core.models.mimo_v2 import MiMoV2ForCausalLM
from core.models.mimo_v2_config import MiMoV2Config
from core.mxfp4 import on_grid, snap
from core.train.batch import Batch
from qat.config import LayerwiseConfig
from qat.layer_checkpoint import open_layers
from qat.layer_io import DiskStore, LayerCalls, ModelSource, StreamShape, find_decoder
from qat.layer_train import SliceAdam, Targets, auto_slices, row_order
from qat.layerwise import train_layerwise

SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "tie_word_embeddings": False,
    "initializer_range": 0.12,
}


def moe() -> nn.Module:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        **SMALL, intermediate_size=64, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2
    )
    return Qwen3MoeForCausalLM(config).to(torch.bfloat16).eval()


def mimo() -> nn.Module:
    """Dense first layer (nothing to quantise in it), window and full attention, as many KV heads in both."""
    torch.manual_seed(0)
    config = MiMoV2Config(
        **SMALL | {"head_dim": 48},
        v_head_dim=32,
        swa_num_key_value_heads=1,
        intermediate_size=64,
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        sliding_window=8,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    )
    return MiMoV2ForCausalLM(config).to(torch.bfloat16).eval()


def gpt_oss() -> nn.Module:
    torch.manual_seed(0)
    config = GptOssConfig(
        **SMALL, intermediate_size=32, num_local_experts=4, num_experts_per_tok=2, sliding_window=8, pad_token_id=0
    )
    return GptOssForCausalLM(config).to(torch.bfloat16).eval()


def llama() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=128)).to(torch.bfloat16).eval()


def rows(count: int = 16, tokens: int = 24) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 96, (count, tokens), generator=generator)
    positions = torch.arange(tokens).repeat(count, 1)
    positions[:, tokens // 2 :] -= tokens // 2  # two documents a row
    batch = Batch(ids, ids.roll(-1, 1), positions)
    return [batch.rows(0, count // 2), batch.rows(count // 2, count)]


def experts(model: nn.Module, dim: int = -1) -> dict[str, int]:
    found = {name: dim for name, p in model.named_parameters() if "experts." in name and p.ndim == 3}
    return found or {name: dim for name, _ in model.named_parameters() if ".mlp." in name}


def targets(model: nn.Module, dim: int = -1) -> Targets:
    names = experts(model, dim)
    return Targets(names, list(names))


@torch.no_grad()
def kl(model: nn.Module, base: nn.Module) -> float:
    total = 0.0
    for batch in rows():
        logp, logq = (
            m(input_ids=batch.input_ids_BT, position_ids=batch.position_ids_BT, use_cache=False)
            .logits.float()
            .log_softmax(-1)
            for m in (base, model)
        )
        total += float((logp.exp() * (logp - logq)).sum(-1).mean())
    return total


CONFIG = LayerwiseConfig(steps=40, batch_size=8, lr=2e-2)


@pytest.mark.parametrize(("make", "dim"), [(moe, -1), (llama, -1), (gpt_oss, -2)])
def test_training_beats_rounding_end_to_end_and_lands_on_the_grid(make, dim, tmp_path: Path) -> None:
    base, model, rounded = make(), make(), make()
    for name, p in rounded.named_parameters():
        if name in experts(base, dim):
            p.data.copy_(snap(p.data, dim=dim))
    records = []
    result = train_layerwise(ModelSource(model), targets(model, dim), rows(), CONFIG, tmp_path, log=records.append)
    assert kl(model, base) < 0.6 * kl(rounded, base)
    assert [r["layer"] for r in records] == [0, 1, 2]
    assert all(r["loss"] < r["loss_ptq"] for r in records)
    parameters = dict(model.named_parameters())
    saved = dict(result.tensors())
    assert set(saved) == set(experts(model, dim))
    for name, tensor in saved.items():
        assert on_grid(tensor, dim), name
        assert torch.equal(tensor, parameters[name])
    for name, p in base.named_parameters():
        if name not in saved:
            assert torch.equal(p, parameters[name]), f"{name} is not selected and must not change"


def test_compensating_inputs_end_closer_than_bf16_inputs(tmp_path: Path) -> None:
    losses = {}
    for inputs in ("quantized", "bf16"):
        model = moe()
        cfg = LayerwiseConfig(steps=40, batch_size=8, lr=2e-2, inputs=inputs)
        losses[inputs] = (
            train_layerwise(ModelSource(model), targets(model), rows(), cfg, tmp_path / inputs).reports[-1].loss
        )
    assert losses["quantized"] < losses["bf16"]


def test_slices_train_every_expert(tmp_path: Path) -> None:
    model, base = moe(), moe()
    cfg = LayerwiseConfig(steps=20, batch_size=8, lr=2e-2, slices=2)
    result = train_layerwise(ModelSource(model), targets(model), rows(), cfg, tmp_path)
    assert all(r.slices == 2 and r.steps == 40 and r.loss < r.loss_ptq for r in result.reports)
    originals = dict(base.named_parameters())
    for name, tensor in result.tensors():
        assert on_grid(tensor)
        trained = [not torch.equal(t, snap(o)) for t, o in zip(tensor, originals[name].data, strict=True)]
        assert all(trained), f"{name}: an expert equals its rounded start"


def test_other_parameters_train_when_asked_and_stay_off_the_grid(tmp_path: Path) -> None:
    model = moe()
    names = experts(model)
    norms = [n for n, _ in model.named_parameters() if "post_attention_layernorm" in n]
    result = train_layerwise(ModelSource(model), Targets(names, [*names, *norms]), rows(), CONFIG, tmp_path)
    assert set(norms) <= dict(result.tensors()).keys()
    assert any(not torch.equal(t, torch.ones_like(t)) for n, t in result.tensors() if n in norms)


class CountingSource(ModelSource):
    """Counts layers alive at one time; dies in the chosen layer's chosen load."""

    def __init__(self, model: nn.Module, die_at: int = -1) -> None:
        super().__init__(model)
        self.alive: list = []
        self.most = self.loads = 0
        self.die_at = die_at

    def load(self, index: int) -> nn.Module:
        import weakref

        self.loads += 1
        if self.loads == self.die_at:
            raise KeyboardInterrupt
        layer = super().load(index)
        self.alive = [ref for ref in self.alive if ref() is not None] + [weakref.ref(layer)]
        self.most = max(self.most, len(self.alive))
        return layer


def test_one_layer_at_a_time(tmp_path: Path) -> None:
    model = moe()
    source = CountingSource(model)
    train_layerwise(source, targets(model), rows(), LayerwiseConfig(steps=2, batch_size=8), tmp_path)
    assert source.most == 1
    assert not list((tmp_path / "hidden").glob("*.bf16")), "hidden states are dropped at the end"


@pytest.mark.parametrize("hidden", ["disk", "recompute"])
@pytest.mark.parametrize("die_at", [1, 4, 6])  # two loads a layer: in the first, at its training load, in the last
def test_resume_equals_uninterrupted(hidden: str, die_at: int, tmp_path: Path) -> None:
    cfg = LayerwiseConfig(steps=6, batch_size=8, lr=2e-2, hidden=hidden)
    whole = moe()
    expected = train_layerwise(ModelSource(whole), targets(whole), rows(), cfg, tmp_path / "whole")
    killed = moe()
    with pytest.raises(KeyboardInterrupt):
        train_layerwise(CountingSource(killed, die_at), targets(killed), rows(), cfg, tmp_path / "cut")
    again = moe()  # a new process loads the base weights again
    result = train_layerwise(ModelSource(again), targets(again), rows(), cfg, tmp_path / "cut")
    for (name, a), b in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert [(r.loss, r.loss_ptq) for r in result.reports] == [(r.loss, r.loss_ptq) for r in expected.reports]


def test_resume_with_other_values_is_refused(tmp_path: Path) -> None:
    train_layerwise(ModelSource(moe()), targets(moe()), rows(), LayerwiseConfig(steps=1, batch_size=8), tmp_path)
    with pytest.raises(ConfigError, match=r"layerwise\.\*"):
        train_layerwise(ModelSource(moe()), targets(moe()), rows(), LayerwiseConfig(steps=2, batch_size=8), tmp_path)


def test_recorded_calls_reproduce_the_model() -> None:
    model, batch = gpt_oss(), rows()[0]
    _, decoder = find_decoder(model)
    calls = LayerCalls(decoder)
    hidden = calls.record(0, batch)[0]
    for index, layer in enumerate(decoder.layers):
        hidden = layer(hidden, **calls.record(index, batch)[1])
    direct = decoder(
        input_ids=batch.input_ids_BT, position_ids=batch.position_ids_BT, use_cache=False
    ).last_hidden_state
    assert torch.equal(decoder.norm(hidden), direct)


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to do"):
        Targets({}, [])
    with pytest.raises(DataError, match="calibration"):
        train_layerwise(ModelSource(moe()), targets(moe()), [], CONFIG, tmp_path)
    with pytest.raises(ConfigError, match=r"layerwise\.hidden=tape"):
        train_layerwise(ModelSource(moe()), targets(moe()), rows(), LayerwiseConfig(hidden="tape"), tmp_path)
    with pytest.raises(UnsupportedError, match="one stack"):
        ModelSource(nn.Linear(2, 2))
    broken = moe()
    broken.model.layers[1].mlp.experts.down_proj.data[0, 0, 0] = float("nan")
    with pytest.raises(FormatError, match="NaN"):
        train_layerwise(ModelSource(broken), targets(broken), rows(), LayerwiseConfig(steps=1, batch_size=8), tmp_path)


def test_hidden_files_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    store = DiskStore(StreamShape(2, 3, 4), tmp_path)
    out = store.create()
    out.fill_(1.5)
    assert not store.has("a")
    store.commit("a", out)
    assert store.has("a") and torch.equal(store.open("a"), torch.full((2, 3, 4), 1.5, dtype=torch.bfloat16))
    (tmp_path / "a.bf16").write_bytes(b"short")
    assert not store.has("a")


def test_slice_adam_equals_torch_adam() -> None:
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(6, 32))
    reference = nn.Parameter(copy.deepcopy(p.data[2:5]))
    theirs = torch.optim.Adam([reference], lr=1e-2, betas=(0.9, 0.95), eps=1e-12)
    ours = SliceAdam(1e-2, steps=10)
    ours.attach(p, slice(2, 5), lambda master, work: work.copy_(master))
    x, scale = torch.randn(32), float(reference.detach().square().mean().sqrt())
    for step in range(10):
        ours.step = step
        theirs.param_groups[0]["lr"] = ours.lr() * scale
        (p @ x).square().sum().backward()
        theirs.zero_grad()
        (reference @ x).square().sum().backward()
        theirs.step()
    assert p.grad is None
    torch.testing.assert_close(p.data[2:5], reference.data)


def test_rows_are_seen_evenly_and_slices_follow_the_budget() -> None:
    seen = torch.cat(list(row_order(10, 4, 10, seed=3)))
    assert torch.equal(seen.bincount(), torch.full((10,), 4))
    gib = 1e9
    assert auto_slices(29.6 * gib, 14.5 * gib, 19.3 * gib, 141 * gib) == 3  # a MiMo-V2.5-Pro layer on one H200
    assert auto_slices(1.3 * gib, 0.6 * gib, 0.8 * gib, 80 * gib) == 1
    with pytest.raises(ConfigError, match="larger device"):
        auto_slices(90 * gib, 1 * gib, 1 * gib, 80 * gib)


def test_benchmark_tiny_shape_trains(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "benchmarks.layerwise", "--shape", "tiny", "--tokens", "1024", "--seq-len", "64"]
    command += ["--steps", "30", "--batch-size", "4", "--json", str(out)]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, cwd=root, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads(out.read_text())
    assert record["loss"] < record["loss_ptq"]
    assert "hours for the model" in done.stdout


@pytest.mark.parametrize("make", [moe, mimo])
def test_layers_from_a_checkpoint_equal_those_in_memory(make, tmp_path: Path) -> None:
    model = make()
    save_model(model.state_dict().items(), model.config, tmp_path / "base")
    source = open_layers(tmp_path / "base", "cpu", "auto", "grouped_mm")
    assert all(p.is_meta for p in source.shell.layers.parameters())
    loaded = load_model(tmp_path / "base", attention="auto", experts="grouped_mm")
    cfg = LayerwiseConfig(steps=3, batch_size=8)
    expected = train_layerwise(ModelSource(loaded.model), targets(model), rows(), cfg, tmp_path / "a")
    result = train_layerwise(source, targets(model), rows(), cfg, tmp_path / "b")
    assert [(r.layer, r.loss_ptq, r.loss) for r in result.reports] == [
        (r.layer, r.loss_ptq, r.loss) for r in expected.reports
    ]
    save_model(source.tensors(result.tensors()), source.loaded, tmp_path / "out")
    written = load_model(tmp_path / "out").model.state_dict()
    assert written.keys() == loaded.model.state_dict().keys()
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(written[name], tensor), name
