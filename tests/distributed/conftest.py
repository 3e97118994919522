"""Launching worker processes: gloo on the CPU, a port of their own, a time limit."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.distributed.worker import Phase, Result, run

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 900  # seconds; a launch takes about ten alone on a machine, minutes beside other work
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONFAULTHANDLER": "1"}
Launch = Callable[..., list[Result]]


def torchrun(world: int, *words: str) -> subprocess.CompletedProcess[str]:
    """`torchrun --standalone` (which picks a free port); its whole process group ends with the test."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}", *words]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )


def launch_phases(folder: Path, world: int, *phases: Phase) -> list[Result]:
    spec, out = folder / "spec.pt", folder / "out.pt"
    torch.save(list(phases), spec)
    out.unlink(missing_ok=True)
    done = torchrun(world, "-m", "tests.distributed.worker", str(spec), str(out))
    assert done.returncode == 0, done.stderr[-6000:]
    return torch.load(out, weights_only=False)


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """launch(world, phase, ...) -> rank 0's results, one a phase."""
    return lambda world, *phases: launch_phases(tmp_path_factory.mktemp("launch"), world, *phases)


@pytest.fixture(scope="module")
def alone() -> Callable[[Phase], Result]:
    """A phase in this process, on one thread, as the workers compute."""

    def one(phase: Phase) -> Result:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return run(phase)
        finally:
            torch.set_num_threads(threads)

    return one
