"""What every process of test_families runs: three QAT steps of transformers' own classes, in one mode after another."""

import sys
from copy import deepcopy
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from core.errors import Fp4FlashError
from core.leave import leave
from core.models.packing import separate_documents
from core.train.batch import Batch
from core.train.config import OptimConfig, ParallelConfig, ParallelMode
from core.train.engine import Engine
from core.train.engines import build_engine, start_processes
from qat.config import LossConfig, Method, QuantConfig
from qat.fake_quant import use_fake_quant
from qat.losses import make_loss
from qat.select import select, set_trainable
from qat.snap import Quantiser
from tests.unit.test_families import FAMILIES

CPU = torch.device("cpu")
ROWS, TOKENS, VOCABULARY, STEPS = 4, 32, 64, 3
TARGETS = ROWS * (TOKENS - 1)


def batch_of(step: int, engine: Engine) -> Batch:
    ids = torch.randint(0, VOCABULARY, (ROWS, TOKENS), generator=torch.Generator().manual_seed(step))
    labels = ids.roll(-1, 1)
    labels[:, -1] = -100
    own = ROWS // engine.world
    positions = torch.arange(TOKENS).expand(ROWS, TOKENS)
    return Batch(ids, labels, positions).rows(engine.rank * own, (engine.rank + 1) * own)


def losses(family: str, mode: str, method: str) -> list[float] | str:
    """Mean loss of each step, or the refusal; the grid is checked inside every forward."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(deepcopy(FAMILIES[family]), dtype=torch.bfloat16)
    model.set_experts_implementation("grouped_mm")
    model.config.use_cache = False
    separate_documents(model)
    quant = QuantConfig(check_grid_every=1)
    selection = select(model, quant)
    set_trainable(model, ["quantized", "*norm.weight"], selection)
    engine = build_engine(
        model.train(), make_loss(LossConfig(kl=0.0, ce=1.0), None), OptimConfig(lr=1e-3),
        ParallelConfig(ParallelMode[mode]), micro_batches=1, device=CPU,
    )  # fmt: skip
    hook = Quantiser(engine, selection, quant, Method[method])
    if method == "fake_quant":
        use_fake_quant(engine.model, selection, quant.rule, lambda: set(hook.active(hook.step)))
    found = []
    try:
        hook.after_step(0)
        for step in range(STEPS):
            stats = engine.forward_backward(batch_of(step, engine), 1 / TARGETS, last=True)
            found.append(float(engine.sum_over_ranks(stats["loss"].double().reshape(1))) / TARGETS)
            engine.step(1.0)
            hook.after_step(step + 1)
            hook.metrics(step + 1)
    except Fp4FlashError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        engine.close()
    return found


def main(spec: Path, out: Path) -> None:
    torch.set_num_threads(1)
    rank, _ = start_processes(ParallelConfig(ParallelMode.ddp), CPU)
    results = {case: losses(*case) for case in torch.load(spec)}
    if rank == 0:
        torch.save(results, out)
    torch.distributed.barrier()
    leave(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
