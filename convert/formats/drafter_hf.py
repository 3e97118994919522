"""`hf`: transformers' own DFlash (>= 5.23), model type muse_glimmer_assistant.

    target.generate(ids, assistant_model=AutoModel.from_pretrained(OUT), speculation_type="dflash")

fc and hidden_norm live under `encoder.`. A query sees keys at a distance of up to `sliding_window`, that distance
included, and the cache keeps as many: our W (self included) is W - 1 there. The mask embedding is the target's row
`mask_token_id`. Taps are hidden_states[id + 1].
"""

from typing import Any

from torch import Tensor

from convert.formats.drafter import (
    MASK,
    Dialect,
    Pair,
    dtype_name,
    from_target,
    refuse_beyond,
    refuse_last_tap,
    refuse_own_mask,
    sizes,
)  # fmt: skip
from core.models.dflash_config import DFlashConfig

MODEL_TYPE = "muse_glimmer_assistant"


class Hf(Dialect):
    name = "hf"
    renames = {"fc.weight": "encoder.fc.weight", "hidden_norm.weight": "encoder.output_norm_enc.weight"}  # noqa: RUF012
    window_rule = "|query - key| <= sliding_window"

    def refuse(self, config: DFlashConfig, tensors: dict[str, Tensor], pair: Pair) -> None:
        refuse_beyond(self.name, config, sinks=False, values=False, rotary=False, causal=False)
        refuse_last_tap(self.name, config, pair)
        refuse_own_mask(self.name, config, tensors[MASK], pair)

    def window(self, config: DFlashConfig) -> int:
        return config.window - 1

    def config(self, config: DFlashConfig, tensors: dict[str, Tensor], pair: Pair) -> dict[str, Any]:
        shared = sizes(config)
        shared.pop("attention_bias")
        return {
            **shared,
            **from_target(pair),
            "architectures": ["MuseGlimmerAssistantModel"],
            "model_type": MODEL_TYPE,
            "sliding_window": self.window(config),
            "mask_token_id": config.mask_token_id,
            "target_layer_ids": list(config.taps),
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
            "dtype": dtype_name(tensors),
        }
