"""From a checkpoint folder to a model and back.

Loading: the model is built on the meta device (shapes only), matched to the folder's keys by a strict plan, then
filled tensor by tensor. MiMo-V2 types get our class, everything else transformers' own from `config.json`.
Saving writes the hub's names, so that `AutoModelForCausalLM.from_pretrained(out)` loads the result, and copies what
the class does not compute (MTP blocks, vision, audio) from the source, byte for byte.
"""

import copy
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, MiMoV2FlashConfig, PreTrainedConfig

from core.checkpoint.index import Checkpoint, open_checkpoint
from core.checkpoint.keymap import family_of, make_plan, to_checkpoint
from core.checkpoint.reader import Reader
from core.checkpoint.writer import SHARD_BYTES, ShardWriter, replacing, write_text
from core.errors import CheckpointError, ConfigError
from core.models.build import build_meta, meta_model, read_config
from core.models.experts import find_experts
from core.models.mimo_v2 import MiMoV2ForCausalLM
from core.models.mimo_v2_config import MiMoV2Config
from core.models.packing import separate_documents

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
)
__all__ = ["LoadedModel", "Passthrough", "load_model", "load_tokenizer", "meta_model", "plan_reader", "save_model"]
NOT_SAVED = (
    "quantization_config", "auto_map", "torch_dtype", "_name_or_path", "id2label", "label2id", "problem_type",
    "return_dict", "output_attentions", "output_hidden_states", "chunk_size_feed_forward", "is_encoder_decoder",
)  # fmt: skip
ATTENTION = ("auto", "eager", "sdpa", "flex_attention")


@dataclass(frozen=True)
class Passthrough:
    """A checkpoint tensor that the model class has no place for and that saving copies."""

    name: str
    nbytes: int


@dataclass(frozen=True)
class LoadedModel:
    model: nn.Module
    config: PreTrainedConfig
    tokenizer: Any | None
    passthrough: tuple[Passthrough, ...]
    folder: Path


def load_model(
    path: Path | str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    attention: str = "auto",
    experts: str = "auto",
) -> LoadedModel:
    """Load a checkpoint folder.

    Args:
        path: folder with config.json and safetensors (single or sharded; BF16, block FP8, or MXFP4 experts).
        dtype: of the parameters; router correction biases stay FP32.
        attention: auto | eager | sdpa | flex_attention. experts: auto | eager | grouped_mm | batched_mm | fp4flash.
    Raises:
        CheckpointError: missing, incomplete or damaged files, or weights that do not fit the config; one line.
    """
    folder = Path(path)
    config = read_config(folder)
    checkpoint = open_checkpoint(folder)
    model = build_meta(copy.deepcopy(config), dtype)
    reader = plan_reader(model, checkpoint, checkpoint.config.get("model_type", config.model_type))
    fill(model, reader, dtype, torch.device(device))
    choose(model, attention, experts)
    # transformers forgets that a row is packed as soon as it makes a cache, so a plain forward must not make one;
    # generate() has its own switch. LoadedModel.config is another object and is saved as it came.
    model.config.use_cache = False
    separate_documents(model)
    model.eval()
    carried = tuple(Passthrough(k, checkpoint.entries[k].nbytes) for k in reader.plan.carried)
    return LoadedModel(model, config, load_tokenizer(folder), carried, folder)


def plan_reader(model: nn.Module, checkpoint: Checkpoint, model_type: str) -> Reader:
    """A reader for every tensor of `model` (meta or real)."""
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    plan = make_plan(checkpoint, model_type, shapes, tied=tied_names(model))
    reader = Reader(checkpoint, plan, shapes, qkv_chunks=getattr(model.config, "num_key_value_heads", 1) or 1)
    reader.check_stored()
    return reader


def tied_names(model: nn.Module) -> dict[str, str]:
    """Parameter names that share storage with an earlier one: {name: the earlier name}."""
    first: dict[nn.Parameter, str] = {}
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter in first:
            tied[name] = first[parameter]
        else:
            first[parameter] = name
    return tied


def fill(model: nn.Module, reader: Reader, dtype: torch.dtype, device: torch.device) -> None:
    """Give every tensor of a meta model its storage and value, one at a time."""
    tied = tied_names(model)
    strict = tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in reader.order():
        if name in tied and tied[name] in reader.plan.recipes:
            continue
        wide = any(part in name for part in strict) or name.endswith("e_score_correction_bias")
        tensor = torch.empty(reader.shapes[name], dtype=torch.float32 if wide else dtype, device=device)
        reader.fill(name, tensor)
        place(model, name, nn.Parameter(tensor) if name in parameters else tensor)
    for name, source in tied.items():
        have, other = (
            (name, source) if name in reader.plan.recipes and source not in reader.plan.recipes else (source, name)
        )
        place(model, other, model.get_parameter(have))
    restore_buffers(model, device)
    empty = next((n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta), None)
    if empty:
        raise CheckpointError(
            f"{reader.checkpoint.folder}: nothing gave {empty} a value; this transformers model needs a rule for it"
        )


def place(model: nn.Module, name: str, tensor: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, tensor)


def restore_buffers(model: Any, device: torch.device) -> None:
    """Compute buffers that no checkpoint holds (rotary frequencies) with the model's own initialiser, in FP32."""
    for module in model.modules():
        missing = {n: b for n, b in module._buffers.items() if b is not None and b.is_meta}
        if not missing:
            continue
        for name, buffer in missing.items():
            module._buffers[name] = torch.empty_like(buffer, device=device)
        model._init_weights(module)


def choose(model: Any, attention: str, experts: str) -> None:
    """Attention and experts implementation by name."""
    if attention not in ATTENTION:
        raise ConfigError(f"model.attention={attention}: expected one of {', '.join(ATTENTION)}")
    if isinstance(model, MiMoV2ForCausalLM):
        model.set_attention(attention)
    elif attention != "auto":
        model.set_attn_implementation(attention)
    if not find_experts(model):
        return
    try:
        model.set_experts_implementation("fp4flash" if experts == "auto" else experts)
    except ValueError as error:
        raise ConfigError(
            f"model.experts={experts}: expected auto, eager, grouped_mm, batched_mm or fp4flash"
        ) from error


def load_tokenizer(folder: Path) -> Any | None:
    """The folder's tokenizer, or None when it has none.

    Raises:
        CheckpointError: it cannot be loaded: damaged files, or a library that it needs is missing.
    """
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises plain exceptions
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(
            f"{folder}: its tokenizer cannot be loaded ({said}); if damaged, copy the base's"
        ) from error


def save_model(
    tensors: Iterable[tuple[str, Tensor]],
    source: LoadedModel | PreTrainedConfig,
    out: Path | str,
    *,
    tokenizer: Any | None = None,
    rank: int = 0,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a checkpoint folder, all or nothing; an existing one is replaced only when the new one is complete.

    Args:
        tensors: (name in the model, whole tensor), one at a time; consumed on every rank (it may be collective).
        source: the model as loaded (its folder supplies tokenizer and carried tensors), or only a config.
        tokenizer: saved beside the weights; None copies the source's tokenizer files.
        rank: only rank 0 writes.
    Raises:
        CheckpointError: the disk is full, or the tensors are not exactly the model's.
    """
    if rank != 0:
        for _ in tensors:
            pass
        return
    out = Path(out)
    config = source.config if isinstance(source, LoadedModel) else source
    with replacing(out) as part:
        writer = ShardWriter(part, shard_bytes)
        write_weights(writer, tensors, config)
        if isinstance(source, LoadedModel):
            carry(writer, source, part)
        writer.finish()
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
        write_text(part / "config.json", json.dumps(saved_config(config), indent=2, sort_keys=True) + "\n")


def write_weights(writer: ShardWriter, tensors: Iterable[tuple[str, Tensor]], config: PreTrainedConfig) -> None:
    meta = build_meta(config)
    expected = {name: tuple(t.shape) for name, t in meta.state_dict().items()}
    tied, known = tied_names(meta), {name for name, _ in [*meta.named_buffers(), *meta.named_parameters()]}
    family = family_of(config.model_type)
    missing = set(expected) - set(tied)
    for name, tensor in tensors:
        if name in tied or (name in known and name not in expected):
            continue  # a second name of a written tensor, or a buffer that is computed and not stored
        if expected.get(name) != tuple(tensor.shape):
            raise CheckpointError(
                f"{name} {tuple(tensor.shape)} is no tensor of this model; expected {expected.get(name)}"
            )
        missing.discard(name)
        for key, piece in to_checkpoint(family, name, tensor):
            writer.add(key, piece)
    if missing:
        raise CheckpointError(
            f"{min(missing)} and {len(missing) - 1} more tensors of the model were not handed to the save"
        )


def carry(writer: ShardWriter, source: LoadedModel, part: Path) -> None:
    """Carried tensors and small files of the source folder."""
    if source.passthrough:
        checkpoint = open_checkpoint(source.folder)
        for entry in source.passthrough:
            writer.add(entry.name, checkpoint.read(entry.name))
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        if (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, part / name)


def saved_config(config: PreTrainedConfig) -> dict[str, Any]:
    """config.json of a BF16 checkpoint; MiMo-V2 in transformers' own type wherever its class computes the geometry."""
    if isinstance(config, MiMoV2Config):
        raw = config.to_dict()
        raw["architectures"] = ["MiMoV2ForCausalLM"]
        if config.fits_transformers:
            raw.pop("swa_num_key_value_heads")
            raw.pop("model_type")
            raw = MiMoV2FlashConfig(**raw).to_dict()
            raw["architectures"] = ["MiMoV2FlashForCausalLM"]
    else:
        raw = config.to_diff_dict()
    for key in NOT_SAVED:
        raw.pop(key, None)
    return raw | {"dtype": "bfloat16"}
