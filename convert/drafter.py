"""A drafter folder of ours in the layout of another engine: read, held against its target, written, verified.

    python -m convert.export --what drafter --from DRAFTER --target TARGET_EXPORT --to hf|z-lab|vllm|mimo --out DIR

The target is the folder that will be served: it gives the row of the mask token, the ids that a config repeats, and the
hash by which `convert.manifest.check_pair` knows the pair.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from convert.formats import DRAFTERS
from convert.formats.drafter import MASK, MASK_FILE, Dialect, Pair, read_mask_file
from convert.manifest import VERSION, model_hash, versions
from convert.packer import sha256
from convert.source import MANIFEST, check_manifest
from core.checkpoint.index import DTYPE_NAMES, INDEX, open_checkpoint, read_json
from core.checkpoint.writer import replacing, write_text
from core.errors import CheckpointError, ConfigError, UnsupportedError
from core.models.dflash_config import DFlashConfig
from core.models.dflash_io import read_drafter, read_pairing
from core.models.load import load_model, meta_model, plan_reader

CHEAP = 2 * 2**30  # bytes of a target that is read whole to compare its fingerprint
STORED = (torch.bfloat16, torch.float32)


def embedding_row(folder: Path, row: int) -> tuple[Tensor, dict[str, Any]]:
    """(row `row` of the input embedding as stored, sizes of the model); reads that row alone."""
    model, config = meta_model(folder)
    checkpoint = open_checkpoint(folder)
    reader = plan_reader(model, checkpoint, checkpoint.config.get("model_type", config.model_type))
    table = model.get_input_embeddings().weight
    name = next(n for n, p in model.named_parameters() if p is table)
    sizes = {
        "model_type": config.model_type,
        "num_hidden_layers": config.num_hidden_layers,
        "hidden_size": table.shape[1],
        "vocab_size": table.shape[0],
    }
    if not 0 <= row < table.shape[0]:
        raise ConfigError(
            f"mask_token_id={row} is no row of {folder}, which has {table.shape[0]}; give the drafter's own target"
        )
    return checkpoint.read_row(reader.entry(reader.plan.recipes[name].keys[0]).name, row), sizes


def pair_with(folder: Path, config: DFlashConfig, hashed: bool = True) -> Pair:
    """The target in `folder`, for a drafter of `config`.

    Args:
        hashed: whether it must have a manifest.
    Raises:
        CheckpointError: it is no checkpoint, or has no manifest.
    """
    manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
    if hashed and not manifest.get("model_hash"):
        raise CheckpointError(f"target {folder} has no {MANIFEST}; export it first: python -m convert.export --to hf")
    row, sizes = embedding_row(folder, config.mask_token_id)
    return Pair(
        folder, read_json(folder / "config.json"), row, sizes, manifest.get("model_hash", ""),
        bool(manifest.get("reencoded")),
    )  # fmt: skip


def misfit(config: DFlashConfig, remembered: dict[str, Any], pair: Pair) -> str | None:
    """Why this is not the target that the drafter was trained with; None: nothing speaks against it."""
    for key, own in (
        ("hidden_size", config.hidden_size),
        ("vocab_size", config.vocab_size),
        ("num_hidden_layers", config.num_target_layers),
    ):
        for said in (own, remembered.get(key, own)):
            if said != pair.identity[key]:
                return f"{key} {said} against {pair.identity[key]}"
    wanted = remembered.get("fingerprint")
    if not wanted or pair.reencoded or bytes_of(pair.folder) > CHEAP:
        return None
    from core.models.fingerprint import fingerprint

    found = fingerprint(load_model(pair.folder).model)
    return None if found == wanted else f"fingerprint {wanted[:12]} against {found[:12]}"


def bytes_of(folder: Path) -> int:
    return sum(e.nbytes for e in open_checkpoint(folder).entries.values())


def plan_drafter(to: str, folder: Path, target: Path, *, force: bool = False, hashed: bool = True) -> "Planned":
    """Everything that can be refused is refused here, before a byte is written.

    Args:
        force: go on with a target that does not look like the drafter's. hashed: the target must have a manifest.
    Raises:
        UnsupportedError: the dialect cannot express the drafter. ConfigError: it was trained for another target.
    """
    if to not in DRAFTERS:
        raise UnsupportedError(f"--to {to} is no layout for drafters; they go to {', '.join(DRAFTERS)}")
    dialect = DRAFTERS[to]
    config, tensors = read_drafter(folder)
    odd = next((n for n, t in tensors.items() if t.dtype not in STORED or t.dtype != tensors["fc.weight"].dtype), None)
    if odd:
        raise UnsupportedError(f"{folder}: {odd} is {tensors[odd].dtype}; drafters are all bfloat16 or all float32")
    training = read_pairing(folder)
    pair = pair_with(target, config, hashed)
    why = misfit(config, training.get("target", {}), pair)
    if why and not force:
        raise ConfigError(
            f"drafter {folder} was not trained with target {target} ({why}): acceptance would collapse; take its own "
            "target, or add --force"
        )
    dialect.refuse(config, tensors, pair)
    return Planned(dialect, config, tensors, {n: dialect.key(n) for n in tensors}, training, pair, folder)


@dataclass(frozen=True)
class Planned:
    """A drafter that can be written. keys: our name -> name in the weights file, None for the mask embedding.

    training: drafter.json. folder: where the drafter was read from.
    """

    dialect: Dialect
    config: DFlashConfig
    tensors: dict[str, Tensor]
    keys: dict[str, str | None]
    training: dict[str, Any]
    pair: Pair
    folder: Path

    @property
    def nbytes(self) -> int:
        return sum(self.tensors[n].nbytes for n, k in self.keys.items() if k)

    def summary(self) -> str:
        stored = sum(k is not None for k in self.keys.values())
        ours, here = self.config.window, self.dialect.window(self.config)
        return (
            f"{stored} tensors, {self.nbytes / 1e9:.3f} GB; mask embedding: {self.mask()}\n"
            f"Window {ours} (query - key < {ours}) is written as {here}: {self.dialect.window_rule}"
        )

    def mask(self) -> str:
        return MASK_FILE if self.dialect.mask_file else f"row {self.config.mask_token_id} of the target's embedding"

    def table(self) -> str:
        """Every tensor: source -> destination, dtype, shape, bytes."""
        lines = []
        for name, key in self.keys.items():
            tensor = self.tensors[name]
            place = self.mask() if key is None else key
            shape = "x".join(map(str, tensor.shape))
            lines.append(f"  {name} -> {place}  {DTYPE_NAMES[tensor.dtype]} {shape}  {tensor.nbytes:,}")
        return "\n".join(lines)

    def manifest(self, target_hash: str) -> dict[str, Any]:
        hashes = {n: sha256(t) for n, t in self.tensors.items()}
        return {
            "manifest_version": VERSION,
            "what": "drafter",
            "format": self.dialect.name,
            "model_hash": model_hash(hashes),
            "target_hash": target_hash,
            "target": self.pair.identity,
            "window": {
                "ours": self.config.window,
                "here": self.dialect.window(self.config),
                "rule": self.dialect.window_rule,
            },
            "mask_embedding": self.mask(),
            "tensors": {
                n: {"sha256": hashes[n], "dtype": str(t.dtype).removeprefix("torch."), "shape": list(t.shape)}
                | {"stored_as": self.keys[n] or self.mask()}
                for n, t in self.tensors.items()
            },
            "drafter": self.config.to_dict(),
            "training": self.training,
            "source": {"folder": self.folder.name},
            "made_with": versions(),
        }

    def write(self, out: Path, target_hash: str = "") -> dict[str, Any]:
        """Write the folder, whole or not at all; returns its manifest.

        Args:
            target_hash: of a target that was exported after the plan was made; else the plan's.
        Raises:
            CheckpointError: `out` holds something.
        """
        if out.exists() and any(out.iterdir()):
            raise CheckpointError(f"{out} is not empty; choose another --out, or remove it")
        manifest = self.manifest(target_hash or self.pair.hash)
        with replacing(out) as part:
            stored = {k: self.tensors[n].contiguous() for n, k in self.keys.items() if k}
            save_file(stored, part / self.dialect.weights, metadata={"format": "pt"})
            if self.dialect.indexed:
                index = {
                    "metadata": {"total_size": self.nbytes},
                    "weight_map": dict.fromkeys(stored, self.dialect.weights),
                }
                write_text(part / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
            if self.dialect.mask_file:
                mask = {"mask_token_id": self.config.mask_token_id, "embedding": self.tensors[MASK]}
                torch.save(mask, part / MASK_FILE)
            raw = self.dialect.config(self.config, self.tensors, self.pair)
            write_text(part / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True) + "\n")
            write_text(part / "config.json", json.dumps(raw, indent=2, sort_keys=True) + "\n")
        return manifest


def verify_drafter(folder: Path, manifest: dict[str, Any], origin: Path | None) -> list[tuple[str, str, bool]]:
    """(what, found, good) of an exported drafter: tensors against the manifest, its target beside it, its source."""
    if manifest.get("format") not in DRAFTERS:
        raise CheckpointError(f"{folder / MANIFEST}: format {manifest.get('format')!r} is no drafter's")
    check_manifest(manifest, folder)
    dialect = DRAFTERS[manifest["format"]]
    checkpoint, listed = open_checkpoint(folder), manifest.get("tensors", {})
    keys = {name: dialect.key(name) for name in listed}
    extra = sorted(set(checkpoint.entries) - {k for k in keys.values() if k})
    found = {n: checkpoint.read(k) for n, k in keys.items() if k in checkpoint.entries}
    mask = read_mask_file(folder) if dialect.mask_file else None
    if mask:
        found[MASK] = mask["embedding"]
    expected = set(keys) - (set() if dialect.mask_file else {MASK})
    wrong = sorted(n for n in expected if n not in found or sha256(found[n]) != listed[n].get("sha256")) + extra
    rows = [
        ("manifest hashes", f"{len(wrong)} differ, first {wrong[0]}" if wrong else f"{len(found)} equal", not wrong)
    ]
    rows.append(("target", f"model hash {str(manifest.get('target_hash'))[:16]}", bool(manifest.get("target_hash"))))
    if origin is not None:
        _, theirs = read_drafter(origin)
        wrong = sorted(
            n for n in expected if n not in theirs or not torch.equal(theirs[n], found.get(n, torch.empty(0)))
        )
        rows.append(
            ("source", f"{len(wrong)} differ, first {wrong[0]}" if wrong else f"bit-equal, {origin}", not wrong)
        )
    return rows
