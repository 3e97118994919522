"""The kinds of drafters by the model_type of their folders."""

from pathlib import Path

import torch

from core.errors import CheckpointError
from core.models.dflash import Drafter
from core.models.dflash_config import MODEL_TYPE as DFLASH
from core.models.dflash_config import DFlashConfig
from core.models.dflash_io import load_drafter, read_raw_config
from core.models.eagle import EagleDrafter
from core.models.eagle_config import MODEL_TYPE as EAGLE
from core.models.eagle_config import EagleConfig
from core.models.eagle_io import load_eagle

AnyConfig = DFlashConfig | EagleConfig
AnyDrafter = Drafter | EagleDrafter
LOADERS = {DFLASH: load_drafter, EAGLE: load_eagle}


def folder_of(path: Path | str) -> Path:
    """Where the weights are: a run folder stands for its model."""
    folder = Path(path)
    return folder / "model" if (folder / "run.json").exists() else folder


def load_any(
    folder: Path | str, *, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu"
) -> AnyDrafter:
    """A drafter folder of either kind, in `dtype`.

    Raises:
        CheckpointError: an unknown kind, or as the loader of its kind. UnsupportedError: FP16.
    """
    raw = read_raw_config(folder)
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if kind not in LOADERS:
        raise CheckpointError(f"{folder}: model_type={kind!r}, expected {' or '.join(LOADERS)}; convert it first")
    return LOADERS[kind](folder, dtype=dtype, device=device)


def empty(config: AnyConfig) -> AnyDrafter:
    """The module that a configuration describes, with weights that nobody has set."""
    return EagleDrafter(config) if isinstance(config, EagleConfig) else Drafter(config)
