"""Replies through the commands: a kill while they are written, another target, a damaged line."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from core.models.dflash_io import read_pairing
from tests.integration.conftest import ROOT, Cli
from tests.integration.test_bad_input import one_line
from tests.integration.test_drafter import TINY, TRAIN

REGENERATE = """import sys, draft_training.regenerate as r
r.PART = 8
sys.exit(r.entry(r.COMMAND, r.main, sys.argv[1:]))"""


@pytest.fixture(scope="module")
def replies(finished: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Replies of the QAT run's model, whose writing was killed (-9) as soon as the first of six parts was there."""
    out = tmp_path_factory.mktemp("replies")
    words = [sys.executable, "-c", REGENERATE, f"target.path={finished}", "data.max_bytes=200000", "replies.count=48",
             "replies.prompt_tokens=16", "replies.max_new_tokens=24"]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(
        [*words, f"out={out / 'killed'}"], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL
    ) as process:
        while process.poll() is None and not list(out.glob("killed/part-*")):
            time.sleep(0.001)
        process.kill()
    assert process.returncode == -signal.SIGKILL and len(list(out.glob("killed/part-*"))) < 6
    for name in ("killed", "whole"):
        done = subprocess.run(
            [*words, f"out={out / name}"], cwd=ROOT, env=environment, capture_output=True, check=False
        )
        assert done.returncode == 0 and b"Ended by the target" in done.stdout, done.stderr
    return out


def test_replies_after_a_kill_are_those_of_an_uninterrupted_run(replies: Path) -> None:
    killed, whole = ({p.name: p.read_bytes() for p in (replies / n).iterdir()} for n in ("killed", "whole"))
    assert killed == whole and len(whole) == 7


def test_replies_of_another_target_are_refused_unless_forced(
    cli: Cli, replies: Path, finished: Path, base: Path
) -> None:
    """The QAT run's replies are used for it; for its BF16 base, only by force, and then the drafter says so."""
    words = (*TINY, f"replies.path={replies / 'whole'}", "train.steps=1", "train.eval_every=0")
    own = cli(*words, f"target.path={finished}", "run.name=own", module=TRAIN)
    assert own.returncode == 0 and "said by this target" in own.stdout, own.stderr
    done = cli(*words, f"target.path={base}", "run.name=no", module=TRAIN)
    said_by = json.loads((replies / "whole" / "replies.json").read_text())["target"]
    one_line(done, f"replies.path={replies / 'whole'}", said_by[:12], "target.path is", "replies.force=true")
    assert not (cli.root / "no").exists()
    forced = cli(*words, f"target.path={base}", "run.name=forced", "replies.force=true", module=TRAIN)
    assert forced.returncode == 0 and "ANOTHER target" in forced.stdout, forced.stderr
    for name, expected in (("own", False), ("forced", True)):
        pairing = read_pairing(cli.root / name / "model")
        assert pairing["replies"] == {"path": str(replies / "whole"), "target": said_by, "forced": expected}
        assert json.loads((cli.root / name / "run.json").read_text())["replies"] == pairing["replies"]
        assert (pairing["target"]["fingerprint"] == said_by) == (name == "own")
    stranger = ("draft_training.acceptance", f"target.path={finished}", f"drafter.path={cli.root / 'forced'}")
    one_line(cli(*stranger[1:], module=stranger[0]), "was trained for target", said_by[:12], "drafter.force=true")


def test_a_damaged_reply_ends_the_run_before_it_begins(cli: Cli, replies: Path, finished: Path, tmp_path: Path) -> None:
    lines = gzip.decompress((replies / "whole" / "part-00000.jsonl.gz").read_bytes()).splitlines()
    file = tmp_path / "mine.jsonl"
    file.write_bytes(b"\n".join([*lines, lines[0][:50]]))
    words = (*TINY, f"target.path={finished}", f"replies.path={file}", "train.steps=1")
    one_line(cli(*words, module=TRAIN), "mine.jsonl line 9 is not JSON", "repair or drop the line")
    assert not (cli.root / "latest").exists()
    file.write_bytes(b"\n".join(lines))
    done = cli(*words, "replies.val_share=2", "run.name=plain", module=TRAIN)
    assert done.returncode == 0 and "said by unknown target" in done.stdout, done.stderr
    assert read_pairing(cli.root / "plain" / "model")["replies"]["target"] == "unknown target"
