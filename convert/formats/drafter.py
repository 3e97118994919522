"""What a drafter dialect must say: where each tensor goes, which keys config.json has, and what it cannot express.

Dialects agree on the tensors (3 + 11 a layer; `attention_sink_bias` beside them where there are sinks) and on tap ids
(layer id, counted from 0, whose output is transformers' hidden_states[id + 1]). They differ in the window, in what a
missing key means, and in where the mask embedding comes from. So every dialect writes every key it reads.
"""

import pickle
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.checkpoint.index import inside
from core.errors import CheckpointError, UnsupportedError
from core.models.dflash_config import FULL, SLIDING, DFlashConfig

MASK = "mask_embedding"
MASK_FILE = "mask_embedding.pt"
MAX_MASK_FILE = 2**24  # bytes; a released one is 12 KB
DAMAGED = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, TypeError, LookupError, AttributeError)
INNER = (
    "input_layernorm", "post_attention_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
    "self_attn.o_proj", "self_attn.q_norm", "self_attn.k_norm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
LAYER = re.compile(rf"layers\.\d+\.(({'|'.join(map(re.escape, INNER))})\.weight|self_attn\.attention_sink_bias)")


@dataclass(frozen=True)
class Pair:
    """The target that a drafter is exported for. row: its embedding of the drafter's mask token. raw: its config.json.
    hash: its model hash ("" before it is written)."""

    folder: Path
    raw: dict[str, Any]
    row: Tensor
    identity: dict[str, Any]
    hash: str = ""
    reencoded: bool = False
    notes: tuple[str, ...] = field(default=())


class Dialect:
    """One way of writing a drafter folder. `--to` accepts `name`."""

    name: str
    weights: str = "model.safetensors"
    indexed: bool = False  # an index beside a single file, as MiMo's releases have
    mask_file: bool = False  # the mask embedding travels as a file; else it is the target's own row
    renames: dict[str, str] = {}  # noqa: RUF012 - a constant of each class
    window_rule: str

    def refuse(self, config: DFlashConfig, tensors: dict[str, Tensor], pair: Pair) -> None:
        """UnsupportedError naming what this dialect cannot say, and the remedy."""
        raise NotImplementedError

    def config(self, config: DFlashConfig, tensors: dict[str, Tensor], pair: Pair) -> dict[str, Any]:
        raise NotImplementedError

    def window(self, config: DFlashConfig) -> int:
        """The number that stands in config.json for our W."""
        return config.window

    def key(self, name: str) -> str | None:
        """Where a tensor of ours goes; None: it is no tensor of the weights file here.

        Raises:
            UnsupportedError: this dialect has no place for it.
        """
        if name == MASK:
            return None
        if name in self.renames:
            return self.renames[name]
        if name in ("fc.weight", "hidden_norm.weight", "norm.weight") or LAYER.fullmatch(name):
            return name
        raise UnsupportedError(f"--to {self.name} has no place for the drafter's tensor {name}")


def stop(name: str, key: str, value: Any, why: str) -> None:
    raise UnsupportedError(f"--to {name} cannot express {key}={value}: {why}")


def refuse_beyond(
    name: str,
    config: DFlashConfig,
    *,
    sinks: bool = True,
    values: bool = True,
    rotary: bool = True,
    causal: bool = True,
) -> None:
    """Refuse what a dialect has no key for. Flags: whether it has one."""
    if config.selector_rank:
        stop(name, "selector_rank", config.selector_rank, "no engine reads this selector; train with selector_rank=0")
    if config.sinks and not sinks:
        stop(name, "sinks", True, "it has no sink bias; use --to mimo or vllm, or train with draft.sinks=false")
    if config.value_scale != 1.0 and not values:
        stop(name, "value_scale", config.value_scale, "use --to mimo, or train with draft.value_scale=1")
    if config.partial_rotary_factor != 1.0 and not rotary:
        why = "it rotates whole heads; use --to mimo or vllm, or train with draft.partial_rotary_factor=1"
        stop(name, "partial_rotary_factor", config.partial_rotary_factor, why)
    if config.causal and not causal:
        stop(name, "causal", True, "its blocks see themselves in both directions; train with draft.causal=false")


def refuse_own_mask(name: str, config: DFlashConfig, mask: Tensor, pair: Pair) -> None:
    """For dialects that read the mask embedding from the target."""
    if torch.equal(mask.float(), pair.row.to(mask.dtype).float()):
        return
    if config.learned_mask:
        why = (
            f"it takes row {config.mask_token_id} of the target's embedding, which is not the trained vector; use --to "
            "mimo or vllm, or train with draft.learned_mask=false"
        )
        stop(name, "learned_mask", True, why)
    raise UnsupportedError(
        f"--to {name}: the drafter's mask embedding should be row {config.mask_token_id} of the target's embedding, "
        f"and {pair.folder} has another there; give the target that it was trained with"
    )


def refuse_last_tap(name: str, config: DFlashConfig, pair: Pair) -> None:
    """transformers gives the final norm's output in place of the last layer's, unless the target's config forbids."""
    last = config.num_target_layers - 1
    if config.taps[-1] == last and pair.raw.get("tie_last_hidden_states", True):
        why = (
            f"transformers hands out the final norm's output for the last layer ({last}); set "
            f'"tie_last_hidden_states": false in {pair.folder / "config.json"}, or train with draft.taps below {last}'
        )
        stop(name, "taps", list(config.taps), why)


def sizes(config: DFlashConfig) -> dict[str, Any]:
    """Keys that mean the same everywhere."""
    keys = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "head_dim", "rms_norm_eps", "block_size",
    )  # fmt: skip
    return {k: getattr(config, k) for k in keys} | {
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "layer_types": list(config.layer_types),
    }


def from_target(pair: Pair) -> dict[str, Any]:
    """Keys that a drafter's config repeats from its target's; absent there: null."""
    text = pair.raw.get("text_config") or pair.raw
    ids = {k: text.get(k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {k: v[0] if isinstance(v, list) else v for k, v in ids.items()} | {
        "max_position_embeddings": text.get("max_position_embeddings") or 131072
    }


def dtype_name(tensors: dict[str, Tensor]) -> str:
    return str(tensors["fc.weight"].dtype).removeprefix("torch.")


def qwen3_shaped(config: DFlashConfig, tensors: dict[str, Tensor], pair: Pair) -> dict[str, Any]:
    """What z-lab's, vLLM's and MiMo's drafters have in common: a Qwen3 config with `dflash_config` in it."""
    sliding = SLIDING in config.layer_types
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.partial_rotary_factor != 1.0:
        rope["partial_rotary_factor"] = config.partial_rotary_factor
    return {
        **sizes(config),
        **from_target(pair),
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "vocab_size": config.vocab_size,
        "num_target_layers": config.num_target_layers,
        "target_hidden_size": config.hidden_size,
        "is_causal": config.causal,  # never left out: without it some loaders take sliding layers for causal ones
        "use_sliding_window": sliding,
        "sliding_window": config.window if sliding else None,
        "max_window_layers": config.num_hidden_layers,
        "rope_theta": config.rope_theta,
        "rope_parameters": rope,
        "use_cache": True,
        "dtype": dtype_name(tensors),
        "torch_dtype": dtype_name(tensors),
        "dflash_config": {
            "target_layer_ids": list(config.taps),
            "mask_token_id": config.mask_token_id,
            "block_size": config.block_size,
            "causal": config.causal,
        },
    }


def mixed(config: DFlashConfig) -> bool:
    return {FULL, SLIDING} <= set(config.layer_types)


def read_mask_file(folder: Path) -> dict[str, Any] | None:
    """{mask_token_id, embedding} of mask_embedding.pt, which is a dict or a bare tensor; only tensors are unpickled."""
    path = folder / MASK_FILE
    if not path.exists():
        return None
    path = inside(folder, MASK_FILE)
    if path.stat().st_size > MAX_MASK_FILE:
        raise CheckpointError(
            f"{path} has {path.stat().st_size:,} bytes, far more than one embedding; download it again"
        )
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGED as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} holds more than tensors, or is damaged ({why}); download it again") from error
    if isinstance(found, Tensor):
        found = {"embedding": found}
    if not isinstance(found, dict) or not isinstance(found.get("embedding"), Tensor):
        raise CheckpointError(f"{path} is no dict with an 'embedding'; download it again")
    return {"mask_token_id": found.get("mask_token_id"), "embedding": found["embedding"]}
