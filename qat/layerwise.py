"""`qat=layerwise`: quantisation-train decoder layers one after another, in the memory of one layer.

Layer l of the student starts from the BF16 weights and sees the hidden states of the *quantised* layers before it; its
target is what the BF16 layer l made of the BF16 hidden states. So each layer also repairs what the layers before it
broke (block reconstruction with error compensation); training it on the BF16 inputs instead would only teach it to
copy itself, and errors would add up over depth. `layerwise.inputs=bf16` gives that arm for comparison.

The objective is the squared error of a token's output over the squared norm of its target, averaged over tokens: what
reads a residual stream normalises it first (RMSNorm), so an error counts in relation to the token's own size, and the
few tokens with giant activations do not drown the rest.

Memory. Weights are snapped in place; FP32 masters and the two Adam moments (12 bytes a parameter) exist only for the
slice of rows (experts, where the tensor is a stack of them) in training. A layer whose masters do not fit is trained
slice after slice (`layerwise.slices`): finished slices are on the grid, waiting ones still BF16, so a later slice
compensates for an earlier one. The update runs inside backward as soon as a tensor's gradient exists, which is then
dropped: no more than one gradient tensor is alive. Hence no gradient clipping by global norm; Adam and a normalised
loss need none here.

Resume. A finished layer is a file; a killed run loses the layer it was in and repeats it with the same seeds.

Legend: N calibration rows, B rows of a step, T tokens, H hidden size.
"""

import json
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from core import mxfp4
from core.errors import CheckpointError, ConfigError, DataError
from core.mxfp4 import ScaleRule
from core.train.batch import Batch
from qat.config import LayerwiseConfig
from qat.layer_io import DiskStore, HiddenStore, LayerCalls, LayerSource, MemoryStore, StreamShape, run_layer

Log = Callable[[dict[str, float | int | str]], None]
CHUNK = 1 << 24  # elements in one pass of the optimiser: bounds its FP32 temporaries


@dataclass(frozen=True)
class LayerReport:
    """One layer's line in metrics.jsonl. Losses are relative squared errors of the layer's output."""

    layer: int
    quantized_params: int
    loss_ptq: float  # weights rounded, not trained
    loss: float  # after training
    slices: int
    steps: int
    seconds: float
    tokens_per_s: float
    step_ms: float
    peak_bytes: int  # device memory; 0 on a CPU


@dataclass(frozen=True)
class LayerwiseResult:
    reports: tuple[LayerReport, ...]
    folder: Path  # layer-00000.safetensors ...: the trained tensors under their full names

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for report in self.reports:
            yield from load_file(layer_file(self.folder, report.layer)).items()


@dataclass(frozen=True)
class Targets:
    """What is quantised (full name -> reduction dimension), what is trained, and how."""

    quantized: Mapping[str, int]
    trained: Collection[str]
    rule: ScaleRule = ScaleRule.even

    def __post_init__(self) -> None:
        if not self.quantized and not self.trained:
            raise ConfigError("quant.select and trainable.patterns are both empty: qat=layerwise has nothing to do")


def layer_file(folder: Path, index: int) -> Path:
    return folder / f"layer-{index:05d}.safetensors"


def snap_(weight: Tensor, rule: ScaleRule, dim: int, name: str) -> None:
    """Snap in place, a slice of dimension 0 at a time, so that temporaries stay small."""
    step = max(1, CHUNK // max(1, weight[0].numel()))
    for start in range(0, weight.shape[0], step):
        part = weight[start : start + step]
        part.copy_(mxfp4.snap(part, rule, dim, name))


def relative_error(y_BTH: Tensor, target_BTH: Tensor) -> Tensor:
    """Mean over tokens of |y - target|^2 / |target|^2, in FP32."""
    target = target_BTH.float()
    return ((y_BTH.float() - target).square().sum(-1) / target.square().sum(-1).clamp_min(1e-12)).mean()


class SliceAdam:
    """Adam on FP32 masters of rows [start, stop) of BF16 parameters, applied inside backward.

    After `attach`, `loss.backward()` updates: each parameter's gradient is consumed and freed the moment it is complete.
    """

    def __init__(self, cfg: LayerwiseConfig, steps: int) -> None:
        self.cfg, self.steps, self.step = cfg, steps, 0
        self.handles: list[torch.utils.hooks.RemovableHandle] = []

    def lr(self) -> float:
        """Linear warm-up over the first 5 % of the steps, cosine down to a tenth."""
        warm = max(1, round(0.05 * self.steps))
        if self.step < warm:
            return self.cfg.lr * (self.step + 1) / warm
        part = (self.step - warm) / max(1, self.steps - warm)
        return self.cfg.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * part)))

    def attach(self, p: nn.Parameter, rows: slice, snap: Callable[[Tensor], None] | None) -> None:
        """Train `p[rows]`; `snap` is applied in place to the BF16 rows after each update and once now."""
        master = p.data[rows].float()
        m, v = torch.zeros_like(master), torch.zeros_like(master)
        if snap is not None:
            snap(p.data[rows])

        def update(param: nn.Parameter) -> None:
            if param.grad is None:
                return
            grad, param.grad = param.grad[rows], None
            self._adam(master, m, v, grad)
            work = param.data[rows]
            work.copy_(master)
            if snap is not None:
                snap(work)

        p.requires_grad_(True)
        self.handles.append(p.register_post_accumulate_grad_hook(update))

    def _adam(self, master: Tensor, m: Tensor, v: Tensor, grad: Tensor) -> None:
        (b1, b2), t, lr = (0.9, 0.95), self.step + 1, self.lr()
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
    """One layer on the device: runs both streams through it and trains it."""

    def __init__(self, run: "Run", index: int, layer: nn.Module) -> None:
        self.run, self.index, self.layer = run, index, layer.eval().requires_grad_(False)
        prefix = f"{run.source.prefix}{index}."
        self.params = {prefix + name: p for name, p in layer.named_parameters()}
        self.quantized = {name: dim for name, dim in run.targets.quantized.items() if name in self.params}
        self.trained = [name for name in self.params if name in run.targets.trained]

    @torch.no_grad()
    def forward_stream(self, source: Tensor, out: Tensor | None, target: Tensor | None = None) -> float:
        """Send all rows through the layer; write outputs to `out`; return the mean relative error against `target`."""
        total, rows = 0.0, source.shape[0]
        for start in range(0, rows, self.run.cfg.batch_size):
            part = slice(start, min(start + self.run.cfg.batch_size, rows))
            y = self.run.call(self.layer, self.index, source, part)
            if out is not None:
                out[part] = y.cpu()
            if target is not None:
                total += float(relative_error(y, target[part].to(y.device))) * (part.stop - part.start)
        return total / rows

    def snapper(self, name: str) -> Callable[[Tensor], None] | None:
        if name not in self.quantized:
            return None
        return lambda w: snap_(w, self.run.targets.rule, self.quantized[name], name)

    def snap_all(self) -> None:
        for name in self.quantized:
            self.snapper(name)(self.params[name].data)

    def train(self, source: Tensor, target: Tensor, slices: int, part: int) -> None:
        """Train slice `part` of `slices` of the quantised tensors, and all of the other trained ones."""
        cfg = self.run.cfg
        optimiser = SliceAdam(cfg, cfg.steps)
        for name, p in self.params.items():
            count = p.shape[0] if p.ndim else 1
            rows = slice(count * part // slices, count * (part + 1) // slices) if name in self.quantized else slice(0, count)
            if name in self.trained:
                optimiser.attach(p, rows, self.snapper(name))
            elif name in self.quantized:
                self.snapper(name)(p.data[rows])
        generator = torch.Generator().manual_seed(((self.run.seed * 10_007 + self.index) * 10_007 + part) % 2**63)
        order = torch.empty(0, dtype=torch.int64)
        for step in range(cfg.steps if self.trained else 0):
            optimiser.step = step
            if order.numel() < cfg.batch_size:
                order = torch.cat((order, torch.randperm(source.shape[0], generator=generator)))
            rows, order = order[: cfg.batch_size].sort().values, order[cfg.batch_size :]
            y = self.run.call(self.layer, self.index, source, rows)
            relative_error(y, target[rows].to(y.device)).backward()
        optimiser.detach()
        self.layer.requires_grad_(False)

    def tensors(self) -> dict[str, Tensor]:
        names = set(self.quantized) | set(self.trained)
        return {name: p.data.cpu().contiguous() for name, p in self.params.items() if name in names}


class Run:
    """State of one layerwise run: the source, the calibration rows, the two streams and the folder."""

    def __init__(
        self, source: LayerSource, targets: Targets, batches: list[Batch], cfg: LayerwiseConfig, folder: Path, seed: int
    ) -> None:
        if not batches:
            raise DataError("qat=layerwise has no calibration rows; set data.train or data.root")
        self.source, self.targets, self.cfg, self.folder, self.seed = source, targets, cfg, folder, seed
        self.rows = Batch(*(torch.cat(parts) for parts in zip(*(b.tensors() for b in batches), strict=True)))
        self.calls = LayerCalls(source.shell)
        self.device = next(source.shell.parameters()).device
        folder.mkdir(parents=True, exist_ok=True)
        hidden, _ = self.calls.record(0, self.pick(slice(0, 1)))
        shape = StreamShape(*self.rows.input_ids_BT.shape, hidden.shape[-1])
        if cfg.hidden not in ("disk", "recompute"):
            raise ConfigError(f"layerwise.hidden is {cfg.hidden!r}; use disk or recompute")
        self.store: HiddenStore = MemoryStore(shape) if cfg.hidden == "recompute" else DiskStore(shape, folder / "hidden")

    def pick(self, rows: slice | Tensor) -> Batch:
        return Batch(*(t[rows] for t in self.rows.tensors())).to(self.device)

    def call(self, layer: nn.Module, index: int, source: Tensor, rows: slice | Tensor) -> Tensor:
        _, kwargs = self.calls.record(index, self.pick(rows))
        return run_layer(layer, source[rows].to(self.device), kwargs)

    @torch.no_grad()
    def embed(self) -> None:
        if self.store.has(stream("base", 0)):
            return
        out = self.store.create()
        for start in range(0, out.shape[0], self.cfg.batch_size):
            part = slice(start, min(start + self.cfg.batch_size, out.shape[0]))
            out[part] = self.calls.record(0, self.pick(part))[0].to(torch.bfloat16).cpu()
        self.store.commit(stream("base", 0), out)

    def student_input(self, index: int) -> Tensor:
        """Before the first quantised layer both streams are one."""
        key = stream("quantized", index)
        return self.store.open(key if self.store.has(key) else stream("base", index))


def stream(kind: str, index: int) -> str:
    return f"{kind}-{index:05d}"


def train_layer(run: Run, index: int) -> LayerReport | None:
    """Advance both streams by one layer, training it if anything in it is selected. None: nothing was."""
    started = time.perf_counter()
    on_gpu = run.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(run.device)
    trainer = LayerTrainer(run, index, run.source.load(index))
    base_in = run.store.open(stream("base", index))
    target = run.store.create()
    trainer.forward_stream(base_in, target)
    run.store.commit(stream("base", index + 1), target)
    target = run.store.open(stream("base", index + 1))
    student_in = run.student_input(index)
    touched = bool(trainer.quantized or trainer.trained)
    if not touched and not run.store.has(stream("quantized", index)):
        return None
    seconds, loss_ptq, slices = 0.0, 0.0, 1
    if touched:
        loss_ptq = measure_ptq(trainer, student_in, target)
        del trainer
        trainer = LayerTrainer(run, index, run.source.load(index))
        inputs = base_in if run.cfg.inputs == "bf16" else student_in
        slices = choose_slices(trainer)
        before = time.perf_counter()
        for part in range(slices):
            trainer.train(inputs, target, slices, part)
        if on_gpu:
            torch.cuda.synchronize(run.device)
        seconds = time.perf_counter() - before
    out = run.store.create()
    loss = trainer.forward_stream(student_in, out, target)
    run.store.commit(stream("quantized", index + 1), out)
    if not touched:
        return None
    save_layer(run, index, trainer.tensors())
    steps = run.cfg.steps * slices if trainer.trained else 0
    return LayerReport(
        layer=index,
        quantized_params=sum(trainer.params[name].numel() for name in trainer.quantized),
        loss_ptq=loss_ptq,
        loss=loss,
        slices=slices,
        steps=steps,
        seconds=time.perf_counter() - started,
        tokens_per_s=steps * run.cfg.batch_size * run.rows.input_ids_BT.shape[1] / max(seconds, 1e-9),
        step_ms=1e3 * seconds / max(1, steps),
        peak_bytes=torch.cuda.max_memory_allocated(run.device) if on_gpu else 0,
    )


def measure_ptq(trainer: LayerTrainer, source: Tensor, target: Tensor) -> float:
    """Relative error with rounded weights. Overwrites the layer's weights: load it again afterwards."""
    trainer.snap_all()
    return trainer.forward_stream(source, None, target)


def save_layer(run: Run, index: int, tensors: dict[str, Tensor]) -> None:
    path = layer_file(run.folder, index)
    scratch = path.with_suffix(".tmp")
    try:
        save_file(tensors, scratch)
    except Exception as error:  # noqa: BLE001  safetensors raises its own type for a full disk
        scratch.unlink(missing_ok=True)
        raise CheckpointError(f"{path}: cannot be written ({error}); earlier layers are safe, free space and resume") from error
    scratch.replace(path)


def auto_slices(layer_bytes: int, trained: int, largest_bytes: int, budget: int) -> int:
    """Fewest slices such that weights, one gradient, 12 bytes a parameter of a slice and work space fit `budget` bytes.

    A tenth of the budget, at least, is left for activations and the allocator.
    Raises:
        ConfigError: not even 64 slices fit.
    """
    free = 0.9 * budget - layer_bytes - largest_bytes
    for slices in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64):
        if 12 * trained / slices <= free:
            return slices
    raise ConfigError(
        f"one decoder layer ({layer_bytes / 1e9:.1f} GB in BF16) and its largest gradient ({largest_bytes / 1e9:.1f} GB) leave no "
        f"room for training in {budget / 1e9:.0f} GB of device memory; use a larger device"
    )


def choose_slices(trainer: LayerTrainer) -> int:
    """`layerwise.slices`, or what the CUDA device's memory asks for (a CPU: 1)."""
    run = trainer.run
    if run.cfg.slices or run.device.type != "cuda":
        return max(1, run.cfg.slices)
    sizes = [p.numel() * p.element_size() for p in trainer.params.values()]
    trained = sum(trainer.params[name].numel() for name in trainer.trained)
    return auto_slices(sum(sizes), trained, max(sizes), torch.cuda.mem_get_info(run.device)[1])


def write_state(run: Run, finished: int, reports: list[LayerReport]) -> None:
    state = {"finished": finished, "seed": run.seed, "config": asdict(run.cfg), "reports": [asdict(r) for r in reports]}
    scratch = run.folder / "layerwise.json.tmp"
    scratch.write_text(json.dumps(state, indent=1))
    scratch.replace(run.folder / "layerwise.json")


def restore(run: Run) -> tuple[int, list[LayerReport]]:
    """(first layer still to do, reports of the finished ones), with the streams in front of that layer in place."""
    path = run.folder / "layerwise.json"
    if not path.is_file():
        run.embed()
        return 0, []
    state = json.loads(path.read_text())
    if state["config"] != asdict(run.cfg) or state["seed"] != run.seed:
        raise ConfigError(f"{path}: this run began with other layerwise.* values or another train.seed; resume with those, or start a new run")
    finished, reports = state["finished"], [LayerReport(**r) for r in state["reports"]]
    if not run.store.durable:
        recompute(run, finished, {r.layer for r in reports})
    for report in reports:
        run.source.store(report.layer, load_file(layer_file(run.folder, report.layer)))
    return finished, reports


def recompute(run: Run, finished: int, trained: set[int]) -> None:
    """Rebuild both streams in front of layer `finished`; the same calls in the same order give the same bits."""
    run.embed()
    for index in range(finished):
        trainer = LayerTrainer(run, index, run.source.load(index))
        out = run.store.create()
        trainer.forward_stream(run.store.open(stream("base", index)), out)
        run.store.commit(stream("base", index + 1), out)
        if index in trained or run.store.has(stream("quantized", index)):
            if index in trained:
                for name, tensor in load_file(layer_file(run.folder, index)).items():
                    trainer.params[name].data.copy_(tensor)
            out = run.store.create()
            trainer.forward_stream(run.student_input(index), out)
            run.store.commit(stream("quantized", index + 1), out)
        run.store.keep_only({stream("base", index + 1), stream("quantized", index + 1)})


def train_layerwise(
    source: LayerSource,
    targets: Targets,
    batches: list[Batch],
    cfg: LayerwiseConfig,
    folder: Path,
    *,
    seed: int = 0,
    log: Log | None = None,
) -> LayerwiseResult:
    """Train every layer in turn; continues where a killed run in `folder` stopped.

    Args:
        source: the BF16 model's layers; its shell lies on the training device.
        targets: quantised and trained parameters by full name, and the scale rule.
        batches: calibration rows, all of one length; the whole set is kept (token ids only).
        cfg: steps, rows in a step, learning rate, where hidden states live.
        folder: receives `layer-<index>.safetensors`, `layerwise.json` and `hidden/`.
        log: called with one flat record after each trained layer.
    Returns:
        reports, and the folder with the trained tensors; `source.store` has received each of them.
    """
    run = Run(source, targets, batches, cfg, folder, seed)
    first, reports = restore(run)
    for index in range(first, source.num_layers):
        report = train_layer(run, index)
        if report is not None:
            source.store(index, load_file(layer_file(folder, index)))
            reports.append(report)
        write_state(run, index + 1, reports)
        run.store.keep_only({stream("base", index + 1), stream("quantized", index + 1)})
        if report is not None and log is not None:
            log(asdict(report))
    run.store.keep_only(set())
    return LayerwiseResult(tuple(reports), folder)
