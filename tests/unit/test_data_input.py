"""Chat records through real kinds of templates, and input that is wrong."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from core.config import CONFIG_DIR
from core.errors import ConfigError, DataError, Fp4FlashError
from core.train.batch import IGNORE
from core.train.config import DataConfig, DataSource, Source
from core.train.data import eval_batches, train_stream
from core.train.data.chat import render
from core.train.data.encode import Tally, encode_all
from core.train.tokenizer import train_tokenizer

NATIVE = (  # the shape of Qwen2.5's: tools and calls in the template, tool results grouped into one user turn
    "{%- if tools %}<|im_start|>system\nTOOLS{% for t in tools %}{{ t | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{%- for m in messages %}{% if m.role == 'tool' %}"
    "{% if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "\n<tool_response>{{ m.content }}</tool_response>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}CALL{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}\n{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)
REWRITES = (  # earlier turns change when later ones come, as where thinking is dropped
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}|{{ messages | length }}{% endfor %}"
)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Größe?  "},
    {"role": "assistant", "content": "  5 m 🎉 high"},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "6 m"},
]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2]}}}
TOOL_TALK = {
    "id": "t1",
    "messages": [
        {"role": "user", "content": "add"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "3", "name": "add"},
        {"role": "tool", "content": "4", "name": "add"},
        {"role": "assistant", "content": "3 and 4"},
    ],
    "tools": [{"type": "function", "function": {"name": "add", "parameters": {}}}],
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return train_tokenizer(
        [f"user assistant {n}\n" for n in range(200)], 400, tmp_path_factory.mktemp("tokenizer") / "t"
    )


@pytest.fixture
def with_template(tokenizer: Any) -> Any:
    kept = tokenizer.chat_template

    def change(template: str | None) -> Any:
        tokenizer.chat_template = template
        return tokenizer

    yield change
    tokenizer.chat_template = kept


def config(loss_on: str = "all", **changes: Any) -> DataConfig:
    return DataConfig(source=DataSource.jsonl, seq_len=64, loss_on=loss_on, **changes)


def learned(record: dict[str, Any], tokenizer: Any) -> str:
    """The text that carries loss, pieces joined by |."""
    (found,) = encode_all([record], tokenizer, config("assistant"))
    pieces, inside = [], False
    for token, carries in zip(found.ids.tolist(), found.carries.tolist(), strict=True):
        if carries:
            pieces = [*pieces, [token]] if not inside else [*pieces[:-1], [*pieces[-1], token]]
        inside = carries
    return "|".join(tokenizer.decode(p) for p in pieces)


def test_native_tool_calls_are_not_flattened(with_template: Any) -> None:
    tokenizer = with_template(NATIVE)
    text = render(TOOL_TALK, tokenizer).text
    assert 'CALLadd{"a": 1, "b": [2]}' in text and "TOOLS{" in text and "None" not in text
    wire = json.loads(json.dumps(TOOL_TALK))
    wire["messages"][1]["tool_calls"][0]["function"]["arguments"] = json.dumps({"a": 1, "b": [2]})
    assert render(wire, tokenizer).text == text, "arguments as JSON text (OpenAI's wire form) read the same"


def test_templates_without_tools_show_them_in_the_system_message(tokenizer: Any) -> None:
    record = TOOL_TALK | {"messages": [TALK[0], *TOOL_TALK["messages"]]}
    text = render(record, tokenizer).text
    assert text.startswith("<|im_start|>system\nBe brief.\n\nYou may call these functions:\n{")
    assert text.count("<|im_start|>system") == 1
    assert '<tool_call>{"name": "add", "arguments": {"a": 1, "b": [2]}}</tool_call>' in text


def test_refused_system_message_goes_to_the_user(with_template: Any) -> None:
    tokenizer = with_template(NO_SYSTEM)
    assert render({"messages": TALK}, tokenizer).text.startswith("<|im_start|>user\nBe brief.\n\nGröße?")
    with pytest.raises(DataError, match=r"refuses record x9 \(System role not supported\)"):
        render({"id": "x9", "messages": [TALK[0]]}, tokenizer)
    with pytest.raises(DataError, match="no chat template"):
        render({"messages": TALK}, with_template(None))


def test_content_parts_and_null(tokenizer: Any) -> None:
    parts = [{"type": "text", "text": "Hello "}, {"type": "text", "text": "you"}]
    text = render({"messages": [{"role": "user", "content": parts}, {"role": "assistant"}]}, tokenizer).text
    assert text == "<|im_start|>user\nHello you<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"


@pytest.mark.parametrize("template", ["own", MARKED])
def test_assistant_mask_and_ids_of_the_plain_tokenisation(template: str, with_template: Any, tokenizer: Any) -> None:
    tokenizer = tokenizer if template == "own" else with_template(template)
    assert learned({"messages": TALK}, tokenizer) == "  5 m 🎉 high<|im_end|>|6 m<|im_end|>"
    (masked,), (all_loss,) = (encode_all([{"messages": TALK}], tokenizer, config(on)) for on in ("assistant", "all"))
    assert masked.ids.tolist() == all_loss.ids.tolist() and all_loss.carries.all()


def test_assistant_mask_with_tools(with_template: Any) -> None:
    assert learned(TOOL_TALK, with_template(NATIVE)) == 'CALLadd{"a": 1, "b": [2]}<|im_end|>|3 and 4<|im_end|>'


def test_mask_in_the_labels(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": TALK}) + "\n")
    stream = train_stream(
        config("assistant", root=str(tmp_path), train=[Source("a.jsonl")]), tokenizer, batch_size=4, seed=0
    )
    batch = next(stream)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    kept = batch.labels_BT[batch.labels_BT != IGNORE]
    assert 0 < (kept == end).sum() < (batch.input_ids_BT == end).sum(), "ends of user turns carry no loss"


def test_mask_refuses_templates_that_rewrite(with_template: Any) -> None:
    with pytest.raises(DataError, match="loss_on=all"):
        encode_all([{"messages": TALK}], with_template(REWRITES), config("assistant"))


def test_eos_once(tokenizer: Any, with_template: Any) -> None:
    (text,) = encode_all([{"text": "hello"}], tokenizer, config())
    assert text.ids[-1] == tokenizer.eos_token_id
    pieces = encode_all([{"text": "line\n" * 1000}], tokenizer, config())
    assert [p.ids[-1] == tokenizer.eos_token_id for p in pieces] == [False] * (len(pieces) - 1) + [True]
    ends = with_template("{% for m in messages %}{{ m.content }}<|endoftext|>\n{% endfor %}")
    (chat,) = encode_all([{"messages": TALK}], ends, config())
    assert (chat.ids == tokenizer.eos_token_id).sum() == len(TALK), "the template closed it"


def test_left_out_records_are_counted(tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask = {"messages": [{"role": "user", "content": "?"}]}
    tally = Tally()
    assert (
        len(encode_all([ask | {"prompt_only": True}, ask, {"messages": TALK}], tokenizer, config("assistant"), tally))
        == 1
    )
    assert (tally.prompt_only, tally.silent) == (1, 1)
    records = [ask | {"prompt_only": True}] * 3 + [{"messages": TALK}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    for rank in range(2):
        train_stream(
            config(root=str(tmp_path), train=[Source("a.jsonl")]), tokenizer, batch_size=2, seed=0, rank=rank, world=2
        )
    assert capsys.readouterr().out.count("data: left out 3 without a reply") == 1


GOOD = json.dumps({"text": "fine"}).encode() + b"\n"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", None, ["a.jsonl", "matches no file"]),
        ("a.jsonl", b"", ["a.jsonl", "is empty"]),
        ("a.jsonl.gz", b"", ["a.jsonl.gz", "is empty"]),
        ("a.jsonl", b"\n\n", ["a.jsonl", "is empty"]),
        ("a.jsonl.gz", b"not gzip at all", ["a.jsonl.gz", "cannot be read"]),
        ("a.jsonl.gz", gzip.compress(GOOD * 5000)[:-20], ["a.jsonl.gz", "cannot be read"]),
        ("a.jsonl.gz", gzip.compress(GOOD * 50)[:14] + b"\xff" * 40, ["a.jsonl.gz", "cannot be read"]),
        ("a.jsonl", GOOD + b"\xff\xfe\n", ["a.jsonl", "cannot be read"]),
        ("a.jsonl", GOOD + b'{"text": \n', ["a.jsonl line 2", "not JSON"]),
        ("a.jsonl", GOOD + b"[1]\n", ["a.jsonl line 2", "is a list"]),
        ("a.jsonl", GOOD + b'{"txt": "x"}\n', ["a.jsonl line 2", "neither `messages` nor `text`"]),
        ("a.jsonl", GOOD + b'{"text": 5}\n', ["a.jsonl line 2", "`text` of type int"]),
        ("a.jsonl", GOOD + b'{"messages": "hi"}\n', ["a.jsonl line 2", "not a list"]),
        ("a.jsonl", GOOD + b'{"messages": []}\n', ["a.jsonl line 2", "at least one message"]),
        ("a.jsonl", GOOD + b'{"messages": ["hi"]}\n', ["a.jsonl line 2", "messages[0] without a `role`"]),
        ("a.jsonl", GOOD + b'{"messages": [{"role": "user", "content": 5}]}\n', ["line 2", "content of type int"]),
        ("a.jsonl", GOOD + b'{"messages": [{"role": "user", "tool_calls": 5}]}\n', ["line 2", "tool_calls"]),
        ("a.jsonl", GOOD + b'{"messages": [{"role": "user"}], "tools": {}}\n', ["line 2", "`tools` of type dict"]),
        ("a.jsonl", b'{"text": ""}\n', ["a.jsonl", "no usable document"]),
    ],
)
def test_bad_files(name: str, content: bytes | None, words: list[str], tokenizer: Any, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        train_stream(config(root=str(tmp_path), train=[Source(name)]), tokenizer, batch_size=1, seed=0)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": [Source("a.jsonl")]}, "FP4FLASH_DATA"),
        ({"root": "/nowhere", "train": [Source("a.jsonl")]}, "matches no file"),
        ({"root": "/"}, "data.train is empty"),
        ({"root": "/", "train": [Source("a.jsonl", weight=0.0)]}, "weight=0.0"),
        ({"root": "/", "train": [Source("a.jsonl")], "shuffle_buffer": 0}, "data.shuffle_buffer=0"),
        ({"source": DataSource.embedded, "max_bytes": 1000, "loss_on": "some"}, "data.loss_on=some"),
        ({"source": DataSource.embedded, "max_bytes": 1000, "seq_len": 1}, "data.seq_len=1"),
    ],
)
def test_bad_settings(changes: dict[str, Any], words: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FP4FLASH_DATA", raising=False)
    with pytest.raises(Fp4FlashError) as caught:
        train_stream(DataConfig(**{"source": DataSource.jsonl, **changes}), tokenizer, batch_size=1, seed=0)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"data\.eval_rows=0"):
        eval_batches(DataConfig(eval_rows=0), tokenizer, 1)


def test_the_bundle(tokenizer: Any) -> None:
    """configs/data/jsonl.yaml on the real files: every domain there, shares as configured, resumable."""
    if not os.environ.get("FP4FLASH_DATA"):
        pytest.skip("FP4FLASH_DATA is not set; no data bundle to read")
    chosen: Any = OmegaConf.to_container(OmegaConf.load(Path(CONFIG_DIR) / "data" / "jsonl.yaml"))
    val = [Source(**s) for s in chosen["val"]]
    small = [Source(**s) for s in chosen["train"] if "chat" in s["path"] or "_demo" in s["path"]]
    bundle = DataConfig(source=DataSource.jsonl, train=small, val=val, seq_len=256, eval_rows=4)
    assert {
        k: sum(len(b.input_ids_BT) for b in v) for k, v in eval_batches(bundle, tokenizer, 2).items()
    } == dict.fromkeys(("math", "code", "agent", "chat", "wiki", "python"), 4)
    stream = train_stream(bundle, tokenizer, batch_size=8, seed=0)
    for _ in range(30):
        next(stream)
    emitted = {i.name: i.emitted / i.weight for i in stream.ingredients}
    longest = max(len(d.ids) / i.weight for i in stream.ingredients for d in i.documents)
    assert max(emitted.values()) - min(emitted.values()) <= longest
