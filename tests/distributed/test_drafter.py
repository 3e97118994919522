"""`torchrun -m draft_training.train` on two CPU processes: the drafter of one process, its replies written once.

NOISE: BF16 rounding of half gradients over six steps of Muon (measured 1e-4 in losses, which are about 5, and 1e-3 of
gradient norms: updates of Muon and Adam are the same for gradients of any size, so their norms are compared too).
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from core.models.load import save_model
from core.models.mimo_v2 import MiMoV2ForCausalLM
from core.train.tokenizer import train_tokenizer
from qat.base import nano_config
from tests.distributed.conftest import ENVIRONMENT, ROOT, TIMEOUT, torchrun
from tests.distributed.worker import NANO

TINY = ("+experiment=mimo_dflash", "+debug=tiny_draft", "train.keep_last=9", "train.eval_every=0")
NOISE, NORMS = 5e-4, 5e-3
CLOCK = ("wall_s", "tokens_per_s")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random nano target."""
    root = tmp_path_factory.mktemp("drafters")
    config = nano_config(NANO, 3, 0)
    config.vocab_size = 300
    torch.manual_seed(0)
    model = MiMoV2ForCausalLM(config).to(torch.bfloat16)
    save_model(model.state_dict().items(), config, root / "target")
    train_tokenizer(["import os\ndef main():\n    return 0\n"] * 3, 300, root / "tokens")
    for file in (root / "tokens").iterdir():
        shutil.copy(file, root / "target" / file.name)
    return root


def words(root: Path, *more: str) -> list[str]:
    return ["-m", "draft_training.train", *TINY, f"target.path={root / 'target'}", f"run.root={root}",
            f"run.cache={root / 'cache'}", *more]  # fmt: skip


def train(root: Path, *more: str) -> str:
    done = torchrun(2, *words(root, *more))
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout


def rows(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]


@pytest.fixture(scope="module")
def ddp(root: Path) -> tuple[Path, str]:
    return root / "ddp", train(root, "run.name=ddp", "parallel=ddp")


@pytest.fixture(scope="module")
def single(root: Path, ddp: tuple[Path, str]) -> Path:
    """The same run in one process, on the replies that rank 0 of two wrote."""
    done = subprocess.run(
        [sys.executable, *words(root, "run.name=single")], cwd=ROOT, env=os.environ | ENVIRONMENT,
        capture_output=True, text=True, timeout=TIMEOUT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    assert "Ended by the target" not in done.stdout, "nothing is left to generate"
    return root / "single"


def test_two_processes_have_the_losses_of_one(ddp: tuple[Path, str], single: Path, root: Path) -> None:
    run, out = ddp
    assert out.count("Drafter: ") == out.count("Ended by the target: ") == 1, "one rank speaks"
    assert len(list((root / "cache").glob("replies-*/part-*"))) == 1
    ours, theirs = rows(run), rows(single)
    assert [r["step"] for r in ours] == [r["step"] for r in theirs] == list(range(1, 7))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["targets"] == other["targets"]
        assert all(mine[k] == pytest.approx(other[k], abs=NOISE) for k in ("loss", "ce"))
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=NORMS)
    assert ours[0]["loss"] == pytest.approx(theirs[0]["loss"], abs=1e-5), "of the same weights and rows"
    assert ours[-1]["ce"] < ours[0]["ce"] - 50 * NOISE, "it learns more than the noise"
    reports = [json.loads((r / "report.json").read_text())["teacher_forced"] for r in (run, single)]
    assert reports[0].keys() == reports[1].keys() and reports[0]
    for domain, found in reports[0].items():
        assert found["tau"] == pytest.approx(reports[1][domain]["tau"], abs=0.3)


@pytest.mark.parametrize("world", [1, 2])
def test_an_interrupted_run_of_two_goes_on(world: int, ddp: tuple[Path, str], root: Path) -> None:
    """From step 4: on two processes to the same bits, in one to the same losses."""
    run = root / f"half-{world}"
    shutil.copytree(ddp[0], run)
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    mode = ("parallel=ddp",) if world == 2 else ("parallel=none",)
    done = torchrun(world, *words(root, f"run.resume={run.name}", *mode))
    assert done.returncode == 0, done.stderr[-6000:]
    assert "4/6" in done.stderr, "it began behind the checkpoint"
    for mine, other in zip(rows(run), rows(ddp[0]), strict=True):
        assert mine == other if world == 2 else mine["loss"] == pytest.approx(other["loss"], abs=NOISE)
    found, wanted = (load_file(r / "model" / "model.safetensors") for r in (run, ddp[0]))
    assert found.keys() == wanted.keys()
    assert world == 1 or all(torch.equal(found[n], wanted[n]) for n in wanted)


def test_accelerate_launches_the_same_run(ddp: tuple[Path, str], root: Path) -> None:
    done = subprocess.run(
        [
            sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1",
            "--main_process_port=0", "--mixed_precision=no", "--dynamo_backend=no",
            *words(root, "run.name=accelerated", "parallel=ddp"),
        ],
        cwd=ROOT, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=TIMEOUT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    assert rows(root / "accelerated") == rows(ddp[0])
