"""Geometry of an EAGLE drafter: every key explicit in its folder, none guessed from another."""

from dataclasses import asdict, dataclass
from typing import Any

from core.errors import CheckpointError, ConfigError
from core.models.dflash_config import check_types, exact_keys

MODEL_TYPE = "fp4flash_eagle"


@dataclass(frozen=True)
class EagleConfig:
    """A drafter of one layer. Sizes in numbers of values; `taps` are target layers counted from 0, outputs are read.

    drafts: K, steps of the chain. window: W; a query at position p sees keys at positions > p - W; 0: all before it.
    """

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    num_target_layers: int
    taps: tuple[int, ...]
    drafts: int = 7
    window: int = 0
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        object.__setattr__(self, "taps", tuple(self.taps))
        check(self)

    def to_dict(self) -> dict[str, Any]:
        """What config.json of a drafter folder says."""
        return {"model_type": MODEL_TYPE, **asdict(self)}


def check(c: EagleConfig) -> None:
    """ConfigError naming the key, its value and the rule."""
    check_types(c)
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size", "num_target_layers")
    rules = {key: (getattr(c, key) >= 1, "at least 1") for key in sizes} | {
        "drafts": (c.drafts >= 1, "at least 1"),
        "window": (c.window == 0 or c.window > c.drafts, f"0 (all keys), or above drafts={c.drafts}"),
        "num_key_value_heads": (
            c.num_key_value_heads >= 1 and c.num_attention_heads % c.num_key_value_heads == 0,
            f"a divisor of num_attention_heads={c.num_attention_heads}",
        ),
        "head_dim": (c.head_dim >= 2 and c.head_dim % 2 == 0, "an even number of dims"),
        "taps": (
            bool(c.taps) and list(c.taps) == sorted(set(c.taps)) and 0 <= c.taps[0] <= c.taps[-1] < c.num_target_layers,
            f"ascending layer numbers of the target, 0 to {c.num_target_layers - 1}",
        ),
        "rope_theta": (c.rope_theta > 0, "above 0"),
        "rms_norm_eps": (c.rms_norm_eps > 0, "above 0"),
    }  # fmt: skip
    for key, (holds, rule) in rules.items():
        if not holds:
            raise ConfigError(f"drafter {key}={getattr(c, key)!r}: expected {rule}")


def from_dict(raw: dict[str, Any], where: str) -> EagleConfig:
    """The inverse of `to_dict`; every key must be there.

    Raises:
        CheckpointError: another model type, or a missing or unknown key; says which.
    """
    known = exact_keys(EagleConfig, MODEL_TYPE, raw, where)
    try:
        return EagleConfig(**known)
    except TypeError as error:
        raise CheckpointError(f"{where}: taps is no list ({error}); write the drafter again") from error
