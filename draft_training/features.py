"""Features kept in files: for a small target whose forward would be repeated every epoch.

    python -m draft_training.train ... features.path=DIR features.rows=4096

The first run writes `rows` packed rows with the outputs of the tapped layers (and the last hidden states, for soft
labels) and then trains on them in an order of its own; later runs with the same target, taps and text read them. It
costs 2 bytes x hidden x (taps + 1) a token: 7 KB for a target of width 576 and five taps, 74 KB for one of width 6,144,
which is why large targets are captured online. Anchors are drawn anew every time a row is used.

Legend: R rows, T tokens, F taps x hidden size, G hidden size.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from core.errors import CheckpointError, ConfigError, DataError
from core.generate.target import Target
from core.train.data import TrainStream
from draft_training.anchors import DraftBatch, draw_anchors

SETTINGS = "features.json"


@dataclass(frozen=True)
class FeatureBatch(DraftBatch):
    """Rows whose features were computed before. last_RTG: hidden states after the final norm; features_RTF."""

    last_RTG: Tensor
    features_RTF: Tensor

    def capture(self, target: Target) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        return self.last_RTG, self.features_RTF


def write_features(folder: Path, stream: TrainStream, target: Target, rows: int, settings: dict[str, Any]) -> None:
    """One file a row, each whole or not at all; rows that are there are not computed again.

    Raises:
        ConfigError: the folder holds features of another target, taps or text. CheckpointError: the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS
    if path.exists():
        have = json.loads(path.read_text())
        wrong = next((k for k, v in settings.items() if have.get(k) != v), None)
        if wrong:
            raise ConfigError(
                f"features.path={folder} was made with {wrong}={have.get(wrong)}, not {settings[wrong]}; name another"
            )
    else:
        path.write_text(json.dumps(settings, indent=2))
    made = 0
    with tqdm(total=rows, desc="features", unit="row") as bar:
        while made < rows:
            batch = next(stream)
            count = min(rows - made, batch.input_ids_BT.shape[0])
            names = [folder / f"row-{made + r:07d}.safetensors" for r in range(count)]
            if not all(n.exists() for n in names):
                moved = batch.to(target.device)
                last, features = target.packed(moved.input_ids_BT, moved.position_ids_BT)
                for r, name in enumerate(names):
                    parts = zip(("ids", "labels", "position"), batch.tensors(), strict=True)
                    store(name, {n: t[r] for n, t in parts} | {"last": last[r].cpu(), "features": features[r].cpu()})
            made += count
            bar.update(count)


def store(path: Path, tensors: dict[str, Tensor]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        save_file({n: t.contiguous() for n, t in tensors.items()}, partial)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {path}: {error}; free space and run the command again") from error


class FeatureStream:
    """Endless batches of stored rows; every pass is a permutation. This rank reads only its own rows."""

    def __init__(
        self, folder: Path, rows: int, anchors: int, drafts: int, batch_size: int, seed: int, rank: int, world: int
    ) -> None:
        if batch_size > rows:
            raise ConfigError(f"train.batch_size={batch_size} is more than features.rows={rows}; store more rows")
        self.folder, self.rows, self.anchors, self.drafts = folder, rows, anchors, drafts
        self.batch_size, self.seed, self.rank, self.share = batch_size, seed, rank, batch_size // world
        self.batch = 0

    def __next__(self) -> FeatureBatch:
        first = self.batch * self.batch_size + self.rank * self.share
        self.batch += 1
        rows = [self.row(number) for number in range(first, first + self.share)]
        return FeatureBatch(*(torch.stack(column) for column in zip(*rows, strict=True)))

    def row(self, number: int) -> tuple[Tensor, ...]:
        """The row that is used as the `number`-th, with its anchors."""
        epoch, place = divmod(number, self.rows)
        stored = int(np.random.default_rng([self.seed, epoch]).permutation(self.rows)[place])
        path = self.folder / f"row-{stored:07d}.safetensors"
        try:
            t = load_file(path)
            labels, position = t["labels"], t["position"]
        except (OSError, SafetensorError, KeyError) as error:
            raise DataError(f"{path} is missing or damaged ({error}); delete it and run the command again") from error
        rng = np.random.default_rng([self.seed, number])
        anchors = torch.from_numpy(draw_anchors(labels.numpy(), position.numpy(), self.anchors, rng))
        return t["ids"], labels, position, anchors, torch.tensor(self.drafts), t["last"], t["features"]

    def state_dict(self) -> dict[str, Any]:
        return {"batch": self.batch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batch = state["batch"]
