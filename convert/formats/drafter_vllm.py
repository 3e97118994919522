"""`vllm`: the keys that vLLM's DFlash loader reads, all of them written.

Its causality is the top-level `is_causal`, then `dflash_config.causal`, then a guess from the layer type. Its window is
`dflash_config.swa_window_size`, then `sliding_window`. It adds 1 to `dflash_config.target_layer_ids` itself, and to
nothing else, so taps stand there alone. Sinks are one switch for all layers. It has no value scale. A
`mask_embedding.pt` beside the weights replaces the target's row. Full and sliding layers together need its V2 runner.
"""

from typing import Any

from torch import Tensor

from convert.formats.drafter import Dialect, Pair, mixed, qwen3_shaped, refuse_beyond, stop
from core.models.dflash_config import FULL, SLIDING, DFlashConfig


class VLlm(Dialect):
    name = "vllm"
    mask_file = True
    window_rule = "query - key < swa_window_size"

    def refuse(self, config: DFlashConfig, tensors: dict[str, Tensor], pair: Pair) -> None:  # noqa: ARG002
        refuse_beyond(self.name, config, values=False)
        if config.sinks and mixed(config):
            why = f"its sink bias is in every layer or in none, ours only in {SLIDING} ones; use --to mimo"
            stop(self.name, "sinks", f"True with {FULL} layers", why)

    def config(self, config: DFlashConfig, tensors: dict[str, Tensor], pair: Pair) -> dict[str, Any]:
        raw = qwen3_shaped(config, tensors, pair)
        sliding = SLIDING in config.layer_types
        raw["add_swa_attention_sink_bias"] = config.sinks and sliding
        raw["dflash_config"] |= {"attention_sink_bias": config.sinks and sliding}
        if sliding:
            raw["dflash_config"] |= {"use_swa": True, "swa_window_size": config.window}
        return raw
