"""Snap after step: the BF16 working copies of the selected weights are put on the MXFP4 grid in place.

After an optimiser step every working copy is bf16(master). Snapping it costs one pass over the selected weights; the
forward, the backward, accumulation and checkpointing then run unchanged on the snapped values, and the gradient goes
straight through to the master (straight-through estimator). What was trained is what ships.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from core.errors import FormatError
from core.mxfp4 import BLOCK, on_grid
from core.train.engine import Engine, Shard
from core.train.local import gather_objects
from kernels.mxfp4_snap import new_flag, raise_if_flagged, snap_
from qat.config import Method, QuantConfig
from qat.metrics import CodeTracker, ExpertCounter, clip_rate
from qat.select import Selected, Selection, refuse_transposed_shard


class Quantiser:
    """The hook of a QAT run (core.train.loop.Hook): snapping by schedule, grid checks, code statistics."""

    def __init__(self, engine: Engine, selection: Selection, config: QuantConfig, method: Method) -> None:
        self.engine = engine
        self.config = config
        self.method = method
        self.tensors = {t.name: t for t in selection.tensors}
        self.flag = new_flag(engine.device)
        self.tracker = CodeTracker(config.rule, snapped=method is Method.snap)
        self.counter = ExpertCounter(engine.model)
        self.checker = GridChecker(engine.model, self, config.check_grid_every)
        self.step = 0

    def active(self, step: int) -> list[str]:
        """Names quantised in the forward that follows `step` finished steps."""
        begins = self.config.layer_start_steps
        return [n for n, t in self.tensors.items() if step >= begins.get(t.layer, self.config.start_step)]

    def after_step(self, step: int) -> None:
        """Put every active weight on the grid.

        Raises:
            FormatError: a weight became NaN or Inf.
        """
        self.step = step
        names = self.active(step)
        for shard in self.engine.working_shards(names) if names else ():
            if self.method is Method.snap:
                self.snap_shard(shard)
            values = sampled(shard, self.tensors[shard.name])
            if values is not None:
                self.tracker.update(shard.name, values, step)

    def snap_shard(self, shard: Shard) -> None:
        tensor = self.tensors[shard.name]
        if tensor.dim == -1:
            if shard.start % BLOCK or shard.flat.numel() % BLOCK:
                raise FormatError(
                    f"the shard of {shard.name} at {shard.start} (+{shard.flat.numel()}) cuts a block of {BLOCK}"
                )
            snap_(shard.flat, self.config.rule, flag=self.flag)
        elif shard.whole:
            snap_transposed_(
                shard.flat.view(shard.shape), tensor.dim, lambda w: snap_(w, self.config.rule, flag=self.flag)
            )
        else:
            refuse_transposed_shard(tensor)

    def metrics(self, step: int) -> dict[str, Any]:
        """Flip and oscillation rates since the last call; checks the NaN flag."""
        raise_if_flagged(self.flag, f"a selected weight at step {step}")
        return self.tracker.metrics()

    def summary(self) -> dict[str, Any]:
        """What the report says of codes and experts: clip rate of the masters, tokens per expert, starved experts.

        Collective. Under ZeRO-3 the clip rate is that of this rank's part.
        """
        counter = copy.copy(self.counter)
        counter.counts = self.counts_of_all_ranks()
        names = [n for n, p in self.engine.model.named_parameters() if p.requires_grad and n in self.tensors]
        masters = (sampled(s, self.tensors[s.name]) for s in self.engine.master_shards(names))
        rates = [clip_rate(m, self.config.rule) for m in masters if m is not None]
        return {
            "clip_rate": sum(rates) / len(rates) if rates else None,
            "tokens_per_expert": counter.table(),
            "starved": counter.starved(),
        }

    def counts_of_all_ranks(self) -> dict[str, Tensor]:
        """Tokens per expert over all ranks. Collective."""
        total: dict[str, Tensor] = {}
        for counts in gather_objects(self.counter.state_dict(), self.engine.world):
            for name, count in counts.items():
                total[name] = total[name] + count if name in total else count
        return total

    def state_dict(self) -> dict[str, Any]:
        """Collective; rank 0 writes it."""
        return {"tracker": self.tracker.state_dict(), "counter": self.counts_of_all_ranks()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tracker.load_state_dict(state["tracker"])
        self.counter.load_state_dict(state["counter"] if self.engine.rank == 0 else {})


def sampled(shard: Shard, tensor: Selected) -> Tensor | None:
    """What code statistics look at, flat, blocks one after another: the shard, or of [in, out] experts the first one.

    None for a part of a tensor that does not begin it, or that cuts its blocks.
    """
    if shard.start:
        return None
    if tensor.dim == -1:
        return shard.flat
    return shard.flat.view(shard.shape)[0].transpose(tensor.dim, -1).reshape(-1) if shard.whole else None


def snap_transposed_(weight: Tensor, dim: int, snap_last_: Callable[[Tensor], Tensor]) -> None:
    """Snap along `dim` in place, one leading slice (expert) at a time so that the copy stays small."""
    for one in weight:
        moved = one.transpose(dim, -1).contiguous()
        one.copy_(snap_last_(moved).transpose(dim, -1))


class GridChecker:
    """Asserts inside the forward, where ZeRO has gathered the weights, that the selected ones are on the grid.

    Seen without it: DeepSpeed re-gathered small persistent parameters inside step(), before the snap, and the next
    forward ran on unsnapped values. Checks the first forwards and then one in `every` training forwards.
    """

    def __init__(self, model: nn.Module, quantiser: Quantiser, every: int) -> None:
        self.quantiser = quantiser
        self.every = every
        self.enabled = True
        self.calls: dict[str, int] = {}
        if every == 0 or quantiser.method is not Method.snap:
            return
        by_module: dict[str, list[Selected]] = {}
        for tensor in quantiser.tensors.values():
            by_module.setdefault(tensor.name.rsplit(".", 1)[0], []).append(tensor)
        modules = dict(model.named_modules())
        for name, tensors in by_module.items():
            modules[name].register_forward_pre_hook(self.hook(name, tensors))

    def hook(self, name: str, tensors: list[Selected]) -> Callable[[nn.Module, Any], None]:
        @torch.compiler.disable
        def check(module: nn.Module, _args: Any) -> None:
            if not (self.enabled and module.training and torch.is_grad_enabled()):
                return
            call = self.calls[name] = self.calls.get(name, -1) + 1
            if call > 1 and call % self.every:
                return
            active = set(self.quantiser.active(self.quantiser.step))
            for tensor in tensors:
                if tensor.name in active:
                    require_grid(getattr(module, tensor.name.rsplit(".", 1)[1]), tensor)

        return check


def require_grid(weight: Tensor, tensor: Selected) -> None:
    """FormatError unless the whole weight is on the grid; read one leading slice at a time."""
    for index, one in enumerate(weight.detach() if weight.dim() == 3 else (weight.detach(),)):
        if not on_grid(one, tensor.dim):
            raise FormatError(
                f"{tensor.name}[{index}] is not on the MXFP4 grid inside the forward: something rewrote the "
                "working copy after the snap; under DeepSpeed keep stage3_param_persistence_threshold at 0"
            )


def ptq_(model: nn.Module, selection: Selection, config: QuantConfig) -> None:
    """Snap the selected weights of a model in place: post-training quantisation, no training."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for tensor in selection.tensors:
            weight = parameters[tensor.name].data
            if tensor.dim == -1:
                snap_(weight, config.rule)
            else:
                snap_transposed_(weight, tensor.dim, lambda w: snap_(w, config.rule))
