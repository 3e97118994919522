"""`hf`: compressed-tensors `mxfp4-pack-quantized`, the layout that transformers, vLLM and SGLang all read.

    X.weight [N, K]  ->  X.weight_packed uint8 [N, K/2], low nibble first;  X.weight_scale uint8 [N, K/32], E8M0

One config group with the target `Linear`, and every other two-dimensional weight under `ignore` by its exact name: the
spelling that all loaders understand, fused or not. Field names: compressed-tensors 0.20, its preset MXFP4A16.
"""

from collections.abc import Iterator
from typing import Any

import torch

from convert.formats.config import base_config
from convert.plan import Format, Job, Output, copy_job
from convert.source import Item, Source
from core.errors import UnsupportedError
from core.mxfp4 import BLOCK

WEIGHTS = {
    "num_bits": 4, "type": "float", "strategy": "group", "group_size": BLOCK, "symmetric": True, "dynamic": False,
    "scale_dtype": "torch.uint8",
}  # fmt: skip


class HF(Format):
    name = "hf"

    def refuse(self, source: Source) -> None:
        whole_matrices(source, self.name)

    def jobs(self, source: Source) -> Iterator[Job]:
        for item in source.items:
            yield packed_job(item, "_packed") if item.quantised else copy_job(item)

    def config(self, source: Source) -> dict[str, Any]:
        group = {
            "targets": ["Linear"],
            "weights": WEIGHTS,
            "input_activations": None,
            "output_activations": None,
            "format": "mxfp4-pack-quantized",
        }
        return base_config(source) | {
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "format": "mxfp4-pack-quantized",
                "quantization_status": "compressed",
                "config_groups": {"group_0": group},
                "ignore": kept_matrices(source),
                "kv_cache_scheme": None,
            }
        }


def packed_job(item: Item, suffix: str) -> Job:
    """`X.weight` as codes under `X.weight<suffix>` and scales under `X.weight_scale`."""
    *rows, size = item.shape
    outputs = (
        Output(f"{item.name}{suffix}", torch.uint8, (*rows, size // 2)),
        Output(f"{item.name}_scale", torch.uint8, (*rows, size // BLOCK)),
    )
    how = "relay" if item.packed else "pack"

    def make(packer: Any) -> list[torch.Tensor]:
        packed = packer.packed(item)
        return [packed.codes, packed.scales]

    return Job((item,), outputs, how, make)


def whole_matrices(source: Source, format_name: str) -> None:
    """UnsupportedError unless there are quantised tensors and each is one module's `weight` [N, K]."""
    if not source.quantised:
        raise UnsupportedError(
            f"{source.folder} has no quantised tensor, so --to {format_name} has nothing to pack; use --to bf16"
        )
    for item in source.quantised:
        if item.transposed or len(item.shape) != 2 or not item.name.endswith(".weight"):
            raise UnsupportedError(
                f"--to {format_name} needs one matrix per expert and projection, {item.name} is {item.shape}: "
                f"model_type={source.config.model_type} keeps its experts fused; use --to gpt-oss or --to bf16"
            )


def kept_matrices(source: Source) -> list[str]:
    """Module names of all two-dimensional weights that are not quantised, carried ones too."""
    kept = [i.name for i in source.items if not i.quantised and len(i.shape) == 2 and i.name.endswith(".weight")]
    kept += [e.name for e in source.carried if len(e.shape) == 2 and e.name.endswith(".weight")]
    tied = [] if any(n == "lm_head.weight" for n in kept) else ["lm_head"]
    return sorted(n.removesuffix(".weight") for n in kept) + tied
