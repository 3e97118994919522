"""`torchrun -m qat.train` as a user starts it, on two CPU processes, beside the same run in one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from core.mxfp4 import on_grid
from tests.distributed.conftest import torchrun

TINY = ("+experiment=mimo_fp4", "+debug=tiny")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def train(root: Path, world: int, *overrides: str) -> str:
    done = torchrun(world, "-m", "qat.train", *overrides, f"run.root={root}", f"run.cache={root / 'cache'}")
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout


@pytest.fixture(scope="module")
def single(root: Path) -> Path:
    train(root, 1, *TINY, "run.name=single")
    return root / "single"


@pytest.fixture(scope="module")
def ddp(root: Path, single: Path) -> tuple[Path, str]:
    return root / "ddp", train(root, 2, *TINY, "run.name=ddp", "parallel=ddp")


@pytest.fixture(scope="module")
def zero3(root: Path, single: Path) -> tuple[Path, str]:
    return root / "zero3", train(root, 2, *TINY, "run.name=zero3", "parallel=zero3", "train.keep_last=3")


def rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def tensors(run: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in sorted((run / "model").glob("*.safetensors")) for k, v in load_file(f).items()}


@pytest.mark.parametrize("mode", ["ddp", "zero3"])
def test_run_on_two_processes(mode: str, single: Path, request: pytest.FixtureRequest) -> None:
    """KL training, evaluation during it, checkpoints, model and report: the files and numbers of one process."""
    run, out = request.getfixturevalue(mode)
    assert out.count("Coverage (") == 1, "one rank speaks"
    for name in ("config.yaml", "metrics.jsonl", "report.md", "report.json", "selection.json", "quant.json"):
        assert (run / name).exists(), name
    assert json.loads((run / "run.json").read_text())["state"] == "finished"
    ours, theirs = rows(run), rows(single)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        for key in other:
            if key == "ce" or key.startswith("val_loss"):
                assert mine[key] == pytest.approx(other[key], abs=1e-3), key  # BF16 noise, 5e-5 measured
            if key in {"targets", "lr"}:
                assert mine[key] == other[key]
    counted, wanted = (json.loads((r / "quant.json").read_text())["tokens_per_expert"] for r in (run, single))
    assert {n: sum(c) for n, c in counted.items()} == {n: sum(c) for n, c in wanted.items()}
    after, reference = tensors(run), tensors(single)
    assert set(after) == set(reference)
    for name, weight in after.items():
        if ".experts." in name:
            assert on_grid(weight), name
        else:
            assert torch.equal(weight, reference[name]), f"{name} is frozen"


def test_interrupted_zero3_run_resumes_in_one_process(zero3: tuple[Path, str], root: Path) -> None:
    """Two processes wrote the checkpoint of step 4; the run as it was then is carried on by one."""
    run = root / "half"
    shutil.copytree(zero3[0], run)
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    train(root, 1, *TINY, "run.resume=half", "train.keep_last=3", "parallel=none")
    assert [row["step"] for row in rows(run) if "loss" in row] == list(range(1, 7))
    for mine, other in zip(rows(run), rows(zero3[0]), strict=True):
        assert all(mine[k] == pytest.approx(other[k], abs=1e-3) for k in other if k == "ce" or k.startswith("val_loss"))
    counted, wanted = (json.loads((r / "quant.json").read_text())["tokens_per_expert"] for r in (run, zero3[0]))
    assert {n: sum(c) for n, c in counted.items()} == {n: sum(c) for n, c in wanted.items()}
    assert all(on_grid(w) for n, w in tensors(run).items() if ".experts." in n)


def test_forgotten_mode_is_one_line(root: Path, single: Path) -> None:
    done = torchrun(2, "-m", "qat.train", *TINY, "run.name=none", f"run.root={root}", f"run.cache={root / 'cache'}")
    assert done.returncode != 0
    assert "2 processes were launched with parallel=none; set parallel=ddp, zero2 or zero3" in done.stderr + done.stdout
