"""Commands run as a user runs them, on the smallest demo; its BF16 base is trained once a session."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Cli:
    """Runs `python -m qat.train` and friends with a shared cache and a run root of its own."""

    root: Path
    cache: Path

    def __call__(
        self, *overrides: str, module: str = "qat.train", preexec: Callable[[], None] | None = None
    ) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", module, *overrides, f"run.root={self.root}", f"run.cache={self.cache}"]
        environment = os.environ | {"OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
        return subprocess.run(
            words,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            preexec_fn=preexec,
            timeout=600,
            check=False,
        )

    def demo(self, *overrides: str, **kwargs: object) -> subprocess.CompletedProcess[str]:
        return self("+experiment=mimo_fp4", "+debug=tiny", *overrides, **kwargs)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def cli(tmp_path: Path, cache: Path) -> Cli:
    return Cli(tmp_path / "runs", cache)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """The folder of one finished tiny run."""
    cli = Cli(tmp_path_factory.mktemp("finished"), cache)
    done = cli.demo("run.name=whole")
    assert done.returncode == 0, done.stderr
    return cli.root / "whole"


@pytest.fixture(scope="session")
def base(finished: Path, cache: Path) -> Path:
    """The BF16 base's checkpoint folder."""
    return next(cache.glob("nano-base-*/model"))
