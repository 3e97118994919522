"""The drafter's commands end to end, on the smallest QAT run: train, resume, measure, export, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from core.models.dflash_io import load_drafter, read_pairing
from core.models.eagle_io import load_eagle
from tests.integration.conftest import Cli
from tests.integration.test_bad_input import one_line

TRAIN = "draft_training.train"
TINY = ("+experiment=mimo_dflash", "+debug=tiny_draft")
CLOCK = ("wall_s", "tokens_per_s")


def metrics(run: Path) -> list[dict[str, object]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in rows]


@pytest.fixture(scope="module")
def drafted(finished: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished drafter run."""
    cli = Cli(tmp_path_factory.mktemp("drafted"), cache)
    done = cli(*TINY, f"target.path={finished}", "run.name=whole", module=TRAIN)
    assert done.returncode == 0, done.stderr
    assert "tokens a round on held-out replies" in done.stdout and "Drafter: 1 layers" in done.stdout
    return cli.root / "whole"


def test_a_run_leaves_a_drafter_and_its_figures(drafted: Path, finished: Path) -> None:
    report = json.loads((drafted / "report.json").read_text())
    assert report["teacher_forced"]["code"]["rounds"] > 0 and 1 <= report["teacher_forced"]["code"]["tau"] <= 4
    drafter = load_drafter(drafted / "model")
    assert drafter.config.sinks and drafter.config.block_size == 4 and drafter.config.value_scale == 0.612
    assert read_pairing(drafted / "model")["target_folder"] == str((finished / "model").resolve())


def test_a_resumed_run_ends_in_the_same_bits(cli: Cli, drafted: Path, finished: Path) -> None:
    """As after a kill between step 4 and the end: that checkpoint is the newest, nothing else was written."""
    words = (*TINY, f"target.path={finished}", "train.keep_last=9")
    first = cli(*words, "run.name=parts", module=TRAIN)
    assert first.returncode == 0, first.stderr
    run = cli.root / "parts"
    for path in (run / "model", run / "checkpoints" / "step-00000006"):
        shutil.rmtree(path)
    again = cli(*words, "run.resume=parts", module=TRAIN)
    assert again.returncode == 0, again.stderr
    assert "4/6" in again.stderr, "it began behind the checkpoint"
    wanted, found = (load_file(r / "model" / "model.safetensors") for r in (drafted, run))
    assert all(wanted[n].equal(found[n]) for n in wanted) and wanted.keys() == found.keys()
    assert metrics(drafted) == metrics(run)


def test_the_newest_qat_run_is_the_target(finished: Path, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "qat").symlink_to(finished)
    done = Cli(tmp_path / "runs", cache)(*TINY, "dry_run=true", module=TRAIN)
    assert done.returncode == 0, done.stderr
    assert f"Target: {tmp_path}/runs/qat/model" in done.stdout and "anchors a row" in done.stdout
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["qat"], "a dry run writes nothing"


def test_acceptance_of_the_drafter(cli: Cli, drafted: Path, finished: Path) -> None:
    words = [f"target.path={finished}", f"drafter.path={drafted}", "prompts.limit=3", "prompts.max_tokens=16",
             "sampling.max_new_tokens=12", "prompts.max_bytes=100000", "bootstrap=50", "run.name=measured"]  # fmt: skip
    done = cli(*words, module="draft_training.acceptance")
    assert done.returncode == 0, done.stderr
    report = json.loads((cli.root / "measured" / "report.json").read_text())
    assert report and (cli.root / "measured" / "rounds.jsonl").stat().st_size > 0
    assert "teacher-forced" in done.stdout


def test_the_autoregressive_baseline(cli: Cli, drafted: Path, finished: Path) -> None:
    """Trained on the same replies by the same loop, resumed in the same bits, measured beside the other kind."""
    words = ("+experiment=mimo_eagle", "+debug=tiny_draft", f"target.path={finished}", "train.keep_last=9")
    done = cli(*words, "run.name=chained", module=TRAIN)
    assert done.returncode == 0, done.stderr
    assert "EAGLE, chain of 3, all keys" in done.stdout and "tokens a round on held-out replies" in done.stdout
    run = cli.root / "chained"
    assert json.loads((run / "report.json").read_text())["teacher_forced"]["code"]["rounds"] > 0
    replies = [r for r in cli.cache.glob("replies-*") if (r / "replies.json").exists()]
    assert len(replies) == 1, "both kinds read the same replies"
    assert load_eagle(run / "model").config.taps == load_drafter(drafted / "model").config.taps
    whole, logged = load_file(run / "model" / "model.safetensors"), metrics(run)
    for path in (run / "model", run / "checkpoints" / "step-00000006"):
        shutil.rmtree(path)
    again = cli(*words, "run.resume=chained", module=TRAIN)
    assert again.returncode == 0, again.stderr
    found = load_file(run / "model" / "model.safetensors")
    assert all(whole[n].equal(found[n]) for n in whole) and metrics(run) == logged
    measured = cli(f"target.path={finished}", f"drafter.path={run}", f"drafter.other={drafted}", "prompts.limit=3",
                   "prompts.max_tokens=16", "sampling.max_new_tokens=12", "prompts.max_bytes=100000", "bootstrap=50",
                   "run.name=both", module="draft_training.acceptance")  # fmt: skip
    assert measured.returncode == 0, measured.stderr
    report = json.loads((cli.root / "both" / "report.json").read_text())
    assert report["setup"]["drafter"]["kind"] == "eagle" and report["setup"]["drafter"]["made_for_this_target"] is True
    assert report["same_text"]["drafter"]["equal"] == report["same_text"]["drafter"]["total"] > 0
    assert (cli.root / "both" / "rounds-other_drafter.jsonl").stat().st_size > 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("draft.kind=medusa",), ("draft.kind", "medusa")),
        (("draft.window=2",), ("window=2", "block_size=4")),
        (("draft.taps=[0,9]",), ("taps", "9")),
        (("draft.block_size=1",), ("block_size=1", "at least 2")),
        (("draft.mask_token_id=40",), ("draft.mask_token_id=40", "has a place in text")),
        (("loss.ce=0", "loss.kl=0"), ("loss.ce=0", "loss.kl=0")),
        (("loss.dpace_alpha=2",), ("loss.dpace_alpha=2",)),
        (("replies.path=nowhere",), ("replies.path=nowhere", "regenerate")),
        (("anchors=0",), ("anchors=0",)),
        (("draft.sliding=3",), ("sliding",)),
    ],
)
def test_refused_in_one_line(cli: Cli, finished: Path, words: tuple[str, ...], says: tuple[str, ...]) -> None:
    one_line(cli(*TINY, f"target.path={finished}", *words, module=TRAIN), *says)
    assert not (cli.root / "latest").exists(), "no run was begun"


def test_a_target_that_is_not_there(cli: Cli) -> None:
    one_line(cli(*TINY, "target.path=nowhere", module=TRAIN), "target.path=nowhere")
    one_line(cli(*TINY, module=TRAIN), "no finished QAT run", "target.path=DIR")
