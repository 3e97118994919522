"""One checkpoint format for every engine and every world size: flat FP32 slices and an index of where they lie.

    state-<rank>-of-<world>-<part>.safetensors   keys "<kind>:<parameter>", each a flat FP32 slice
    state.json   {"shapes": {name: shape}, "steps": n, "pieces": {"<kind>:<parameter>": [[file, start, stop]]}}

DeepSpeed's own ZeRO-3 checkpoints only load at the world size that wrote them; these load anywhere, because a reader
asks for the range it holds and reads just that from whichever files have it. Host memory: one part while saving from
a GPU, one slice while loading.

The caller makes it atomic: it hands over a folder under a temporary name and renames that when every rank is done
(core.train.loop), so a process killed at any moment, or a full disk, leaves the previous checkpoint as it was.
"""

import json
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from core.errors import CheckpointError
from core.run import write_json

INDEX = "state.json"
PART_BYTES = 4 << 30  # of one file


def key_of(name: str, kind: str) -> str:
    return f"{kind}:{name}"


def save_pieces(
    folder: Path, pieces: Iterable[tuple[str, str, int, Tensor]], rank: int, world: int
) -> dict[str, list[Any]]:
    """Write this rank's pieces (name, kind, start, flat tensor) to its files; returns their part of the index.

    Raises:
        CheckpointError: a file cannot be written (disk full); the folder is then incomplete and must be dropped.
    """
    index: dict[str, list[Any]] = {}
    tensors: dict[str, Tensor] = {}
    size = part = 0
    for name, kind, start, flat in pieces:
        if tensors and size + 4 * flat.numel() > PART_BYTES:
            write_part(folder / part_name(rank, world, part), tensors)
            tensors, size, part = {}, 0, part + 1
        key = key_of(name, kind)
        tensors[key] = flat.detach().reshape(-1).to("cpu", torch.float32)
        index[key] = [part_name(rank, world, part), start, start + flat.numel()]
        size += 4 * flat.numel()
    write_part(folder / part_name(rank, world, part), tensors)
    return index


def part_name(rank: int, world: int, part: int) -> str:
    return f"state-{rank:05d}-of-{world:05d}-{part:03d}.safetensors"


def write_part(path: Path, tensors: dict[str, Tensor]) -> None:
    """One file, on the disk and not only in its cache when this returns."""
    try:
        save_file(tensors, path)
        with path.open("rb") as file:
            os.fsync(file.fileno())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {path}: {error}; free space; the previous checkpoint is kept") from error


def write_index(folder: Path, parts: list[dict[str, list[Any]]], shapes: dict[str, list[int]], steps: int) -> None:
    """Merge the ranks' parts into state.json, written last."""
    pieces: dict[str, list[list[Any]]] = {}
    for part in parts:
        for key, piece in part.items():
            pieces.setdefault(key, []).append(piece)
    write_json(folder / INDEX, {"shapes": shapes, "steps": steps, "pieces": pieces})


class StateReader:
    """Reads any range of any saved tensor."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            index = json.loads((folder / INDEX).read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{folder / INDEX} is missing or damaged ({error}); resume from another checkpoint"
            ) from error
        self.pieces: dict[str, list[tuple[str, int, int]]] = {
            k: [(f, a, b) for f, a, b in sorted(v, key=lambda p: p[1])] for k, v in index["pieces"].items()
        }
        self.shapes: dict[str, list[int]] = index["shapes"]
        self.steps: int = index["steps"]

    def kinds(self, name: str) -> list[str]:
        return [k.split(":", 1)[0] for k in self.pieces if k.split(":", 1)[1] == name]

    def check(self, shapes: Mapping[str, torch.Size], kinds: Mapping[str, Collection[str]]) -> None:
        """CheckpointError unless exactly these parameters, with these shapes, were saved by the same optimiser.

        Moments may be absent (a checkpoint of step 0), unknown kinds and a missing average may not.
        """
        ours, theirs = {n: list(s) for n, s in shapes.items()}, self.shapes
        if ours != theirs:
            name = next(n for n in sorted(set(ours) | set(theirs)) if ours.get(n) != theirs.get(n))
            raise CheckpointError(
                f"{self.folder} was saved with another trained set: {name} is {theirs.get(name, 'absent')} there and "
                f"{ours.get(name, 'not trained')} here; resume with the run's own model and trainable.patterns"
            )
        for name, wanted in kinds.items():
            saved = set(self.kinds(name))
            if not saved <= set(wanted) or not {"master", "ema"} & set(wanted) <= saved:
                raise CheckpointError(
                    f"{self.folder} holds {sorted(saved)} of {name}, this run keeps {sorted(wanted)}; "
                    "resume with the run's own optim.name and optim.ema"
                )

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """FP32 [stop - start] of the flattened tensor."""
        parts, at = [], start
        for file, begin, end in self.pieces[key_of(name, kind)]:
            if end <= at or begin >= stop:
                continue
            if begin > at:
                break
            try:
                with safe_open(self.folder / file, "pt") as opened:
                    parts.append(opened.get_slice(key_of(name, kind))[at - begin : min(end, stop) - begin])
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"{self.folder / file} cannot be read ({error}); resume from another checkpoint"
                ) from error
            at = min(end, stop)
        if at != stop:
            raise CheckpointError(f"{self.folder} lacks {key_of(name, kind)}[{at}:{stop}]; a rank's file is missing")
        return torch.cat(parts) if len(parts) != 1 else parts[0]
