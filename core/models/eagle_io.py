"""Folders of EAGLE drafters, laid out as those of core.models.dflash_io, which also writes them.

Tensor names are those of published EAGLE-3 heads (fc, midlayer.*, norm); there is no head and no vocabulary map, since
drafts come from the target's own head.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file

from core.checkpoint.index import open_checkpoint
from core.models.dflash import refuse_half
from core.models.dflash_io import CONFIG, WEIGHTS, match_shapes, read_raw_config
from core.models.eagle import EagleDrafter
from core.models.eagle_config import from_dict


def load_eagle(
    folder: Path | str, *, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu"
) -> EagleDrafter:
    """A drafter folder in `dtype`.

    Raises:
        CheckpointError: another kind of drafter, damaged files, missing or extra tensors, another shape.
        UnsupportedError: FP16.
    """
    refuse_half(dtype)
    folder = Path(folder)
    config = from_dict(read_raw_config(folder), str(folder / CONFIG))
    open_checkpoint(folder)  # validates headers, offsets and sizes before anything is allocated
    tensors = load_file(folder / WEIGHTS)
    with torch.device("meta"):
        drafter = EagleDrafter(config)
    match_shapes(tensors, drafter.state_dict(), str(folder / WEIGHTS))
    drafter.load_state_dict({n: t.to(device, dtype) for n, t in tensors.items()}, assign=True)
    return drafter.eval()
