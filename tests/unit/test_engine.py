"""The engine of one process, the checkpoint format that all engines share, and modes refused by name."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from core.errors import CheckpointError, ConfigError, UnsupportedError
from core.train.batch import Batch
from core.train.config import Offload, OptimConfig, OptimName, ParallelConfig, ParallelMode
from core.train.engines import build_engine, check_graph, start_processes
from core.train.local import LocalEngine
from core.train.state import StateReader, save_pieces, write_index
from core.train.zero import zero_config

CPU = torch.device("cpu")
MUON = OptimConfig(name=OptimName.muon, lr=1e-2, muon_lr=1e-2, weight_decay=0.1, ema=0.5)
ADAMW = OptimConfig(lr=1e-2, weight_decay=0.1)


def tiny(frozen: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 64)).to(torch.bfloat16)
    model[0].requires_grad_(not frozen)
    return model


def loss_fn(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    logits = model(batch.input_ids_BT).float().flatten(0, 1)
    loss = nn.functional.cross_entropy(logits, batch.labels_BT.flatten(), reduction="sum")
    return loss, {"correct": (logits.argmax(-1) == batch.labels_BT.flatten()).sum()}


def batch_of(step: int) -> Batch:
    ids = torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(step))
    return Batch(ids, ids.roll(-1, 1), torch.arange(16).expand(8, 16))


def engine_of(optim: OptimConfig = ADAMW, micro: int = 1, model: nn.Module | None = None) -> LocalEngine:
    return LocalEngine(model or tiny(), loss_fn, optim, micro_batches=micro, device=CPU)


def train(engine: LocalEngine, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        batch, rows = batch_of(step), 8 // engine.micro_batches
        parts = [batch.rows(at, at + rows) for at in range(0, 8, rows)]
        stats = [engine.forward_backward(p, 1 / 128, last=p is parts[-1]) for p in parts]
        losses.append(float(sum(s["loss"] for s in stats)) / 128)
        engine.step(1.0)
    return losses


def masters(engine: LocalEngine) -> dict[str, Tensor]:
    return engine.optimizer.masters


def test_working_copies_are_the_cast_of_the_masters() -> None:
    engine = engine_of()
    train(engine, 0, 3)
    names = list(masters(engine))
    shards = zip(engine.working_shards(names), engine.master_shards(names), strict=True)
    for working, master in shards:
        assert working.whole and working.name == master.name
        assert working.flat.dtype == torch.bfloat16 and master.flat.dtype == torch.float32
        assert torch.equal(working.flat, master.flat.to(torch.bfloat16))


def test_overwritten_working_copies_do_not_reach_the_masters() -> None:
    """What snapping relies on: the next step starts from the masters."""
    engine = engine_of()
    before = {n: m.clone() for n, m in masters(engine).items()}
    for shard in engine.working_shards(list(before)):
        shard.flat.zero_()
    assert all(not p.any() for n, p in engine.parameters.items() if n in before), "shards are the storage itself"
    engine.forward_backward(batch_of(0), 1 / 128, last=True)
    engine.step(0.0)
    assert all(torch.equal(m, before[n]) for n, m in masters(engine).items())
    assert all(torch.equal(engine.parameters[n], m.to(torch.bfloat16)) for n, m in before.items())


def test_micro_batches_add_up_to_one_batch() -> None:
    """The first step's gradients are those of the whole batch, up to BF16 rounding.

    Each of four micro-gradients is rounded to BF16 (2^-9 relative), so sums agree to about 2^-8 of the largest.
    """
    norms, losses = [], []
    for micro in (1, 4):
        engine = engine_of(micro=micro)
        batch, rows = batch_of(0), 8 // micro
        total = 0.0
        for at in range(0, 8, rows):
            total += float(engine.forward_backward(batch.rows(at, at + rows), 1 / 128, last=at + rows == 8)["loss"])
        source = engine.optimizer.accumulated or {n: engine.parameters[n].grad for n in masters(engine)}
        grads = {n: g.float().clone() for n, g in source.items()}
        norms.append(grads)
        losses.append(total / 128)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for name, whole in norms[0].items():
        assert (norms[1][name] - whole).abs().max() <= 2**-8 * whole.abs().max() * 2, name
        assert norms[1][name].dtype == torch.float32


@pytest.mark.parametrize("optim", [ADAMW, MUON], ids=["adamw", "muon"])
@pytest.mark.parametrize("micro", [1, 2])
def test_saved_and_loaded_engine_continues_bit_for_bit(optim: OptimConfig, micro: int, tmp_path: Path) -> None:
    whole = engine_of(optim, micro)
    losses = train(whole, 0, 6)
    first = engine_of(optim, micro)
    train(first, 0, 3)
    first.save(tmp_path)
    second = engine_of(optim, micro, model=tiny())
    with torch.no_grad():
        for parameter in second.parameters.values():
            if parameter.requires_grad:
                parameter.zero_()
    second.load(tmp_path)
    assert train(second, 3, 6) == losses[3:]
    ours = {(n, k): t for n, k, t in second.optimizer.state_tensors()}
    theirs = {(n, k): t for n, k, t in whole.optimizer.state_tensors()}
    assert set(ours) == set(theirs) and {k for _, k in ours} >= {"master"}
    assert all(torch.equal(ours[key], t) for key, t in theirs.items())


def saved(folder: Path) -> Path:
    engine = engine_of()
    train(engine, 0, 1)
    engine.save(folder)
    return folder


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        engine_of().load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_damaged_checkpoints_are_one_line(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    file = next(folder.glob("*.safetensors"))
    content, index = file.read_bytes(), (folder / "state.json").read_text()
    for kept in (0, 4, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:kept])
        assert f"{file} cannot be read" in refused(folder)
    file.unlink()
    assert f"{file} cannot be read" in refused(folder)
    file.write_bytes(content)
    for text in ("", index[: len(index) // 2]):
        (folder / "state.json").write_text(text)
        assert "state.json is missing or damaged" in refused(folder)
    (folder / "state.json").unlink()
    assert "resume from another checkpoint" in refused(folder)


def test_another_trained_set_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    with pytest.raises(CheckpointError, match=r"another trained set: 0\.weight is absent there"):
        engine_of(model=tiny(frozen=False)).load(folder)


def test_any_range_is_read_from_whichever_files_have_it(tmp_path: Path) -> None:
    """Three ranks' slices, read in ranges that cross them; a rank's missing slice is named."""
    values = torch.arange(10.0)
    cuts = [(0, 4), (4, 7), (7, 10)]
    parts = [save_pieces(tmp_path, [("w", "master", a, values[a:b])], rank, 3) for rank, (a, b) in enumerate(cuts)]
    write_index(tmp_path, parts, {"w": [2, 5]}, 7)
    reader = StateReader(tmp_path)
    assert reader.steps == 7 and reader.kinds("w") == ["master"]
    for start in range(10):
        for stop in range(start + 1, 11):
            assert torch.equal(reader.read("w", "master", start, stop), values[start:stop])
    write_index(tmp_path, [parts[0], parts[2]], {"w": [2, 5]}, 7)
    with pytest.raises(CheckpointError, match=r"lacks master:w\[4:10\]; a rank's file is missing"):
        StateReader(tmp_path).read("w", "master", 2, 10)
    assert json.loads((tmp_path / "state.json").read_text())["steps"] == 7


@pytest.mark.parametrize("mode", [ParallelMode.fsdp2, ParallelMode.ep])
def test_modes_refused_by_name(mode: ParallelMode) -> None:
    with pytest.raises(UnsupportedError, match=rf"parallel={mode.value} .*use parallel=zero3"):
        build_engine(tiny(), loss_fn, ADAMW, ParallelConfig(mode), micro_batches=1, device=CPU)


@pytest.mark.parametrize("mode", [ParallelMode.zero2, ParallelMode.zero3])
def test_muon_under_zero_is_refused_by_name(mode: ParallelMode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.train.engines.start_processes", lambda *_: (0, 1))
    with pytest.raises(UnsupportedError, match=f"optim=muon needs whole matrices and parallel={mode.value}"):
        build_engine(tiny(), loss_fn, MUON, ParallelConfig(mode), micro_batches=1, device=CPU)


def test_forgotten_mode_under_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 processes were launched with parallel=none"):
        start_processes(ParallelConfig(), CPU)


def test_deepspeed_settings() -> None:
    """The persistence thresholds are the trap of snapping under ZeRO-3; offload goes through."""
    zero3 = ParallelConfig(ParallelMode.zero3, Offload.cpu, Offload.nvme, "/scratch")
    found = zero_config(ADAMW, zero3, 2)
    assert found["zero_optimization"] == {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_model_persistence_threshold": 0,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "nvme", "nvme_path": "/scratch"},
    }
    assert found["data_types"]["grad_accum_dtype"] == "fp32"
    assert found["gradient_clipping"] == ADAMW.clip_grad_norm
    with pytest.raises(ConfigError, match=r"needs parallel\.nvme_path"):
        zero_config(ADAMW, ParallelConfig(ParallelMode.zero3, Offload.nvme), 1)
    with pytest.raises(ConfigError, match=r"parallel\.offload_params needs parallel=zero3"):
        zero_config(ADAMW, ParallelConfig(ParallelMode.zero2, offload_params=Offload.cpu), 1)


@pytest.mark.parametrize(
    ("place", "mode", "found"), [("cpu", ParallelMode.none, "cpu and none"), ("cuda", ParallelMode.ddp, "cuda and ddp")]
)
def test_a_graph_is_refused_where_there_is_none(place: str, mode: ParallelMode, found: str) -> None:
    with pytest.raises(ConfigError, match=f"^graph=true needs a GPU and parallel=none, not {found}; set graph=false$"):
        check_graph(True, ParallelConfig(mode), torch.device(place))
    check_graph(False, ParallelConfig(mode), torch.device(place))
