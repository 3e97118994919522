"""Models without weights: from config.json, or from the published geometries in presets/, on the meta device.

The preset files state what the publishers' config.json states (MiMo in the hub's spelling), nothing else. They let
a plan be made for a 1T-parameter model on a laptop.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig

from core.checkpoint.index import inside, read_json
from core.errors import CheckpointError, ConfigError, UnsupportedError
from core.models.mimo_v2 import MiMoV2ForCausalLM
from core.models.mimo_v2_config import MiMoV2Config

MIMO_TYPES = ("mimo_v2", "mimo_v2_flash")
MAX_COUNT = 4096  # layers, experts in one layer
MAX_SIZE = 2**31
IMPOSSIBLE = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RuntimeError, AssertionError)
PRESETS = Path(__file__).parent / "presets"


def read_config(folder: Path | str) -> PreTrainedConfig:
    """config.json as a typed config: ours for MiMo-V2, transformers' for other types."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} has no config.json; download the checkpoint there, or set model.path to its folder"
        )
    return config_from(read_json(inside(folder, "config.json")))


def config_from(raw: Mapping[str, Any]) -> PreTrainedConfig:
    """A typed config.

    Raises:
        UnsupportedError: an unknown model type. ConfigError: a value that no model has.
    """
    kind = str(raw.get("model_type"))
    check_numbers(raw)
    with named_config():
        return typed(kind, raw)


def check_numbers(raw: Mapping[str, Any]) -> None:
    """Refuse sizes that would keep a machine busy before anyone could see that the weights do not fit them."""
    for key, value in raw.items():
        counted = key.endswith(("layers", "experts"))
        if isinstance(value, int | float) and not abs(value) <= (MAX_COUNT if counted else MAX_SIZE):
            raise ConfigError(f"config.json: {key}={value} is beyond any model; download it again")


@contextmanager
def named_config() -> Iterator[None]:
    """What transformers and torch raise over impossible values, in one line."""
    try:
        yield
    except (*IMPOSSIBLE, StrictDataclassError) as error:
        first = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(f"config.json: no model can be built from it ({first}); download it again") from error


def typed(kind: str, raw: Mapping[str, Any]) -> PreTrainedConfig:
    raw = {k: v for k, v in raw.items() if k not in ("model_type", "auto_map", "quantization_config")}
    if kind == "mimo_v2_flash" and not raw.keys() & {"sliding_window", "sliding_window_size"}:
        raw["sliding_window"] = 129  # transformers leaves its default out of the files it writes
    if kind in MIMO_TYPES:
        return MiMoV2Config(**raw)
    if kind not in CONFIG_MAPPING:
        raise UnsupportedError(
            f"config.json: model_type={kind!r} is unknown to this transformers; upgrade it or choose another model"
        )
    return CONFIG_MAPPING[kind].from_dict(raw)


def build_meta(config: PreTrainedConfig, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The model with shapes and dtypes but no storage."""
    with named_config(), torch.device("meta"):
        if isinstance(config, MiMoV2Config):
            return nn.Module.to(MiMoV2ForCausalLM(config), dtype)
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def preset_names() -> list[str]:
    return sorted(p.stem for p in PRESETS.glob("*.json"))


def meta_model(name: str | Path, dtype: torch.dtype = torch.bfloat16) -> tuple[nn.Module, PreTrainedConfig]:
    """(model on the meta device, config): parameter names, shapes and dtypes, no storage.

    Args:
        name: a preset (`mimo_v2_5_pro`), or a folder with config.json; its weights are not read.
    Raises:
        ConfigError: neither.
    """
    if str(name) in preset_names():
        config = config_from(read_json(PRESETS / f"{name}.json"))
    elif (Path(name) / "config.json").is_file():
        config = read_config(name)
    else:
        raise ConfigError(
            f"no geometry named {name}; there are {', '.join(preset_names())}, or set model.path to a folder"
        )
    return build_meta(config, dtype), config
