"""What the codes and the experts do during QAT: flips, oscillation, clipping, starvation. Cheap, on samples.

flip rate         share of sampled values that differ from the previous step's
oscillation rate  share of sampled values that flipped back: the flip returns to the value held before the last flip,
                  at most WINDOW steps after it. Nagel et al. 2022 (arXiv:2203.11086, section 3) count an oscillation
                  when a weight's integer changes opposite to its previous change; the window makes it a rate.
clip rate         share of sampled weights whose magnitude lies above the largest code, 6 x scale

A value stands for its code and scale. Values are read off the snapped BF16 weights, one small copy a tensor and step;
everything else happens once a step on all samples together, and nothing waits for the device.
"""

from typing import Any

import torch
from torch import Tensor, nn

from core.models.experts import find_experts
from core.mxfp4 import BLOCK, E2M1_MAX, ScaleRule, scale_bytes, scale_values, snap

SAMPLE_BLOCKS = 1024  # of each tensor
WINDOW = 16  # steps within which a return counts as oscillation
STARVED_SHARE = 0.01  # of the tokens an expert would get under uniform routing


def sample(flat: Tensor) -> Tensor:
    """Up to SAMPLE_BLOCKS whole blocks, evenly spread over the tensor: a copy of shape [blocks, 32]."""
    blocks = flat[: flat.numel() // BLOCK * BLOCK].view(-1, BLOCK)
    stride = max(1, blocks.shape[0] // SAMPLE_BLOCKS)
    return blocks[::stride][:SAMPLE_BLOCKS].clone()


class CodeTracker:
    """Follows sampled values of every selected tensor from step to step.

    For each sampled value: `last` (now), `origin` (what the last flip left), `age` (steps since that flip).
    """

    def __init__(self, rule: ScaleRule, snapped: bool = True) -> None:
        """`snapped`: the tensors handed to `update` are on the grid (qat=snap); else the samples are snapped here."""
        self.rule, self.snapped = rule, snapped
        self.step = self.folded = -1
        self.pending: dict[str, Tensor] = {}
        self.names: list[str] = []
        self.state: dict[str, Tensor] = {}
        self.sums: Tensor | None = None  # flips, returns, on the device
        self.seen = 0

    def update(self, name: str, flat: Tensor, step: int) -> None:
        """Sample one tensor as it is after `step`; a step that was seen already (a resumed run) changes nothing."""
        if step == self.folded:
            return
        if step != self.step:
            self.fold()
            self.step = step
        self.pending[name] = sample(flat)

    def fold(self) -> None:
        """Compare the pending step with the one before, all tensors at once."""
        if not self.pending:
            return
        names, now = list(self.pending), torch.cat(list(self.pending.values()))
        self.pending, self.folded = {}, self.step
        if not self.snapped:
            now = snap(now, self.rule)
        if (
            names != self.names or now.shape != self.state["last"].shape
        ):  # the first step, or a schedule that quantises further layers from here on
            self.names = names
            self.state = {"last": now, "origin": now.clone(), "age": torch.zeros_like(now, dtype=torch.int8)}
            return
        last, origin, age = (self.state[k].to(now.device) for k in ("last", "origin", "age"))
        flipped = now != last
        returned = flipped & (now == origin) & (age < WINDOW)
        counts = torch.stack((flipped.sum(), returned.sum()))
        self.sums = counts if self.sums is None else self.sums + counts
        self.seen += now.numel()
        self.state = {
            "last": now,
            "origin": torch.where(flipped, last, origin),
            "age": torch.where(flipped, 0, (age + 1).clamp(max=126)).to(torch.int8),
        }

    def metrics(self) -> dict[str, float]:
        """Rates since the last call."""
        self.fold()
        if self.sums is None:
            return {}
        flips, returns = self.sums.tolist()
        found = {"flip_rate": flips / self.seen, "oscillation_rate": returns / self.seen}
        self.sums, self.seen = None, 0
        return found

    def state_dict(self) -> dict[str, Any]:
        self.fold()
        return {
            "step": self.folded,
            "names": self.names,
            "state": {k: v.cpu() for k, v in self.state.items()},
            "sums": None if self.sums is None else self.sums.cpu(),
            "seen": self.seen,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = self.folded = state["step"]
        self.names, self.state = list(state["names"]), dict(state["state"])
        self.sums, self.seen, self.pending = state["sums"], state["seen"], {}


def clip_rate(weight: Tensor, rule: ScaleRule) -> float:
    """Share of sampled weights (blocks along the last dimension) above 6 x their block's scale."""
    blocks = sample(weight.detach().to(torch.bfloat16).reshape(-1)).to(torch.float32)
    scale = scale_values(scale_bytes(blocks.abs().amax(-1), rule))
    return float((blocks.abs() > E2M1_MAX * scale[:, None]).float().mean())


class ExpertCounter:
    """Tokens routed to each expert of each layer in training forwards, counted on the device by hooks.

    Activation checkpointing runs a layer twice, and counts its tokens twice; shares do not change.
    """

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
