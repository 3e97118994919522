"""Drafter folders: config.json (every key explicit), model.safetensors, drafter.json (which target it belongs to).

Tensor names are those of the published drafters (fc, hidden_norm, layers.N..., norm), plus `mask_embedding` and, where
there is one, `selector.*`. Written whole or not at all.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from core.checkpoint.index import open_checkpoint
from core.checkpoint.writer import replacing, write_text
from core.errors import CheckpointError
from core.models.dflash import Drafter, refuse_half
from core.models.dflash_config import DFlashConfig, from_dict

WEIGHTS, CONFIG, PAIRING = "model.safetensors", "config.json", "drafter.json"
NEAR_ZERO = 1e-6  # root mean square of a mask embedding below which drafts collapse


class Described(Protocol):
    """A drafter's configuration of any kind."""

    def to_dict(self) -> dict[str, Any]: ...


def save_drafter(tensors: dict[str, torch.Tensor], config: Described, out: Path | str, pairing: dict[str, Any]) -> None:
    """Write a drafter folder; an existing one is replaced only when the new one is complete.

    Args:
        tensors: the state dict of the drafter that `config` describes. pairing: what drafter.json says of target and
            training.
    """
    with replacing(Path(out)) as part:
        save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, part / WEIGHTS)
        write_text(part / PAIRING, json.dumps(pairing, indent=2, sort_keys=True) + "\n")
        write_text(part / CONFIG, json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n")


def read_raw_config(folder: Path | str) -> Any:
    """config.json as it is. Raises CheckpointError where it is missing or no JSON."""
    path = Path(folder) / CONFIG
    try:
        return json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as a drafter's configuration: {error}") from error


def read_drafter_config(folder: Path | str) -> DFlashConfig:
    return from_dict(read_raw_config(folder), str(Path(folder) / CONFIG))


def read_pairing(folder: Path | str) -> dict[str, Any]:
    """drafter.json: `target` (model type, layers, hidden size, vocabulary, hash) and how it was trained."""
    path = Path(folder) / PAIRING
    try:
        return json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; export the drafter again") from error


def load_drafter(
    folder: Path | str, *, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu"
) -> Drafter:
    """A drafter folder in `dtype`.

    Raises:
        CheckpointError: damaged files, missing or extra tensors, another shape, a near-zero mask embedding.
        UnsupportedError: FP16.
    """
    refuse_half(dtype)
    config, tensors = read_drafter(folder)
    with torch.device("meta"):
        drafter = Drafter(config)
    drafter.load_state_dict({n: t.to(device, dtype) for n, t in tensors.items()}, assign=True)
    return drafter.eval()


def read_drafter(folder: Path | str) -> tuple[DFlashConfig, dict[str, torch.Tensor]]:
    """(config, tensors as stored). Raises CheckpointError as `load_drafter`."""
    folder = Path(folder)
    config = read_drafter_config(folder)
    open_checkpoint(folder)  # validates headers, offsets and sizes before anything is allocated
    tensors = load_file(folder / WEIGHTS)
    check_tensors(tensors, config, str(folder / WEIGHTS))
    check_mask(tensors["mask_embedding"], str(folder))
    return config, tensors


def check_tensors(tensors: dict[str, torch.Tensor], config: DFlashConfig, where: str) -> None:
    """CheckpointError naming the first tensor that is missing, too many, or of another shape than the config says."""
    with torch.device("meta"):
        match_shapes(tensors, Drafter(config).state_dict(), where)


def match_shapes(tensors: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], where: str) -> None:
    shapes = {n: tuple(t.shape) for n, t in wanted.items()}
    found = {n: tuple(t.shape) for n, t in tensors.items()}
    if found != shapes:
        name = min(n for n in shapes.keys() | found.keys() if shapes.get(n) != found.get(n))
        raise CheckpointError(f"{where}: {name} is {found.get(name)}; the config wants {shapes.get(name)}")


def check_mask(mask: torch.Tensor, where: str) -> None:
    """CheckpointError for a mask embedding near zero, which drafts nothing and fails silently elsewhere."""
    size = float(mask.float().square().mean().sqrt())
    if not size > NEAR_ZERO:
        raise CheckpointError(
            f"{where}: mask_embedding has root mean square {size:.1e}; such a row drafts nothing: set "
            "draft.mask_token_id to a token with a trained embedding, or draft.learned_mask=true"
        )


def target_identity(model: nn.Module, fingerprint: str) -> dict[str, Any]:
    """What a drafter remembers of its target, for refusing another one."""
    config: Any = model.config
    return {
        "model_type": config.model_type,
        "num_hidden_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "fingerprint": fingerprint,
    }
