"""FP32 masters, AdamW and Muon, against torch's own optimiser and against linear algebra."""

import math

import pytest
import torch
from torch import Tensor, nn

from core.train import optim as optim_module
from core.train.config import OptimConfig, OptimName, Schedule
from core.train.optim import MasterOptimizer, chunks, orthogonalise
from core.train.schedule import lr_factor

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


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        (Schedule.cosine, 0, 0.1),  # a tenth of the warm-up, not zero
        (Schedule.cosine, 9, 1.0),
        (Schedule.cosine, 54, 0.2 + 0.8 * 0.5),  # halfway between warm-up and end
        (Schedule.cosine, 99, 0.2),
        (Schedule.linear, 54, 0.2 + 0.8 * 0.5),
        (Schedule.linear, 99, 0.2),
        (Schedule.constant, 4, 0.5),
        (Schedule.constant, 99, 1.0),
    ],
)
def test_schedule_values(schedule: Schedule, step: int, expected: float) -> None:
    config = OptimConfig(schedule=schedule, warmup=0.1, min_lr_ratio=0.2)
    assert lr_factor(config, step, 100) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("schedule", list(Schedule))
def test_schedule_of_one_step_is_positive(schedule: Schedule) -> None:
    assert lr_factor(OptimConfig(schedule=schedule, warmup=0.0), 0, 1) > 0
    assert lr_factor(OptimConfig(schedule=schedule, warmup=0.05), 0, 1) == 1.0


def test_masters_equal_torch_adamw_bit_for_bit() -> None:
    config = OptimConfig(lr=1e-2, weight_decay=0.1, clip_grad_norm=1.0)
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    optimizer = MasterOptimizer(ours, config)
    groups = [
        {"params": [p for p in theirs.values() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in theirs.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=config.betas, eps=config.eps, fused=True)
    for step in range(5):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        norm = optimizer.step(1.0)
        expected = nn.utils.clip_grad_norm_(theirs.values(), 1.0, foreach=False)
        reference.step()
        assert torch.equal(norm, expected)
        for name in ours:
            assert torch.equal(optimizer.masters[name], theirs[name]), name
            assert torch.equal(ours[name], theirs[name])
            assert ours[name].grad is None and optimizer.masters[name].grad is None


def test_working_copy_is_the_bf16_cast_and_small_steps_are_kept() -> None:
    params = parameters(torch.bfloat16)
    before = {n: p.detach().clone() for n, p in params.items()}
    optimizer = MasterOptimizer(params, OptimConfig(lr=1e-5, clip_grad_norm=0.0))
    for step in range(20):
        for parameter in params.values():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step(1.0)
        for name, parameter in params.items():
            assert torch.equal(parameter, optimizer.masters[name].to(torch.bfloat16)), (step, name)
    # 20 steps of 1e-5 in one direction: every master moved by 2e-4, though few BF16 weights could show a single one
    for name, old in before.items():
        torch.testing.assert_close(optimizer.masters[name], old.float() - 2e-4, rtol=0, atol=2e-6)


def test_what_is_written_over_working_copies_does_not_reach_the_masters() -> None:
    plain, snapped = parameters(torch.bfloat16), parameters(torch.bfloat16)
    one, other = (MasterOptimizer(p, OptimConfig(lr=1e-2)) for p in (plain, snapped))
    for step in range(3):
        give_gradients(plain, step)
        give_gradients(snapped, step)
        for parameter in snapped.values():
            parameter.data.round_()
        one.step(1.0)
        other.step(1.0)
    assert all(torch.equal(plain[n], snapped[n]) for n in plain)


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


def test_accumulation_keeps_what_bf16_sums_lose() -> None:
    """256 + 1 is not a BF16 number: a BF16 sum of these gradients would stay at 256."""
    parameter = nn.Parameter(torch.zeros(2, 2, dtype=torch.bfloat16))
    optimizer = MasterOptimizer({"w": parameter}, OptimConfig(clip_grad_norm=0.0))
    for value in (256.0, 1.0, 1.0, 1.0):
        parameter.grad = torch.full_like(parameter, value)
        optimizer.accumulate()
    assert parameter.grad is None
    assert float(optimizer.step(1.0)) == pytest.approx(259.0 * 2)  # norm over four values
    assert not optimizer.accumulated


def test_average_of_masters() -> None:
    params = parameters(torch.float32)
    first = {n: p.detach().clone() for n, p in params.items()}
    optimizer = MasterOptimizer(params, OptimConfig(lr=1e-2, ema=0.9))
    give_gradients(params, 0)
    optimizer.step(1.0)
    for name, average in optimizer.ema.items():
        torch.testing.assert_close(average, 0.9 * first[name] + 0.1 * optimizer.masters[name])


# --- Muon -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(48, 96), (96, 48), (3, 32, 80), (2, 33, 31)])
def test_orthogonalise_brings_singular_values_near_one(shape: tuple[int, ...]) -> None:
    """Jordan's coefficients bring [0, 1] into about [.68, 1.13] and no further; BF16 widens that a little."""
    momentum = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 7
    values = torch.linalg.svdvals(orthogonalise(momentum).float())
    expected = torch.linalg.svdvals(momentum)
    started = expected / expected.norm(dim=-1, keepdim=True) > 0.02  # five steps lift smaller ones only part of the way
    assert values.max() < 1.25
    assert values[started].min() > 0.6


def test_orthogonalise_keeps_the_singular_vectors() -> None:
    momentum = torch.randn(24, 64, generator=torch.Generator().manual_seed(1))
    u, _, v = torch.linalg.svd(momentum, full_matrices=False)
    inner = u.T @ orthogonalise(momentum).float() @ v.T  # diagonal if the vectors are the same
    off_diagonal = inner - torch.diag(inner.diagonal())
    assert off_diagonal.abs().max() < 0.05  # BF16 iterations: 2^-8 relative, times five steps


def test_experts_are_separate_matrices() -> None:
    """Batched equals one expert after another up to BF16 rounding (the two matmul kernels sum in another order)."""
    momentum = torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(2)) * torch.tensor([1e-3, 1.0, 1e3]).view(
        3, 1, 1
    )
    together = orthogonalise(momentum).float()
    apart = torch.stack([orthogonalise(one).float() for one in momentum])
    torch.testing.assert_close(together, apart, rtol=0, atol=2e-2)


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


def test_muon_takes_matrices_and_leaves_the_rest_to_adamw() -> None:
    shapes = {
        "model.embed_tokens.weight": (16, 8), "lm_head.weight": (16, 8), "model.layers.0.mlp.gate.weight": (4, 8),
        "model.layers.0.mlp.router.weight": (4, 8), "model.norm.weight": (8,), "model.layers.0.self_attn.sinks": (4,),
        "model.layers.0.mlp.experts.gate_up_proj": (4, 8, 8), "model.layers.0.self_attn.q_proj.weight": (8, 8),
        "model.layers.0.mlp.gate_proj.weight": (8, 8),
    }  # fmt: skip
    params = {n: nn.Parameter(torch.randn(s)) for n, s in shapes.items()}
    kinds = MasterOptimizer(params, OptimConfig(name=OptimName.muon)).kinds()
    taken = {n for n, k in kinds.items() if "momentum" in k}
    assert taken == {n for n in shapes if "experts" in n or "q_proj" in n or "mlp.gate_proj" in n}


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
