"""The engine of one process: what the step loop may rely on, and checkpoints that a full disk cannot spoil."""

import errno
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.errors import CheckpointError, ConfigError, UnsupportedError
from core.train import state as state_module
from core.train.batch import Batch
from core.train.config import OptimConfig, OptimName, ParallelConfig, ParallelMode
from core.train.engines import build_engine, start_processes
from core.train.local import LocalEngine
from core.train.state import StateReader, save_pieces, write_index

CPU = torch.device("cpu")
VOCABULARY = 32


class TinyModel(nn.Module):
    """Embedding, fused experts used densely, head: the parameter kinds that matter, in a few hundred values."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator) * 0.3)

        self.embed = weight(VOCABULARY, 16)
        self.experts = weight(2, 16, 16)
        self.scale = nn.Parameter(torch.ones(16))
        self.head = nn.Linear(16, VOCABULARY, bias=False)
        self.head.weight = weight(VOCABULARY, 16)
        self.frozen = weight(16, 16).requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        x = F.embedding(ids, self.embed)
        x = x + torch.tanh(x @ self.experts.sum(0).T) @ self.frozen
        return self.head(x * self.scale)


def loss_fn(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    logits = model(batch.input_ids_BT).flatten(0, 1).float()
    return F.cross_entropy(logits, batch.labels_BT.flatten(), reduction="sum"), {"rows": torch.tensor(1.0)}


def batch_of(step: int) -> Batch:
    ids = torch.randint(0, VOCABULARY, (4, 8), generator=torch.Generator().manual_seed(step))
    return Batch(ids, ids.roll(-1, 1), torch.arange(8).expand(4, 8))


def engine_of(optim: OptimConfig | None = None, dtype: torch.dtype = torch.bfloat16, micro: int = 1) -> LocalEngine:
    engine = build_engine(
        TinyModel().to(dtype), loss_fn, optim or OptimConfig(lr=1e-2), ParallelConfig(), micro_batches=micro,
        device=CPU, seed=0,
    )  # fmt: skip
    assert isinstance(engine, LocalEngine)
    return engine


def train(engine: LocalEngine, first: int, last: int, micro: int = 1) -> list[float]:
    losses = []
    for step in range(first, last):
        batch, total = batch_of(step), 0.0
        rows = 4 // micro
        for index in range(micro):
            part = batch.rows(index * rows, (index + 1) * rows)
            total += float(engine.forward_backward(part, 1 / 32, last=index == micro - 1)["loss"])
        engine.step(1.0)
        losses.append(total)
    return losses


def state_of(engine: LocalEngine) -> dict[str, Tensor]:
    working = {f"working:{n}": p.detach().clone() for n, p in engine.parameters.items()}
    return working | {f"{kind}:{n}": t.clone() for n, kind, t in engine.optimizer.state_tensors()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [n for n in one if not torch.equal(one[n], other[n])] == []


def test_gradients_are_the_sum_of_scaled_losses() -> None:
    engine, model = engine_of(dtype=torch.float32), TinyModel()
    stats = engine.forward_backward(batch_of(0), 0.25, last=True)
    loss, _ = loss_fn(model, batch_of(0))
    (0.25 * loss).backward()
    for name, parameter in model.named_parameters():
        grad = engine.parameters[name].grad
        assert (grad is None) == (parameter.grad is None) and (grad is None or torch.equal(grad, parameter.grad)), name
    assert float(stats["loss"]) == loss.item() and set(stats) == {"loss", "rows"}
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(torch.as_tensor(engine.step(1.0)), norm)
    assert all(p.grad is None for p in engine.parameters.values())


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float32, 1e-6),  # the same terms in another order; measured 1.2e-7
        (torch.bfloat16, 1e-2),  # each micro-batch's gradient is rounded to BF16 (2^-9); measured 3.3e-3
    ],
)
def test_micro_batches_equal_one_large_batch(dtype: torch.dtype, tolerance: float) -> None:
    whole, parts = engine_of(dtype=dtype), engine_of(dtype=dtype, micro=4)
    for step in range(3):
        whole.forward_backward(batch_of(step), 1 / 32, last=True)
        for row in range(4):
            parts.forward_backward(batch_of(step).rows(row, row + 1), 1 / 32, last=row == 3)
        assert parts.optimizer.accumulated["experts"].dtype is torch.float32
        for name, total in parts.optimizer.accumulated.items():
            expected = whole.parameters[name].grad
            assert expected is not None
            assert float((total - expected.float()).norm() / expected.float().norm()) < tolerance, name
        whole.step(1.0)
        parts.step(1.0)
        for name, parameter in whole.parameters.items():  # the next step compares gradients at the same weights
            parts.parameters[name].data.copy_(parameter)


def test_shards_write_through_and_the_next_step_starts_from_the_masters() -> None:
    plain, overwritten = engine_of(), engine_of()
    for step in range(3):
        for engine in (plain, overwritten):
            engine.forward_backward(batch_of(step), 1 / 32, last=True)
        for shard in overwritten.working_shards(["experts"]):
            assert shard.whole and shard.flat.dtype is torch.bfloat16 and shard.flat.numel() == shard.shape.numel()
            shard.flat.fill_(7.0)
            assert bool((overwritten.parameters[shard.name] == 7.0).all())
        for engine in (plain, overwritten):
            engine.step(1.0)
        assert torch.equal(plain.parameters["experts"], overwritten.parameters["experts"])
    next(overwritten.working_shards(["frozen"])).flat.fill_(7.0)
    train(overwritten, 3, 4)
    assert bool((overwritten.parameters["frozen"] == 7.0).all())  # frozen: nothing rewrites it
    assert [s.name for s in plain.master_shards(["embed"])] == ["embed"]
    assert "frozen" not in plain.optimizer.masters


def test_names_are_the_models_own_under_compile() -> None:
    model = TinyModel()
    model.head = torch.compile(model.head, backend="eager")  # type: ignore[assignment]
    engine = build_engine(model, loss_fn, OptimConfig(), ParallelConfig(), micro_batches=1, device=CPU, seed=0)
    assert [s.name for s in engine.working_shards(["head.weight"])] == ["head.weight"]
    assert "head.weight" in dict(engine.full_tensors())


@pytest.mark.parametrize(
    "optim", [OptimConfig(lr=1e-2), OptimConfig(lr=1e-2, name=OptimName.muon), OptimConfig(lr=1e-2, ema=0.9)],
    ids=["adamw", "muon", "ema"],
)  # fmt: skip
@pytest.mark.parametrize("micro", [1, 2])
def test_resumed_equals_uninterrupted(tmp_path: Path, optim: OptimConfig, micro: int) -> None:
    whole = engine_of(optim, micro=micro)
    losses = train(whole, 0, 3, micro)
    whole.save(tmp_path)
    losses += train(whole, 3, 6, micro)
    resumed = engine_of(optim, micro=micro)
    train(resumed, 10, 12, micro)  # leftovers that loading must replace
    resumed.load(tmp_path)
    assert train(resumed, 3, 6, micro) == losses[3:]
    assert_same(state_of(whole), state_of(resumed))


def test_state_before_the_first_step_loads(tmp_path: Path) -> None:
    engine, other = engine_of(), engine_of()
    engine.save(tmp_path)
    other.load(tmp_path)
    assert train(other, 0, 2) == train(engine, 0, 2)


def test_state_in_many_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_module, "PART_BYTES", 3000)
    engine, other = engine_of(), engine_of()
    train(engine, 0, 2)
    engine.save(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 4
    other.load(tmp_path)
    assert_same(state_of(engine), state_of(other))


def test_any_range_is_put_together_from_other_ranks_slices(tmp_path: Path) -> None:
    """World 3 wrote uneven slices; every range is read back, padding and neighbours never."""
    values = torch.arange(100.0)
    bounds = [(0, 41), (41, 41), (41, 100)]  # the middle rank holds nothing
    parts = [save_pieces(tmp_path, [("w", "master", a, values[a:b])], r, 3) for r, (a, b) in enumerate(bounds)]
    write_index(tmp_path, parts, {"w": [10, 10]}, 5)
    reader = StateReader(tmp_path)
    assert reader.steps == 5
    for start, stop in [(0, 100), (0, 41), (41, 100), (40, 42), (0, 1), (99, 100), (50, 50)]:
        assert torch.equal(reader.read("w", "master", start, stop), values[start:stop]), (start, stop)


# --- what must end in one clear line ----------------------------------------------------------------------------------


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_another_trained_set_is_named(tmp_path: Path) -> None:
    engine_of().save(tmp_path)
    model = TinyModel()
    model.embed.requires_grad_(False)
    other = build_engine(model, loss_fn, OptimConfig(), ParallelConfig(), micro_batches=1, device=CPU, seed=0)
    with pytest.raises(CheckpointError, match=r"embed is \[32, 16\] there and not trained here") as error:
        other.load(tmp_path)
    one_line(error)


@pytest.mark.parametrize(
    ("saved", "ours"),
    [
        (OptimConfig(), OptimConfig(name=OptimName.muon)),
        (OptimConfig(name=OptimName.muon), OptimConfig()),
        (OptimConfig(), OptimConfig(ema=0.9)),
        (OptimConfig(ema=0.9), OptimConfig()),
    ],
)
def test_another_optimiser_is_named(tmp_path: Path, saved: OptimConfig, ours: OptimConfig) -> None:
    engine = engine_of(saved)
    train(engine, 0, 1)
    engine.save(tmp_path)
    with pytest.raises(CheckpointError, match=r"optim\.name and optim\.ema") as error:
        engine_of(ours).load(tmp_path)
    one_line(error)


def test_damaged_checkpoints_are_named(tmp_path: Path) -> None:
    engine = engine_of()
    engine.save(tmp_path)
    file = next(tmp_path.glob("*.safetensors"))
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"state-00000.*cannot be read") as error:
        engine_of().load(tmp_path)
    one_line(error)
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        engine_of().load(tmp_path)
    file.write_bytes(content)
    index = tmp_path / "state.json"
    pieces = json.loads(index.read_text())
    pieces["pieces"]["master:embed"][0][2] -= 16
    index.write_text(json.dumps(pieces))
    with pytest.raises(CheckpointError, match=r"lacks master:embed\[496:512\]"):
        engine_of().load(tmp_path)
    index.write_text("{")
    with pytest.raises(CheckpointError, match=r"state\.json is missing or damaged"):
        engine_of().load(tmp_path)


def test_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(state_module, "save_file", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*previous checkpoint is kept") as error:
        engine_of().save(tmp_path)
    one_line(error)
    assert not (tmp_path / "state.json").exists()  # without it nothing takes the folder for a checkpoint


def test_several_processes_need_a_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 processes were launched with parallel=none; set parallel=ddp") as error:
        start_processes(ParallelConfig(), CPU)
    one_line(error)


@pytest.mark.parametrize(
    ("parallel", "optim", "match"),
    [
        (ParallelMode.fsdp2, OptimName.adamw, "parallel=fsdp2 is not supported.*use parallel=zero3"),
        (ParallelMode.ep, OptimName.adamw, "parallel=ep .*is not supported.*use parallel=zero3"),
        (ParallelMode.zero2, OptimName.muon, "optim=muon.*parallel=zero2.*use optim=adamw or parallel=ddp"),
        (ParallelMode.zero3, OptimName.muon, "optim=muon.*parallel=zero3.*use optim=adamw or parallel=ddp"),
    ],
)
def test_refused_by_name(parallel: ParallelMode, optim: OptimName, match: str) -> None:
    with pytest.raises(UnsupportedError, match=match) as error:
        build_engine(
            TinyModel(), loss_fn, replace(OptimConfig(), name=optim), ParallelConfig(mode=parallel), micro_batches=1,
            device=CPU, seed=0,
        )  # fmt: skip
    one_line(error)
    assert not torch.distributed.is_initialized()
