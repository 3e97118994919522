"""`mimo`: the `dflash/` folder of Xiaomi's releases, with the keys of V2.6 and their spellings of V2.5.

    dflash_draft_model.safetensors, model.safetensors.index.json   63 BF16 tensors for five layers with sinks
    mask_embedding.pt      {"mask_token_id": int, "embedding": BF16 [hidden]}; the target's own row is near zero
    config.json            V2.6: layer_types, sliding_window, is_causal; V2.5: dflash_config.use_swa, swa_window_size
                           both: dflash_config.attention_sink_bias, attention_value_scale; partial_rotary_factor

Every layer slides and blocks see themselves in both directions: V2.5 readers assume both. `rope_theta` is the
drafter's; V2.5's `backbone_rotary_base` (the target's, which no drafter tensor meets) is left out as in V2.6.
"""

from typing import Any

import torch
from torch import Tensor

from convert.formats.drafter import Dialect, Pair, qwen3_shaped, refuse_beyond, stop
from core.models.dflash_config import FULL, DFlashConfig


class MiMoDrafter(Dialect):
    name = "mimo"
    weights = "dflash_draft_model.safetensors"
    indexed = True
    mask_file = True
    window_rule = "query - key < sliding_window"

    def refuse(self, config: DFlashConfig, tensors: dict[str, Tensor], pair: Pair) -> None:  # noqa: ARG002
        refuse_beyond(self.name, config, causal=False)
        if FULL in config.layer_types:
            why = "every layer of MiMo's drafters slides; use --to vllm, or train with sliding layers only"
            stop(self.name, "layer_types", list(config.layer_types), why)
        wide = next((n for n, t in tensors.items() if t.dtype != torch.bfloat16), None)
        if wide:
            stop(self.name, wide, tensors[wide].dtype, "the released layout is BF16; save the drafter in bfloat16")

    def config(self, config: DFlashConfig, tensors: dict[str, Tensor], pair: Pair) -> dict[str, Any]:
        raw = qwen3_shaped(config, tensors, pair)
        raw |= {
            "v_head_dim": config.head_dim,
            "partial_rotary_factor": config.partial_rotary_factor,
            "add_swa_attention_sink_bias": config.sinks,
        }
        raw["dflash_config"] |= {
            "use_swa": True,
            "swa_window_size": config.window,
            "attention_sink_bias": config.sinks,
            "attention_value_scale": config.value_scale,
        }
        return raw
