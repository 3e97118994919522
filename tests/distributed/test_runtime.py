"""The runtime on two CPU processes over gloo: the tokens of one, on every rank; a served model; a rank that dies."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core.train.tokenizer import train_tokenizer
from tests import runtime_cases as cases
from tests.convert_cases import CONFIGS, values_of
from tests.distributed.conftest import ENVIRONMENT, ROOT, torchrun

TOKENS = 16
WORKER = ("-m", "tests.distributed.runtime_worker")


@pytest.fixture(scope="module", params=["mimo pro", "gpt_oss"])
def made(request: Any, tmp_path_factory: Any) -> Any:
    place = tmp_path_factory.mktemp("runtime")
    return place, *cases.both_folders(place, request.param)[:3]


def test_two_ranks_say_what_one_says(made: Any) -> None:
    place, folder, drafter, model = made
    for world in (1, 2):
        (place / str(world)).mkdir()
        done = torchrun(world, *WORKER, str(folder), str(drafter), str(place / str(world)), str(TOKENS))
        assert done.returncode == 0, done.stderr[-4000:]
    one = json.loads((place / "1" / "rank0.json").read_text())
    two = [json.loads((place / "2" / f"rank{r}.json").read_text()) for r in (0, 1)]
    greedy = cases.greedy(model, cases.prompts(), TOKENS)
    assert one[0] == [greedy[p.id] for p in cases.prompts()]
    assert two[0] == two[1], "ranks must agree"
    assert two[0][0] == one[0]  # sampled text may differ where the order of sums moves a draw over an edge


def port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture
def environment() -> dict[str, str]:
    return os.environ | ENVIRONMENT | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port()), "PYTHONPATH": str(ROOT)}


def ranks_of(environment: dict[str, str], *words: str) -> list[subprocess.Popen[str]]:
    """Two ranks without a launcher, which would end both itself."""
    return [
        subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=environment | {"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
        )
        for r in (0, 1)
    ]  # fmt: skip


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_is_named_by_the_other_within_thirty_seconds(
    tmp_path: Path, environment: dict[str, str], victim: int
) -> None:
    folder, drafter, *_ = cases.both_folders(tmp_path, "mimo pro")
    running = ranks_of(environment, *WORKER, str(folder), str(drafter), str(tmp_path), "200")
    try:
        for process in running:
            assert process.stdout is not None and process.stdout.readline().startswith("ready")
        running[victim].kill()
        begun = time.monotonic()
        _, error = running[1 - victim].communicate(timeout=60)
        assert time.monotonic() - begun < 30
        assert f"rank {victim} died" in error
        assert running[1 - victim].returncode != 0
    finally:
        for process in running:
            process.kill()


@pytest.fixture
def served(tmp_path: Path, environment: dict[str, str]) -> Iterator[tuple[list[subprocess.Popen[str]], str]]:
    from core.models.load import save_model
    from core.mxfp4 import ScaleRule

    config = CONFIGS["mimo pro"]()
    config.vocab_size = 300
    save_model(values_of(config, ScaleRule.even).items(), config, tmp_path / "m")
    train_tokenizer(["import os\ndef main():\n    return 0\n"] * 3, 300, tmp_path / "tokens")
    for file in (tmp_path / "tokens").iterdir():
        shutil.copy(file, tmp_path / "m" / file.name)
    running = ranks_of(
        environment, "-m", "infer.serve", "--model", str(tmp_path / "m"), "--port", "0", "--device", "cpu", "--dtype",
        "float32",
    )  # fmt: skip
    assert running[0].stdout is not None and running[0].stderr is not None
    line = running[0].stdout.readline()
    try:
        assert "http://" in line, running[0].stderr.read()[-3000:]
        yield running, line.rsplit(" ", 1)[1].strip()
    finally:
        for process in running:
            process.kill()


def test_a_server_over_two_ranks(served: tuple[list[subprocess.Popen[str]], str]) -> None:
    """Two equal greedy requests have one text, and SIGTERM ends both ranks in order."""
    running, url = served
    texts = []
    for _ in range(2):
        body = json.dumps({"prompt": "import os", "max_tokens": 8, "temperature": 0, "ignore_eos": True}).encode()
        request = urllib.request.Request(f"{url}/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as reply:
            texts.append(json.load(reply)["choices"][0]["text"])
    assert texts[0] == texts[1] and texts[0]
    for process in running:
        process.send_signal(signal.SIGTERM)
    for process in running:
        _, error = process.communicate(timeout=60)
        assert process.returncode == 0, error[-3000:]
