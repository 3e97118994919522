"""Bad input ends in one clear line and a non-zero status, and loses nothing."""

import json
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from core.config import entry
from qat.train import COMMAND
from tests.integration.conftest import Cli


def one_line(done: subprocess.CompletedProcess[str], *words: str) -> str:
    """The single line a failed command printed last; asserts status 2, no traceback, and that it says `words`."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(("qat.train: ", "qat.evaluate: ", "draft_training.")), done.stderr
    for word in words:
        assert word in last, last
    return last


def with_path(base: Path, copy: Path) -> list[str]:
    shutil.copytree(base, copy)
    return ["model=path", f"model.path={copy}", "data.seq_len=128", "data.max_bytes=200000", "train.steps=2"]


def test_nan_in_a_weight(cli: Cli, base: Path, tmp_path: Path) -> None:
    overrides = with_path(base, tmp_path / "nan")
    file = next((tmp_path / "nan").glob("*.safetensors"))
    tensors = load_file(file)
    name = next(n for n in tensors if "down_proj" in n and "experts" in n)
    tensors[name].view(-1)[5] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    one_line(cli(*overrides), "down_proj", "NaN")


def test_width_that_does_not_divide_into_blocks(cli: Cli) -> None:
    done = cli.demo("model.nano.moe_intermediate_size=40")
    one_line(done, "40", "32", "down_proj")


def test_truncated_shard(cli: Cli, base: Path, tmp_path: Path) -> None:
    overrides = with_path(base, tmp_path / "cut")
    file = next((tmp_path / "cut").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1000])
    one_line(cli(*overrides), file.name)


def test_missing_tensor(cli: Cli, base: Path, tmp_path: Path) -> None:
    overrides = with_path(base, tmp_path / "missing")
    file = next((tmp_path / "missing").glob("*.safetensors"))
    tensors = load_file(file)
    name = next(n for n in tensors if "experts.1.up_proj" in n)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    one_line(cli(*overrides), "up_proj")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["trian.steps=3"], ["trian"]),
        (["train.stepz=3"], ["stepz"]),
        (["+train.stepz=3"], ["stepz"]),
        (["train.batch_size=0"], ["train.batch_size=0", "positive"]),
        (["optim.lr=-1"], ["optim.lr=-1"]),
        (["data.loss_on=assistent"], ["assistent", "assistant"]),
        (["eval.tasks=[gsm9k]"], ["gsm9k", "gsm8k"]),
        (["eval.tasks=[gsm8k]"], ["FP4FLASH_DATA"]),
        (["+quant.layer_start_steps={9:2}"], ["layer 9"]),
        (["run.name=../../evil"], ["run.name", "folder name"]),
        (["qat=layerwise", "optim.ema=0.9"], ["layerwise", "optim.ema"]),
        (["train.steps=many"], ["train.steps", "many"]),
        (["quant.rule=nearest"], ["quant.rule", "nearest"]),
        (["model=mimo_v3"], ["mimo_v3"]),
        (["train.batch_size=4", "train.micro_batch_size=3"], ["train.micro_batch_size=3"]),
        (["model=mimo_v2_flash"], ["model=mimo_v2_flash", "hf download", "model.path"]),
        (["model=path", "model.path=/nowhere"], ["/nowhere", "config.json"]),
        (["quant.select=[model.layers.99.*]"], ["model.layers.99.*", "matched no parameter"]),
        (
            ["quant.select=[model.layers.1.mlp.experts.*]", "model.nano.num_hidden_layers=3"],
            ["leaves out", "quant.skip"],
        ),
        (["quant=none", "loss.kl=1", "loss.ce=0"], ["loss=ce"]),
        (["data=jsonl"], ["FP4FLASH_DATA"]),
        (["parallel=fsdp2"], ["fsdp2"]),
        (["parallel=ep"], ["ep"]),
        (["run.resume=nothing"], ["nothing"]),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else None,
)
def test_configuration(
    cli: Cli, finished: Path, overrides: list[str], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FP4FLASH_DATA", raising=False)
    one_line(cli.demo(*overrides), *words)


def test_empty_data(cli: Cli, base: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    done = cli(
        "model=path", f"model.path={base}", "data=jsonl", f"data.root={tmp_path}",
        "data.train=[{path: empty.jsonl}]", "data.val=[{path: empty.jsonl}]",
    )  # fmt: skip
    one_line(done, "empty.jsonl")


def test_full_disk_during_a_save_keeps_the_old_checkpoint(cli: Cli, finished: Path) -> None:
    """A file-size limit stands in for a full disk: both make write() fail half-way."""
    assert cli.demo("run.name=full", "train.steps=6").returncode == 0
    run = cli.root / "full"
    shutil.rmtree(run / "model")
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    before = {p.name: p.read_bytes() for p in newest.rglob("*") if p.is_file()}
    loop = json.loads((newest / "loop.json").read_text())
    assert loop["step"] == 6

    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    one_line(cli.demo("run.resume=full", "train.steps=6", preexec=small_files), "model")
    after = {p.name: p.read_bytes() for p in newest.rglob("*") if p.is_file()}
    assert after == before
    assert cli("run.resume=full").returncode == 0
    with safe_open(next((run / "model").glob("*.safetensors")), "pt") as file:
        assert file.keys()


def test_out_of_gpu_memory_anywhere_says_what_to_change(capsys: pytest.CaptureFixture[str]) -> None:
    def allocate(_config: object, _resolved: str) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. Of the allocated memory 3")

    assert entry(COMMAND, allocate, ["+experiment=mimo_fp4"]) == 2
    line = capsys.readouterr().err.strip()
    assert "micro_batch_size" in line and "activation_checkpointing" in line and "\n" not in line


def test_gpu_asked_for_where_there_is_none(cli: Cli) -> None:
    one_line(cli.demo("train.device=cuda"), "train.device=cuda")
