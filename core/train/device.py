"""The device of a process."""

import os

import torch

from core.errors import ConfigError
from core.train.config import TrainConfig


def device(train: TrainConfig) -> torch.device:
    """The device of this process: `train.device`, or the GPU of LOCAL_RANK where there is one."""
    if train.device not in {"auto", "cpu", "cuda"}:
        raise ConfigError(f"train.device={train.device}: expected auto, cpu or cuda")
    if train.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "train.device=cuda, but torch sees no GPU; set train.device=cpu or install a CUDA build of torch"
        )
    if train.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank())


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))
