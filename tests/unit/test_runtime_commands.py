"""infer.generate, infer.chat, infer.validate and the Python API on a tiny model with a tokenizer."""

import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from core.errors import ConfigError
from core.models.load import load_model, save_model
from core.mxfp4 import ScaleRule
from infer import chat, generate, validate
from infer.llm import LLM
from infer.request import SamplingParams
from infer.round import Round
from tests import runtime_cases as cases
from tests.convert_cases import CONFIGS, edit_tensors, exported, values_of
from tests.drafter_cases import saved
from tests.fake_engine import VOCAB, make_tokenizer

CPU = ("--device", "cpu", "--dtype", "float32")


class Folders:
    def __init__(self, place: Path) -> None:
        config = CONFIGS["mimo"]()
        config.vocab_size, config.eos_token_id = VOCAB, None
        self.run = place / "run"
        self.model = self.run / "model"
        save_model(values_of(config, ScaleRule.even).items(), config, self.model)
        self.tokenizer = make_tokenizer(place / "tokens")
        self.tokenizer.save_pretrained(place / "tokens")
        for file in (place / "tokens").iterdir():
            shutil.copy(file, self.model / file.name)
        self.hf = exported(self.model, "hf", place / "hf")
        self.core = load_model(self.model, dtype=torch.float32, attention="eager").model
        self.drafts = place / "drafts"
        drafter = cases.taught(self.core, cases.prompts(), vocab_size=VOCAB)
        saved(drafter, self.core, self.drafts / "model")
        self.trained(1.0)

    def trained(self, tau: float) -> None:
        """What the drafter's run says of its acceptance."""
        report = {"teacher_forced": {"code": {"tau": tau}, "chat": {"tau": tau}}}
        (self.drafts / "report.json").write_text(json.dumps(report))

    def text(self, prompt: str, tokens: int) -> tuple[list[int], str]:
        ids = self.tokenizer(prompt)["input_ids"]
        reply = cases.greedy(self.core, [cases.Prompt("p", ids)], tokens)["p"]
        return reply, self.tokenizer.decode(reply, skip_special_tokens=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: Any) -> Iterator[Folders]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Folders(tmp_path_factory.mktemp("commands"))
    torch.set_num_threads(before)


def test_generate_streams_the_models_text(made: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    _, wanted = made.text("import os", 12)
    for more in ((), ("--drafter", str(made.drafts / "model"), "--stats")):
        assert (
            generate.main(["--model", str(made.hf), "--max-tokens", "12", "--ignore-eos", *CPU, *more, "import os"])
            == 0
        )
        out = capsys.readouterr()
        assert out.out == wanted + "\n"
    assert "12 tokens in" in out.err and "tau " in out.err and "ms a round" in out.err


def test_generate_of_many_prompts(made: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("import os\n\ndef main\n")
    words = ["--model", str(made.hf), "--max-tokens", "6", "--ignore-eos", *CPU]
    assert (
        generate.main([*words, "--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "out.jsonl")]) == 0
    )
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [r["prompt"] for r in rows] == ["import os", "def main"]
    for row in rows:
        assert (row["ids"], row["text"]) == made.text(row["prompt"], 6) and row["finish"] == "length"
    capsys.readouterr()
    assert generate.main([*words, "--chat", "import os", "def main"]) == 0
    assert capsys.readouterr().out.count("--- ") == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "/nowhere", "x"], "no such folder"),
        (["--model", "MODEL"], "no prompt"),
        (["--model", "MODEL", "--prompts", "/nowhere"], "cannot be read"),
        (["--model", "MODEL", "--top-p", "2", "x"], "top_p=2.0"),
        (["--model", "MODEL", "--device", "tpu", "x"], "device='tpu'"),
        (["--model", "MODEL", "--drafter", "MODEL", "x"], "model_type"),
        (["--model", "MODEL", "--max-length", "3", "import os def"], "the prompt has"),
        (["--model", "MODEL", "--out", "/nowhere/x.jsonl", "x"], "--out /nowhere/x.jsonl: expected a file"),
        (["--model", "MODEL", "--kv-tokens", "1000000000000", "x"], "out of memory: lower --kv-tokens"),
        (["--model", "DAMAGED generation_config.json", "x"], "generation_config.json cannot be read"),
        (["--model", "DAMAGED tokenizer.json", "x"], "its tokenizer cannot be loaded"),
    ],
)
def test_mistakes_end_in_one_line(
    made: Folders, words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(made.hf) if w == "MODEL" else w for w in words]
    if given[1].startswith("DAMAGED"):
        shutil.copytree(made.hf, tmp_path / "m")
        (tmp_path / "m" / given[1].split()[1]).write_text("{")
        given[1] = str(tmp_path / "m")
    assert generate.main([*given, *(() if "--device" in given else CPU)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("infer.generate: ") and error.count("\n") == 1


def test_standard_input_of_several_processes_is_refused(
    made: Folders, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only one of them would have it, and the others would end without a prompt while it waits for them."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert generate.main(["--model", str(made.hf), *CPU, "-"]) == 2
    assert "several processes have no common standard input" in capsys.readouterr().err


def test_no_gpu_is_said(made: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert generate.main(["--model", str(made.hf), "--device", "cuda", "x"]) == 2
    assert "torch sees no GPU" in capsys.readouterr().err


def test_chat(made: Folders, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns go through the template, are kept, and can be forgotten."""
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nmore\n/stats\n/reset\nhello\n"))
    words = ["--model", str(made.hf), "--max-tokens", "5", "--ignore-eos", "--seed", "1", *CPU]
    assert chat.main(words) == 0
    said = capsys.readouterr().out.split("> ")
    template = made.tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], tokenize=False, add_generation_prompt=True
    )
    _, wanted = made.text(template, 5)
    assert said[1].startswith(wanted)
    assert said[5] == said[1] and "tokens/s" in said[3]


def test_a_chat_goes_on_after_what_it_cannot_read(
    made: Folders, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A turn that is too long, and a conversation that the template refuses."""
    lines = ["word " * 60, "hello", "/system be brief", "hello", "/system", "hello"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    template = made.model / "chat_template.jinja"
    whole = template.read_text()
    template.write_text(whole.replace("'bad'", "'system'"))
    words = ["--model", str(made.model), "--max-tokens", "5", "--ignore-eos", "--max-length", "90", *CPU]
    assert chat.main(words) == 0
    template.write_text(whole)
    said = capsys.readouterr().out.split("> ")
    assert "the prompt has" in said[1] and "/reset" in said[1]
    assert "template refuses" in said[4]
    assert said[2] == said[6] and "[" not in said[2]


def test_who_stops_reading_gets_no_traceback(
    made: Folders, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def left(*args: Any, **more: Any) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", left)
    monkeypatch.setattr("os.dup2", lambda *_: None)
    assert generate.main(["--model", str(made.hf), "--max-tokens", "2", *CPU, "import os"]) == 1


def test_several_strings_end_a_reply(made: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    _, text = made.text("import os", 20)
    words = ["--model", str(made.hf), "--max-tokens", "20", "--ignore-eos", *CPU]
    assert generate.main([*words, "--stop", "no such text", "--stop", text[3:6], "import os"]) == 0
    assert capsys.readouterr().out == text[: text.index(text[3:6])] + "\n"


def test_replies_that_are_read_in_turn(made: Folders) -> None:
    """Each iteration steps the one engine; tokens of the other's request are the other's."""
    llm = LLM(made.hf, drafter=made.drafts / "model", device="cpu", dtype="float32")
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    streams = {p: llm.stream(p, params) for p in ("import os", "def main")}
    texts = dict.fromkeys(streams, "")
    while streams:
        for prompt in list(streams):
            piece = next(streams[prompt], None)
            if piece is None:
                del streams[prompt]
            else:
                texts[prompt] += piece[0]
                ids, _ = made.text("x", 3)
                if prompt == "def main":
                    assert llm.generate("x", SamplingParams(max_tokens=3, ignore_eos=True))[0].ids == ids
    assert texts == {p: made.text(p, 20)[1] for p in texts}
    assert not llm.live


def test_an_end_token_has_no_text(made: Folders) -> None:
    llm = LLM(made.hf, device="cpu", dtype="float32")
    ids, _ = made.text("import os", 20)
    end = next(i for i in range(4, 20) if ids[i] not in ids[:i])
    found = llm.generate("import os", SamplingParams(stop_token_ids=(ids[end],), ignore_eos=True))[0]
    assert found.ids == ids[: end + 1] and found.text == made.tokenizer.decode(ids[:end], skip_special_tokens=True)


def test_the_python_api(made: Folders) -> None:
    with LLM(made.hf, drafter=made.drafts / "model", device="cpu", dtype="float32") as llm:
        ids, text = made.text("import os", 20)
        one, two = llm.generate(
            ["import os", made.tokenizer("import os")["input_ids"]], SamplingParams(max_tokens=20, ignore_eos=True)
        )
        assert one.ids == two.ids == ids and one.text == text and one.finish == "length"
        stop = text[3:6]
        cut = llm.generate("import os", SamplingParams(max_tokens=20, stop=(stop,), ignore_eos=True))[0]
        assert cut.text == text[: text.index(stop)] and cut.finish == "stop"
        pieces = [t for t, _ in llm.stream("import os", SamplingParams(max_tokens=20, ignore_eos=True))]
        assert "".join(pieces) == text and len(pieces) > 1
        stream = llm.stream("import os", SamplingParams(max_tokens=200, ignore_eos=True))
        next(stream)
        stream.close()
        list(llm.engine.step())
        assert llm.stats().running == 0 and llm.stats().kv_used == 0
        with pytest.raises(ConfigError, match="2 entries for 1"):
            llm.generate("x", [SamplingParams(), SamplingParams()])


def validated(made: Folders, *more: str, model: Path | None = None) -> int:
    words = ["--model", str(model or made.hf), "--against", str(made.run), "--documents", "3", "--length", "60"]
    return validate.main([*words, "--replies", "2", "--reply-tokens", "12", "--device", "cpu", *more])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_was_exported_is_what_was_trained(
    made: Folders, dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found.json"
    assert validated(made, "--dtype", dtype, "--layers", "--drafter", str(made.drafts), "--out", str(out)) == 0
    said = capsys.readouterr().out
    assert said.count("pass") == 5 and "layer 1" in said and "computes what was trained" in said
    found = json.loads(out.read_text())
    assert found["own"]["positions"] == found["exact"]["positions"] > 100 and len(found["layers"]) == 2
    if dtype == "float32":
        assert found["own"]["kl"] < 1e-8 and found["same_replies"] == 2


def test_another_model_does_not_pass(made: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One expert's codes changed by one step each: no check of files would tell, the logits do."""
    folder = tmp_path / "hf"
    shutil.copytree(made.hf, folder)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = next(n for n in sorted(tensors) if tensors[n].dtype == torch.uint8 and "packed" in n)
        tensors[name] ^= 0x11

    edit_tensors(folder, change)
    assert validated(made, "--dtype", "float32", model=folder) == 1
    said = capsys.readouterr().out
    assert "FAIL  logits" in said and "not what was trained" in said


def test_replies_that_fail_are_not_the_same(
    made: Folders, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits along a text may be right where those of generation are no numbers."""
    whole = Round.compute

    def broken(self: Round, given: Any) -> Any:
        found = whole(self, given)
        return replace(found, token=torch.full_like(found.token, -1))

    monkeypatch.setattr(Round, "compute", broken)
    assert validated(made, "--dtype", "float32", "--max-length", "30") == 1
    assert "FAIL  greedy" in capsys.readouterr().out


def test_a_drafter_that_lost_its_acceptance_raises_the_alarm(made: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    for trained, status in ((1.2, 0), (4.9, 1)):
        made.trained(trained)
        assert validated(made, "--dtype", "float32", "--drafter", str(made.drafts)) == status
    assert "FAIL  drafter" in capsys.readouterr().out
    (made.drafts / "report.json").write_text("[1]")
    assert validated(made, "--dtype", "float32", "--drafter", str(made.drafts)) == 2
    assert "is no report" in capsys.readouterr().err
    made.trained(1.0)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--text", "/nowhere"], "no such file"),
        (["--documents", "0"], "--documents 0"),
        (["--against", "/nowhere"], "neither a run"),
        (["--out", "/nowhere/x.json"], "--out /nowhere/x.json: expected a file"),
    ],
)
def test_what_cannot_be_told_is_status_two(
    made: Folders, more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert validated(made, *more) == 2
    assert said in capsys.readouterr().err


def test_text_files(made: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.txt").write_text("import os and then\n\ndef main():\n    return 0\n")
    chat_row = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "import os"}]}
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": "import os"}) + "\n" + json.dumps(chat_row) + "\n")
    (tmp_path / "empty.txt").write_text("")
    for name in ("t.txt", "t.jsonl"):
        assert validated(made, "--dtype", "float32", "--text", str(tmp_path / name)) == 0
    capsys.readouterr()
    assert validated(made, "--text", str(tmp_path / "empty.txt")) == 2
    assert "no document" in capsys.readouterr().err
