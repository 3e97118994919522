"""A drafter of another engine back into our folder: `python -m convert.load --from DRAFTER --target TARGET --out OUT`.

Read: transformers' muse_glimmer_assistant, and `DFlashDraftModel` folders of z-lab, vLLM and MiMo (V2.5, V2.6). What a
folder leaves unsaid and tools take differently (causality of sliding layers) is asked for by name, never guessed.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from convert.drafter import embedding_row
from convert.formats import DRAFTERS
from convert.formats.drafter import MASK, MASK_FILE, read_mask_file
from convert.formats.drafter_hf import MODEL_TYPE
from core.checkpoint.index import inside, open_checkpoint, read_json
from core.errors import CheckpointError, ConfigError, UnsupportedError
from core.models.build import IMPOSSIBLE, check_numbers, named_config
from core.models.dflash_config import FULL, SLIDING, DFlashConfig
from core.models.dflash_io import check_mask, check_tensors, save_drafter

MODEL_PREFIX = "model."  # some releases have it on every tensor


def is_drafter(raw: dict[str, Any]) -> bool:
    return raw.get("model_type") == MODEL_TYPE or any("DFlash" in a for a in raw.get("architectures") or ())


def import_drafter(folder: Path, out: Path, target: Path | None, dry_run: bool = False) -> DFlashConfig:
    """Write our folder; returns its config.

    Raises:
        UnsupportedError: a variant that our drafter is not. CheckpointError: damaged, incomplete, ambiguous.
    """
    raw = read_json(inside(folder, "config.json"))
    check_numbers(raw)
    if not dry_run and out.exists() and any(out.iterdir()):
        raise CheckpointError(f"{out} is not empty; choose another --out, or remove it")
    mask = read_mask_file(folder)
    identity = embedding_row(target, 0)[1] if target is not None else {}
    config = read_as_ours(raw, folder, identity, mask is not None)
    if mask and mask["mask_token_id"] not in (None, config.mask_token_id):
        raise CheckpointError(
            f"{folder / MASK_FILE} is for token {mask['mask_token_id']}, config.json says {config.mask_token_id}"
        )
    wanted = {"hidden_size": config.hidden_size, "num_hidden_layers": config.num_target_layers}
    for key, value in wanted.items():
        if identity and identity[key] != value:
            raise ConfigError(f"drafter {folder} is for a target of {key}={value}, {target} has {identity[key]}")
    row = mask["embedding"] if mask else row_of(target, config, folder)
    tensors = renamed(folder, raw)
    tensors[MASK] = row.reshape(-1).to(tensors["fc.weight"].dtype if "fc.weight" in tensors else row.dtype)
    with named_config():
        check_tensors(tensors, config, str(folder))
    check_mask(tensors[MASK], str(folder))
    if not dry_run:
        said = identity or wanted | {"vocab_size": config.vocab_size}
        save_drafter(tensors, config, out, {"target": said, "imported_from": folder.name})
    return config


def read_as_ours(raw: dict[str, Any], folder: Path, identity: dict[str, Any], own_mask: bool) -> DFlashConfig:
    """config.json of either kind. Raises CheckpointError naming what it lacks, or what is no value of a drafter."""
    try:
        return (from_hf if raw.get("model_type") == MODEL_TYPE else from_qwen3)(raw, folder, identity, own_mask)
    except IMPOSSIBLE as error:
        raise CheckpointError(
            f"{folder / 'config.json'} is no drafter's ({error!r}); download it again, or add what it lacks"
        ) from error


def row_of(target: Path | None, config: DFlashConfig, folder: Path) -> Tensor:
    if target is None:
        raise ConfigError(f"{folder} has no {MASK_FILE}: its mask embedding is the target's; add --target DIR")
    return embedding_row(target, config.mask_token_id)[0]


def renamed(folder: Path, raw: dict[str, Any]) -> dict[str, Tensor]:
    """Every tensor of the folder under our name; `check_tensors` names the ones that our drafter has not."""
    hf = raw.get("model_type") == MODEL_TYPE
    back = {there: ours for ours, there in DRAFTERS["hf"].renames.items()} if hf else {}
    checkpoint = open_checkpoint(folder)
    return {back.get(n, n.removeprefix(MODEL_PREFIX)): checkpoint.read(n) for n in checkpoint.entries}


def shared(raw: dict[str, Any]) -> dict[str, Any]:
    rope = raw.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default" or raw.get("rope_scaling"):
        raise UnsupportedError(f"drafter rope_parameters={rope or raw['rope_scaling']}: only plain RoPE is read here")
    keys = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "head_dim", "rms_norm_eps",
    )  # fmt: skip
    theta = rope.get("rope_theta", raw.get("rope_theta"))
    if theta is None:
        raise KeyError("rope_theta")
    return {k: raw[k] for k in keys} | {"rope_theta": float(theta)}


def from_hf(raw: dict[str, Any], folder: Path, identity: dict[str, Any], own_mask: bool) -> DFlashConfig:
    if not identity:
        raise ConfigError(f"{folder} does not say its target's sizes; add --target DIR")
    return DFlashConfig(
        **shared(raw), vocab_size=identity["vocab_size"], num_target_layers=identity["num_hidden_layers"],
        taps=raw["target_layer_ids"], mask_token_id=raw["mask_token_id"], block_size=raw["block_size"],
        window=raw["sliding_window"] + 1, layer_types=raw["layer_types"], learned_mask=own_mask,
    )  # fmt: skip


def from_qwen3(raw: dict[str, Any], folder: Path, identity: dict[str, Any], own_mask: bool) -> DFlashConfig:
    inner = raw.get("dflash_config") or {}
    for key in ("selector_rank", "conv_kernel_size", "output_multiplier", "final_logit_softcapping", "projector_type"):
        if inner.get(key, raw.get(key)) not in (None, 0, 1.0):
            raise UnsupportedError(f"{folder}: {key}={inner.get(key, raw.get(key))} belongs to a variant not read here")

    def either(key: str, default: Any = None) -> Any:
        found = inner.get(key, raw.get(key, default))
        if found is None:
            raise KeyError(key)
        return found

    kinds = layers_of(raw, inner, folder)
    value_scale, sinks = either("attention_value_scale", 1.0), either("attention_sink_bias", False)
    if (sinks or value_scale != 1.0) and not own_mask:
        raise CheckpointError(f"{folder} is one of MiMo's drafters and lacks {MASK_FILE}; download it again")
    partial = (raw.get("rope_parameters") or {}).get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    return DFlashConfig(
        **shared(raw), vocab_size=identity.get("vocab_size", raw["vocab_size"]), taps=either("target_layer_ids"),
        num_target_layers=either("num_target_layers", identity.get("num_hidden_layers")),
        mask_token_id=either("mask_token_id"), block_size=either("block_size"),
        window=(inner.get("swa_window_size") or either("sliding_window")) if SLIDING in kinds else 2**20,
        layer_types=kinds, causal=causality(raw, inner, kinds, folder), sinks=bool(sinks), value_scale=value_scale,
        partial_rotary_factor=partial, learned_mask=own_mask,
    )  # fmt: skip


def layers_of(raw: dict[str, Any], inner: dict[str, Any], folder: Path) -> tuple[str, ...]:
    """Layer types, from `layer_types` or V2.5's `use_swa`; all-full ones yield to use_swa, as ModelOpt writes."""
    count, kinds = raw["num_hidden_layers"], tuple(raw.get("layer_types") or ())
    swa = inner.get("use_swa", raw.get("use_swa"))
    if swa and SLIDING not in kinds:
        return (SLIDING,) * count
    if not kinds and swa is None and raw.get("use_sliding_window"):
        raise CheckpointError(f"{folder}: use_sliding_window without layer_types; add layer_types to config.json")
    return kinds or (FULL,) * count


def causality(raw: dict[str, Any], inner: dict[str, Any], kinds: tuple[str, ...], folder: Path) -> bool:
    """Explicit keys first; V2.5 (use_swa, no layer_types) and all-full drafters are bidirectional everywhere."""
    for said in (raw.get("is_causal"), inner.get("causal")):
        if said is not None:
            return bool(said)
    if SLIDING not in kinds or (inner.get("use_swa", raw.get("use_swa")) and not raw.get("layer_types")):
        return False
    raise CheckpointError(
        f"{folder}: sliding layers without is_causal, which some engines take for causal and others for bidirectional; "
        'add "is_causal": true or false to config.json, as it was trained'
    )
