"""QAT of transformers' own MoE classes on two processes: the losses of one process, in every mode.

NOISE: BF16 rounding of half gradients, as in test_engines (measured 7e-5 after two steps, GPT-OSS the largest);
between the modes the same halves are added (measured 0).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed.conftest import ENVIRONMENT, ROOT, TIMEOUT, torchrun
from tests.distributed.families import losses

MOE = ("qwen3_moe", "mimo_v2", "deepseek_v3", "gpt_oss")
MODES = ("ddp", "zero2", "zero3")
NOISE, EQUAL = 2e-4, 1e-6


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, str], list[float] | str]:
    folder = tmp_path_factory.mktemp("families")
    cases = [(family, mode, "snap") for family in MOE for mode in MODES] + [("gpt_oss", "zero3", "fake_quant")]
    torch.save(cases, folder / "spec.pt")
    done = torchrun(2, "-m", "tests.distributed.families", str(folder / "spec.pt"), str(folder / "out.pt"))
    assert done.returncode == 0, done.stderr[-6000:]
    return torch.load(folder / "out.pt")


@pytest.mark.parametrize("family", MOE)
def test_two_processes_equal_one(family: str, found) -> None:
    alone = losses(family, "none", "snap")
    for mode in MODES:
        if (family, mode) == ("gpt_oss", "zero3"):
            continue
        assert found[family, mode, "snap"] == pytest.approx(alone, abs=NOISE), mode
        assert found[family, mode, "snap"] == pytest.approx(found[family, "ddp", "snap"], abs=EQUAL), mode


def test_transposed_experts_under_zero3(found) -> None:
    """GPT-OSS keeps [E, in, out]: flat shards cut its blocks, so snapping is refused and fake-quant takes its place."""
    refusal = found["gpt_oss", "zero3", "snap"]
    assert str(refusal).startswith("UnsupportedError: ") and "use qat=fake_quant, or parallel=zero2" in str(refusal)
    assert found["gpt_oss", "zero3", "fake_quant"] == pytest.approx(found["gpt_oss", "ddp", "snap"], abs=EQUAL)


def test_accelerate_launch_is_a_launcher_too(found, tmp_path: Path) -> None:
    """--multi_gpu is accelerate's word for several processes; with --cpu it starts one, whatever --num_processes."""
    case = ("mimo_v2", "zero3", "snap")
    torch.save([case], tmp_path / "spec.pt")
    done = subprocess.run(
        [
            sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1",
            "--main_process_port=0", "--mixed_precision=no", "--dynamo_backend=no", "-m", "tests.distributed.families",
            str(tmp_path / "spec.pt"), str(tmp_path / "out.pt"),
        ],
        cwd=ROOT, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=TIMEOUT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    assert torch.load(tmp_path / "out.pt")[case] == found[case]
