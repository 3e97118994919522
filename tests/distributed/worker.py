"""What every process of a distributed test runs: phases of training on a tiny MiMo-V2, each with an engine of its own.

`run` works in one process too (mode=none), which is the reference of every comparison.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core.errors import Fp4FlashError
from core.leave import leave
from core.models.mimo_v2 import MiMoV2ForCausalLM
from core.models.packing import separate_documents
from core.train.batch import Batch
from core.train.config import Offload, OptimConfig, ParallelConfig, ParallelMode
from core.train.engine import Engine
from core.train.engines import build_engine, start_processes
from qat.base import nano_config
from qat.config import LossConfig, Method, NanoConfig, QuantConfig, QuantFormat, Teacher
from qat.losses import make_loss
from qat.select import select, set_trainable
from qat.snap import Quantiser
from qat.teacher import make_teacher

ROWS, TOKENS, VOCABULARY = 6, 32, 128
NANO = NanoConfig(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=2, head_dim=32, v_head_dim=32, intermediate_size=96,
    moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2, vocab_size=VOCABULARY,
)  # fmt: skip
TRAINED = ["quantized", "*.mlp.gate.weight", "*norm.weight"]  # matrices with and without the grid, and vectors
CPU = torch.device("cpu")


@dataclass
class Phase:
    """One engine's life. `load`/`save`: folders; `save_at`: the step, counted from the start of training.

    Without steps, what was loaded is saved again.
    """

    mode: str = "none"
    first: int = 0
    steps: int = 4
    micro: int = 1
    load: str | None = None
    save: str | None = None
    save_at: int = 0
    quant: bool = True
    trained: list[str] = field(default_factory=lambda: list(TRAINED))
    teacher: str | None = None  # KL to it instead of cross-entropy
    offload: bool = False
    ema: float = 0.0
    one_token: bool = False  # rank r sees one token only, so that the ranks' routers leave different experts idle
    overrides: dict[str, Any] = field(default_factory=dict)  # of DeepSpeed's zero_optimization


@dataclass
class Result:
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)  # whole working copies at the end
    selected: list[str] = field(default_factory=list)
    tokens_per_expert: dict[str, list[int]] = field(default_factory=dict)
    error: str = ""


def tiny_model() -> nn.Module:
    torch.manual_seed(0)
    model = MiMoV2ForCausalLM(nano_config(NANO, 0, 1)).to(torch.bfloat16)
    model.set_experts_implementation("fp4flash")
    model.config.use_cache = False
    separate_documents(model)
    return model.train()


def batch_of(step: int, rank: int, world: int, one_token: bool = False) -> Batch:
    ids = torch.randint(0, VOCABULARY, (ROWS, TOKENS), generator=torch.Generator().manual_seed(step))
    if one_token:
        ids[:] = 7 + 50 * rank
    labels = ids.roll(-1, 1)
    labels[:, -1] = -100
    positions = torch.arange(TOKENS).expand(ROWS, TOKENS).contiguous()
    return Batch(ids, labels, positions).rows(rank * ROWS // world, (rank + 1) * ROWS // world)


def engine_of(phase: Phase, model: nn.Module, slot: list[Engine]) -> Engine:
    loss = LossConfig(kl=1.0, teacher=Teacher[phase.teacher]) if phase.teacher else LossConfig(kl=0.0, ce=1.0)
    optim = OptimConfig(lr=1e-3, weight_decay=0.1, clip_grad_norm=0.05, ema=phase.ema)
    where = Offload.cpu if phase.offload else Offload.none
    parallel = ParallelConfig(ParallelMode[phase.mode], offload_optimizer=where)
    if phase.mode == "zero3":
        parallel.offload_params = where
    loss_fn = make_loss(loss, make_teacher(loss, model, slot))
    if phase.overrides:
        from core.train.zero import ZeroEngine

        return ZeroEngine(
            model, loss_fn, optim, parallel, micro_batches=phase.micro, device=CPU, overrides=phase.overrides
        )
    return build_engine(model, loss_fn, optim, parallel, micro_batches=phase.micro, device=CPU)


def run(phase: Phase) -> Result:
    model, quant, slot = tiny_model(), QuantConfig(check_grid_every=1), []
    if not phase.quant:
        quant.format = QuantFormat.none
    selection = select(model, quant)
    set_trainable(model, phase.trained, selection)
    engine = engine_of(phase, model, slot)
    slot.append(engine)
    result = Result(selected=selection.names)
    try:
        hook = Quantiser(engine, selection, quant, Method.snap)
        if phase.load:
            engine.load(Path(phase.load))
        if phase.save and not phase.steps:
            save(engine, phase.save)
        hook.after_step(phase.first)
        for step in range(phase.first, phase.first + phase.steps):
            one_step(engine, hook, phase, step, result)
        result.tensors = dict(engine.full_tensors())
        result.tokens_per_expert = hook.summary()["tokens_per_expert"]
    except Fp4FlashError as error:
        result.error = f"{type(error).__name__}: {error}"
    engine.close()
    return result


def one_step(engine: Engine, hook: Quantiser, phase: Phase, step: int, result: Result) -> None:
    batch = batch_of(step, engine.rank, engine.world, phase.one_token)
    targets = ROWS * (TOKENS - 1)
    rows = batch.input_ids_BT.shape[0] // phase.micro
    total = torch.zeros(1, dtype=torch.float64)
    for index in range(phase.micro):
        part = batch.rows(index * rows, (index + 1) * rows)
        total += engine.forward_backward(part, 1.0 / targets, last=index == phase.micro - 1)["loss"].double()
    result.losses.append(float(engine.sum_over_ranks(total)) / targets)
    result.norms.append(float(engine.step(1.0)))
    hook.after_step(step + 1)
    hook.metrics(step + 1)
    if phase.save and step + 1 == phase.save_at:
        save(engine, phase.save)


def save(engine: Engine, folder: str) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    engine.save(Path(folder))


def main(spec: Path, out: Path) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    phases: list[Phase] = torch.load(spec, weights_only=False)
    rank, _ = start_processes(ParallelConfig(ParallelMode.ddp), CPU)
    results = [run(phase) for phase in phases]
    if rank == 0:
        torch.save(results, out)
    torch.distributed.barrier()
    leave(0)


if __name__ == "__main__":
    from tests.distributed import worker  # so that pickled classes carry the module's own name

    worker.main(Path(sys.argv[1]), Path(sys.argv[2]))
