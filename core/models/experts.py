"""Finding the fused expert weights of any transformers-v5 model.

Expert classes decorated with `use_experts_implementation` carry their layout: `is_transposed` (weights are
[E, in, out], GPT-OSS) or not ([E, out, in]), `has_gate`, `has_bias`. The dimension summed over in the matmul is
where MXFP4 blocks lie.
"""

import re
from dataclasses import dataclass

from torch import nn

WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class ExpertTensor:
    """One fused parameter [E, ., .]; `reduction_dim` is -1, or -2 where the layout is transposed."""

    name: str
    module_name: str
    shape: tuple[int, ...]
    reduction_dim: int
    layer: int | None


def find_experts(model: nn.Module) -> list[ExpertTensor]:
    """Every fused expert weight, in the model's order; biases are not among them."""
    found = []
    for module_name, module in model.named_modules():
        if not (hasattr(module, "is_transposed") and hasattr(module, "has_gate")):
            continue
        for leaf in WEIGHTS:
            weight = module._parameters.get(leaf)
            if weight is None:
                continue
            shape = tuple(getattr(weight, "ds_shape", weight.shape))  # ZeRO-3 empties the parameter itself
            if len(shape) == 3:
                dim = -2 if module.is_transposed else -1
                number = re.search(r"\.layers\.(\d+)\.", f".{module_name}.")
                layer = int(number[1]) if number else None
                found.append(ExpertTensor(f"{module_name}.{leaf}", module_name, shape, dim, layer))
    return found
