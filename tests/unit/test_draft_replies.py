"""Replies of a target: written once whatever interrupts it, read with every fault named, refused for another target."""

import errno
import gzip
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from core.errors import CheckpointError, ConfigError, DataError
from core.generate.decode import PlainGenerator
from core.generate.interface import Prompt, Reply
from core.generate.sampling import Sampling
from core.generate.target import Target
from core.train.config import DataConfig, DataSource, Source
from core.train.tokenizer import train_tokenizer
from draft_training import regenerate
from draft_training.config import RepliesConfig
from draft_training.prompts import DomainPrompt, distinct, load_prompts
from draft_training.regenerate import Made, settings_of, write_replies
from draft_training.replies import SETTINGS, UNKNOWN, check_target, read_replies, whose
from tests.unit.test_engine_kill import Killed, dying_before

VOCABULARY, OWN, OTHER = 50, "a" * 64, "b" * 64
GREEDY = Sampling(max_new_tokens=6)


@pytest.fixture(scope="module")
def target() -> Target:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.3,
    )  # fmt: skip
    return Target(LlamaForCausalLM(config).eval())


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regenerate, "PART", 3)


def prompts_of(count: int = 8) -> list[DomainPrompt]:
    return [DomainPrompt("ab"[n % 2], Prompt(f"{n}", [1 + n, 2, 30 - n][: 1 + n % 3])) for n in range(count)]


def settings(prompts: list[DomainPrompt], fingerprint: str = OWN) -> dict[str, Any]:
    return settings_of(RepliesConfig(max_new_tokens=6), 0, fingerprint, prompts)


class Dying:
    """A generator whose process dies after `left` replies."""

    def __init__(self, inner: PlainGenerator, left: int) -> None:
        self.inner, self.left = inner, left

    def generate(self, prompts: Iterable[Prompt], sampling: Sampling) -> Iterator[Reply]:
        for reply in self.inner.generate(prompts, sampling):
            if self.left == 0:
                raise Killed
            self.left -= 1
            yield reply


def write(out: Path, target: Target, dies_after: int = -1) -> Made:
    prompts = prompts_of()
    return write_replies(out, Dying(PlainGenerator(target, rows=2), dies_after), prompts, settings(prompts), GREEDY)


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def config(path: Path, force: bool = False) -> RepliesConfig:
    return RepliesConfig(path=str(path), force=force)


def ids_of(path: Path) -> list[str]:
    return [text.prompt.id for text in read_replies(config(path), VOCABULARY)]


def test_replies_are_the_targets_own_each_once_in_order(tmp_path: Path, target: Target) -> None:
    made = write(tmp_path / "r", target)
    assert (made.replies, made.tokens, made.stopped) == (8, 48, 0)
    assert len(list((tmp_path / "r").glob("part-*"))) == 3
    own = {r.id: r.ids for r in PlainGenerator(target).generate([p.prompt for p in prompts_of()], GREEDY)}
    texts = list(read_replies(config(tmp_path / "r"), VOCABULARY))
    assert [t.prompt for t in texts] == [p.prompt for p in prompts_of()]
    assert [t.domain for t in texts] == [p.domain for p in prompts_of()]
    assert {t.reply.id: t.reply.ids for t in texts} == own


def test_a_death_at_any_moment_loses_and_repeats_no_prompt(tmp_path: Path, target: Target) -> None:
    """Between any two changes to the disk, and between any two replies; then the same command again: the same bytes."""
    write(tmp_path / "whole", target)
    wanted = content(tmp_path / "whole")
    with dying_before(-1) as changes:
        write(tmp_path / "counted", target)
    assert content(tmp_path / "counted") == wanted and changes.count("replace") == 4
    for moment in range(len(changes)):
        out = tmp_path / f"change-{moment}"
        with pytest.raises(Killed), dying_before(moment):
            write(out, target)
        write(out, target)
        assert content(out) == wanted, (moment, changes[moment])
    for replies in range(8):
        out = tmp_path / f"reply-{replies}"
        with pytest.raises(Killed):
            write(out, target, dies_after=replies)
        made = write(out, target)
        assert content(out) == wanted, replies
        assert made.replies == 8 - 3 * (replies // 3), "finished parts are not made again"


def test_a_folder_is_continued_only_as_it_was_begun(tmp_path: Path, target: Target) -> None:
    out, prompts = tmp_path / "r", prompts_of()
    write(out, target)
    before, generator = content(out), PlainGenerator(target)
    with pytest.raises(ConfigError, match=f"r holds replies with target={OWN}, not {OTHER}; choose another out="):
        write_replies(out, generator, prompts, settings(prompts, OTHER), GREEDY)
    turned = prompts[::-1]  # the same prompts in other parts: some would be answered twice, others never
    with pytest.raises(ConfigError, match="r holds replies with prompts="):
        write_replies(out, generator, turned, settings(turned), GREEDY)
    assert content(out) == before
    (out / SETTINGS).unlink()
    with pytest.raises(ConfigError, match=r"holds replies without replies\.json, so whose they are is unknown"):
        write(out, target)
    for text in ("", "{", "[]", '{"target": 3}', "{}"):
        (out / SETTINGS).write_text(text)
        with pytest.raises(DataError, match=r"replies\.json (is damaged|names no target).*another folder"):
            write(out, target)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_full_disk_is_one_line_and_leaves_whole_parts(
    number: int, tmp_path: Path, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "whole", target)
    out = tmp_path / "r"
    with pytest.raises(Killed):
        write(out, target, dies_after=4)

    def fsync(_handle: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    line = rf"^cannot write .*part-00001\.jsonl\.gz: {os.strerror(number)}; free space and run the command again$"
    with pytest.raises(CheckpointError, match=line):
        write(out, target)
    assert sorted(content(out)) == ["part-00000.jsonl.gz", SETTINGS]
    monkeypatch.undo()
    monkeypatch.setattr(regenerate, "PART", 3)
    write(out, target)
    assert content(out) == content(tmp_path / "whole")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot create out=.*file: File exists; choose another folder"):
        write(tmp_path / "file", target)


def test_two_prompts_of_one_id_stay_two(tmp_path: Path) -> None:
    """Two files of one name are one domain, whose records have the same numbers."""
    tokenizer = train_tokenizer(["some text to learn bytes from"] * 3, 300, tmp_path / "tokens")
    for folder, word in (("one", "yes"), ("two", "no")):
        (tmp_path / folder).mkdir()
        lines = [{"messages": [{"role": "user", "content": f"{word} {n}"}]} for n in range(2)]
        (tmp_path / folder / "x.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    sources = [Source(path="one/x.jsonl"), Source(path="two/x.jsonl")]
    data = DataConfig(source=DataSource.jsonl, root=str(tmp_path), train=sources)
    found = load_prompts(data, RepliesConfig(), tokenizer, 0)
    assert sorted(p.prompt.id for p in found) == ["x/0", "x/0#2", "x/1", "x/1#2"]
    assert len({tuple(p.prompt.ids) for p in found}) == 4
    same = [DomainPrompt("d", Prompt(name, [1])) for name in ("a", "a#2", "a", "a")]
    assert [p.prompt.id for p in distinct(same)] == ["a", "a#2", "a#3", "a#4"]


@pytest.mark.parametrize(
    ("made", "eos", "words"),
    [
        (Made(8, 48, 3), (2,), ["Ended by the target: 3 of 8", "replies.max_new_tokens=6: 5"]),
        (Made(8, 40, 8), (), ["Ended by the target: 8 of 8", "cut at replies.max_new_tokens=6: 0"]),
        (Made(8, 48, 0), (2, 7), ["0 of 8", "never said its end token (2, 7)"]),
        (Made(8, 48, 0), (), ["0 of 8", "names no end token", "eos_token_id"]),
    ],
)
def test_how_replies_ended_is_one_line(made: Made, eos: tuple[int, ...], words: list[str]) -> None:
    line = made.line(eos, 6)
    assert "\n" not in line and all(word in line for word in words)
    assert ("end token" in line) == (made.stopped == 0)


ROW = {"id": "0", "domain": "d", "prompt_ids": [1, 2], "reply_ids": [3, 4], "stop": "length"}
DAMAGE = {
    "a line cut short": ('{"id": "0", "domain": "d", "prom', r"line 2 is not JSON"),
    "not an object": ("[1]", r"line 2 is a list, not an object with prompt_ids and reply_ids"),
    "no reply": (ROW | {"reply_ids": []}, r"line 2 has no token in `reply_ids`"),
    "no prompt": (ROW | {"prompt_ids": []}, r"line 2 has no token in `prompt_ids`"),
    "text in place of ids": (ROW | {"reply_ids": "four"}, r"line 2 has no token in `reply_ids`"),
    "a number that is no id": (ROW | {"reply_ids": [3, 4.0]}, r"line 2 has a float in `reply_ids`"),
    "true": (ROW | {"prompt_ids": [1, True]}, r"line 2 has a bool in `prompt_ids`"),
    "beyond the vocabulary": (ROW | {"reply_ids": [3, 50]}, r"line 2 has token 50 in `reply_ids`.* tokens 0 to 49"),
    "below it": (ROW | {"prompt_ids": [-1, 3]}, r"line 2 has token -1 in `prompt_ids`"),
    "no id": ({k: v for k, v in ROW.items() if k != "id"}, r"line 2 has no `id`"),
    "an id of another type": (ROW | {"id": 7}, r"line 2 has `id` of type int, not a string"),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_line_is_named(name: str, packed: bool, tmp_path: Path) -> None:
    """Alone, and among the parts of regenerate, where the remedy is another."""
    line, pattern = DAMAGE[name]
    text = f"{json.dumps(ROW)}\n{line if isinstance(line, str) else json.dumps(line)}\n"
    file = tmp_path / ("part-00000.jsonl.gz" if packed else "mine.jsonl")
    file.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    if packed:
        (tmp_path / SETTINGS).write_text(json.dumps({"target": OWN}))
    remedy = (
        "delete the file and run python -m draft_training.regenerate again" if packed else "repair or drop the line"
    )
    with pytest.raises(DataError, match=rf"{file.name} {pattern}.*; {remedy}$") as error:
        ids_of(tmp_path)
    assert "\n" not in str(error.value)


def test_a_damaged_or_missing_file_is_named(tmp_path: Path, target: Target) -> None:
    write(tmp_path, target)
    part = tmp_path / "part-00001.jsonl.gz"
    good = part.read_bytes()
    damaged = {good[:-12]: "cannot be read", good[:30] + b"\0" * 9 + good[39:]: "part-00001", b"": "is empty",
               gzip.compress(b"\xff\xfe\n"): "cannot be read"}  # fmt: skip
    for data, word in damaged.items():
        part.write_bytes(data)
        with pytest.raises(DataError, match=r"part-00001\.jsonl\.gz.*; delete the file and run") as error:
            ids_of(tmp_path)
        assert word in str(error.value) and "\n" not in str(error.value)
    part.unlink()
    with pytest.raises(DataError, match=r"holds 5 of 8 replies; run .*regenerate again.*replies\.force=true"):
        ids_of(tmp_path)
    assert len(list(read_replies(config(tmp_path, force=True), VOCABULARY))) == 5
    part.write_bytes(good)
    assert len(ids_of(tmp_path)) == 8
    with pytest.raises(DataError, match=r"nowhere holds no replies; write them with"):
        ids_of(tmp_path / "nowhere")


def test_replies_of_another_target_are_refused_unless_forced(tmp_path: Path, target: Target) -> None:
    write(tmp_path, target)
    found = check_target(config(tmp_path), OWN)
    assert found == {"path": str(tmp_path), "target": OWN, "forced": False} and whose(found).endswith("this target")
    with pytest.raises(ConfigError, match=f"target {OWN[:12]}, and target.path is {OTHER[:12]}") as error:
        check_target(config(tmp_path), OTHER)
    assert "\n" not in str(error.value) and "draft_training.regenerate" in str(error.value)
    found = check_target(config(tmp_path, force=True), OTHER)
    assert found == {"path": str(tmp_path), "target": OWN, "forced": True}
    assert "ANOTHER target (aaaaaaaaaaaa)" in whose(found)


def test_plain_lines_are_replies_of_an_unknown_target(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps(ROW) + "\n\n" + json.dumps(ROW | {"id": "1"}) + "\n")
    (tmp_path / "more.jsonl.gz").write_bytes(gzip.compress(json.dumps(ROW | {"id": "2"}).encode()))
    for path, ids in ((file, ["0", "1"]), (tmp_path, ["0", "1", "2"])):
        found = check_target(config(path), OTHER)
        assert found == {"path": str(path), "target": UNKNOWN, "forced": False}
        assert UNKNOWN in whose(found) and ids_of(path) == ids
