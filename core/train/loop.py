"""The one step loop. Pipelines differ in the model, the loss and what happens after a step, not in the loop.

A step: draw this rank's rows, run micro-batches through the engine, update the masters, call `after_step` (QAT snaps
there), log, now and then evaluate and save. Everything that decides the next step is in the checkpoint (masters,
optimiser state, data position, random states, the hooks' own state), so a run that is killed and resumed ends in the
same bits as one that was not.
"""

import json
import math
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from core.errors import CheckpointError, ConfigError, ResourceError, resource_line
from core.run import Run, write_json
from core.train.batch import Batch
from core.train.config import OptimConfig, TrainConfig
from core.train.engine import Engine
from core.train.schedule import lr_factor
from core.train.tracker import NoTracker, Tracker


class Stream(Protocol):
    """Endless batches of this rank's rows, resumable exactly."""

    def __next__(self) -> Batch: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Hook(Protocol):
    """What a pipeline adds to a step. `step` counts finished optimiser steps, 0 before the first."""

    def after_step(self, step: int) -> None: ...

    def metrics(self, step: int) -> dict[str, Any]: ...

    def state_dict(self) -> dict[str, Any]:
        """Called on every rank; rank 0's is written and is loaded on every rank."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class NoHook:
    """Nothing added to a step: the plain trainer."""

    def after_step(self, step: int) -> None:
        """Nothing."""

    def metrics(self, step: int) -> dict[str, Any]:  # noqa: ARG002
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Loop:
    """Everything a run of the loop needs; `run()` does it.

    evaluate: (step) -> values to log; called every `train.eval_every` steps, collectively on all ranks.
    """

    engine: Engine
    stream: Stream
    train: TrainConfig
    optim: OptimConfig
    run_folder: Run
    hook: Hook
    evaluate: Callable[[int], dict[str, Any]] | None = None
    tracker: Tracker = field(default_factory=NoTracker)
    title: str = "train"

    def run(self) -> int:
        """Train to `train.steps`, resuming from the newest checkpoint of the run folder; returns the steps done.

        Raises:
            ResourceError: the loss or gradient became NaN or Inf, or memory ran out; one line with the remedy.
        """
        rows = rows_per_rank(self.train, self.engine.world)
        done = self.restore()
        self.hook.after_step(done)
        bar = tqdm(total=self.train.steps, initial=done, desc=self.title, unit="step", disable=self.engine.rank != 0)
        try:
            for step in range(done + 1, self.train.steps + 1):
                self.one_step(step, rows, bar)
        except torch.OutOfMemoryError as error:
            raise ResourceError(resource_line(error) or str(error)) from error
        finally:
            bar.close()
        return self.train.steps

    def one_step(self, step: int, micro_rows: int, bar: tqdm) -> None:
        began = time.perf_counter()
        batch = next(self.stream)
        targets = self.count_targets(batch)
        stats: dict[str, Tensor] = {}
        starts = range(0, batch.input_ids_BT.shape[0], micro_rows)
        for start in starts:
            micro = batch.rows(start, start + micro_rows).to(self.engine.device)
            add(stats, self.engine.forward_backward(micro, 1.0 / targets, last=start == starts[-1]))
        factor = lr_factor(self.optim, step - 1, self.train.steps)
        grad_norm = self.engine.step(factor)
        self.hook.after_step(step)
        bar.update()
        if step % self.train.log_every == 0 or step == self.train.steps:
            self.log(step, stats, targets, grad_norm, factor, began, bar)
        if self.evaluate and self.train.eval_every and step % self.train.eval_every == 0:
            values = self.evaluate(step)
            self.run_folder.log(step=step, **values)
            self.tracker.log(step, values)
        if (self.train.save_every and step % self.train.save_every == 0) or step == self.train.steps:
            self.save(step)

    def count_targets(self, batch: Batch) -> int:
        """Tokens with loss in this step over all ranks; a step without any would divide by zero."""
        here = torch.tensor([float(batch.num_targets)], dtype=torch.float64)
        total = int(self.engine.sum_over_ranks(here).item()) if self.engine.world > 1 else batch.num_targets
        if total == 0:
            raise ConfigError("a batch has no token with loss; check data.loss_on and data.seq_len")
        return total

    def log(
        self,
        step: int,
        stats: dict[str, Tensor],
        targets: int,
        grad_norm: float | Tensor,
        factor: float,
        began: float,
        bar: tqdm,
    ) -> None:
        names = sorted(stats)
        summed = self.engine.sum_over_ranks(torch.stack([stats[n].double().reshape(()) for n in names]))
        values = {n: v / targets for n, v in zip(names, summed.tolist(), strict=True)}
        values |= {"grad_norm": float(grad_norm), "lr": self.optim.lr * factor, "targets": targets}
        values |= self.hook.metrics(step)
        seconds = time.perf_counter() - began
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            raise ResourceError(
                f"loss={values['loss']} grad_norm={values['grad_norm']} at step {step}: training diverged; "
                f"lower optim.lr (now {self.optim.lr:g}) or set optim.clip_grad_norm, then set run.resume=latest"
            )
        speed = targets / seconds
        self.run_folder.log(step=step, **values, tokens_per_s=round(speed, 1), wall_s=round(time.time(), 3))
        self.tracker.log(step, values | {"tokens_per_s": speed})
        bar.set_postfix(loss=f"{values['loss']:.4f}", tok_s=f"{speed:,.0f}", refresh=False)

    def save(self, step: int) -> None:
        """Write checkpoints/step-<n> under a temporary name, rename it, then drop the older ones."""
        final = self.run_folder.checkpoints / f"step-{step:08d}"
        partial = final.with_name(f".{final.name}.partial")
        if self.engine.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            make_folder(partial)
        barrier(self.engine)
        self.engine.save(partial)
        hook_state = self.hook.state_dict()
        try:
            torch.save(random_state(), partial / f"random-{self.engine.rank}.pt")
            if self.engine.rank == 0:
                torch.save(hook_state, partial / "hook.pt")
        except (OSError, RuntimeError) as error:
            raise CheckpointError(
                f"cannot write {partial}: {error}; free space and resume; an earlier checkpoint is kept"
            ) from error
        if self.engine.rank == 0:
            write_json(
                partial / "loop.json", {"step": step, "stream": self.stream.state_dict(), "world": self.engine.world}
            )
        barrier(self.engine)
        if self.engine.rank == 0:
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            for old in finished_checkpoints(self.run_folder.checkpoints)[: -self.train.keep_last]:
                shutil.rmtree(old)
        barrier(self.engine)

    def restore(self) -> int:
        """Load the newest whole checkpoint, if any, and rewind the metrics to it; returns its step."""
        found = finished_checkpoints(self.run_folder.checkpoints)
        if not found:
            self.run_folder.rewind(0)
            return 0
        folder = found[-1]
        state = json.loads((folder / "loop.json").read_text())
        self.engine.load(folder)
        self.stream.load_state_dict(state["stream"])
        self.hook.load_state_dict(torch.load(folder / "hook.pt", weights_only=True))
        own = folder / f"random-{self.engine.rank}.pt"
        if own.exists() and state["world"] == self.engine.world:
            set_random_state(torch.load(own, weights_only=True))
        self.run_folder.rewind(state["step"])
        return state["step"]


def rows_per_rank(train: TrainConfig, world: int) -> int:
    """Rows of one micro-batch; ConfigError where batch_size does not divide evenly."""
    if train.batch_size % world:
        raise ConfigError(f"train.batch_size={train.batch_size} does not divide over {world} ranks; choose a multiple")
    rank_rows = train.batch_size // world
    micro = train.micro_batch_size or rank_rows
    if rank_rows % micro:
        raise ConfigError(
            f"train.micro_batch_size={micro} does not divide the {rank_rows} rows of a rank "
            f"(train.batch_size={train.batch_size} over {world} ranks); choose a divisor"
        )
    return micro


def finished_checkpoints(folder: Path) -> list[Path]:
    """step-* folders, oldest first; those under a temporary name were never finished."""
    return sorted(folder.glob("step-*")) if folder.exists() else []


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"cannot create {folder}: {error.strerror}") from error


def add(total: dict[str, Tensor], part: dict[str, Tensor]) -> None:
    for name, value in part.items():
        total[name] = total[name] + value if name in total else value


def barrier(engine: Engine) -> None:
    if engine.world > 1:
        torch.distributed.barrier()


def random_state() -> dict[str, Any]:
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {"python": [version, list(words), gauss], "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
