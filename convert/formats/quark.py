"""`quark`: AMD Quark's layout. Codes under the weight's own name, `weight_scale` beside it; both uint8.

    X.weight [N, K]  ->  X.weight uint8 [N, K/2], low nibble first;  X.weight_scale uint8 [N, K/32]

Field names as vLLM's quark.py reads them. SGLang's loader of the same name accepts no weight-only MXFP4 (it demands
dynamic FP4 inputs); convert.verify says so.
"""

from collections.abc import Iterator
from typing import Any

from convert.formats.compressed_tensors import kept_matrices, packed_job, whole_matrices
from convert.formats.config import base_config
from convert.plan import Format, Job, copy_job
from convert.source import Source
from core.mxfp4 import BLOCK


class Quark(Format):
    name = "quark"

    def refuse(self, source: Source) -> None:
        whole_matrices(source, self.name)

    def jobs(self, source: Source) -> Iterator[Job]:
        for item in source.items:
            yield packed_job(item, "") if item.quantised else copy_job(item)

    def config(self, source: Source) -> dict[str, Any]:
        weight = {
            "dtype": "fp4", "qscheme": "per_group", "group_size": BLOCK, "scale_format": "e8m0", "ch_axis": -1,
            "is_dynamic": False, "symmetric": None, "round_method": "half_even", "scale_type": "float",
        }  # fmt: skip
        return base_config(source) | {
            "quantization_config": {
                "quant_method": "quark",
                "export": {
                    "kv_cache_group": [],
                    "pack_method": "reorder",
                    "weight_format": "real_quantized",
                    "weight_merge_groups": None,
                },
                "global_quant_config": {
                    "weight": weight, "input_tensors": None, "output_tensors": None, "bias": None,
                },
                "layer_quant_config": {},
                "layer_type_quant_config": {},
                "exclude": kept_matrices(source),
                "quant_mode": "eager_mode",
            }
        }  # fmt: skip
