"""What the codes and the experts do during QAT: flips, oscillation, clipping, starvation. Cheap, on samples.

flip rate         share of sampled codes that differ from the previous step's
oscillation rate  share of sampled codes that returned to the code before last in the step after leaving it (the
                  reversal that Nagel et al. 2022, arXiv:2203.11086, count as oscillation)
clip rate         share of sampled weights whose magnitude lies above the largest code, 6 x scale

Codes are read off the snapped BF16 weights, so nothing but the sample is kept.
"""

from typing import Any

import torch
from torch import Tensor, nn

from core.models.experts import find_experts
from core.mxfp4 import BLOCK, E2M1_MAX, ScaleRule, scale_bytes, scale_values

SAMPLE_BLOCKS = 1024
STARVED_SHARE = 0.01  # of the tokens an expert would get under uniform routing


def sample(flat: Tensor) -> Tensor:
    """Up to SAMPLE_BLOCKS whole blocks, evenly spread over the tensor: a copy of shape [blocks, 32]."""
    blocks = flat.view(-1, BLOCK)
    stride = max(1, blocks.shape[0] // SAMPLE_BLOCKS)
    return blocks[::stride][:SAMPLE_BLOCKS].clone()


class CodeTracker:
    """Follows sampled snapped values of every selected tensor; a value stands for its code and scale."""

    def __init__(self, rule: ScaleRule) -> None:
        self.rule = rule
        self.last: dict[str, Tensor] = {}
        self.before: dict[str, Tensor] = {}
        self.flips: Tensor | None = None
        self.returns: Tensor | None = None
        self.seen = 0

    def update(self, name: str, flat: Tensor, step: int) -> None:  # noqa: ARG002
        """Compare with the step before; call once a step and tensor, after the snap."""
        now = sample(flat)
        if name in self.last:
            last, before = self.last[name].to(now.device), self.before[name].to(now.device)
            flipped = now != last
            self.add(flipped.sum(), (flipped & (now == before)).sum(), now.numel())
        self.before[name] = self.last.get(name, now)
        self.last[name] = now

    def add(self, flips: Tensor, returns: Tensor, count: int) -> None:
        self.flips = flips if self.flips is None else self.flips + flips
        self.returns = returns if self.returns is None else self.returns + returns
        self.seen += count

    def metrics(self) -> dict[str, float]:
        """Rates since the last call."""
        if self.flips is None or self.returns is None:
            return {}
        found = {"flip_rate": float(self.flips) / self.seen, "oscillation_rate": float(self.returns) / self.seen}
        self.flips = self.returns = None
        self.seen = 0
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"last": {n: t.cpu() for n, t in self.last.items()}, "before": {n: t.cpu() for n, t in self.before.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.last, self.before = dict(state["last"]), dict(state["before"])


def clip_rate(weight: Tensor, rule: ScaleRule) -> float:
    """Share of sampled weights (blocks along the last dimension) above 6 x their block's scale."""
    blocks = sample(weight.detach().to(torch.bfloat16).reshape(-1)).to(torch.float32)
    scale = scale_values(scale_bytes(blocks.abs().amax(-1), rule))
    return float((blocks.abs() > E2M1_MAX * scale[:, None]).float().mean())


class ExpertCounter:
    """Tokens routed to each expert of each layer during training, counted on the device by hooks."""

    def __init__(self, model: nn.Module) -> None:
        self.counts: dict[str, Tensor] = {}
        modules = dict(model.named_modules())
        for name in dict.fromkeys(e.module_name for e in find_experts(model)):
            modules[name].register_forward_pre_hook(self.hook(name), with_kwargs=True)

    def hook(self, name: str) -> Any:
        def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not (module.training and torch.is_grad_enabled()):
                return
            index = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
            index = index.float() if index.device.type == "cpu" else index.int()
            experts = module.num_experts
            found = torch.histc(index, bins=experts, min=0, max=experts - 1).to(torch.int64)
            old = self.counts.get(name)
            self.counts[name] = found if old is None else old.to(found.device) + found

        return torch.compiler.disable(count)

    def table(self) -> dict[str, list[int]]:
        return {n: c.tolist() for n, c in self.counts.items()}

    def starved(self) -> list[str]:
        """`module[expert]` of every expert with less than 1 % of the tokens of uniform routing."""
        found = []
        for name, counts in self.table().items():
            floor = STARVED_SHARE * sum(counts) / len(counts)
            found += [f"{name}[{i}]: {c} tokens" for i, c in enumerate(counts) if c < floor or c == 0]
        return found

    def state_dict(self) -> dict[str, Any]:
        return {n: c.cpu() for n, c in self.counts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts = dict(state)
