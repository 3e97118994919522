"""Which experts a token goes to, and with what weights, from the router's logits: the rules of three families.

sigmoid_bias   MiMo-V2      score = sigmoid(logit); the top k of score + bias, in the best groups of experts only;
                            weight = score, without the bias, over (sum of the chosen + 1e-20) if `normalise`
softmax_topk   Qwen3-MoE    score = softmax over all experts; the top k; over the sum of the chosen if `normalise`
topk_softmax   GPT-OSS      the top k logits; weight = softmax over those

Order is part of the definition, since torch.topk promises none: experts by descending rank, of equals the lower index
first. Rank is score + bias for sigmoid_bias, and the logit itself for the others (softmax keeps its order, and FP32
would only merge neighbours). Weights stay FP32; transformers rounds those of the last two to the logits' dtype.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from core.errors import ConfigError, FormatError
from kernels.dispatch import check_tensor, implementation

__all__ = ["Rule", "route"]

KINDS = ("sigmoid_bias", "softmax_topk", "topk_softmax")
MOST_EXPERTS, MOST_CHOSEN = 512, 16


@dataclass(frozen=True)
class Rule:
    """How a family routes; see the head of this file.

    top_k: experts a token, 1 to 16.
    groups, top_groups: experts lie in `groups` runs of equal size; only those in the `top_groups` groups whose best
        two ranks have the largest sums can be chosen. sigmoid_bias only.
    normalise: chosen weights sum to 1 (before `scaling`, a factor on them). topk_softmax has no other form.
    Raises:
        ConfigError: another kind, or a number that does not fit.
    """

    kind: str
    top_k: int
    groups: int = 1
    top_groups: int = 1
    normalise: bool = True
    scaling: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"kind={self.kind!r}: expected one of {', '.join(KINDS)}")
        if not 1 <= self.top_k <= MOST_CHOSEN:
            raise ConfigError(f"top_k={self.top_k}: expected 1 to {MOST_CHOSEN}")
        if not 1 <= self.top_groups <= self.groups:
            raise ConfigError(f"top_groups={self.top_groups}: expected 1 to groups={self.groups}")
        if self.groups > 1 and self.kind != "sigmoid_bias":
            raise ConfigError(f"groups={self.groups}: only sigmoid_bias has groups, {self.kind} does not")
        if not self.normalise and self.kind == "topk_softmax":
            raise ConfigError("normalise=False: topk_softmax is a softmax over the chosen, its weights sum to 1")


def route(logits: Tensor, rule: Rule, bias: Tensor | None, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """(experts int32 [T, k], weights FP32 [T, k]), by descending rank, of equals the lower index first.

    A token's result depends on its own logits alone. A NaN ranks below every number; of a token whose logits are all
    NaN the first k experts are chosen, with NaN weights.

    Args:
        logits: FP32 [T, E], contiguous, E at most 512; T may be 0.
        rule: see `Rule`.
        bias: FP32 [E], added for choosing, or None; for sigmoid_bias only.
        backend: "triton", "reference" (plain torch), or "auto": Triton on CUDA and under TRITON_INTERPRET=1.
    Raises:
        FormatError: shapes, dtypes, devices, a bias for another rule, or fewer experts than the rule chooses from.
    """
    if logits.dim() != 2 or not 1 <= logits.shape[1] <= MOST_EXPERTS:
        raise FormatError(f"logits have the shape {tuple(logits.shape)}: expected [T, E] with E of 1 to {MOST_EXPERTS}")
    experts = logits.shape[1]
    check_tensor("logits", logits, (None, experts), torch.float32, logits.device)
    if bias is not None:
        check_tensor("bias", bias, (experts,), torch.float32, logits.device)
        if rule.kind != "sigmoid_bias":
            raise FormatError(
                f"bias is given, and {rule.kind} has none: pass None (a linear bias belongs in the logits)"
            )
    if rule.groups > 1 and (experts % rule.groups or experts // rule.groups < 2):
        raise FormatError(f"logits have {experts} experts: expected groups={rule.groups} of equal size, 2 or more")
    if rule.top_k > experts // rule.groups * rule.top_groups:
        raise FormatError(
            f"top_k={rule.top_k}, of {experts} experts in {rule.top_groups} of {rule.groups} groups: lower it"
        )
    return implementation(__name__, logits, backend).route(logits, rule, bias)
