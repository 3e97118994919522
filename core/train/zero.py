"""The engine of DeepSpeed ZeRO-2 and ZeRO-3: masters, optimiser state and (ZeRO-3) weights divided over the ranks.

How DeepSpeed holds a parameter, which is what the shards below are:

    ZeRO-2   working copy whole on every rank; FP32 masters of a weight-decay group are one flat vector cut into
             `world` parts, so a rank holds any slice of a parameter (or none of it)
    ZeRO-3   every parameter is flattened, padded to a multiple of `world` and cut evenly, working copy and master
             alike: rank r holds [r * part, (r + 1) * part)

DeepSpeed's own default keeps parameters below `stage3_param_persistence_threshold` (100,000 values) whole on every rank
and gathers those again inside step(), before the snap: the next forward would run on unsnapped weights. The threshold
is 0 here, so that a forward always gathers what the shards hold.

Experts are one fused parameter in one module, so every rank gathers the same modules in the same order whatever its
router decides; DeepSpeed's leaf modules, made for experts that are modules of their own, are not needed (and its
backward fails on a leaf that holds parameters itself, 0.19.8).

The model arrives whole on every rank and is divided here (no zero.Init): each process first needs room for all of it.
CPU offload is tested; NVMe offload is passed on to DeepSpeed and untested.
"""

import logging
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core.errors import CheckpointError, ConfigError
from core.train.batch import Batch
from core.train.config import Offload, OptimConfig, ParallelConfig, ParallelMode
from core.train.engine import LossFn, Shard
from core.train.local import StepModule, gather_objects, named_parameters
from core.train.state import StateReader, save_pieces, write_index

BUCKET = 500_000_000  # values; DeepSpeed's default
MOMENTS = ("exp_avg", "exp_avg_sq")


def import_deepspeed() -> Any:
    """DeepSpeed, quiet, and on the CPU where torch sees no GPU (it decides at import, from DS_ACCELERATOR)."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    for name in ("DeepSpeed", "deepspeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return deepspeed


def zero_config(optim: OptimConfig, parallel: ParallelConfig, micro_batches: int) -> dict[str, Any]:
    """DeepSpeed's configuration for `parallel=...`.

    Raises:
        ConfigError: NVMe offload without a path, or parameters offloaded under ZeRO-2.
    """
    stage = 3 if parallel.mode is ParallelMode.zero3 else 2
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_model_persistence_threshold": 0}
    for key, where in (("offload_optimizer", parallel.offload_optimizer), ("offload_param", parallel.offload_params)):
        if where is Offload.none:
            continue
        if key == "offload_param" and stage == 2:
            raise ConfigError("parallel.offload_params needs parallel=zero3; ZeRO-2 keeps whole weights on every rank")
        if where is Offload.nvme and not parallel.nvme_path:
            raise ConfigError(f"parallel.{key}=nvme needs parallel.nvme_path=DIR on a local disk")
        zero[key] = {"device": where.value} | ({"nvme_path": parallel.nvme_path} if where is Offload.nvme else {})
    return {
        "train_micro_batch_size_per_gpu": 1,  # bookkeeping only: the loop cuts the batches
        "gradient_accumulation_steps": micro_batches,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32" if micro_batches > 1 else "bf16"},
        "gradient_clipping": optim.clip_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def make_adamw(parameters: list[nn.Parameter], optim: OptimConfig, fused: bool) -> torch.optim.AdamW:
    """The groups of MasterOptimizer: weight decay on matrices only."""
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=fused
    )


@dataclass(frozen=True)
class Slice:
    """Where this rank's part of a parameter lies: [start, start + numel) of it is flat[at : at + numel]."""

    start: int
    numel: int
    flat: Tensor
    at: int

    def of(self, flat: Tensor) -> Tensor:
        """This parameter's part of a vector laid out like `flat`."""
        return flat.narrow(0, self.at, self.numel)


class ZeroEngine:
    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        optim: OptimConfig,
        parallel: ParallelConfig,
        *,
        micro_batches: int,
        device: torch.device,
        overrides: dict[str, Any] | None = None,
    ) -> None:
        """`overrides`: entries of DeepSpeed's `zero_optimization` that replace ours (tests of what they would do)."""
        deepspeed = import_deepspeed()
        self.deepspeed = deepspeed
        self.model = model.to(device)
        self.device = device
        self.rank, self.world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.stage3 = parallel.mode is ParallelMode.zero3
        self.lr = optim.lr
        self.ema_decay = optim.ema
        # Any: DeepSpeed adds attributes (ds_tensor, _hp_mapping) to the parameters
        self.parameters: dict[str, Any] = dict(named_parameters(self.model))
        self.trained: dict[str, Any] = {n: p for n, p in self.parameters.items() if p.requires_grad}
        self.shapes = {n: p.shape for n, p in self.parameters.items()}
        config = zero_config(optim, parallel, micro_batches)
        # DeepSpeed allocates the whole bucket at every backward: 1 GB by default, however small the model.
        config["zero_optimization"]["reduce_bucket_size"] = min(BUCKET, sum(p.numel() for p in self.trained.values()))
        config["zero_optimization"] |= overrides or {}
        fused = parallel.offload_optimizer is not Offload.nvme
        self.engine, *_ = deepspeed.initialize(
            model=StepModule(self.model, loss_fn),
            optimizer=make_adamw(list(self.trained.values()), optim, fused),
            config=config,
            dist_init_required=False,
        )
        self.optimizer = self.engine.optimizer
        self.steps = 0
        self.ema = {n: s.of(s.flat).clone() for n, s in self.slices()} if self.ema_decay else {}

    def forward_backward(self, batch: Batch, scale: float, last: bool) -> dict[str, Tensor]:
        self.engine.set_gradient_accumulation_boundary(last)
        loss, stats = self.engine(batch)
        # DeepSpeed averages over ranks (and, unless told not to, over micro-batches); the contract is a sum.
        self.engine.backward(loss * (scale * self.world), scale_wrt_gas=False)
        return stats | {"loss": loss.detach()}

    @torch.no_grad()
    def step(self, lr_factor: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * lr_factor
        self.engine.step()
        self.steps += 1
        if self.ema:
            for name, piece in self.slices():
                self.ema[name].lerp_(piece.of(piece.flat), 1 - self.ema_decay)
        return float(self.engine.get_global_grad_norm())

    def working_shards(self, names: Collection[str]) -> Iterator[Shard]:
        for name in names:
            parameter = self.parameters[name]
            if self.stage3:
                start, numel = self.range_of(name)
                yield Shard(name, self.shapes[name], start, parameter.ds_tensor.data.view(-1)[:numel])
            else:
                yield Shard(name, self.shapes[name], 0, parameter.data.view(-1))

    def master_shards(self, names: Collection[str]) -> Iterator[Shard]:
        """ZeRO-2: whole copies, gathered one at a time (collective). ZeRO-3: this rank's part."""
        for name in names:
            parameter = self.trained[name]
            if self.stage3:
                start, numel = self.range_of(name)
                flat = self.deepspeed.utils.safe_get_local_fp32_param(parameter)
                yield Shard(name, self.shapes[name], start, flat[:numel])
            else:
                whole = self.deepspeed.utils.safe_get_full_fp32_param(parameter)
                yield Shard(name, self.shapes[name], 0, whole.view(-1))

    def range_of(self, name: str) -> tuple[int, int]:
        """(start, values) of a ZeRO-3 parameter on this rank; the last ranks hold padding, which does not count."""
        part = self.parameters[name].ds_tensor.numel()
        start = min(self.rank * part, self.shapes[name].numel())
        return start, min(part, self.shapes[name].numel() - start)

    def slices(self) -> Iterator[tuple[str, Slice]]:
        """(name, slice of the FP32 masters) of every trained parameter of which this rank holds something."""
        for name, parameter in self.trained.items():
            if self.stage3:
                group, at, _ = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
                start, numel = self.range_of(name)
                flat = self.optimizer.fp32_partitioned_groups_flat[group]
            elif parameter._hp_mapping is None:
                continue
            else:
                mapping = parameter._hp_mapping
                flat = self.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
                at, numel = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
                start = mapping.lp_fragment_address.start
            if numel > 0:
                yield name, Slice(start, int(numel), flat.data, int(at))

    def state_of(self, name: str) -> dict[str, Tensor]:
        """AdamW's state of the flat vector that holds `name`; empty before the first step."""
        parameter = self.trained[name]
        if self.stage3:
            group, _, _ = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
            flat = self.optimizer.fp32_partitioned_groups_flat[group]
        else:
            flat = self.optimizer.single_partition_of_fp32_groups[parameter._hp_mapping.param_group_index]
        return self.optimizer.optimizer.state[flat]

    def pieces(self) -> Iterator[tuple[str, str, int, Tensor]]:
        """(name, kind, start, flat FP32 slice) of everything a resume needs from this rank."""
        for name, piece in self.slices():
            yield name, "master", piece.start, piece.of(piece.flat)
            if self.ema:
                yield name, "ema", piece.start, self.ema[name]
            state = self.state_of(name)
            yield from ((name, kind, piece.start, piece.of(state[kind])) for kind in MOMENTS if kind in state)

    def save(self, folder: Path) -> None:
        try:
            part: Any = save_pieces(folder, self.pieces(), self.rank, self.world)
        except CheckpointError as error:
            part = str(error)
        parts = gather_objects(part, self.world)
        failed = [p for p in parts if isinstance(p, str)]
        if failed:  # on every rank, so that none waits for another
            raise CheckpointError(failed[0])
        if self.rank == 0:
            write_index(folder, parts, {n: list(self.shapes[n]) for n in self.trained}, self.steps)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        reader = StateReader(folder)
        kept = {"master", "ema", *MOMENTS} if self.ema_decay else {"master", *MOMENTS}
        reader.check({n: self.shapes[n] for n in self.trained}, dict.fromkeys(self.trained, kept))
        self.steps = reader.steps
        for name, piece in self.slices():
            kinds, stop = reader.kinds(name), piece.start + piece.numel
            piece.of(piece.flat).copy_(reader.read(name, "master", piece.start, stop))
            if self.ema and "ema" in kinds:
                self.ema[name].copy_(reader.read(name, "ema", piece.start, stop))
            state = self.state_of(name)
            for kind in MOMENTS:
                if kind not in kinds:
                    continue
                if kind not in state:
                    state[kind] = torch.zeros_like(piece.flat)
                piece.of(state[kind]).copy_(reader.read(name, kind, piece.start, stop))
                # on the vector's device, where the fused kernel wants it; plain AdamW takes it from anywhere
                state["step"] = torch.tensor(float(self.steps), device=piece.flat.device)
        for name, parameter in self.trained.items():
            if self.stage3:
                start, numel = self.range_of(name)
                target = parameter.ds_tensor.data.view(-1)[:numel]
            else:
                start, target = 0, parameter.data.view(-1)
            target.copy_(reader.read(name, "master", start, start + target.numel()))

    @torch.no_grad()
    def full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            plain = name.replace("_orig_mod.", "")
            if hasattr(tensor, "ds_id"):
                with self.deepspeed.zero.GatheredParameters([tensor]):
                    yield plain, tensor.detach().cpu().clone()
            else:
                yield plain, tensor.detach().cpu()

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        if self.world > 1:
            values = values.to(self.device)
            torch.distributed.all_reduce(values)
        return values

    def close(self) -> None:
        """Remove DeepSpeed's hooks and buffers; the model is unusable afterwards under ZeRO-3."""
        self.engine.destroy()
