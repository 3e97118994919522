"""Training of one decoder layer on streamed hidden states: the inner part of `qat.layerwise`.

Legend: N calibration rows, B rows of a step, T tokens, H hidden size.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from core.errors import ConfigError
from core.mxfp4 import ScaleRule
from kernels.mxfp4_snap import new_flag, raise_if_flagged, snap_from
from qat.config import LayerwiseConfig

CHUNK = 1 << 24  # elements in one pass of the optimiser: bounds its FP32 temporaries
MASTER_BYTES = 12  # FP32 master and two Adam moments of a trained parameter
Rows = slice | Tensor
Call = Callable[[nn.Module, Tensor, Rows], Tensor]
"""(layer, hidden states [N, T, H] in host memory or a file, rows of it) -> output [B, T, H] on the device."""


@dataclass(frozen=True)
class Targets:
    """What is quantised (full name -> reduction dimension, -1 or -2), what is trained, and the scale rule."""

    quantized: Mapping[str, int]
    trained: Collection[str]
    rule: ScaleRule = ScaleRule.even

    def __post_init__(self) -> None:
        if not self.quantized and not self.trained:
            raise ConfigError("quant.select and trainable.patterns are both empty: qat=layerwise has nothing to do")


def snap_rows_(source: Tensor, out: Tensor, rule: ScaleRule, dim: int, flag: Tensor) -> None:
    """out = snap(bf16(source)) along `dim`; along -2 one leading slice (expert) at a time, to keep the copy small."""
    if dim == -1:
        snap_from(source, out, rule, flag=flag)
        return
    for one, result in zip(source, out, strict=True) if source.ndim == 3 else ((source, out),):
        moved = one.to(torch.bfloat16).transpose(-1, -2).contiguous()
        result.copy_(snap_from(moved, moved, rule, flag=flag).transpose(-1, -2))


def relative_error(y_BTH: Tensor, target_BTH: Tensor) -> Tensor:
    """Mean over tokens of |y - target|^2 / |target|^2, in FP32."""
    target = target_BTH.float()
    return ((y_BTH.float() - target).square().sum(-1) / target.square().sum(-1).clamp_min(1e-12)).mean()


class SliceAdam:
    """Adam on FP32 masters of some leading rows of BF16 parameters, applied inside backward.

    After `attach`, `loss.backward()` updates: a parameter's gradient is used and freed the moment it is complete.
    The rate is a share of each tensor's root mean square: what a step must overcome is the grid's spacing, which is
    proportional to the weights, so one setting serves models of any scale.
    """

    def __init__(self, lr: float, steps: int, betas: tuple[float, float] = (0.9, 0.95)) -> None:
        self.peak, self.steps, self.betas, self.step = lr, steps, betas, 0
        self.handles: list[torch.utils.hooks.RemovableHandle] = []

    def lr(self) -> float:
        """Linear warm-up over the first 5 % of the steps, cosine down to a tenth."""
        warm = max(1, round(0.05 * self.steps))
        if self.step < warm:
            return self.peak * (self.step + 1) / warm
        part = (self.step - warm) / max(1, self.steps - warm)
        return self.peak * (0.1 + 0.45 * (1 + math.cos(math.pi * part)))

    def attach(self, p: nn.Parameter, rows: slice, write: Callable[[Tensor, Tensor], None]) -> None:
        """Train `p[rows]`; `write(master, working rows)` refreshes the BF16 copy, now and after each update."""
        master = p.data[rows].float()
        m, v = torch.zeros_like(master), torch.zeros_like(master)
        scale = max(float(torch.linalg.vector_norm(master)) / master.numel() ** 0.5, 1e-6)
        write(master, p.data[rows])

        def update(param: nn.Parameter) -> None:
            if param.grad is not None:
                grad, param.grad = param.grad[rows], None
                self._adam(master, m, v, grad, scale * self.lr())
                write(master, param.data[rows])

        p.requires_grad_(True)
        self.handles.append(p.register_post_accumulate_grad_hook(update))

    def _adam(self, master: Tensor, m: Tensor, v: Tensor, grad: Tensor, lr: float) -> None:
        (b1, b2), t = self.betas, self.step + 1
        chunk = max(1, CHUNK // max(1, master[0].numel()))
        for start in range(0, master.shape[0], chunk):
            part = slice(start, start + chunk)
            g = grad[part].float()
            m[part].lerp_(g, 1 - b1)
            v[part].mul_(b2).addcmul_(g, g, value=1 - b2)
            denominator = (v[part] / (1 - b2**t)).sqrt_().add_(1e-12)
            master[part].addcdiv_(m[part], denominator, value=-lr / (1 - b1**t))

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()


class LayerTrainer:
    """One layer on the device: sends streams of hidden states through it and trains it."""

    def __init__(self, layer: nn.Module, prefix: str, targets: Targets, cfg: LayerwiseConfig, call: Call) -> None:
        self.layer, self.targets, self.cfg, self.call = layer.eval().requires_grad_(False), targets, cfg, call
        self.prefix = prefix
        self.params = {prefix + name: p for name, p in layer.named_parameters()}
        self.quantized = {name: dim for name, dim in targets.quantized.items() if name in self.params}
        self.trained = [name for name in self.params if name in targets.trained]
        self.flag = new_flag(next(layer.parameters()).device)

    @property
    def touched(self) -> bool:
        return bool(self.quantized or self.trained)

    @torch.no_grad()
    def stream(self, source: Tensor, out: Tensor | None, target: Tensor | None = None) -> float:
        """Send all rows through the layer; write outputs to `out`; return the mean relative error against `target`."""
        total, rows = 0.0, source.shape[0]
        for start in range(0, rows, self.cfg.batch_size):
            part = slice(start, min(start + self.cfg.batch_size, rows))
            y = self.call(self.layer, source, part)
            if out is not None:
                out[part] = y.cpu()
            if target is not None:
                total += float(relative_error(y, target[part].to(y.device))) * (part.stop - part.start)
        return total / rows

    def writer(self, name: str) -> Callable[[Tensor, Tensor], None]:
        """(master, working rows) -> working rows rewritten: snapped if the tensor is quantised, else cast."""
        if name not in self.quantized:
            return lambda master, work: work.copy_(master)
        dim, rule = self.quantized[name], self.targets.rule
        return lambda master, work: snap_rows_(master, work, rule, dim, self.flag)

    def snap(self) -> None:
        """PTQ: every quantised tensor onto the grid, in place."""
        for name in self.quantized:
            weight = self.params[name].data
            self.writer(name)(weight, weight)
        self.check()

    def check(self) -> None:
        raise_if_flagged(self.flag, f"a selected weight of {self.prefix.rstrip('.')}")

    def train(self, source: Tensor, target: Tensor, slices: int, part: int, seed: int) -> None:
        """Train slice `part` of `slices` of the quantised tensors, and the whole of the other trained ones."""
        optimiser = SliceAdam(self.cfg.lr, self.cfg.steps)
        for name, p in self.params.items():
            count = p.shape[0] if p.ndim else 1
            cut = slice(count * part // slices, count * (part + 1) // slices)
            rows = cut if name in self.quantized else slice(0, count)
            if rows.start == rows.stop:
                continue
            if name in self.trained:
                optimiser.attach(p, rows, self.writer(name))
            elif name in self.quantized:
                self.writer(name)(p.data[rows], p.data[rows])
        order = row_order(source.shape[0], self.cfg.batch_size, self.cfg.steps if self.trained else 0, seed)
        for step, rows in enumerate(order):
            optimiser.step = step
            y = self.call(self.layer, source, rows)
            relative_error(y, target[rows].to(y.device)).backward()
        optimiser.detach()
        self.layer.requires_grad_(False)
        self.check()

    def tensors(self) -> dict[str, Tensor]:
        """Finished tensors on the CPU, by full name."""
        names = set(self.quantized) | set(self.trained)
        return {name: p.data.cpu().contiguous() for name, p in self.params.items() if name in names}

    def slices(self, budget: int) -> int:
        """`layerwise.slices`, or the fewest that fit `budget` bytes of device memory (0: no limit)."""
        if self.cfg.slices or not budget:
            return max(1, self.cfg.slices)
        sizes = [p.numel() * p.element_size() for p in self.params.values()]
        trained = sum(self.params[name].numel() for name in self.trained)
        return auto_slices(sum(sizes), trained, max(sizes), budget)


def row_order(rows: int, batch: int, steps: int, seed: int) -> Iterator[Tensor]:
    """`steps` sorted sets of row indices: every row once before any row again (nearly: an epoch's end is joined)."""
    generator = torch.Generator().manual_seed(seed)
    waiting = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while waiting.numel() < batch:
            waiting = torch.cat((waiting, torch.randperm(rows, generator=generator)))
        now, waiting = waiting[:batch], waiting[batch:]
        yield now.sort().values


def auto_slices(layer_bytes: float, trained: float, gradient_bytes: float, budget: float) -> int:
    """Fewest slices so that a layer, its largest gradient and the slice's masters and moments fit `budget` bytes.

    A tenth of the budget is left for activations, the optimiser's temporaries and the allocator.
    Raises:
        ConfigError: not even 64 slices fit.
    """
    free = 0.9 * budget - layer_bytes - gradient_bytes
    for slices in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64):
        if MASTER_BYTES * trained / slices <= free:
            return slices
    raise ConfigError(
        f"one decoder layer ({layer_bytes / 1e9:.1f} GB in BF16) and its largest gradient "
        f"({gradient_bytes / 1e9:.1f} GB) leave no room for training in {budget / 1e9:.0f} GB of device memory; "
        "use a larger device"
    )
