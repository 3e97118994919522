"""A GGUF file as a checkpoint folder: MXFP4 keeps its codes, everything else becomes what its values fit.

    MXFP4 experts          ->  X.weight_packed, X.weight_scale per expert (GPT-OSS: *_blocks, *_scales, fused)
    F32, F16, BF16         ->  the dtype that manifest.json beside the file names, else BF16 if that changes no value
    other quantised types  ->  BF16 of the dequantised values

Read: MiMo-V2, Qwen3-MoE, GPT-OSS and dense Llama, whether fp4flash or llama.cpp's converter wrote them. llama.cpp
stores Llama's q and k rows so that rotary pairs are neighbours; transformers rotates halves, so their order is undone
here. One tensor (an expert, where they are stacked) is in memory at a time.
"""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from convert.formats.gguf_config import arch_in, config_of
from convert.formats.gguf_file import GgufFile, GgufTensor, open_gguf
from convert.formats.gguf_names import STACKED, Arch, from_blocks, from_gguf
from convert.formats.gguf_tokenizer import read_tokenizer
from convert.source import MANIFEST, Source, open_source, packed_shape
from core.checkpoint.index import read_json
from core.checkpoint.writer import ShardWriter, replacing, write_text
from core.errors import CheckpointError
from core.models.build import config_from
from core.models.load import saved_config
from core.mxfp4 import BLOCK

MXFP4 = gguf.GGMLQuantizationType.MXFP4
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
KEPT_WIDE = "e_score_correction_bias"  # FP32 in every checkpoint: expert choice hangs on its last bits
Pair = tuple[str, Tensor]


@dataclass(frozen=True)
class GgufModel:
    """`config`: config.json's content. `dtypes`: what manifest.json says of canonical names, if it is there."""

    file: GgufFile
    arch: Arch
    config: dict[str, Any]
    dtypes: dict[str, str]

    @property
    def has_mxfp4(self) -> bool:
        return any(t.kind is MXFP4 for t in self.file.tensors.values())

    def tensors(self) -> Iterator[Pair]:
        """(checkpoint key, tensor) of every tensor of the model, one at a time; MTP blocks are left out."""
        layers = self.config["num_hidden_layers"]
        for tensor in self.file.tensors.values():
            block = re.match(r"blk\.(\d+)\.", tensor.name)
            if block and int(block[1]) >= layers:
                continue
            expert = STACKED.fullmatch(tensor.name)
            if expert and self.arch.name == "gpt-oss":
                yield from self.fused(*expert.groups())
            elif expert and expert[3] == "weight":
                yield from self.experts(tensor, f"model.layers.{expert[1]}.mlp.experts", f"{expert[2]}_proj.weight")
            elif re.fullmatch(r"blk\.\d+\.attn_qkv\.(weight|bias)", tensor.name):
                yield from self.split(tensor)
            else:
                yield from self.one(tensor)

    def one(self, tensor: GgufTensor) -> Iterator[Pair]:
        name = from_gguf(self.arch, tensor.name)
        if name is None:
            raise CheckpointError(
                f"{self.file.path} holds {tensor.name}, which {self.arch.name} has no place for; it would be lost, so "
                "reading stops"
            )
        rotary = re.search(r"\.self_attn\.([qk])_proj\.(weight|bias)$", name) if self.arch.name == "llama" else None
        heads = self.config["num_attention_heads" if rotary and rotary[1] == "q" else "num_key_value_heads"]
        if tensor.kind is MXFP4:
            packed = from_blocks(self.file.raw(tensor))
            pair = [packed.codes, packed.scales]
            yield from zip(
                (f"{name}_packed", f"{name}_scale"), [halves(p, heads) if rotary else p for p in pair], strict=True
            )
        else:
            value = self.settled(name, value_of(self.file, tensor))
            yield name, halves(value, heads) if rotary else value

    def experts(self, tensor: GgufTensor, stem: str, leaf: str) -> Iterator[Pair]:
        for expert in range(tensor.shape[0]):
            name = f"{stem}.{expert}.{leaf}"
            if tensor.kind is MXFP4:
                packed = from_blocks(self.file.raw(tensor, expert))
                yield f"{name}_packed", packed.codes
                yield f"{name}_scale", packed.scales
            else:
                yield name, self.settled(name, value_of(self.file, tensor, expert))

    def split(self, tensor: GgufTensor) -> Iterator[Pair]:
        """Q, K and V that llama.cpp's converter left fused, [Q | K | V] along the rows."""
        layer, leaf = int(tensor.name.split(".")[1]), tensor.name.rsplit(".", 1)[1]
        config = self.config
        window = config.get("layer_types", [""] * (layer + 1))[layer] == "sliding_attention"
        kv = config.get("swa_num_key_value_heads") if window and self.arch.name == "mimo2" else None
        kv = kv or config["num_key_value_heads"]
        width = config["head_dim"]
        rows = [config["num_attention_heads"] * width, kv * width, kv * config.get("v_head_dim", width)]
        value = value_of(self.file, tensor)
        if value.shape[0] != sum(rows):
            raise CheckpointError(
                f"{self.file.path}: {tensor.name} has {value.shape[0]} rows, its heads need {sum(rows)}"
            )
        for part, piece in zip("qkv", value.split(rows), strict=True):
            name = f"model.layers.{layer}.self_attn.{part}_proj.{leaf}"
            yield name, self.settled(name, piece.contiguous())

    def fused(self, layer: str, part: str, leaf: str) -> Iterator[Pair]:
        """GPT-OSS: gate and up come together when gate's turn is, rows alternating; weights as [E, K, N]."""
        if part == "up":
            return
        names = [f"blk.{layer}.ffn_{p}_exps.{leaf}" for p in (("gate", "up") if part == "gate" else ("down",))]
        if any(n not in self.file.tensors for n in names):
            raise CheckpointError(f"{self.file.path} has {names[0]} without {names[-1]}; it is incomplete")
        found = [self.file.tensors[n] for n in names]
        joined = "gate_up_proj" if part == "gate" else "down_proj"
        name = f"model.layers.{layer}.mlp.experts.{joined}" + ("_bias" if leaf == "bias" else "")
        if all(t.kind is MXFP4 for t in found):
            packed = [from_blocks(self.file.raw(t)) for t in found]
            yield f"{name}_blocks", alternate([p.codes for p in packed]).unflatten(-1, (-1, BLOCK // 2))
            yield f"{name}_scales", alternate([p.scales for p in packed])
        else:
            value = alternate([value_of(self.file, t) for t in found])
            value = value.transpose(1, 2).contiguous() if leaf == "weight" else value
            yield name, self.settled(name, value)

    def settled(self, name: str, value: Tensor) -> Tensor:
        """In the dtype that the checkpoint had, as far as it can be known; never at the cost of a bit."""
        wanted = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}.get(
            self.dtypes.get(name, "float32" if name.endswith(KEPT_WIDE) else "bfloat16"), torch.bfloat16
        )
        narrow = value.to(wanted)
        return narrow if torch.equal(narrow.to(torch.float64), value.to(torch.float64)) else value


def alternate(parts: list[Tensor]) -> Tensor:
    """Row 0 of each, row 1 of each, ...: [E, N, ...] -> [E, len(parts) * N, ...]."""
    return torch.stack(parts, dim=2).flatten(1, 2)


def halves(rows: Tensor, heads: int) -> Tensor:
    """Rotary pairs from neighbours (2i, 2i+1) to halves (i, i + d/2), within each head."""
    if rows.shape[0] % (2 * heads):
        raise CheckpointError(f"{rows.shape[0]} rows of q or k do not divide into {heads} heads; the file is damaged")
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def value_of(file: GgufFile, tensor: GgufTensor, row: int | None = None) -> Tensor:
    """Values in the file's own float type; of quantised types in BF16."""
    raw = file.raw(tensor, row)
    if tensor.kind.name in FLOATS:
        value = raw.view(FLOATS[tensor.kind.name])
    else:
        try:
            flat = gguf.quants.dequantize(raw.numpy(), tensor.kind)
        except (NotImplementedError, ValueError) as error:
            raise CheckpointError(
                f"{file.path}: {tensor.name} is {tensor.kind.name}, which gguf cannot decode"
            ) from error
        value = torch.from_numpy(np.ascontiguousarray(flat)).to(torch.bfloat16)
    if not bool(torch.isfinite(value).all()):
        raise CheckpointError(f"{file.path}: {tensor.name} has a NaN or Inf; the file is damaged, download it again")
    return value


def read_gguf(path: Path | str) -> GgufModel:
    """Header, config and names of a GGUF file; tensors come from `.tensors()`.

    Raises:
        CheckpointError: damaged or incomplete. UnsupportedError: an architecture or geometry that is not read here.
    """
    file = open_gguf(path)
    arch = arch_in(file)
    manifest = manifest_beside(file.path)
    dtypes = {n: t.get("dtype", "") for n, t in manifest.get("tensors", {}).items() if isinstance(t, dict)}
    return GgufModel(file, arch, config_of(file, arch), dtypes)


def manifest_beside(path: Path) -> dict[str, Any]:
    """manifest.json of the export that `path` is the file of; {} when there is none."""
    found = read_json(path.parent / MANIFEST) if (path.parent / MANIFEST).is_file() else {}
    return found if found.get("format") == "gguf" and isinstance(found.get("tensors"), dict) else {}


def gguf_in(place: Path) -> Path | None:
    """The GGUF file that `place` is, or that a folder without config.json holds alone."""
    if place.is_file() and place.suffix == ".gguf":
        return place
    found = sorted(place.glob("*.gguf")) if place.is_dir() and not (place / "config.json").is_file() else []
    if len(found) > 1:
        raise CheckpointError(
            f"{place} has {len(found)} GGUF files; name the one to read (split files: merge them first)"
        )
    return found[0] if found else None


def check_shapes(source: Source, path: Path) -> None:
    """CheckpointError unless the file's fields and its tensors describe one model."""
    for item in source.items:
        stored = next(n for end in ("", "_packed", "_blocks") if (n := item.name + end) in source.checkpoint.entries)
        found = source.checkpoint.entries[stored].shape
        found = (*found[:-2], found[-2] * found[-1]) if stored.endswith("_blocks") else found
        wanted = item.shape
        if stored != item.name:
            wanted = (*packed_shape(item)[:-1], packed_shape(item)[-1] // 2)
        if found != wanted:
            raise CheckpointError(
                f"{path}: {item.name} has {found}, the file's own fields need {wanted}; it is damaged"
            )


def gguf_to_checkpoint(path: Path | str, out: Path) -> Path:
    """`unpacked_gguf`, for callers that know the layout."""
    return unpacked_gguf(path, out)[0]


def unpacked_gguf(path: Path | str, out: Path) -> tuple[Path, str]:
    """Write the file as a checkpoint folder, whole or not at all; codes and scales stay byte for byte.

    Returns:
        `out`, and the name of its format: hf, gpt-oss, or bf16 where the file has no MXFP4.
    Raises:
        CheckpointError, UnsupportedError: as `read_gguf`, or `out` is not empty.
    """
    from convert.formats import FORMATS

    model = read_gguf(path)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"--out {out} exists and is not empty; choose another folder or remove it")
    with replacing(out) as part:
        writer = ShardWriter(part)
        for key, tensor in model.tensors():
            writer.add(key, tensor)
        writer.finish()
        config = config_from(model.config)
        write_text(part / "config.json", json.dumps(saved_config(config), indent=2, sort_keys=True) + "\n")
        tokenizer = read_tokenizer(model.file.fields, model.file.path, config.max_position_embeddings)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
        packed = "gpt-oss" if model.arch.name == "gpt-oss" else "hf"
        name = packed if model.has_mxfp4 else "bf16"
        source = open_source(part, [])  # strict: every tensor of the model is there, and none besides
        check_shapes(source, model.file.path)
        raw = FORMATS[name].config(source)
        write_text(part / "config.json", json.dumps(raw, indent=2, sort_keys=True) + "\n")
        if manifest_beside(model.file.path):
            shutil.copyfile(model.file.path.parent / MANIFEST, part / MANIFEST)
    return out, name
