"""Where the soft targets come from: the model itself before quantisation, in one of four ways.

base     the BF16 weights the run started from. Every tensor that is not trained is shared with the student, so the
         teacher costs memory only for the trained ones.
masters  the BF16 cast of the current masters: no second copy; the working copies are rewritten for the teacher's
         forward and snapped again (two passes over the trained weights a step).
path     another checkpoint.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from core.errors import ConfigError
from core.models.load import load_model
from core.train.batch import Batch
from core.train.engine import Engine
from qat.config import LossConfig
from qat.config import Teacher as Kind


class Teacher(Protocol):
    def targets(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(last hidden states [N, G], output matrix [V, G]) of the teacher, without gradients."""
        ...


class ModelTeacher:
    """A frozen model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def targets(self, batch: Batch) -> tuple[Tensor, Tensor]:
        out = self.model.model(input_ids=batch.input_ids_BT, position_ids=batch.position_ids_BT, use_cache=False)
        return out.last_hidden_state.flatten(0, 1), self.model.get_output_embeddings().weight


class MastersTeacher:
    """The student's own masters in BF16, swapped in for the forward."""

    def __init__(self, engine_slot: list[Engine]) -> None:
        self.engine_slot = engine_slot

    @torch.no_grad()
    def targets(self, batch: Batch) -> tuple[Tensor, Tensor]:
        engine = self.engine_slot[0]
        names = [n for n, p in engine.model.named_parameters() if p.requires_grad]
        kept = {s.name: s.flat.clone() for s in engine.working_shards(names)}
        masters = {s.name: s.flat for s in engine.master_shards(names)}
        for shard in engine.working_shards(names):
            shard.flat.copy_(masters[shard.name])
        training = engine.model.training
        engine.model.eval()
        out = engine.model.model(input_ids=batch.input_ids_BT, position_ids=batch.position_ids_BT, use_cache=False)
        engine.model.train(training)
        for shard in engine.working_shards(names):
            shard.flat.copy_(kept[shard.name])
        return out.last_hidden_state.flatten(0, 1), engine.model.get_output_embeddings().weight.detach()


def frozen_copy(model: nn.Module) -> nn.Module:
    """A deep copy that shares the storage of every parameter without requires_grad, and clones the trained ones."""
    shared: dict[int, object] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            shared[id(parameter)] = parameter
    return copy.deepcopy(model, shared)


def make_teacher(config: LossConfig, model: nn.Module, engine_slot: list[Engine]) -> Teacher | None:
    """The teacher of `loss.teacher`, built before the student is wrapped or snapped; None if the loss needs none.

    Raises:
        ConfigError: `loss.teacher=path` without `loss.teacher_path`.
    """
    if config.kl <= 0:
        return None
    makers: dict[Kind, Callable[[], Teacher]] = {
        Kind.base: lambda: ModelTeacher(frozen_copy(model)),
        Kind.masters: lambda: MastersTeacher(engine_slot),
        Kind.path: lambda: path_teacher(config, model),
    }
    if config.teacher not in makers:
        raise ConfigError(f"loss.teacher={config.teacher.value} is not available")
    return makers[config.teacher]()


def path_teacher(config: LossConfig, model: nn.Module) -> Teacher:
    if not config.teacher_path:
        raise ConfigError("loss.teacher=path needs loss.teacher_path=DIR, a checkpoint with the same vocabulary")
    loaded = load_model(Path(config.teacher_path), device=next(model.parameters()).device)
    return ModelTeacher(loaded.model)
