"""Where the soft targets come from: the model itself before quantisation, in one of four ways.

base     the BF16 weights the run started from. Every tensor that is not trained is shared with the student, so the
         teacher costs memory only for the trained ones (under ZeRO-3: a whole model, partitioned over the ranks).
masters  the BF16 cast of the current masters: no second model; the working copies are rewritten for the teacher's
         forward and put back after it. The copy that is kept meanwhile lives only while no activation of the student
         does. Costs two passes over the trained weights a micro-batch.
path     another checkpoint with the same vocabulary.
topk     log-probabilities computed before (qat/topk.py): no teacher in memory at all.

Legend: N tokens of a batch, C tokens of a chunk, G hidden size, V vocabulary, K kept classes.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from core.errors import ConfigError, UnsupportedError
from core.models.load import load_model
from core.train.batch import Batch
from core.train.engine import Engine
from qat.config import LossConfig
from qat.config import Teacher as Kind
from qat.fake_quant import NAME as FAKE_QUANT


@dataclass(frozen=True)
class Dense:
    """Targets over the whole vocabulary, as what makes them: hidden [N, G] and the output matrix [V, G]."""

    hidden: Tensor
    head: Tensor

    def logits(self, part: slice) -> Tensor:
        """[C, V] of one chunk."""
        return self.hidden[part] @ self.head.T


@dataclass(frozen=True)
class TopK:
    """The K likeliest classes: log-probabilities FP32 [N, K] and ids int64 [N, K]; the rest counts as one class."""

    log_p: Tensor
    ids: Tensor


Targets = Dense | TopK


class Teacher(Protocol):
    def targets(self, batch: Batch) -> Targets:
        """The teacher's view of every position of the batch, without gradients."""
        ...


def last_hidden(model: nn.Module, batch: Batch) -> Tensor:
    """[N, G] last hidden states (after the final norm) of a causal LM, documents kept apart by their positions."""
    out = model.model(input_ids=batch.input_ids_BT, position_ids=batch.position_ids_BT, use_cache=False)
    return out.last_hidden_state.flatten(0, 1)


def whole_head(model: nn.Module) -> Tensor:
    """The output matrix [V, G]; under ZeRO-3 gathered, which needs it to be frozen."""
    weight = model.get_output_embeddings().weight
    if not hasattr(weight, "ds_id"):
        return weight
    if weight.requires_grad:
        raise UnsupportedError(
            "training the output head under parallel=zero3 is not supported (the loss reads it outside its module); "
            "freeze it with trainable.patterns or use parallel=zero2"
        )
    return whole(weight)


def whole(parameter: nn.Parameter) -> Tensor:
    """A ZeRO-3 parameter's values: a copy, or itself where DeepSpeed keeps it gathered for a module that is running."""
    import deepspeed

    if parameter.ds_status.name == "AVAILABLE":
        return parameter.detach()
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


class ModelTeacher:
    """A frozen model; under ZeRO-3, from its first use on, with partitions of its own."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)
        self.partitioned = False

    @torch.no_grad()
    def targets(self, batch: Batch) -> Dense:
        if not self.partitioned and any(hasattr(p, "ds_id") for p in self.model.parameters()):
            partition(self.model)
            self.partitioned = True
        return Dense(last_hidden(self.model, batch), whole_head(self.model).detach())


def partition(model: nn.Module) -> None:
    """Give a frozen model its own ZeRO-3 partitions and gather each module's parameters around its forward.

    Nothing is shared with the student any more: DeepSpeed's prefetching for the student would move the parameters
    under the teacher's feet. A rank holds 1/world of the teacher; parameters are taken over one at a time.
    """
    import deepspeed

    taken: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if hasattr(parameter, "ds_id") and id(parameter) not in taken:
                taken[id(parameter)] = nn.Parameter(whole(parameter).clone(), requires_grad=False)
            setattr(module, name, taken.get(id(parameter), parameter))
        deepspeed.zero.Init(module=module)  # leaves alone what is partitioned already
    gathered: dict[nn.Module, Any] = {}

    def before(module: nn.Module, _args: Any) -> None:
        gathered[module] = deepspeed.zero.GatheredParameters(list(module.parameters(recurse=False)))
        gathered[module].__enter__()

    def after(module: nn.Module, _args: Any, _output: Any) -> None:
        gathered.pop(module).__exit__(None, None, None)

    for module in model.modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_pre_hook(before)
            module.register_forward_hook(after)


class MastersTeacher:
    """The student's own masters in BF16, swapped in for the forward."""

    def __init__(self, engine_slot: list[Engine]) -> None:
        self.engine_slot = engine_slot

    @torch.no_grad()
    def targets(self, batch: Batch) -> Dense:
        engine = self.engine_slot[0]
        model = engine.model
        if getattr(model.config, "_experts_implementation", None) == FAKE_QUANT:
            raise UnsupportedError(
                "loss.teacher=masters with qat=fake_quant would quantise the teacher too; "
                "use qat=snap or loss.teacher=base"
            )
        if any(hasattr(p, "ds_id") for p in model.parameters()):
            raise UnsupportedError(
                "loss.teacher=masters with parallel=zero3 is not supported: DeepSpeed prefetches the student's weights "
                "while the teacher's stand in their place; use loss.teacher=base, or parallel=zero2"
            )
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        masters = {(s.name, s.start): s.flat for s in engine.master_shards(names)}
        kept = []
        for shard in engine.working_shards(names):
            kept.append((shard.flat, shard.flat.clone()))
            shard.flat.copy_(masters[shard.name, shard.start])
        training = model.training
        model.eval()
        try:
            return Dense(last_hidden(model, batch), whole_head(model).detach().clone())
        finally:
            model.train(training)
            for flat, old in kept:
                flat.copy_(old)


def frozen_copy(model: nn.Module) -> nn.Module:
    """A deep copy that shares every parameter without requires_grad, and clones the trained ones."""
    shared: dict[int, Any] = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, shared)


def make_teacher(config: LossConfig, model: nn.Module, engine_slot: list[Engine]) -> Teacher | None:
    """The teacher of `loss.teacher`, built before the student is wrapped or snapped; None if the loss needs none.

    Raises:
        ConfigError: `loss.teacher=path` or `topk` without its folder. DataError: the top-k folder is unusable.
    """
    if config.kl <= 0:
        return None
    makers: dict[Kind, Callable[[], Teacher]] = {
        Kind.base: lambda: ModelTeacher(frozen_copy(model)),
        Kind.masters: lambda: MastersTeacher(engine_slot),
        Kind.path: lambda: path_teacher(config, model),
        Kind.topk: lambda: topk_teacher(config),
    }
    return makers[config.teacher]()


def path_teacher(config: LossConfig, model: nn.Module) -> Teacher:
    if not config.teacher_path:
        raise ConfigError("loss.teacher=path needs loss.teacher_path=DIR, a checkpoint with the same vocabulary")
    loaded = load_model(Path(config.teacher_path), device=next(model.parameters()).device)
    own, other = model.config.vocab_size, loaded.config.vocab_size
    if own != other:
        raise ConfigError(
            f"loss.teacher_path={config.teacher_path} has {other} tokens, the model {own}; KL needs one vocabulary"
        )
    return ModelTeacher(loaded.model)


def topk_teacher(config: LossConfig) -> Teacher:
    from qat.topk import TopKTeacher

    if not config.topk_path:
        raise ConfigError(
            "loss.teacher=topk needs loss.topk_path=DIR, written by python -m qat.topk with the same data"
        )
    return TopKTeacher(Path(config.topk_path))
