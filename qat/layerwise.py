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
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from core.errors import CheckpointError, ConfigError, DataError
from core.train.batch import Batch
from qat.config import LayerwiseConfig
from qat.layer_io import (
    DiskStore,
    HiddenStore,
    LayerCalls,
    LayerSource,
    MemoryStore,
    StreamShape,
    run_layer,
)
from qat.layer_train import LayerTrainer, Rows, Targets

HIDDEN, INPUTS = ("disk", "recompute"), ("quantized", "bf16")
Log = Callable[[dict[str, float | int]], None]


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


def layer_file(folder: Path, index: int) -> Path:
    return folder / f"layer-{index:05d}.safetensors"


class Run:
    """State of one layerwise run: the source, the calibration rows, the two streams and the folder."""

    def __init__(
        self, source: LayerSource, targets: Targets, batches: list[Batch], cfg: LayerwiseConfig, folder: Path, seed: int
    ) -> None:
        if not batches:
            raise DataError("qat=layerwise has no calibration rows; set data.train or data.root")
        for key, value, allowed in (("hidden", cfg.hidden, HIDDEN), ("inputs", cfg.inputs, INPUTS)):
            if value not in allowed:
                raise ConfigError(f"layerwise.{key}={value}: expected {' or '.join(allowed)}")
        self.source, self.targets, self.cfg, self.folder, self.seed = source, targets, cfg, folder, seed
        self.rows = Batch(*(torch.cat(parts) for parts in zip(*(b.tensors() for b in batches), strict=True)))
        self.calls = LayerCalls(source.shell)
        self.device = next(self.calls.shell_parameters()).device
        folder.mkdir(parents=True, exist_ok=True)
        hidden, _ = self.calls.record(0, self.pick(slice(0, 1)))
        shape = StreamShape(*self.rows.input_ids_BT.shape, hidden.shape[-1])
        self.store: HiddenStore = (
            MemoryStore(shape) if cfg.hidden == "recompute" else DiskStore(shape, folder / "hidden")
        )

    def pick(self, rows: Rows) -> Batch:
        return Batch(*(t[rows] for t in self.rows.tensors())).to(self.device)

    def trainer(self, index: int) -> LayerTrainer:
        """The unquantised layer `index`, fresh on the device."""

        def call(layer: nn.Module, source: Tensor, rows: Rows) -> Tensor:
            _, kwargs = self.calls.record(index, self.pick(rows))
            return run_layer(layer, source[rows].to(self.device), kwargs)

        return LayerTrainer(self.source.load(index), f"{self.source.prefix}{index}.", self.targets, self.cfg, call)

    def layer_seed(self, index: int, part: int) -> int:
        return ((self.seed * 10_007 + index) * 10_007 + part) % 2**63

    @torch.no_grad()
    def embed(self) -> None:
        """The first stream: the embeddings of all rows."""
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
    trainer = run.trainer(index)
    base_in = run.store.open(stream("base", index))
    out = run.store.create()
    trainer.stream(base_in, out)
    run.store.commit(stream("base", index + 1), out)
    del out
    target, student_in = run.store.open(stream("base", index + 1)), run.student_input(index)
    if not trainer.touched and not run.store.has(stream("quantized", index)):
        return None
    seconds, loss_ptq, slices = 0.0, 0.0, 1
    if trainer.touched:
        trainer.snap()
        loss_ptq = trainer.stream(student_in, None, target)
        del trainer  # its weights are rounded; and two layers must not be on the device
        trainer = run.trainer(index)
        slices = trainer.slices(torch.cuda.mem_get_info(run.device)[1] if on_gpu else 0)
        before = time.perf_counter()
        for part in range(slices):
            inputs = base_in if run.cfg.inputs == "bf16" else student_in
            trainer.train(inputs, target, slices, part, run.layer_seed(index, part))
        seconds = time.perf_counter() - before  # the trainer's NaN check has synchronised
    out = run.store.create()
    loss = trainer.stream(student_in, out, target)
    run.store.commit(stream("quantized", index + 1), out)
    if not trainer.touched:
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


def save_layer(run: Run, index: int, tensors: dict[str, Tensor]) -> None:
    path = layer_file(run.folder, index)
    scratch = path.with_suffix(".tmp")
    try:
        save_file(tensors, scratch)
    except (OSError, SafetensorError) as error:
        scratch.unlink(missing_ok=True)
        raise CheckpointError(
            f"{path}: cannot be written ({error}); free space and resume, finished layers are safe"
        ) from error
    scratch.replace(path)


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
        raise ConfigError(
            f"{path}: this run began with other layerwise.* values or another train.seed; "
            "resume with those or start anew"
        )
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
        trainer = run.trainer(index)
        out = run.store.create()
        trainer.stream(run.store.open(stream("base", index)), out)
        run.store.commit(stream("base", index + 1), out)
        if index in trained or run.store.has(stream("quantized", index)):
            if index in trained:
                for name, tensor in load_file(layer_file(run.folder, index)).items():
                    trainer.params[name].data.copy_(tensor)
            out = run.store.create()
            trainer.stream(run.student_input(index), out)
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
        log: called with one flat record for each trained layer; a resumed run begins with those already finished.
    Returns:
        reports, and the folder with the trained tensors; `source.store` has received each of them.
    """
    run = Run(source, targets, batches, cfg, folder, seed)
    first, reports = restore(run)
    for report in reports if log is not None else ():
        log(asdict(report))
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
