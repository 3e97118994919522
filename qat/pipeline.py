"""A QAT run from configuration to report: the stages of `qat.train`, in order."""

import json
import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core.errors import ConfigError, ResourceError
from core.models.load import LoadedModel, load_model, load_tokenizer, meta_model, save_model
from core.mxfp4 import snap
from core.run import Run, open_run, start_run, write_json
from core.train.config import DataSource
from core.train.data import eval_batches, train_stream
from core.train.data.documents import data_root
from core.train.data.stream import TrainStream
from core.train.device import device
from core.train.engine import Engine
from core.train.engines import build_engine, start_processes
from core.train.loop import Loop, NoHook, finished_checkpoints, rows_per_rank
from core.train.state import StateReader
from core.train.tracker import make_tracker
from qat.base import model_folder
from qat.config import NANO, LossConfig, Method, QATConfig, QuantFormat, Teacher
from qat.evaluate import Arm, arm_sums, held_out_loss
from qat.fake_quant import use_fake_quant
from qat.layer_checkpoint import open_layers
from qat.layer_run import layerwise_run
from qat.losses import make_loss
from qat.plan import make_plan
from qat.report import write_report
from qat.select import Selection, select, set_trainable
from qat.snap import Quantiser, ptq_
from qat.tasks import score_tasks
from qat.teacher import make_teacher


def dry_run(config: QATConfig) -> str:
    """The plan as text: coverage, memory per GPU, time; no weights are read and nothing is written."""
    return make_plan(config).render()


def train(config: QATConfig, resolved: str) -> Run:
    """Train, save the model, evaluate BF16 / PTQ / QAT and write the report; returns the run."""
    target = device(config.train)
    rank, world = start_processes(config.parallel, target)
    say = print if rank == 0 else lambda *_: None
    announce(config, say)
    folder = model_folder(config) if rank == 0 else None
    folder = share(folder, world)
    seed_everything(config, target)
    model = config.model
    layers = None
    if config.qat is Method.layerwise:
        layers = open_layers(folder, target, model.attention, model.experts)
        loaded = layers.loaded
    else:
        check_fits(config, folder, target)
        loaded = load_model(folder, device=target, attention=model.attention, experts=model.experts)
    selection = covered(loaded, config, say)
    set_trainable(loaded.model, config.trainable.patterns, selection)
    check_schedule(config, selection)
    check_teacher(config.loss)
    check_tasks(config, loaded)
    rows = config.layerwise.batch_size if layers else config.train.batch_size
    stream = train_stream(
        config.data, loaded.tokenizer, batch_size=rows, seed=config.train.seed, rank=rank, world=world
    )
    # everything that can be refused has been: only now does a run folder exist, and `latest` point at it
    run = share(
        start_run(config.run, "qat", config.model.name, resolved, config.train.seed) if rank == 0 else None, world
    )
    run = replace(run, rank=rank)
    run.update(base=str(folder.resolve()))
    if layers:
        tracker = make_tracker(config.tracker, run.folder)
        layerwise_run(config, run, layers, selection, stream, tracker)
        tracker.close()
    else:
        train_steps(config, run, loaded, selection, stream)
    return finish(config, run, folder, selection, target)


def check_fits(config: QATConfig, folder: Path, target: torch.device) -> None:
    """Every process loads the whole model before anything divides it: refuse one that its GPU cannot hold.

    Raises:
        ResourceError: the weights are larger than the GPU; names the way that works.
    """
    if target.type != "cuda":
        return
    weights = sum(2 * p.numel() for p in meta_model(folder)[0].parameters())
    room = torch.cuda.get_device_properties(target).total_memory
    if weights > 0.95 * room:
        raise ResourceError(
            f"model={config.model.name} has {weights / 1e9:.1f} GB of BF16 weights, each process loads them whole "
            f"(parallel={config.parallel.mode.value} divides them later) and this GPU has {room / 1e9:.1f} GB; "
            "use +experiment=layerwise"
        )


def check_schedule(config: QATConfig, selection: Selection) -> None:
    """ConfigError for a scheduled layer that has no quantised tensor."""
    layers = {t.layer for t in selection.tensors}
    wrong = sorted(set(config.quant.layer_start_steps) - layers)
    if wrong:
        raise ConfigError(f"quant.layer_start_steps names layer {wrong[0]}, which has no quantised tensor")


def check_teacher(loss: LossConfig) -> None:
    """ConfigError for a teacher that needs a folder and was given none."""
    needs = {Teacher.path: "teacher_path", Teacher.topk: "topk_path"}.get(loss.teacher)
    if loss.kl and needs and not getattr(loss, needs):
        raise ConfigError(f"loss.teacher={loss.teacher.value} needs loss.{needs}=DIR")


def check_tasks(config: QATConfig, loaded: LoadedModel) -> None:
    """Refuse tasks that could not be scored after the training, before it.

    Raises:
        ConfigError: no data root, or no chat template.
    """
    if not config.eval.tasks:
        return
    data_root(config.data)
    if not getattr(loaded.tokenizer, "chat_template", None):
        raise ConfigError(
            f"eval.tasks={config.eval.tasks} needs a tokenizer with a chat template; {loaded.folder} has none"
        )


def covered(loaded: LoadedModel, config: QATConfig, say: Any) -> Selection:
    """The selection, its coverage table printed."""
    selection = select(loaded.model, config.quant)
    say(f"\nCoverage (quant.rule={config.quant.rule.value})\n{selection.table()}\n")
    return selection


def train_steps(config: QATConfig, run: Run, loaded: LoadedModel, selection: Selection, stream: TrainStream) -> None:
    """The step loop with its teacher and hook; leaves the trained model in run.model."""
    model = loaded.model
    engine_slot: list[Engine] = []
    teacher = make_teacher(config.loss, model, engine_slot)
    train_config = config.train
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    micro = train_config.batch_size // world // rows_per_rank(train_config, world)
    prepare(model, config)
    engine = build_engine(
        model,
        make_loss(config.loss, teacher),
        config.optim,
        config.parallel,
        micro_batches=micro,
        device=device(train_config),
    )
    engine_slot.append(engine)
    hook = make_hook(engine, selection, config)
    evaluator = Evaluator(config, loaded, engine)
    tracker = make_tracker(config.tracker, run.folder, engine.rank)
    title = "QAT" if selection.tensors else "train"
    Loop(engine, stream, train_config, config.optim, run, hook, evaluator, tracker, title=title).run()
    tracker.close()
    save_model(on_grid_tensors(engine, selection, config), loaded, run.model, rank=engine.rank)
    if config.optim.ema:
        averages = StateReader(finished_checkpoints(run.checkpoints)[-1])
        save_model(
            averaged_tensors(engine, averages, selection, config), loaded, run.folder / "model-ema", rank=engine.rank
        )
    if isinstance(hook, Quantiser):
        summary = hook.summary()
        if engine.rank == 0:
            write_json(run.folder / "quant.json", summary)
    engine.close()


def on_grid_tensors(engine: Engine, selection: Selection, config: QATConfig) -> Iterator[tuple[str, Tensor]]:
    """What ships: the working copies. Fake quantisation keeps them off the grid, so there they are snapped here."""
    dims = {t.name: t.dim for t in selection.tensors} if config.qat is Method.fake_quant else {}
    for name, tensor in engine.full_tensors():
        yield name, snap(tensor, config.quant.rule, dims[name], name) if name in dims and engine.rank == 0 else tensor


def averaged_tensors(
    engine: Engine, state: StateReader, selection: Selection, config: QATConfig
) -> Iterator[tuple[str, Tensor]]:
    """The model with the moving average of its masters in place of what was trained; quantised tensors snapped."""
    dims = {t.name: t.dim for t in selection.tensors}
    for name, tensor in engine.full_tensors():
        if name in state.shapes and engine.rank == 0:
            average = state.read(name, "ema", 0, tensor.numel()).view(tensor.shape).to(tensor.dtype)
            tensor = snap(average, config.quant.rule, dims[name], name) if name in dims else average
        yield name, tensor


def prepare(model: nn.Module, config: QATConfig) -> None:
    """Training mode, activation checkpointing and compilation of the decoder layers."""
    model.train()
    if config.train.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.train.compile:
        for layer in model.model.layers:
            layer.compile()


def make_hook(engine: Engine, selection: Selection, config: QATConfig) -> Quantiser | NoHook:
    if config.quant.format is QuantFormat.none:
        return NoHook()
    quantiser = Quantiser(engine, selection, config.quant, config.qat)
    if config.qat is Method.fake_quant:
        use_fake_quant(engine.model, selection, config.quant.rule, lambda: set(quantiser.active(quantiser.step)))
    return quantiser


class Evaluator:
    """Held-out loss during training: what the curves show. The report at the end has the whole comparison."""

    def __init__(self, config: QATConfig, loaded: LoadedModel, engine: Engine) -> None:
        rows = config.train.micro_batch_size or config.train.batch_size // engine.world
        self.batches = eval_batches(config.data, loaded.tokenizer, rows)
        self.engine = engine

    def __call__(self, step: int) -> dict[str, Any]:  # noqa: ARG002
        losses = held_out_loss(self.engine.model, self.batches, self.engine.device)
        return {f"val_loss_{domain}": loss for domain, loss in losses.items()}


def finish(config: QATConfig, run: Run, base: Path, selection: Selection, target: torch.device) -> Run:
    """Evaluate the arms on rank 0 and write the report."""
    if run.rank == 0:
        write_json(run.folder / "selection.json", selection.as_json() | {"rule": config.quant.rule.value})
        if config.eval.compare:
            print(compare(config, run, base, selection, target))
        else:
            print(f"Written: {run.folder} (model/, metrics.jsonl); no comparison, eval.compare=false")
        run.update(state="finished")
    return run


def compare(config: QATConfig, run: Run, base: Path, selection: Selection, target: torch.device) -> str:
    """The run's model on held-out rows, beside BF16 and PTQ; writes the report and returns its text.

    A run without quantisation that has another model for a teacher is judged by it: teacher, start, trained.
    """

    def load(folder: Path) -> LoadedModel:
        return load_model(folder, device=target, attention=config.model.attention, experts=config.model.experts)

    tasks: list[dict[str, Any]] = []

    def measure(name: str, loaded: LoadedModel) -> None:
        arms[name] = arm_sums(loaded.model, reference.model, batches, target)
        if config.eval.tasks:
            found = score_tasks(loaded.model, loaded.tokenizer, config.eval, data_root(config.data))
            tasks.extend({"arm": name, **result.as_json()} for result in found)

    healing = not selection.tensors and config.loss.kl > 0 and config.loss.teacher is Teacher.path
    reference = load(Path(config.loss.teacher_path or base) if healing else base)
    batches = eval_batches(
        config.data, load_tokenizer(base), config.train.micro_batch_size or min(config.train.batch_size, 8)
    )
    arms: dict[str, Arm] = {}
    measure("teacher" if healing else "BF16", reference)
    if healing:
        measure("start", load(base))
    if selection.tensors:
        student = load(base)
        ptq_(student.model, selection, config.quant)
        measure("PTQ", student)
        del student
    measure("QAT" if selection.tensors else "trained", load(run.model))
    quant = run.folder / "quant.json"
    extra: dict[str, Any] = {"quant": json.loads(quant.read_text())} if quant.exists() else {}
    if tasks:
        extra["tasks"] = tasks
    return write_report(run, arms, selection, config.eval, extra)


def evaluate_run(config: QATConfig) -> None:
    """`python -m qat.evaluate run.resume=...`: the comparison of a finished run, again.

    Raises:
        ConfigError: no run is named, or it has no model yet.
    """
    if not config.run.resume:
        raise ConfigError("name the run: run.resume=latest or run.resume=NAME")
    run = open_run(Path(config.run.root), config.run.resume)
    if not (run.model / "config.json").exists():
        raise ConfigError(
            f"{run.folder} has no model yet (state: {run.info().get('state')}); finish it with qat.train run.resume="
        )
    target = device(config.train)
    base = Path(run.info()["base"])
    selection = select(meta_model(base)[0], config.quant)
    print(compare(config, run, base, selection, target))


TEXTS = {
    DataSource.embedded: "text of this Python's library",
    DataSource.jsonl: "your JSON lines",
    DataSource.hub: "a hub dataset",
}


def announce(config: QATConfig, say: Any) -> None:
    if config.model.name == NANO and config.model.path is None:
        say(
            "Model: the embedded demo, a nano MiMo-V2 (hybrid attention, sinks, sigmoid router), "
            f"on {TEXTS[config.data.source]}."
        )
        say(
            "For a real one: python -m qat.train +experiment=mimo_fp4 model=mimo_v2_flash model.path=DIR (see --help)\n"
        )
    else:
        say(f"Model: {config.model.name}" + (f" from {config.model.path}" if config.model.path else ""))


def share(value: Any, world: int) -> Any:
    """Rank 0's value on every rank."""
    if world == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def seed_everything(config: QATConfig, target: torch.device) -> None:
    random.seed(config.train.seed)
    torch.manual_seed(config.train.seed)
    if config.train.deterministic and target.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.train.deterministic)
