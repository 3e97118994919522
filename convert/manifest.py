"""manifest.json: what a folder holds, how it was made, and which drafter belongs to which target.

Hashes are SHA-256 of decoded values in canonical names, so one model has one hash in every lossless format. A format
that must encode some tensors anew (FP8 of `mimo`) lists them under `reencoded` with the hash they had before, and the
model's hash is made of those: it still names the same model.
"""

import hashlib
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from convert.source import MANIFEST, Source
from core.checkpoint.index import read_json
from core.errors import CheckpointError, ConfigError

VERSION = 1
PACKAGES = ("torch", "transformers", "safetensors", "gguf", "compressed-tensors")


def model_hash(tensors: Mapping[str, str]) -> str:
    """Of {canonical name: hash}, whatever the order."""
    text = "".join(f"{name}\0{tensors[name]}\n" for name in sorted(tensors))
    return hashlib.sha256(text.encode()).hexdigest()


def build(
    source: Source, format_name: str, rule: str | None, ptq: bool, hashes: Mapping[str, str],
    reencoded: Mapping[str, str], carried: Mapping[str, str], coverage: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """The manifest of a finished export.

    Args:
        hashes: of what this folder decodes to. reencoded: hashes before a lossy encoding, of the tensors that had one.
        carried: of bytes handed through.
    """
    quantised = {i.name for i in source.quantised}
    reencoded = with_ancestors(source, hashes, reencoded)
    tensors = {
        i.name: {
            "sha256": hashes[i.name],
            "dtype": str(i.dtype).removeprefix("torch."),
            "shape": list(i.shape),
            "quantised": i.name in quantised,
        }
        for i in source.items
    }
    return {
        "manifest_version": VERSION,
        "format": format_name,
        "nibble_order": "split_halves" if format_name == "gguf" else "low_first",
        "scale_rule": rule,
        "method": "ptq" if ptq else source.manifest.get("method", "qat") if quantised else "none",
        "model_hash": model_hash({**hashes, **reencoded}),
        "tensors": tensors,
        "reencoded": dict(reencoded),
        "carried": dict(carried),
        "coverage": dict(coverage),
        "source": {
            "folder": source.folder.name,
            "model_hash": source.manifest.get("model_hash"),
            "run": source.run.get("git", {}) | {"command": source.run.get("command")} if source.run else None,
        },
        "licence_of_base": licence(source.folder),
        "made_with": versions(),
    }


def with_ancestors(source: Source, hashes: Mapping[str, str], reencoded: Mapping[str, str]) -> dict[str, str]:
    """`reencoded`, with the hash a tensor had before the first lossy encoding of its line of exports.

    So a folder made from a `mimo` folder names the model that one was made from, and its drafter still fits.
    """
    listed, found = source.manifest.get("tensors", {}), dict(reencoded)
    for name, first in source.manifest.get("reencoded", {}).items():
        if listed.get(name, {}).get("sha256") == reencoded.get(name, hashes.get(name)):
            found[name] = first
    return found


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("fp4flash", *PACKAGES):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def licence(folder: Path) -> str | None:
    """The licence file's name, or the card's `license:` line, of the base model; None when the folder says nothing."""
    for name in ("LICENSE", "LICENSE.txt", "LICENSE.md"):
        if (folder / name).is_file():
            return name
    card = folder / "README.md"
    if card.is_file():
        for line in card.read_text(encoding="utf-8", errors="replace").splitlines()[:80]:
            if line.startswith("license:"):
                return line.removeprefix("license:").strip()
    return None


def check_pair(target: Path, drafter: Path, force: bool = False) -> None:
    """Refuse a drafter that was trained against another target.

    Raises:
        ConfigError: its manifest names another model's hash. CheckpointError: a manifest is missing.
    """
    found = {}
    for what, folder in (("target", target), ("drafter", drafter)):
        if not (folder / MANIFEST).is_file():
            raise CheckpointError(f"{what} {folder} has no {MANIFEST}; export it with convert.export first")
        found[what] = read_json(folder / MANIFEST)
    wanted, have = found["drafter"].get("target_hash"), found["target"].get("model_hash")
    if wanted != have and not force:
        raise ConfigError(
            f"drafter {drafter} was trained against model {str(wanted)[:12]}, the target {target} is {str(have)[:12]}: "
            "acceptance would collapse; take the matching target, or add --force"
        )
