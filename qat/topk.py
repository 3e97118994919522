"""A teacher that ran before: its K likeliest next tokens for every position, in files, found by a row's content.

    python -m qat.topk +experiment=mimo_fp4 loss=topk loss.topk_path=DIR     writes DIR
    python -m qat.train +experiment=mimo_fp4 loss=topk loss.topk_path=DIR    trains from it

DIR holds rows-<n>.safetensors (`log_p` FP32 [R, T, K], `ids` int32 [R, T, K]) and index.json, which maps a hash of a
row's token ids and positions to its place. Order, batch size and number of ranks may therefore change between
writing and training; text, seq_len and seed may not. 8 K bytes a token.

Legend: B, R rows, T tokens of a row, G hidden size, V vocabulary, K kept classes.
"""

import hashlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from core.config import Command, entry
from core.errors import CheckpointError, ConfigError, DataError
from core.train.batch import Batch
from qat.config import QATConfig, check
from qat.teacher import TopK, last_hidden

CHUNK = 1024  # tokens whose logits exist at one time
SCHEMA = 1
COMMAND = Command("qat.topk", "qat", QATConfig, (__doc__ or "").split("\n\nDIR")[0], check)


def row_keys(batch: Batch) -> list[str]:
    """A hash of each row's token ids and positions (16 bytes of BLAKE2b over little-endian int64)."""
    stacked = torch.stack((batch.input_ids_BT, batch.position_ids_BT), dim=1).cpu()
    return [hashlib.blake2b(row.numpy().astype("<i8").tobytes(), digest_size=16).hexdigest() for row in stacked]


@torch.no_grad()
def top_log_probabilities(model: nn.Module, batch: Batch, k: int) -> tuple[Tensor, Tensor]:
    """FP32 log-probabilities and int32 ids [B, T, K] of the K likeliest next tokens."""
    hidden, head = last_hidden(model, batch), model.get_output_embeddings().weight
    found = []
    for part in hidden.split(CHUNK):
        found.append(torch.log_softmax((part @ head.T).to(torch.float32), dim=-1).topk(k, dim=-1))
    shape = (*batch.input_ids_BT.shape, k)
    return (
        torch.cat([f.values for f in found]).view(shape).cpu(),
        torch.cat([f.indices for f in found]).view(shape).to(torch.int32).cpu(),
    )


def precompute_topk(model: nn.Module, batches: Iterable[Batch], k: int, out: Path) -> int:
    """Write the top K of every row of `batches`, one file a batch and index.json last; returns the rows written.

    Raises:
        ConfigError: K is not in [1, V]. CheckpointError: the disk is full or `out` cannot be written.
    """
    vocabulary = model.get_output_embeddings().weight.shape[0]
    if not 1 <= k <= vocabulary:
        raise ConfigError(f"loss.topk={k} is not between 1 and the vocabulary of {vocabulary}")
    model.eval()
    rows: dict[str, tuple[str, int]] = {}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for number, batch in enumerate(batches):
            log_p, ids = top_log_probabilities(model, batch, k)
            name = f"rows-{number:06d}.safetensors"
            save_file({"log_p": log_p, "ids": ids}, out / name)
            rows |= {key: (name, i) for i, key in enumerate(row_keys(batch))}
        partial = out / "index.partial"
        partial.write_text(json.dumps({"schema": SCHEMA, "k": k, "vocabulary": vocabulary, "rows": rows}))
        partial.replace(out / "index.json")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {out}: {error}; free space and run qat.topk again") from error
    return len(rows)


class TopKTeacher:
    """Reads the targets of a batch's rows; hashing them takes the ids to the host, once a micro-batch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            index = json.loads((folder / "index.json").read_text())
            self.k, self.rows = int(index["k"]), dict(index["rows"])
        except FileNotFoundError as error:
            raise DataError(f"loss.topk_path={folder} has no index.json; write it with python -m qat.topk") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{folder}/index.json is damaged ({error}); write it again with python -m qat.topk"
            ) from error

    def targets(self, batch: Batch) -> TopK:
        """Raises DataError where a row was never precomputed, or a file is damaged."""
        device = batch.input_ids_BT.device
        found = [self.read(key, number) for number, key in enumerate(row_keys(batch))]
        log_p, ids = (torch.stack(part).flatten(0, 1).to(device) for part in zip(*found, strict=True))
        return TopK(log_p, ids.to(torch.int64))

    def read(self, key: str, number: int) -> tuple[Tensor, Tensor]:
        if key not in self.rows:
            raise DataError(
                f"row {number} of a batch is not in loss.topk_path={self.folder}; run python -m qat.topk with this "
                "data, seq_len, seed and at least as many steps"
            )
        name, row = self.rows[key]
        try:
            with safe_open(self.folder / name, framework="pt") as file:
                return file.get_slice("log_p")[row], file.get_slice("ids")[row]
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"{self.folder / name} is damaged or missing ({error}); run python -m qat.topk again"
            ) from error


def main(config: QATConfig, resolved: str) -> int:  # noqa: ARG001
    """Every row that `qat.train` would see in `train.steps` steps, through the BF16 model."""
    from tqdm import tqdm

    from core.models.load import load_model
    from core.train.data import train_stream
    from core.train.device import device
    from qat.base import model_folder

    if not config.loss.topk_path:
        raise ConfigError("qat.topk needs loss.topk_path=DIR to write to")
    target = device(config.train)
    loaded = load_model(
        model_folder(config), device=target, attention=config.model.attention, experts=config.model.experts
    )
    stream = train_stream(config.data, loaded.tokenizer, batch_size=config.train.batch_size, seed=config.train.seed)
    steps = tqdm(range(config.train.steps), desc="top-k", unit="step")
    written = precompute_topk(
        loaded.model, (next(stream).to(target) for _ in steps), config.loss.topk, Path(config.loss.topk_path)
    )
    print(f"Written: {config.loss.topk_path} ({written} rows, top {config.loss.topk})")
    return 0


if __name__ == "__main__":
    sys.exit(entry(COMMAND, main))
