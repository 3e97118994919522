"""Geometry and semantics of a DFlash drafter: every choice that implementations make differently is an explicit key.

Nothing here is guessed from another key. What the window means, whether a block sees itself in both directions, where
the mask embedding comes from and how much of a head is rotated are written in every drafter folder; the dialects of
other engines (convert/formats) state how they say the same.
"""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, get_args

from core.errors import CheckpointError, ConfigError

FULL, SLIDING = "full_attention", "sliding_attention"
MODEL_TYPE = "fp4flash_dflash"


@dataclass(frozen=True)
class DFlashConfig:
    """A drafter. Sizes in numbers of values; `taps` are target layers counted from 0, the output of each is read.

    block_size: B; slot 0 is the anchor, slots 1 .. B-1 are drafted.
    window: W; a query at position p sees context keys at positions > p - W, so W - 1 keys behind it and itself.
    causal: whether slot k sees only slots <= k of its block. False is the published method.
    sinks: one learnt logit per head in the softmax denominator of sliding layers, as MiMo's drafter has.
    learned_mask: the mask embedding is a trained vector of this folder; else it is the target's row `mask_token_id`.
    selector_top_k, selector_rank: candidates per slot and rank of the pair scores; 0 = slots are drafted independently.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    num_target_layers: int
    taps: tuple[int, ...]
    mask_token_id: int
    block_size: int = 8
    window: int = 512
    layer_types: tuple[str, ...] = ()
    causal: bool = False
    sinks: bool = False
    value_scale: float = 1.0
    partial_rotary_factor: float = 1.0
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    learned_mask: bool = True
    selector_top_k: int = 0
    selector_rank: int = 0

    def __post_init__(self) -> None:
        if not self.layer_types:
            object.__setattr__(self, "layer_types", (SLIDING,) * self.num_hidden_layers)
        object.__setattr__(self, "taps", tuple(self.taps))
        object.__setattr__(self, "layer_types", tuple(self.layer_types))
        check(self)

    @property
    def drafts(self) -> int:
        """K, the tokens drafted in a round."""
        return self.block_size - 1

    @property
    def rotary_dims(self) -> int:
        return int(self.head_dim * self.partial_rotary_factor)

    def to_dict(self) -> dict[str, Any]:
        """What config.json of a drafter folder says."""
        return {"model_type": MODEL_TYPE, **asdict(self)}


def check(c: DFlashConfig) -> None:
    """ConfigError naming the key, its value and the rule."""
    check_types(c)
    rules = {
        "block_size": (c.block_size >= 2, "at least 2: the anchor and one draft"),
        "window": (c.window >= c.block_size, f"at least block_size={c.block_size}"),
        "num_hidden_layers": (c.num_hidden_layers >= 1, "at least 1"),
        "layer_types": (
            len(c.layer_types) == c.num_hidden_layers and set(c.layer_types) <= {FULL, SLIDING},
            f"{c.num_hidden_layers} of {FULL} or {SLIDING}",
        ),
        "num_key_value_heads": (
            c.num_key_value_heads >= 1 and c.num_attention_heads % c.num_key_value_heads == 0,
            f"a divisor of num_attention_heads={c.num_attention_heads}",
        ),
        "partial_rotary_factor": (
            0 < c.partial_rotary_factor <= 1 and c.rotary_dims >= 2 and c.rotary_dims % 2 == 0,
            f"a share of head_dim={c.head_dim} that is an even number of dims",
        ),
        "taps": (
            bool(c.taps) and list(c.taps) == sorted(set(c.taps)) and 0 <= c.taps[0] <= c.taps[-1] < c.num_target_layers,
            f"ascending layer numbers of the target, 0 to {c.num_target_layers - 1}",
        ),
        "mask_token_id": (0 <= c.mask_token_id < c.vocab_size, f"an id below vocab_size={c.vocab_size}"),
        "rope_theta": (c.rope_theta > 0, "above 0"),
        "rms_norm_eps": (c.rms_norm_eps > 0, "above 0"),
        "selector_rank": (
            (c.selector_rank > 0) == (c.selector_top_k > 0) and min(c.selector_rank, c.selector_top_k) >= 0,
            "above 0 exactly where selector_top_k is",
        ),
        "selector_top_k": (c.selector_top_k <= c.vocab_size, f"at most vocab_size={c.vocab_size}"),
    }  # fmt: skip
    for key, (holds, rule) in rules.items():
        if not holds:
            raise ConfigError(f"drafter {key}={getattr(c, key)!r}: expected {rule}")


def check_types(c: Any) -> None:
    """ConfigError for a value of another type than its field's, or a float that is not finite (files have them)."""
    for field in fields(c):
        value, several = getattr(c, field.name), get_args(field.type)
        kind: Any = several[0] if several else field.type
        right = all(type(i) is kind or (kind is float and type(i) is int) for i in (value if several else (value,)))
        if not right or (kind is float and not math.isfinite(value)):
            wanted = f"a list of {kind.__name__}" if several else kind.__name__
            raise ConfigError(f"drafter {field.name}={value!r}: expected {wanted}")


def from_dict(raw: dict[str, Any], where: str) -> DFlashConfig:
    """The inverse of `to_dict`; every key must be there.

    Raises:
        CheckpointError: another model type, or a missing or unknown key; says which.
    """
    known = exact_keys(DFlashConfig, MODEL_TYPE, raw, where)
    try:
        return DFlashConfig(**known)
    except TypeError as error:
        raise CheckpointError(f"{where}: taps or layer_types is no list ({error}); export the drafter again") from error


def exact_keys(schema: Any, wanted: str, raw: dict[str, Any], where: str) -> dict[str, Any]:
    """Values of a config.json that says model_type=`wanted` and has the fields of `schema`, all and no other."""
    model_type = raw.get("model_type") if isinstance(raw, dict) else None
    if model_type != wanted:
        raise CheckpointError(f"{where}: model_type={model_type!r}, expected {wanted}; convert other drafters first")
    known = {f.name for f in fields(schema)}
    given = set(raw) - {"model_type"}
    if given != known:
        wrong = min(given ^ known)
        raise CheckpointError(f"{where}: key {wrong!r} is {'unknown' if wrong in given else 'missing'}")
    return {k: raw[k] for k in known}


def spread_taps(layers: int, count: int, full: tuple[int, ...] = ()) -> tuple[int, ...]:
    """Which target layers to read: `count` of its full-attention layers, spread; of all layers where it has fewer.

    Without full layers named, as published for DFlash: from layer 1 to the third last, evenly. Every drafter of
    MiMo-V2 reads full-attention layers, first and last included.
    """
    pool = full if len(full) >= count else tuple(range(layers)) if layers < count + 4 else ()
    if pool:
        count = min(count, len(pool))
        return tuple(sorted({pool[round(i * (len(pool) - 1) / max(count - 1, 1))] for i in range(count)}))
    if count == 1:
        return (layers // 2,)
    return tuple(round(1 + i * (layers - 4) / (count - 1)) for i in range(count))
