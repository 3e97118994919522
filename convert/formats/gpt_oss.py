"""`gpt-oss`: the layout OpenAI released, for GPT-OSS models only.

    experts.gate_up_proj [E, K, N]  ->  experts.gate_up_proj_blocks uint8 [E, N, K/32, 16], low nibble first
                                        experts.gate_up_proj_scales uint8 [E, N, K/32]

The model keeps the reduction dimension first; the file keeps it last, in blocks. Rows alternate gate and up as they do
in the model, biases stay BF16.
"""

from collections.abc import Iterator
from typing import Any

import torch

from convert.formats.config import base_config
from convert.plan import Format, Job, Output, copy_job
from convert.source import Item, Source, packed_shape
from core.errors import UnsupportedError
from core.mxfp4 import BLOCK

KEPT = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]


class GptOss(Format):
    name = "gpt-oss"

    def refuse(self, source: Source) -> None:
        if source.config.model_type != "gpt_oss":
            raise UnsupportedError(
                f"--to gpt-oss is for GPT-OSS models, this is model_type={source.config.model_type}: engines run that "
                "layout with GPT-OSS's clamped activation and biases; use --to hf"
            )
        if not source.quantised:
            raise UnsupportedError(f"{source.folder} has no quantised tensor to pack; use --to bf16")
        for item in source.quantised:
            if not item.transposed:
                raise UnsupportedError(f"--to gpt-oss packs experts, and {item.name} is none; use --to bf16")

    def jobs(self, source: Source) -> Iterator[Job]:
        for item in source.items:
            yield blocks_job(item) if item.quantised else copy_job(item)

    def config(self, source: Source) -> dict[str, Any]:
        return base_config(source) | {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": KEPT}}


def blocks_job(item: Item) -> Job:
    experts, rows, size = packed_shape(item)
    outputs = (
        Output(f"{item.name}_blocks", torch.uint8, (experts, rows, size // BLOCK, BLOCK // 2)),
        Output(f"{item.name}_scales", torch.uint8, (experts, rows, size // BLOCK)),
    )

    def make(packer: Any) -> list[torch.Tensor]:
        packed = packer.packed(item)
        return [packed.codes.unflatten(-1, (-1, BLOCK // 2)), packed.scales]

    return Job((item,), outputs, "relay" if item.packed else "pack", make)
