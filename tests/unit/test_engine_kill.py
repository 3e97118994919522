"""A run that dies before any one of its changes to the file system, and is started again, ends in the same bits.

The death is an exception that no handler catches, raised instead of the n-th rename, delete, flush or mkdir, for every
n: the disk is left as kill -9 at that moment leaves it. Real kills of the whole command: benchmarks/resume.py.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from core.run import Run
from core.train.batch import Batch
from core.train.config import OptimConfig, TrainConfig
from core.train.loop import Loop, NoHook
from tests.engine_cases import assert_same, batch_of, engine_of, state_of

CHANGES = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync")
WALL_CLOCK = {"wall_s", "tokens_per_s"}


class Killed(BaseException):
    """Caught by nothing but the test."""


class Stream:
    """Batches by number, from a position that a checkpoint restores."""

    def __init__(self) -> None:
        self.position = 0

    def __next__(self) -> Batch:
        self.position += 1
        return batch_of(self.position)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


@contextmanager
def dying_before(change: int) -> Iterator[list[str]]:
    """Raise Killed instead of the change numbered `change` (from 0); yields the names of those that were made."""
    made: list[str] = []

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if len(made) == change:
                raise Killed(name)
            made.append(name)
            return real(*args, **kwargs)

        return call

    patches = [patch.object(os, name, counted(name, getattr(os, name))) for name in CHANGES]
    for one in patches:
        one.start()
    try:
        yield made
    finally:
        for one in patches:
            one.stop()


def run_loop(folder: Path) -> dict[str, Tensor]:
    """Start, or start again, the whole run; returns everything it ends with."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    engine = engine_of(OptimConfig(lr=1e-2, ema=0.9))
    train = TrainConfig(steps=5, batch_size=4, save_every=2, eval_every=0, keep_last=1)
    Loop(engine, Stream(), train, OptimConfig(lr=1e-2), Run(folder), NoHook()).run()
    return state_of(engine)


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in WALL_CLOCK} for row in Run(folder).metrics()]


def test_death_before_any_change_to_the_disk_loses_nothing(tmp_path: Path) -> None:
    expected = run_loop(tmp_path / "whole")
    with dying_before(-1) as changes:  # a second time: torch makes folders of its own on the first
        assert_same(run_loop(tmp_path / "counted"), expected)
    assert {"rename", "unlink", "fsync"} <= set(changes)
    for moment in range(len(changes)):
        folder = tmp_path / f"killed-{moment}"
        try:
            with dying_before(moment):
                run_loop(folder)
            raise AssertionError(f"change {moment} of {len(changes)} was not made")
        except Killed:
            pass
        assert_same(run_loop(folder), expected)
        assert metrics(folder) == metrics(tmp_path / "whole"), (moment, changes[moment])
        left = sorted(p.name for p in (folder / "checkpoints").iterdir())
        # one that was being deleted when the run died after its last save stays; nothing reads it
        assert left in (["step-00000005"], ["step-00000004", "step-00000005"]), (moment, changes[moment], left)
