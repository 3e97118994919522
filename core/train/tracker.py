"""Optional trackers beside metrics.jsonl, which is always written.

wandb works without a network: set WANDB_MODE=offline and sync later.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from core.errors import ConfigError
from core.train.config import TrackerConfig, TrackerName


class Tracker(Protocol):
    def log(self, step: int, values: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class NoTracker:
    def log(self, step: int, values: dict[str, Any]) -> None:
        """Nothing beside metrics.jsonl."""

    def close(self) -> None:
        """Nothing to close."""


class WandbTracker:
    def __init__(self, config: TrackerConfig, folder: Path) -> None:
        try:
            import wandb
            from wandb.errors import Error
        except ImportError as error:
            raise ConfigError("tracker=wandb needs the package wandb: pip install wandb") from error
        try:
            self.run = wandb.init(
                project=config.project, name=folder.name, dir=str(folder), id=folder.name, resume="allow"
            )
        except Error as error:
            raise ConfigError(
                f"tracker=wandb could not start ({one_sentence(error)}); run `wandb login`, or set WANDB_MODE=offline"
            ) from error

    def log(self, step: int, values: dict[str, Any]) -> None:
        self.run.log(numbers(values), step=step)

    def close(self) -> None:
        self.run.finish()


class TensorboardTracker:
    def __init__(self, _config: TrackerConfig, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError("tracker=tensorboard needs the package tensorboard: pip install tensorboard") from error
        self.writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, step: int, values: dict[str, Any]) -> None:
        for key, value in numbers(values).items():
            self.writer.add_scalar(key, value, step)

    def close(self) -> None:
        self.writer.close()


def one_sentence(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def numbers(values: dict[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in values.items() if isinstance(v, int | float) and k != "step"}


TRACKERS: dict[TrackerName, Callable[[TrackerConfig, Path], Tracker]] = {
    TrackerName.none: lambda _config, _folder: NoTracker(),
    TrackerName.wandb: WandbTracker,
    TrackerName.tensorboard: TensorboardTracker,
}


def make_tracker(config: TrackerConfig, folder: Path, rank: int = 0) -> Tracker:
    """The tracker of rank 0; other ranks track nothing."""
    return TRACKERS[config.name](config, folder) if rank == 0 else NoTracker()
