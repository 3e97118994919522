"""`z-lab`: what z-lab publishes and its package `dflash`, SGLang and ModelOpt read.

The target runs in transformers there, and the mask embedding is its row `mask_token_id`. `block_size` stands in both
places, because readers look into `dflash_config` first or not at all. The window is ours: query - key < sliding_window.
`is_causal` is always written: the package and SGLang take sliding layers without it for causal ones.
"""

from typing import Any

from torch import Tensor

from convert.formats.drafter import MASK, Dialect, Pair, qwen3_shaped, refuse_beyond, refuse_last_tap, refuse_own_mask
from core.models.dflash_config import DFlashConfig


class ZLab(Dialect):
    name = "z-lab"
    window_rule = "query - key < sliding_window"

    def refuse(self, config: DFlashConfig, tensors: dict[str, Tensor], pair: Pair) -> None:
        refuse_beyond(self.name, config, sinks=False, values=False, rotary=False)
        refuse_last_tap(self.name, config, pair)
        refuse_own_mask(self.name, config, tensors[MASK], pair)

    def config(self, config: DFlashConfig, tensors: dict[str, Tensor], pair: Pair) -> dict[str, Any]:
        return qwen3_shaped(config, tensors, pair)
