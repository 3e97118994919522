"""A checkpoint of any layout as a list of canonical tensors, each read when it is needed.

**Canonical** is what the hub stores in BF16: the family's own names (one tensor per expert and projection where the
family has that, the fused tensor where it has not, as GPT-OSS), split Q, K and V. A canonical tensor has one decoded
value in every format, so its hash identifies it; the hash over all of them identifies the model.

A tensor that the source stores as MXFP4 is handed on as codes and scales, never decoded and encoded again.

Legend: E experts, K reduction dim, N output dim.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from core.checkpoint.index import Checkpoint, Entry, inside, open_checkpoint, read_json
from core.checkpoint.keymap import EXPERT_TENSOR, Kind, Recipe, expert_keys, family_of, parts, to_checkpoint
from core.checkpoint.reader import Reader
from core.errors import CheckpointError, ConfigError
from core.models.build import build_meta, read_config
from core.models.experts import find_experts
from core.models.load import plan_reader
from core.mxfp4 import Packed, ScaleRule, decode

RUN_MODEL = "model"  # the trained checkpoint inside a run folder
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Item:
    """One canonical tensor. `shape` and `dtype` are those of its decoded value.

    `role`: expert | quantised | kept. `transposed`: blocks of 32 lie along dim -2 (GPT-OSS's [E, K, N]).
    `model_name`: the tensor of the model class that it is (a part of). `packed`: the source stores codes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    model_name: str
    expert: int = -1
    part: int = 0
    quantised: bool = False
    transposed: bool = False
    packed: bool = False

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Source:
    """A checkpoint folder seen as canonical tensors, and what is known of how it was made."""

    folder: Path
    checkpoint: Checkpoint
    config: PreTrainedConfig
    reader: Reader
    items: tuple[Item, ...]
    carried: tuple[Entry, ...]
    rule: ScaleRule | None  # None: never quantised
    run: dict[str, Any] = field(default_factory=dict)  # run.json of the training run, if any
    manifest: dict[str, Any] = field(default_factory=dict)

    @property
    def quantised(self) -> list[Item]:
        return [i for i in self.items if i.quantised]

    def read(self, item: Item) -> Tensor:
        """The decoded value, item.shape in item.dtype."""
        tensor = self.value(item)
        self.reader.check(item.name, tensor, item.shape)
        return tensor.to(item.dtype)

    def value(self, item: Item) -> Tensor:
        recipe = self.reader.plan.recipes[item.model_name]
        if recipe.kind is Kind.experts:
            return self.reader.fetch(recipe.keys[item.expert * recipe.width + item.part])
        if recipe.kind is Kind.qkv:
            return self.split_qkv(recipe, item.model_name)[recipe.part]
        if recipe.kind is Kind.gpt_oss:
            return decode(self.read_packed(item)).transpose(-1, -2).contiguous()
        if item.expert >= 0:  # the file has the experts fused
            whole = self.reader.checkpoint.read_row(self.reader.entry(recipe.keys[0]).name, item.expert)
            return whole.chunk(len(parts(item.model_name)))[item.part]
        return self.reader.fetch(recipe.keys[0])

    def read_packed(self, item: Item) -> Packed:
        """Codes and scales as the source has them; of the transposed tensor where item.transposed.

        Raises:
            CheckpointError: shapes or dtypes are not MXFP4, or a scale byte is 255.
        """
        recipe = self.reader.plan.recipes[item.model_name]
        if recipe.kind is Kind.gpt_oss:
            blocks, scales = (self.checkpoint.read(key) for key in recipe.keys)
            codes = blocks.flatten(-2) if blocks.dim() == 4 and blocks.shape[-1] == 16 else blocks
        else:
            key = recipe.keys[max(item.expert, 0) * recipe.width + item.part]
            codes = self.checkpoint.read(self.reader.entry(key).name)
            scales = self.checkpoint.read(self.reader.plan.scales[key]).view(torch.uint8)
        shape = packed_shape(item)
        right = (*shape[:-1], shape[-1] // 2), (*shape[:-1], shape[-1] // 32)
        if (tuple(codes.shape), tuple(scales.shape)) != right or codes.dtype != torch.uint8:
            raise CheckpointError(
                f"{item.name}: codes {tuple(codes.shape)} {codes.dtype} and scales {tuple(scales.shape)} are not MXFP4 "
                f"of {shape}, which needs uint8 {right[0]} and {right[1]}; the file is damaged or of another layout"
            )
        if bool((scales == 255).any()):
            raise CheckpointError(
                f"{item.name}: a scale byte is 255 (NaN), which no MXFP4 file holds; it is damaged, fetch it again"
            )
        return Packed(codes, scales)

    def split_qkv(self, recipe: Recipe, name: str) -> tuple[Tensor, ...]:
        return self._fused(recipe.keys[0], name.rsplit(".", 2)[0])

    @lru_cache(maxsize=4)  # noqa: B019 - Q, K and V of one layer come one after another; a source lives as long as a command
    def _fused(self, key: str, stem: str) -> tuple[Tensor, ...]:
        recipe = Recipe(Kind.qkv, (key,))
        return self.reader.split_qkv(f"{stem}.q_proj.weight", recipe)

    def __hash__(self) -> int:
        return id(self)


def packed_shape(item: Item) -> tuple[int, ...]:
    """Shape whose last dimension the codes run along."""
    return (*item.shape[:-2], item.shape[-1], item.shape[-2]) if item.transposed else item.shape


def open_source(folder: Path | str, select: Iterable[str] | None = None) -> Source:
    """A run folder, or a checkpoint folder of any layout that core.checkpoint reads.

    Args:
        select: names of model tensors that are quantised; None: what the run, the manifest or the files say, else
            every expert tensor.
    Raises:
        CheckpointError, ConfigError: not a checkpoint, incomplete, damaged; one line.
    """
    folder = Path(folder)
    run = {}
    chosen = set(select) if select is not None else None
    rule: ScaleRule | None = None
    if (folder / "run.json").is_file():
        run, trained, rule = from_run(folder)
        chosen = trained if chosen is None else chosen
        folder = folder / RUN_MODEL
    manifest = read_json(inside(folder, MANIFEST)) if (folder / MANIFEST).is_file() else {}
    if manifest:
        check_manifest(manifest, folder)
        rule = ScaleRule(manifest["scale_rule"]) if manifest.get("scale_rule") else rule
    config = read_config(folder)
    checkpoint = open_checkpoint(folder)
    model = build_meta(config)
    reader = plan_reader(model, checkpoint, checkpoint.config.get("model_type", config.model_type))
    items = tuple(canonical(model, reader, config.model_type, chosen, manifest))
    carried = tuple(checkpoint.entries[k] for k in reader.plan.carried)
    return Source(folder, checkpoint, config, reader, items, carried, rule, run, manifest)


def from_run(folder: Path) -> tuple[dict[str, Any], set[str], ScaleRule | None]:
    """(run.json, quantised model tensors, rule) of a training run.

    Raises:
        ConfigError: the run has not finished.
    """
    run = read_json(folder / "run.json")
    if run.get("state") != "finished" or not (folder / RUN_MODEL / "config.json").is_file():
        raise ConfigError(
            f"run {folder.name} has not finished (state={run.get('state')!r}); continue it with "
            f"`python -m qat.train run.resume={folder.name}`"
        )
    chosen: set[str] = set()
    rule = None
    if (folder / "selection.json").is_file():
        selection = read_json(folder / "selection.json")
        try:
            chosen = {t["name"] for t in selection["tensors"]}
            rule = ScaleRule(selection["rule"]) if chosen else None
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{folder / 'selection.json'} is damaged ({error!r}); train the run again") from error
    return run, chosen, rule


def check_manifest(manifest: dict[str, Any], folder: Path) -> None:
    """Refuse a manifest that says what no fp4flash writes.

    Raises:
        CheckpointError
    """
    order = manifest.get("nibble_order", "low_first")
    if order not in ("low_first", "split_halves"):
        raise CheckpointError(
            f"{folder / MANIFEST}: nibble_order={order!r}; expected low_first or split_halves: not a file of ours"
        )
    rule = manifest.get("scale_rule")
    if rule is not None and rule not in [r.value for r in ScaleRule]:
        raise CheckpointError(f"{folder / MANIFEST}: scale_rule={rule!r}; expected even, floor or rceil")
    for key, kind in {"tensors": dict, "reencoded": str, "carried": str}.items():
        value = manifest.get(key, {})
        if not isinstance(value, dict) or not all(isinstance(v, kind) for v in value.values()):
            raise CheckpointError(
                f"{folder / MANIFEST}: {key} is no object of {'objects' if kind is dict else 'hashes'}; it is damaged, "
                "export again"
            )


def canonical(
    model: nn.Module, reader: Reader, model_type: str, chosen: set[str] | None, manifest: dict[str, Any]
) -> Iterable[Item]:
    """Every canonical tensor of the source, in the order of the model's state dict."""
    family = family_of(model_type)
    experts = {e.name: e.reduction_dim for e in find_experts(model)}
    listed = manifest.get("tensors") or None
    for name, tensor in model.state_dict().items():
        if name not in reader.plan.recipes:
            continue  # tied to another
        recipe = reader.plan.recipes[name]
        split = family.per_expert and EXPERT_TENSOR.fullmatch(name) is not None
        for number, (key, piece) in enumerate(to_checkpoint(family, name, tensor)):
            expert, part = divmod(number, len(parts(name))) if split else (-1, 0)
            stored = recipe.keys[number if recipe.kind is Kind.experts else 0]
            packed = recipe.kind is Kind.gpt_oss or (
                stored in reader.plan.scales and reader.entry(stored).dtype == torch.uint8
            )
            if listed is not None and chosen is None:
                quantised = packed or bool(listed.get(key, {}).get("quantised"))
            else:
                quantised = packed or (name in experts if chosen is None else name in chosen)
            dtype = torch.bfloat16 if quantised else reader.dtype(stored)  # quantised values are BF16 by definition
            yield Item(
                key, tuple(piece.shape), dtype, name, expert, part, quantised,
                transposed=experts.get(name, -1) == -2, packed=packed,
            )  # fmt: skip


def expert_stem(item: Item) -> str:
    """`model.layers.3.mlp.experts` of an expert tensor."""
    return expert_keys(item.model_name, 1)[0].split(".experts.")[0] + ".experts"
