"""Packed rows in transformers models that forget about them.

transformers finds the documents of a row from `position_ids` while it builds masks, if the model hands them over.
GPT-OSS does not: its tokens would attend across documents, silently. It does accept ready masks by layer type, so a
forward pre-hook on the decoder supplies them.
"""

from typing import Any

import torch
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

NEED_MASKS = ("gpt_oss",)  # model types whose decoder leaves position_ids out of its masks
MAKERS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}


def separate_documents(model: Any) -> None:
    """Make packed rows right on `model` if its type needs it; generation with a cache stays as it was."""
    if getattr(model.config, "model_type", None) in NEED_MASKS:
        model.get_decoder().register_forward_pre_hook(add_masks, with_kwargs=True)


def add_masks(
    decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    positions, given = kwargs.get("position_ids"), args[0] if args else kwargs.get("input_ids")
    cached = kwargs.get("use_cache") or kwargs.get("past_key_values") is not None
    if positions is None or cached or kwargs.get("attention_mask") is not None:
        return None
    shape = given.shape if given is not None else kwargs["inputs_embeds"].shape[:2]
    weight = decoder.embed_tokens.weight
    like = torch.empty(*shape, 1, dtype=weight.dtype, device=positions.device)  # only its shape, dtype, device are read
    arguments = {
        "config": decoder.config, "inputs_embeds": like, "attention_mask": None, "past_key_values": None,
        "position_ids": positions,
    }  # fmt: skip
    masks = {kind: MAKERS[kind](**arguments) for kind in set(decoder.config.layer_types)}
    return args, kwargs | {"attention_mask": masks}
