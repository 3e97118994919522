"""Forward-time fake quantisation of fused experts: the general path, for layouts that snapping cannot take.

transformers dispatches fused experts by name through an open registry, so no module is patched: we register one more
implementation that quantises the expert weights (straight-through gradient) and hands them to the implementation
the model would have used. It costs a pass over the weights in every forward, and saves the snapped copy for backward;
`qat=snap` gives bit-identical losses without either, where it applies.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from core.errors import UnsupportedError
from core.models.experts import find_experts
from core.mxfp4 import ScaleRule, snap
from qat.select import Selection

NAME = "fp4flash_fake_quant"


class StraightThrough(torch.autograd.Function):
    """snap(weight) forward, identity backward (straight-through estimator, Bengio et al. 2013)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rule: ScaleRule, dim: int) -> Tensor:  # noqa: ARG004
        return snap(weight, rule, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # noqa: ARG004
        return grad, None, None


class QuantisedView:
    """Stands in for an experts module: its attributes, but with quantised weights."""

    def __init__(self, module: nn.Module, weights: dict[str, Tensor]) -> None:
        self._module = module
        self._weights = weights

    def __getattr__(self, name: str) -> Any:
        weights = self.__dict__["_weights"]
        return weights[name] if name in weights else getattr(self.__dict__["_module"], name)


def use_fake_quant(model: nn.Module, selection: Selection, rule: ScaleRule, active: Callable[[], set[str]]) -> None:
    """Route the experts of `model` through fake quantisation.

    Args:
        model: a transformers model with fused experts (`config._experts_implementation` decides what runs beneath).
        selection: the selected tensors; all must be fused experts.
        rule: scale rule.
        active: names quantised now, asked in every forward (schedules).
    Raises:
        UnsupportedError: a selected tensor is not a fused expert.
    """
    dims = {e.name: e.reduction_dim for e in find_experts(model)}
    strangers = [n for n in selection.names if n not in dims]
    if strangers:
        raise UnsupportedError(f"qat=fake_quant covers fused experts only, and {strangers[0]} is not one; use qat=snap")
    by_module: dict[nn.Module, dict[str, tuple[str, int]]] = {}
    modules = dict(model.named_modules())
    for name in selection.names:
        parent, attribute = name.rsplit(".", 1)
        by_module.setdefault(modules[parent], {})[attribute] = (name, dims[name])
    beneath = model.config._experts_implementation

    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        now = active()
        weights = {
            attribute: StraightThrough.apply(getattr(module, attribute), rule, dim)
            for attribute, (name, dim) in by_module.get(module, {}).items()
            if name in now
        }
        view = QuantisedView(module, weights)
        if beneath == "eager":
            return type(module).forward.__wrapped__(view, *args, **kwargs)
        return ALL_EXPERTS_FUNCTIONS[beneath](view, *args, **kwargs)

    ALL_EXPERTS_FUNCTIONS.register(NAME, forward)
    model.set_experts_implementation(NAME)
