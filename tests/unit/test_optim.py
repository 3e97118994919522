"""AdamW and Muon over FP32 masters, and the schedules."""

import math

import pytest
import torch
from torch import nn

from core.train.config import OptimConfig, OptimName, Schedule
from core.train.optim import MasterOptimizer, Muon, is_matrix, orthogonalise
from core.train.schedule import lr_factor


def parameters() -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    shapes = {
        "layers.0.weight": (48, 32),
        "layers.0.experts.up": (3, 64, 32),
        "norm.weight": (32,),
        "lm_head.weight": (96, 32),
    }
    return {n: nn.Parameter(torch.randn(s).to(torch.bfloat16)) for n, s in shapes.items()}


def gradients(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {n: torch.randn(p.shape, generator=generator).to(torch.bfloat16) for n, p in parameters().items()}


def update(optimizer: MasterOptimizer, found: dict[str, nn.Parameter], step: int, factor: float = 1.0) -> float:
    for name, gradient in gradients(step).items():
        found[name].grad = gradient
    return float(optimizer.step(factor))


def test_adamw_over_masters_equals_torch_on_fp32() -> None:
    """Bit for bit: torch.optim.AdamW on FP32 weights given the same gradients, clipped by the same norm."""
    config = OptimConfig(lr=1e-2, weight_decay=0.1, clip_grad_norm=0.5)
    found = parameters()
    ours = MasterOptimizer(found, config)
    plain = {n: nn.Parameter(p.detach().float()) for n, p in found.items()}
    groups = [
        {"params": [p for p in plain.values() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in plain.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    theirs = torch.optim.AdamW(groups, lr=1e-2, betas=config.betas, eps=config.eps, fused=True)
    for step, factor in enumerate((0.5, 1.0, 0.25)):
        norm = update(ours, found, step, factor)
        for name, gradient in gradients(step).items():
            plain[name].grad = gradient.float()
        wanted = float(torch.nn.utils.clip_grad_norm_(plain.values(), 0.5))
        for group in theirs.param_groups:
            group["lr"] = 1e-2 * factor
        theirs.step()
        assert norm == pytest.approx(wanted, rel=1e-6)
        for name, master in ours.masters.items():
            # the two norms are summed in another order: the clipped gradients may differ by one unit in the last place
            assert torch.allclose(master, plain[name].detach(), rtol=1e-6, atol=1e-7), name
            assert torch.equal(found[name].detach(), master.to(torch.bfloat16)), "working = bf16(master)"


def test_small_steps_add_up_in_the_masters() -> None:
    """At a rate of 1e-6 a BF16 weight near 1 would never move; its master does."""
    weight = {"weight": nn.Parameter(torch.ones(4, 32, dtype=torch.bfloat16))}
    optimizer = MasterOptimizer(weight, OptimConfig(lr=1e-4, clip_grad_norm=0.0))
    for _ in range(40):
        weight["weight"].grad = torch.ones(4, 32, dtype=torch.bfloat16)
        optimizer.step(1.0)
    assert torch.allclose(optimizer.masters["weight"], torch.full((4, 32), 1 - 40e-4), atol=1e-5)
    assert float(weight["weight"].detach()[0, 0]) == 0.99609375


def test_accumulated_gradients_are_fp32_sums() -> None:
    """256 + 1 is lost in BF16 and kept in the sums."""
    weight = {"weight": nn.Parameter(torch.zeros(1, 32, dtype=torch.bfloat16))}
    optimizer = MasterOptimizer(weight, OptimConfig(clip_grad_norm=0.0))
    for value in (256.0, 1.0, 1.0):
        weight["weight"].grad = torch.full((1, 32), value, dtype=torch.bfloat16)
        optimizer.accumulate()
    assert float(optimizer.step(0.0)) == pytest.approx(258 * 32**0.5)


@pytest.mark.parametrize("shape", [(64, 64), (128, 32), (32, 128), (5, 96, 32)])
def test_muon_steps_are_nearly_orthogonal(shape: tuple[int, ...]) -> None:
    """Singular values within [0.5, 1.3]: the five quintic steps of Jordan et al. bring them near 1, not to it."""
    torch.manual_seed(1)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)).float())
    assert values.min() > 0.5 and values.max() < 1.3, (values.min(), values.max())


def test_muon_does_experts_as_one_batch() -> None:
    """Fused experts [E, out, in] are E matrices: equal to one at a time up to the BF16 rounding of its products."""
    torch.manual_seed(2)
    gradient, start = torch.randn(4, 64, 32), torch.randn(4, 64, 32)
    fused = nn.Parameter(start.clone())
    single = [nn.Parameter(w.clone()) for w in start]
    for params, grads in (([fused], [gradient]), (single, list(gradient))):
        optimizer = Muon(params, lr=0.1, momentum=0.9, weight_decay=0.1)
        for parameter, grad in zip(params, grads, strict=True):
            parameter.grad = grad.clone()
        optimizer.step()
    for one, part in zip(single, fused, strict=True):
        assert torch.allclose(one, part, atol=0.1 * 2**0.5 * 2**-6), float((one - part).abs().max())
    assert (fused.detach() - start).abs().max() > 0.02


def test_muon_takes_hidden_matrices_and_leaves_the_rest_to_adamw() -> None:
    found = parameters()
    muon, adamw = MasterOptimizer(found, OptimConfig(name=OptimName.muon)).optimizers
    assert [tuple(p.shape) for g in muon.param_groups for p in g["params"]] == [(48, 32), (3, 64, 32)]
    assert sum(len(g["params"]) for g in adamw.param_groups) == 2
    assert not is_matrix("model.layers.1.mlp.gate.weight", torch.Size((8, 64))), "the router"
    assert not is_matrix("model.embed_tokens.weight", torch.Size((8, 64)))


def test_average_of_the_masters() -> None:
    found = parameters()
    optimizer = MasterOptimizer(found, OptimConfig(lr=1e-2, ema=0.75))
    before = {n: m.clone() for n, m in optimizer.masters.items()}
    update(optimizer, found, 0)
    for name, master in optimizer.masters.items():
        assert torch.allclose(optimizer.ema[name], 0.75 * before[name] + 0.25 * master, atol=1e-6)


def factors(steps: int, **kwargs: object) -> list[float]:
    return [lr_factor(OptimConfig(**kwargs), step, steps) for step in range(steps)]  # type: ignore[arg-type]


def test_schedules() -> None:
    assert factors(4, schedule=Schedule.constant, warmup=0.5) == [0.5, 1.0, 1.0, 1.0]
    assert factors(5, schedule=Schedule.linear, warmup=0.2, min_lr_ratio=0.2) == pytest.approx(
        [1.0, 0.8, 0.6, 0.4, 0.2]
    )
    cosine = factors(10, schedule=Schedule.cosine, warmup=0.2, min_lr_ratio=0.1)
    assert cosine[:2] == [0.5, 1.0]
    assert cosine[5] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 4 / 8)))
    assert cosine[-1] == pytest.approx(0.1)
    assert cosine[1:] == sorted(cosine[1:], reverse=True)
    assert factors(3, schedule=Schedule.constant, warmup=0.0) == [1.0, 1.0, 1.0]


def test_muon_does_matrices_of_one_shape_as_one_batch() -> None:
    """Equal to one at a time up to the BF16 rounding of its products, also where one of them has no gradient."""

    def moved(together: bool) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        params = [torch.randn(48, 32, generator=generator) for _ in range(3)] + [torch.randn(32, 48)]
        params[3].copy_(params[0].T)
        groups = [params] if together else [[p] for p in params]
        optimizers = [Muon(group, lr=0.1, momentum=0.9, weight_decay=0.1) for group in groups]
        for step in range(3):
            for place, param in enumerate(params):
                wanted = place != 1 or step == 1
                grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(9 * step + place))
                param.grad = grad if wanted else None
            for optimizer in optimizers:
                optimizer.step()
        return params

    for whole, alone in zip(moved(together=True), moved(together=False), strict=True):
        torch.testing.assert_close(whole, alone, atol=2e-3, rtol=0)
