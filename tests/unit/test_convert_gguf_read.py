"""GGUF files as they come: tokenizers there and back, dense Llama, dtypes, and every kind of damage in one line."""

import copy
import json
import struct
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

from convert.export import main as export
from convert.formats.gguf_file import open_gguf
from convert.formats.gguf_read import gguf_to_checkpoint
from convert.formats.gguf_tokenizer import SPLITTERS, read_tokenizer, tokenizer_fields
from core.checkpoint.index import open_checkpoint
from core.errors import CheckpointError, UnsupportedError
from core.models.load import load_model
from core.models.mimo_v2_config import MiMoV2Config
from tests.unit.test_convert_gguf import MODELS, same, saved
from tests.unit.test_families import FAMILIES, MIMO, SIZE, make


def fast_tokenizer(vocab: int, pre: Any) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=["<|end|>", "<|start|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(["the cat sat on the mat in 1234 days, the hat's end"] * 3, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|start|>")
    fast.add_tokens(["<tool>"])
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return fast


def split_by(name: str) -> Any:
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name not in SPLITTERS)
    if name in SPLITTERS:
        return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLITTERS[name]), "isolated"), level])
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(True), level]) if name == "smollm" else level


@pytest.mark.parametrize("name", ["qwen2", "llama-bpe", "gpt-4o", "gpt-2", "smollm"])
def test_tokenizer_there_and_back(name: str, tmp_path: Path) -> None:
    fast = fast_tokenizer(290, split_by(name))
    config = LlamaConfig(**SIZE | {"vocab_size": 300})
    fast.save_pretrained(tmp_path)
    fields = tokenizer_fields(tmp_path, config)
    assert fields["tokenizer.ggml.pre"] == name
    assert len(fields["tokenizer.ggml.tokens"]) == len(fields["tokenizer.ggml.token_type"]) == 300
    assert fields["tokenizer.ggml.token_type"][:2] == [3, 3]
    assert fields["tokenizer.ggml.token_type"][len(fast) - 1] == 4 and fields["tokenizer.ggml.token_type"][-1] == 5
    assert (fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]) == (1, 0)
    assert fields["tokenizer.ggml.add_bos_token"] is False
    back = read_tokenizer(fields, tmp_path, 64)
    text = "<|start|>The cat's 12345 hats!\n\n  <tool> \u00e9t\u00e9 <|end|>"
    assert back is not None and back(text).input_ids == fast(text).input_ids
    assert back.decode(back(text).input_ids) == fast.decode(fast(text).input_ids)
    assert back.chat_template == fast.chat_template and len(back) == len(fast)
    steps = [json.loads(t.backend_tokenizer.to_str())["pre_tokenizer"] for t in (fast, back)]
    assert steps[0] == steps[1]


def test_tokenizer_split_by_another_rule_is_refused(tmp_path: Path) -> None:
    fast = fast_tokenizer(290, pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), split_by("gpt-2")]))
    fast.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="splits text by"):
        tokenizer_fields(tmp_path, LlamaConfig(**SIZE | {"vocab_size": 300}))


def test_tokenizer_travels_with_the_model(tmp_path: Path) -> None:
    config = MiMoV2Config(**MIMO | {"vocab_size": 300}, eos_token_id=0)
    fast = fast_tokenizer(290, split_by("qwen2"))
    saved(config, tmp_path / "model", tokenizer=fast)
    assert export(["--to", "gguf", "--from", str(tmp_path / "model"), "--out", str(tmp_path / "out")]) == 0
    back = gguf_to_checkpoint(tmp_path / "out" / "model.gguf", tmp_path / "back")
    loaded = load_model(back)
    assert loaded.tokenizer("the mat").input_ids == fast("the mat").input_ids
    assert loaded.config.eos_token_id == 0 and loaded.config.bos_token_id == 1


def dense_llama(path: Path, config: Any) -> dict[str, Tensor]:
    """A GGUF as llama.cpp's converter writes dense Llama: q and k rows permuted, matrices Q8_0. Its values."""
    state = make(config).state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    for key, value in {
        "context_length": 64, "embedding_length": 32, "block_count": 2, "feed_forward_length": 64,
        "attention.head_count": heads, "attention.head_count_kv": kv, "rope.dimension_count": 8,
    }.items():  # fmt: skip
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-6)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    values = {}
    for name, value in state.items():
        if name == "lm_head.weight":
            continue
        out = value
        for part, count in (("q_proj", heads), ("k_proj", kv)):
            if part in name:
                out = value.reshape(count, 2, -1, value.shape[-1]).swapaxes(1, 2).reshape(value.shape)
        kind = gguf.GGMLQuantizationType.F32 if out.dim() == 1 else gguf.GGMLQuantizationType.Q8_0
        data = gguf.quants.quantize(out.numpy(), kind)
        writer.add_tensor(names.get_name(name, (".weight",)), data, raw_dtype=kind)
        values[name] = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(value.numpy(), kind), kind).copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def test_dense_llama_comes_in_with_its_rotary_order(tmp_path: Path) -> None:
    config = FAMILIES["llama tied"]
    values = dense_llama(tmp_path / "llama.gguf", copy.deepcopy(config))
    back = load_model(gguf_to_checkpoint(tmp_path / "llama.gguf", tmp_path / "back"))
    assert back.config.tie_word_embeddings and back.config.rms_norm_eps == 1e-6 and back.config.head_dim == 8
    for name, value in values.items():
        assert same(back.model.state_dict()[name], value.bfloat16()), name


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    root = tmp_path_factory.mktemp("good")
    saved(MODELS["qwen3moe"], root / "model")
    assert export(["--to", "gguf", "--from", str(root / "model"), "--out", str(root / "out")]) == 0
    return (root / "out" / "model.gguf").read_bytes()


def at(data: bytes, where: bytes, skip: int, new: bytes) -> bytes:
    start = data.index(where) + len(where) + skip
    return data[:start] + new + data[start + len(new) :]


BAD = {
    "wrong magic": lambda d: b"GGML" + d[4:],
    "big-endian": lambda d: d[:4] + d[4:8][::-1] + d[8:],
    "old version": lambda d: d[:4] + struct.pack("<I", 1) + d[8:],
    "empty": lambda d: b"",
    "header only": lambda d: d[:30],
    "cut in the fields": lambda d: d[:300],
    "cut in the data": lambda d: d[:-100],
    "2^60 tensors": lambda d: d[:8] + struct.pack("<Q", 2**60) + d[16:],
    "2^60 fields": lambda d: d[:16] + struct.pack("<Q", 2**60) + d[24:],
    "long string": lambda d: at(d, b"general.type", 4, struct.pack("<Q", 2**62)),
    "unknown field type": lambda d: at(d, b"general.type", 0, struct.pack("<I", 77)),
    "unknown tensor type": lambda d: at(d, b"blk.0.attn_q.weight", 4 + 16, struct.pack("<I", 999)),
    "absurd dimension": lambda d: at(d, b"blk.0.attn_q.weight", 4 + 8, struct.pack("<Q", 2**61)),
    "nine dimensions": lambda d: at(d, b"blk.0.attn_q.weight", 0, struct.pack("<I", 9)),
    "offset behind the end": lambda d: at(d, b"blk.0.attn_q.weight", 4 + 16 + 4, struct.pack("<Q", 2**40)),
    "offset over another": lambda d: at(d, b"blk.0.attn_q.weight", 4 + 16 + 4, struct.pack("<Q", 32)),
    "no layers": lambda d: at(d, b"qwen3moe.block_count", 4, struct.pack("<I", 0)),
    "two billion layers": lambda d: at(d, b"qwen3moe.block_count", 4, struct.pack("<I", 2**31 - 1)),
    "a million million wide": lambda d: at(d, b"qwen3moe.embedding_length", 4, struct.pack("<I", 2**31)),
    "layers and wide heads": lambda d: at(d, b"qwen3moe.attention.head_count", 4, struct.pack("<I", 2**19)),
    "no heads": lambda d: at(d, b"qwen3moe.attention.head_count_kv", 4, struct.pack("<I", 0)),
    "field missing": lambda d: d.replace(b"qwen3moe.expert_count", b"qwen3moe.expert_comet"),
    "unknown tensor": lambda d: d.replace(b"blk.0.attn_q.weight", b"blk.0.attn_z.weight"),
    "unknown architecture": lambda d: d.replace(b"general.architecture\x08\0\0\0\x08\0\0\0\0\0\0\0qwen3moe",
                                                b"general.architecture\x08\0\0\0\x08\0\0\0\0\0\0\0qwen9moe"),
    "not UTF-8": lambda d: d.replace(b"general.type", b"general.\xff\xff\xff\xff"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(BAD))
def test_bad_files_end_in_one_line(name: str, good: bytes, tmp_path: Path) -> None:
    damaged = BAD[name](good)
    assert damaged != good
    (tmp_path / "bad.gguf").write_bytes(damaged)
    with pytest.raises((CheckpointError, UnsupportedError)) as caught:
        gguf_to_checkpoint(tmp_path / "bad.gguf", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_any_flipped_byte_of_the_head_ends_in_one_line_or_reads(good: bytes, tmp_path: Path) -> None:
    """No other exception, whatever a stranger writes there."""
    path = tmp_path / "bad.gguf"
    head = good.index(b"output.weight")
    for position in range(0, head, 3):
        path.write_bytes(good[:position] + bytes([good[position] ^ 0x81]) + good[position + 1 :])
        try:
            open_gguf(path)
        except CheckpointError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    "name", ["cut in the data", "absurd dimension", "offset behind the end", "offset over another"]
)
def test_the_head_alone_tells(name: str, good: bytes, tmp_path: Path) -> None:
    """Before any tensor is read, so before memory is taken for it."""
    (tmp_path / "bad.gguf").write_bytes(BAD[name](good))
    with pytest.raises(CheckpointError):
        open_gguf(tmp_path / "bad.gguf")


def test_every_cut_of_the_head_is_found(good: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    for end in range(0, good.index(b"output.weight"), 5):
        path.write_bytes(good[:end])
        with pytest.raises(CheckpointError):
            open_gguf(path)


def test_dtypes_without_the_manifest(tmp_path: Path) -> None:
    """BF16 where that changes no value, but for the correction bias; a value that needs F32 keeps it."""
    model = saved(MODELS["mimo2"], tmp_path / "model")
    file = model / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.gate.e_score_correction_bias"].zero_()
    tensors["model.norm.weight"] = torch.full((32,), 1.0 + 2.0**-20)
    save_file(tensors, file, metadata={"format": "pt"})
    assert export(["--to", "gguf", "--from", str(model), "--out", str(tmp_path / "out")]) == 0
    (tmp_path / "out" / "manifest.json").unlink()
    back = open_checkpoint(gguf_to_checkpoint(tmp_path / "out" / "model.gguf", tmp_path / "back"))
    wide = {n for n, e in back.entries.items() if e.dtype == torch.float32}
    assert wide == {"model.layers.1.mlp.gate.e_score_correction_bias", "model.norm.weight"}
    assert torch.equal(back.read("model.norm.weight"), tensors["model.norm.weight"])
