"""AdamW and Muon over FP32 masters of BF16 parameters.

A BF16 weight cannot take a small step (at a rate of 1e-6 an Adam-size step moves 2 % of BF16 weights), so every trained
parameter has an FP32 master; gradients are cast up a gibibyte at a time, the optimiser moves those masters, and the
working copies are rewritten as bf16(master).

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) replaces the momentum of a matrix by its nearest
semi-orthogonal matrix, found with five Newton-Schulz steps in BF16. Fused experts [E, out, in] are E matrices, done as
one batch, and so are all matrices of one shape. Embeddings, head, routers, norms and biases go to AdamW.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from core.train.config import OptimConfig, OptimName

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic coefficients of Jordan et al.
NEWTON_SCHULZ_STEPS = 5
NOT_MATRICES = ("embed", "lm_head", "router", "mlp.gate.weight")
CHUNK = 2**28  # values whose FP32 gradients exist at one time during a step: 1 GiB


def orthogonalise(momentum: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrix, approximately: [..., out, in] -> the same shape, BF16; singular values near 1."""
    a, b, c = NEWTON_SCHULZ
    x = momentum.to(torch.bfloat16)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, scaled by sqrt(max(1, out / in)); decoupled weight decay."""

    def __init__(self, params: list[Tensor], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            alike: dict[Any, list[Tensor]] = {}
            for master in group["params"]:
                if master.grad is not None:
                    alike.setdefault(master.shape if master.dim() == 2 else id(master), []).append(master)
            for masters in alike.values():
                self.move(masters, group["lr"], group["momentum"], group["weight_decay"])

    def move(self, masters: list[Tensor], lr: float, momentum: float, weight_decay: float) -> None:
        """One update of matrices of one shape, orthogonalised as one batch: alone they are too small for a GPU."""
        for master in masters:
            if not self.state[master]:
                self.state[master]["momentum"] = torch.zeros_like(master)
        buffers = [self.state[m]["momentum"] for m in masters]
        grads = [m.grad for m in masters if m.grad is not None]  # all: `step` leaves the others out
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        update = orthogonalise(torch.stack(torch._foreach_lerp(grads, buffers, momentum))).to(torch.float32)
        torch._foreach_mul_(masters, 1 - lr * weight_decay)
        rows, columns = masters[0].shape[-2:]
        torch._foreach_add_(masters, list(update.unbind()), alpha=-lr * max(1.0, rows / columns) ** 0.5)


def is_matrix(name: str, shape: torch.Size) -> bool:
    """Whether Muon takes it: 2-D hidden matrices and fused experts."""
    return len(shape) >= 2 and not any(part in name for part in NOT_MATRICES)


def chunks(sizes: dict[str, int], limit: int) -> Iterator[list[str]]:
    """Names in order, in runs of at most `limit` values (a single larger one is a run of its own)."""
    run: list[str] = []
    total = 0
    for name, size in sizes.items():
        if run and total + size > limit:
            yield run
            run, total = [], 0
        run.append(name)
        total += size
    if run:
        yield run


def widened(grads: list[Tensor]) -> list[Tensor]:
    """The gradients in FP32, in one launch; those that are FP32 stay what they are."""
    narrow = [g for g in grads if g.dtype != torch.float32]
    made = [torch.empty_like(g, dtype=torch.float32) for g in narrow]
    if made:
        torch._foreach_copy_(made, narrow)
    fresh = iter(made)
    return [g if g.dtype == torch.float32 else next(fresh) for g in grads]


class MasterOptimizer:
    """FP32 masters of the parameters with requires_grad, their optimisers, and an optional average of the masters."""

    def __init__(self, parameters: dict[str, nn.Parameter], config: OptimConfig) -> None:
        self.config = config
        self.parameters = {n: p for n, p in parameters.items() if p.requires_grad}
        self.masters = {n: p.detach().to(torch.float32, copy=True) for n, p in self.parameters.items()}
        self.ema = {n: m.clone() for n, m in self.masters.items()} if config.ema else {}
        self.accumulated: dict[str, Tensor] = {}
        self.optimizers = self.build()

    def build(self) -> list[torch.optim.Optimizer]:
        muon = self.config.name is OptimName.muon
        matrices = [m for n, m in self.masters.items() if muon and is_matrix(n, m.shape)]
        taken = {id(m) for m in matrices}
        rest = [m for m in self.masters.values() if id(m) not in taken]
        found: list[torch.optim.Optimizer] = []
        if matrices:
            found.append(Muon(matrices, self.config.muon_lr, self.config.muon_momentum, self.config.weight_decay))
        if rest:
            groups = [
                {"params": [m for m in rest if m.dim() >= 2], "weight_decay": self.config.weight_decay},
                {"params": [m for m in rest if m.dim() < 2], "weight_decay": 0.0},
            ]
            c = self.config
            groups = [g for g in groups if g["params"]]
            found.append(torch.optim.AdamW(groups, lr=c.lr, betas=c.betas, eps=c.eps, fused=True))
        for optimizer in found:
            for group in optimizer.param_groups:
                group["peak_lr"] = group["lr"]
        return found

    @torch.no_grad()
    def accumulate(self) -> None:
        """Move the gradients of a micro-batch into FP32 sums (4 bytes a trained parameter while a step lasts)."""
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                if name in self.accumulated:
                    self.accumulated[name].add_(parameter.grad)
                else:
                    self.accumulated[name] = parameter.grad.to(torch.float32)
                parameter.grad = None

    def gradient_sums(self) -> list[Tensor]:
        """The FP32 sums of every trained parameter, in one order on all ranks; zeros where no gradient came."""
        for name, master in self.masters.items():
            if name not in self.accumulated:
                self.accumulated[name] = torch.zeros_like(master)
        return [self.accumulated[name] for name in self.masters]

    @torch.no_grad()
    def step(self, lr_factor: float) -> Tensor:
        """One update; returns the gradient norm before clipping as a 0-dim tensor (no synchronisation here)."""
        grads: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            grad = self.accumulated.pop(name, parameter.grad)
            parameter.grad = None
            if grad is not None:
                grads[name] = grad
        norms = torch._foreach_norm(list(grads.values()), dtype=torch.float32) if grads else []
        norm = torch.linalg.vector_norm(torch.stack(norms)) if grads else torch.zeros(())
        clip = self.config.clip_grad_norm
        scale = (clip / (norm + 1e-6)).clamp(max=1.0) if clip else None
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * lr_factor
        for names in chunks({n: g.numel() for n, g in grads.items()}, CHUNK):
            wide = widened([grads.pop(name) for name in names])
            if scale is not None:
                torch._foreach_mul_(wide, scale)
            for name, grad in zip(names, wide, strict=True):
                self.masters[name].grad = grad
            del wide
            for optimizer in self.optimizers:
                optimizer.step()  # skips the masters without a gradient
            for name in names:
                self.masters[name].grad = None
        if self.ema:
            torch._foreach_lerp_(list(self.ema.values()), list(self.masters.values()), 1 - self.config.ema)
        self.write_working()
        return norm

    @torch.no_grad()
    def write_working(self) -> None:
        """working copy = bf16(master)."""
        if self.parameters:
            torch._foreach_copy_([p.data for p in self.parameters.values()], list(self.masters.values()))

    def state_tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """(parameter name, kind, FP32 tensor) of everything a resume needs."""
        name_of = {id(m): n for n, m in self.masters.items()}
        yield from ((n, "master", m) for n, m in self.masters.items())
        yield from ((n, "ema", m) for n, m in self.ema.items())
        for optimizer in self.optimizers:
            for master, state in optimizer.state.items():
                yield from ((name_of[id(master)], kind, value) for kind, value in state.items() if kind != "step")

    def kinds(self) -> dict[str, set[str]]:
        """What `state_tensors` may hold of each parameter, the first step not needed."""
        base = {"master", "ema"} if self.ema else {"master"}
        muon = {id(m) for o in self.optimizers if isinstance(o, Muon) for g in o.param_groups for m in g["params"]}
        return {
            n: base | ({"momentum"} if id(m) in muon else {"exp_avg", "exp_avg_sq"}) for n, m in self.masters.items()
        }

    def steps_done(self) -> int:
        """Updates made so far (AdamW's bias correction needs the count)."""
        for optimizer in self.optimizers:
            for state in optimizer.state.values():
                if "step" in state:
                    return int(state["step"])
        return 0

    @torch.no_grad()
    def restore(self, name: str, kind: str, value: Tensor, steps: int) -> None:
        """Put back one tensor of `state_tensors`."""
        master = self.masters[name]
        if kind in {"master", "ema"}:
            (master if kind == "master" else self.ema[name]).copy_(value.view_as(master))
            return
        for optimizer in self.optimizers:
            if any(master is p for g in optimizer.param_groups for p in g["params"]):
                state = optimizer.state[master]
                state[kind] = value.view_as(master).to(master.device, torch.float32, copy=True)
                if isinstance(optimizer, torch.optim.AdamW):
                    state["step"] = torch.tensor(float(steps), device=master.device if master.is_cuda else "cpu")
