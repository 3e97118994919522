"""infer.text: streamed text is the decoded text, whole characters only, cut at the first complete stop string."""

import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from core.train.tokenizer import train_tokenizer
from infer.text import PATIENCE, REPLACEMENT, StopFinder, TextStream

SAMPLES = (
    "größer als 日本語",
    " 🎉🎊👩‍👩‍👧",
    "naïve “quotes” … end",
    "def f(x):\n    return x",
    "ééé 漢字漢字",
    "a b  c ,d .",
)
BYTES = [f"<0x{b:02X}>" for b in range(256)]
WORDS = ["▁", "▁Hello", "▁world", "lo", "▁é", "x", ",", "▁日"]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Byte-level BPE: tokens of bytes, and merges that end within characters."""
    return train_tokenizer([s * 3 for s in SAMPLES], 330, tmp_path_factory.mktemp("tokenizer") / "t")


@pytest.fixture(scope="module")
def sentencepiece() -> Any:
    """Llama's kind: words that begin with U+2581, bytes as tokens of their own, the first blank dropped."""
    vocab = {t: i for i, t in enumerate(["<unk>", "</s>", *BYTES, *WORDS])}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


def decoded(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def pieces(rng: random.Random, ids: list[int]) -> list[list[int]]:
    cut, out = 0, []
    while cut < len(ids):
        size = rng.choice([1, 1, 2, 3, 5, 9, 40])
        out.append(ids[cut : cut + size])
        cut += size
    return out


def cut_at(text: str, stops: list[str]) -> str:
    """By the definition: the stop string that is complete first, of several the one that began first."""
    for end in range(1, len(text) + 1):
        begun = [end - len(s) for s in stops if text[:end].endswith(s)]
        if begun:
            return text[: min(begun)]
    return text


def streamed(tokenizer: Any, parts: list[list[int]], stops: list[str], prompt: list[int] = []) -> tuple[str, bool]:  # noqa: B006
    stream, text = TextStream(tokenizer, stops, prompt), ""
    for part in parts:
        delta = stream.push(part)
        assert REPLACEMENT not in delta.text, "a character that is not whole was sent"
        assert delta.stopped == stream.stopped
        text += delta.text
        assert len(text) == stream.length <= stream.read
    return text + stream.finish(), stream.stopped


def word_ids(tokenizer: Any, rng: random.Random) -> list[int]:
    """Random words and characters as byte tokens, in SentencePiece's way."""
    ids: list[int] = []
    for _ in range(rng.randrange(1, 30)):
        if rng.random() < 0.5:
            ids.append(tokenizer.convert_tokens_to_ids(rng.choice(WORDS)))
        else:
            ids += [BYTES.index(f"<0x{b:02X}>") + 2 for b in rng.choice("é漢🎉👧ß").encode()]
    return ids


def test_byte_level_text_in_any_pieces_with_any_stops(byte_level: Any) -> None:
    rng = random.Random(0)
    for _ in range(400):
        text = "".join(rng.choice([rng.choice(SAMPLES), rng.choice("aé漢🎉 .\n")]) for _ in range(rng.randrange(1, 12)))
        ids = byte_level(text)["input_ids"]
        stops = []
        for _ in range(rng.randrange(3)):
            at = rng.randrange(len(text))
            stops.append(text[at : at + rng.randrange(1, 6)] + rng.choice(["", "", "?"]))
        got, stopped = streamed(byte_level, pieces(rng, ids), stops)
        assert got == cut_at(text, stops)
        assert stopped == any(s in text for s in stops)


def test_sentencepiece_text_in_any_pieces(sentencepiece: Any) -> None:
    rng = random.Random(1)
    for _ in range(400):
        ids = word_ids(sentencepiece, rng)
        text = decoded(sentencepiece, ids)
        stops = [text[at : at + 3] for at in [rng.randrange(len(text) or 1)] if text[at : at + 3]] * rng.randrange(2)
        assert streamed(sentencepiece, pieces(rng, ids), stops)[0] == cut_at(text, stops)


def test_a_character_comes_with_its_last_byte(byte_level: Any) -> None:
    ids = byte_level.convert_tokens_to_ids(list("ðŁİī"))  # the four bytes of 🎉 in byte-level letters
    stream = TextStream(byte_level)
    assert [stream.push([i]).text for i in ids] == ["", "", "", "🎉"]


def test_the_blank_before_the_first_word_depends_on_the_prompt(sentencepiece: Any) -> None:
    hello, world, eos = sentencepiece.convert_tokens_to_ids(["▁Hello", "▁world", "</s>"])
    assert streamed(sentencepiece, [[world]], []) == ("world", False)
    assert streamed(sentencepiece, [[world]], [], [hello]) == (" world", False)
    assert streamed(sentencepiece, [[hello], [eos], [eos], [world]], []) == ("Hello world", False)


def test_a_prompt_that_ends_within_a_character_is_no_context(byte_level: Any) -> None:
    first, *rest = byte_level.convert_tokens_to_ids(list("ðŁİī"))
    text, _ = streamed_loosely(byte_level, [*rest, *byte_level("ok")["input_ids"]], [first])
    assert text == REPLACEMENT * 3 + "ok", "the reply's own bytes, as if decoded alone"


def streamed_loosely(tokenizer: Any, ids: list[int], prompt: list[int]) -> tuple[str, int]:
    """One id a push; also the most ids that were decoded at once."""
    stream, text, most = TextStream(tokenizer, (), prompt), "", 0
    for i in ids:
        text += stream.push([i]).text
        most = max(most, len(stream.detokenizer.window))
    return text + stream.finish(), most


def test_an_end_within_a_character_is_the_replacement_once(byte_level: Any) -> None:
    ids = byte_level.convert_tokens_to_ids(["a", "ð", "Ł"])
    assert streamed(byte_level, [ids], [])[0] == "a" + REPLACEMENT


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_bytes_that_are_no_text_are_released_and_the_window_stays_small(
    kind: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(kind)
    bad = tokenizer.convert_tokens_to_ids("Ģ" if kind == "byte_level" else "<0x80>")
    x = tokenizer.convert_tokens_to_ids("x")
    text, most = streamed_loosely(tokenizer, [x, *[bad] * 300, x, x], [])
    assert text == "x" + REPLACEMENT * 300 + "xx"
    assert most <= 2 * PATIENCE + 1
    eos = tokenizer.eos_token_id
    text, most = streamed_loosely(tokenizer, [x, *[eos] * 300, x], [])
    assert text == "xx" and most <= 2 * PATIENCE + 1


def test_garbage_of_all_kinds_is_the_decoded_text(byte_level: Any) -> None:
    rng = random.Random(2)
    for _ in range(60):
        ids = [rng.randrange(len(byte_level)) for _ in range(rng.randrange(200))]
        assert streamed_loosely(byte_level, ids, [])[0] == decoded(byte_level, ids)


def test_stops_are_found_across_pushes_and_what_may_begin_one_is_held() -> None:
    finder = StopFinder(["</end>", "END"])
    assert [finder.push(t) for t in ("a<", "/e", "x<", "/end", ">b", "c")] == ["a", "", "</ex", "", "", ""]
    assert finder.stopped and finder.finish() == ""
    open_end = StopFinder(["END"])
    assert open_end.push("the EN") == "the " and open_end.finish() == "EN" and not open_end.stopped


def test_the_first_complete_stop_wins_however_the_text_is_divided() -> None:
    rng = random.Random(3)
    for _ in range(2000):
        text = "".join(rng.choice("ab") for _ in range(rng.randrange(12)))
        stops = ["".join(rng.choice("ab") for _ in range(rng.randrange(1, 5))) for _ in range(rng.randrange(1, 4))]
        finder, got, at = StopFinder(stops), "", 0
        while at < len(text):
            size = rng.randrange(1, 5)
            got += finder.push(text[at : at + size])
            at += size
        assert got + finder.finish() == cut_at(text, stops), (text, stops)


def test_blanks_are_not_cleaned_up(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["a , b . c"] * 9, 300, tmp_path / "t")
    tokenizer.clean_up_tokenization_spaces = True
    tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    text = "a , b . c 's"
    assert streamed(tokenizer, [[i] for i in tokenizer(text)["input_ids"]], [])[0] == text
