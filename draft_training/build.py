"""The target and the drafter of a run, from configuration: what 0 and `auto` mean."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core.errors import ConfigError
from core.generate.target import Target
from core.models.dflash import Drafter, Layer, init_drafter
from core.models.dflash_config import FULL, SLIDING, DFlashConfig, spread_taps
from core.models.dflash_io import check_mask
from core.models.drafters import AnyConfig, AnyDrafter, empty, load_any
from core.models.eagle import EagleDrafter, init_eagle
from core.models.eagle_config import EagleConfig
from core.models.load import LoadedModel, load_model
from core.models.ops import EAGER, FLEX
from draft_training.config import DraftConfig, Kind, TargetConfig


def target_folder(config: TargetConfig, root: str) -> Path:
    """The checkpoint folder of `target.path` (a run folder stands for its model), or of the newest finished QAT run.

    Raises:
        ConfigError: there is none; says what to do.
    """
    if config.path:
        folder = Path(config.path)
        folder = folder / "model" if (folder / "run.json").exists() else folder
        if not (folder / "config.json").exists():
            raise ConfigError(f"target.path={config.path} is not a checkpoint folder (no config.json); set it to one")
        return folder
    runs = sorted(Path(root).glob("*/run.json"), key=lambda p: p.stat().st_mtime, reverse=True)
    for path in runs:
        info = json.loads(path.read_text())
        if path.parent.name != "latest" and info.get("kind") == "qat" and info.get("state") == "finished":
            return path.parent / "model"
    raise ConfigError(
        f"no finished QAT run under {root}: run `python -m qat.train +experiment=mimo_fp4` first, "
        "or set target.path=DIR"
    )


def load_target(config: TargetConfig, folder: Path, device: torch.device) -> LoadedModel:
    """The target in BF16, frozen."""
    loaded = load_model(folder, device=device, attention=config.attention, experts=config.experts)
    loaded.model.requires_grad_(False)
    return loaded


def full_layers(config: Any) -> tuple[int, ...]:
    """Full-attention layers of a target, counted from 0; () where all are."""
    kinds = getattr(config, "layer_types", None) or []
    found = tuple(i for i, k in enumerate(kinds) if k == FULL)
    return () if len(found) == len(kinds) else found


def refuse_real_token(token: int, tokenizer: Any) -> None:
    """ConfigError for a mask token that text has: all but special tokens, and of those EOS, BOS and a chat's marks."""
    if tokenizer is None or token >= len(tokenizer):
        return
    special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special} | set(tokenizer.all_special_ids)
    template = str(getattr(tokenizer, "chat_template", None) or "")
    used = {tokenizer.eos_token_id, tokenizer.bos_token_id}
    free = sorted(i for i in special - used if str(tokenizer.convert_ids_to_tokens(i)) not in template)
    if token not in free:
        named = tokenizer.convert_ids_to_tokens(token)
        remedy = f"take a token that has none, such as {free[0]}" if free else "set draft.learned_mask=true"
        raise ConfigError(f"draft.mask_token_id={token} is {named!r}, which has a place in text; {remedy}")


def mask_id(draft: DraftConfig, tokenizer: Any, vocab: int) -> int:
    """The token that stands for a slot to be drafted.

    Raises:
        ConfigError: draft.mask_token_id, or the last resort where the mask is a row of the target, occurs in text.
    """
    if draft.mask_token_id >= 0:
        refuse_real_token(draft.mask_token_id, tokenizer)
        return draft.mask_token_id
    for name in ("mask_token_id", "unk_token_id", "pad_token_id"):
        found = getattr(tokenizer, name, None)
        if found is not None and found != getattr(tokenizer, "eos_token_id", None):
            return found
    if not draft.learned_mask:
        refuse_real_token(vocab - 1, tokenizer)
    return vocab - 1


def drafter_config(draft: DraftConfig, loaded: LoadedModel) -> AnyConfig:
    """Sizes from the target where the configuration leaves them open.

    Raises:
        ConfigError: draft.full_layers names a layer that the drafter has not, or a size breaks a rule.
    """
    c = loaded.config
    layers = c.num_hidden_layers
    vocab, hidden = loaded.model.get_input_embeddings().weight.shape
    wrong = [i for i in draft.full_layers if not 0 <= i < draft.num_hidden_layers]
    if wrong:
        raise ConfigError(f"draft.full_layers has {wrong[0]}; the drafter has {draft.num_hidden_layers} layers")
    dim = getattr(c, "head_dim", None) or hidden // c.num_attention_heads
    common: dict[str, Any] = {
        "hidden_size": hidden, "intermediate_size": draft.intermediate_size or c.intermediate_size,
        "num_attention_heads": draft.num_attention_heads or c.num_attention_heads,
        "num_key_value_heads": draft.num_key_value_heads or c.num_key_value_heads, "head_dim": draft.head_dim or dim,
        "vocab_size": vocab, "num_target_layers": layers, "rope_theta": draft.rope_theta,
        "taps": tuple(draft.taps) or spread_taps(layers, draft.tap_count, full_layers(c)),
        "rms_norm_eps": getattr(c, "rms_norm_eps", 1e-6),
    }  # fmt: skip
    if draft.kind is Kind.eagle:
        return EagleConfig(**common, drafts=draft.block_size - 1, window=0 if draft.full_layers else draft.window)
    return DFlashConfig(
        **common,
        num_hidden_layers=draft.num_hidden_layers,
        mask_token_id=mask_id(draft, loaded.tokenizer, vocab),
        block_size=draft.block_size,
        window=draft.window,
        layer_types=tuple(FULL if i in draft.full_layers else SLIDING for i in range(draft.num_hidden_layers)),
        causal=draft.causal,
        sinks=draft.sinks,
        value_scale=draft.value_scale,
        partial_rotary_factor=draft.partial_rotary_factor,
        learned_mask=draft.learned_mask,
        selector_top_k=draft.selector_top_k,
        selector_rank=draft.selector_rank,
    )


def make_drafter(draft: DraftConfig, loaded: LoadedModel, device: torch.device) -> AnyDrafter:
    """A fresh drafter in BF16 for this target, or the one of `draft.init`.

    Raises:
        ConfigError: draft.init has another kind or geometry. CheckpointError: the mask token's row is near zero.
    """
    config = drafter_config(draft, loaded)
    if draft.init:
        drafter = load_any(draft.init, device=device)
        if drafter.config != config:
            raise ConfigError(f"draft.init={draft.init} has another geometry than draft.*; set the same values")
    else:
        drafter = empty(config).to(device, torch.bfloat16)
        if isinstance(drafter, EagleDrafter):
            init_eagle(drafter)
        else:
            init_drafter(drafter, first_mask(drafter.config, loaded).to(device))
    drafter.ops = FLEX if device.type == "cuda" else EAGER
    if isinstance(drafter, Drafter):
        drafter.mask_embedding.requires_grad_(drafter.config.learned_mask)
    return drafter.train()


def first_mask(config: DFlashConfig, loaded: LoadedModel) -> Tensor:
    """The mask embedding that training starts from."""
    rows = loaded.model.get_input_embeddings().weight.detach().float()
    if config.learned_mask:
        return torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(0)) * rows.std().cpu()
    check_mask(rows[config.mask_token_id], f"row {config.mask_token_id} of the target's embedding")
    return rows[config.mask_token_id]


def shape_text(config: AnyConfig) -> str:
    """A drafter's geometry in words."""
    taps = f"taps {list(config.taps)} of {config.num_target_layers} layers"
    if isinstance(config, EagleConfig):
        return f"EAGLE, chain of {config.drafts}, {f'window {config.window}' if config.window else 'all keys'}, {taps}"
    selector = ", selector" if config.selector_rank else ""
    return f"DFlash, block {config.block_size}, window {config.window}, {taps}{selector}"


def compile_layers(drafter: AnyDrafter, target: Target) -> None:
    """torch.compile of every decoder layer, one program for all that are alike.

    The forward is compiled and not the module, whose hooks (the taps) would be traced with it, once for each tap.
    """
    for layer in (*drafter.decoder_layers(), *target.model.model.layers):
        layer.forward = torch.compile(layer.forward, dynamic=False)
        if isinstance(layer, Layer):  # of the context, once for all blocks
            layer.key_value = torch.compile(layer.key_value, dynamic=False)


def target_of(loaded: LoadedModel, drafter: AnyDrafter) -> Target:
    model: nn.Module = loaded.model
    return Target(model.eval(), drafter.config.taps)
