"""The demo's tokenizer: the same from the same text, lossless, saved whole or not at all."""

import random
from pathlib import Path
from typing import Any

import pytest

from core.errors import CheckpointError
from core.train.data.chat import render
from core.train.tokenizer import EOS, load_tokenizer, train_tokenizer

TEXTS = [f"def f{n}(x):\n    return x + {n}  # größer, 日本語 🎉\n" for n in range(200)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return train_tokenizer(TEXTS, 400, tmp_path_factory.mktemp("tokenizer") / "t")


def test_same_text_gives_the_same_files(tokenizer: Any, tmp_path: Path) -> None:
    again = train_tokenizer(iter(TEXTS), 400, tmp_path / "t")
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert len(tokenizer) == 400


def test_any_text_survives(tokenizer: Any) -> None:
    rng = random.Random(0)
    for _ in range(200):
        points = [
            rng.choice([rng.randrange(0x80), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]) for _ in range(40)
        ]
        text = "".join(map(chr, points))
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    every_byte = bytes(range(256)).decode("latin-1")
    assert tokenizer.decode(tokenizer(every_byte)["input_ids"]) == every_byte


def test_specials_are_single_tokens_and_nothing_is_added(tokenizer: Any) -> None:
    assert tokenizer(EOS)["input_ids"] == [tokenizer.eos_token_id]
    assert tokenizer.pad_token_id not in {None, tokenizer.eos_token_id}
    assert tokenizer("x")["input_ids"] == tokenizer("x", add_special_tokens=False)["input_ids"]


def test_chat_with_tools(tokenizer: Any) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    record = {
        "messages": [
            {"role": "user", "content": "1+1?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "2"},
        ],
        "tools": [{"type": "function", "function": {"name": "add"}}],
    }
    text = render(record, tokenizer).text
    assert text.startswith("<|im_start|>system\nYou may call these functions:\n")
    assert '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>' in text
    assert "None" not in text and "<|im_start|>tool\n2<|im_end|>" in text
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_failed_save_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import PreTrainedTokenizerFast

    old = train_tokenizer(TEXTS, 300, tmp_path / "t")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
    with pytest.raises(CheckpointError, match="No space left"):
        train_tokenizer(TEXTS, 320, tmp_path / "t")
    assert load_tokenizer(tmp_path / "t").get_vocab() == old.get_vocab()
