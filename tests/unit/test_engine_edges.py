"""What a step and a save do at their edges: chunked casts, idle experts, several files, a full disk."""

import errno
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from core.errors import CheckpointError
from core.train import optim as optim_module
from core.train import state as state_module
from core.train.config import OptimConfig, OptimName, ParallelConfig, Schedule
from core.train.engines import build_engine
from core.train.optim import MasterOptimizer, chunks
from core.train.schedule import lr_factor
from tests.engine_cases import CPU, TinyModel, assert_same, batch_of, engine_of, loss_fn, state_of, train

SHAPES = {
    "embed.weight": (16, 8), "experts.up": (3, 12, 8), "experts.down": (3, 8, 12), "norm.weight": (8,), "head": (5, 8),
}  # fmt: skip


def parameters(dtype: torch.dtype, seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {n: nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for n, s in SHAPES.items()}


def give_gradients(params: dict[str, nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in params.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def test_parameters_kept_in_fp32_stay_so_and_frozen_ones_have_no_master() -> None:
    params = parameters(torch.bfloat16)
    params["router"] = nn.Parameter(torch.randn(4, 8))
    params["head"].requires_grad_(False)
    optimizer = MasterOptimizer(params, OptimConfig())
    assert "head" not in optimizer.masters
    params["router"].grad = torch.ones(4, 8)
    optimizer.step(1.0)
    assert params["router"].dtype is torch.float32
    assert torch.equal(params["router"], optimizer.masters["router"])


@pytest.mark.parametrize("name", list(OptimName))
def test_chunks_change_memory_and_not_values(name: OptimName, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for limit in (2**28, 100):  # 100 values: every parameter of SHAPES but two in a chunk of its own
        monkeypatch.setattr(optim_module, "CHUNK", limit)
        params = parameters(torch.bfloat16)
        optimizer = MasterOptimizer(params, OptimConfig(name=name, lr=1e-2))
        for step in range(3):
            give_gradients(params, step)
            optimizer.step(0.5)
        results.append(optimizer.masters)
    assert all(torch.equal(results[0][n], results[1][n]) for n in SHAPES)


def test_chunks_keep_order_and_limit() -> None:
    assert list(chunks({"a": 3, "b": 3, "c": 9, "d": 1}, 6)) == [["a", "b"], ["c"], ["d"]]
    assert list(chunks({}, 6)) == []


def test_an_expert_without_tokens_does_not_move() -> None:
    params = {"experts.up": nn.Parameter(torch.randn(3, 12, 8))}
    before = params["experts.up"].detach().clone()
    optimizer = MasterOptimizer(params, OptimConfig(name=OptimName.muon))
    gradient = torch.randn(3, 12, 8)
    gradient[1] = 0
    params["experts.up"].grad = gradient
    optimizer.step(1.0)
    assert torch.equal(params["experts.up"][1], before[1])
    assert not torch.equal(params["experts.up"][0], before[0])


@pytest.mark.parametrize("shape", [(32, 16), (16, 32)])
def test_muon_step_has_the_documented_size(shape: tuple[int, int]) -> None:
    """lr * sqrt(max(1, out / in)) times a semi-orthogonal matrix, whose root mean square is 1 / sqrt(max(out, in))."""
    params = {"w": nn.Parameter(torch.zeros(shape))}
    optimizer = MasterOptimizer(params, OptimConfig(name=OptimName.muon, muon_lr=0.1, clip_grad_norm=0.0))
    params["w"].grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    optimizer.step(1.0)
    expected = 0.1 * math.sqrt(max(1.0, shape[0] / shape[1])) / math.sqrt(max(shape))
    assert float(params["w"].detach().square().mean().sqrt()) == pytest.approx(
        expected, rel=0.2
    )  # singular values .7 to 1.15


@pytest.mark.parametrize("name", list(OptimName))
def test_both_solve_a_least_squares_problem(name: OptimName) -> None:
    generator = torch.Generator().manual_seed(0)
    target, x = torch.randn(3, 12, 8, generator=generator), torch.randn(3, 8, 64, generator=generator)
    params = {"experts.up": nn.Parameter(torch.zeros(3, 12, 8, dtype=torch.bfloat16))}
    config = OptimConfig(name=name, lr=3e-2, muon_lr=1e-1, schedule=Schedule.linear, min_lr_ratio=0.0)
    optimizer = MasterOptimizer(params, config)

    def loss() -> Tensor:
        return ((params["experts.up"].float() - target) @ x).square().mean()

    first = loss().item()
    for step in range(200):
        loss().backward()
        optimizer.step(lr_factor(config, step, 200))
    assert loss().item() < first / 100


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


def test_names_are_the_models_own_under_compile() -> None:
    model = TinyModel()
    model.head = torch.compile(model.head, backend="eager")  # type: ignore[assignment]
    engine = build_engine(model, loss_fn, OptimConfig(), ParallelConfig(), micro_batches=1, device=CPU)
    assert [s.name for s in engine.working_shards(["head.weight"])] == ["head.weight"]
    assert "head.weight" in dict(engine.full_tensors())


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
    assert "\n" not in str(error.value)


def test_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(state_module, "save_file", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*previous checkpoint is kept") as error:
        engine_of().save(tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "state.json").exists()  # without it nothing takes the folder for a checkpoint
