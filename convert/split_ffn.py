"""Splitting a dense SwiGLU FFN into experts: which neuron goes where, and the router that finds them again.

A SwiGLU FFN is a sum over its F neurons, down[:, f] * silu(gate[f] x) * (up[f] x). Any partition of the neurons into
experts therefore computes the same sum while every expert is on; routing is about the experts that a token can do
without. Two facts decide the partition. Some neurons matter to every token: they form the experts that are always on.
The others are gated: neurons whose gate rows point the same way open for the same tokens, so they share an expert, and
that common direction is a router that needs no training to be better than chance.

MiMo-V2 scores an expert with sigmoid(w x), chooses by score + correction bias, and weighs by the score alone times
routed_scaling_factor. With w = 0 the score is 1/2, so a factor of 2 weighs every chosen expert by exactly 1. Always-on
experts keep w = 0 and get a bias that no score reaches.

Legend: F neurons of the FFN, H hidden, S always-on and R routed experts, E = S + R, W neurons of an expert (F = E W),
T tokens, N points, C clusters.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

ALWAYS_BIAS = 4.0  # a score stays below 1, and below 2 with any bias that balances it
ROUNDS = 30  # of k-means at most; it stops when no point moves


@dataclass
class FFNStats:
    """What calibration tokens do to one FFN, as sums over them in float64.

    activity_F: |silu(gate x) * up x|. x_H: the FFN's input, after the layer's norm. xx_HH: its outer product.
    """

    activity_F: Tensor
    x_H: Tensor
    xx_HH: Tensor
    tokens: int = 0

    @staticmethod
    def empty(neurons: int, hidden: int) -> "FFNStats":
        return FFNStats(
            *(torch.zeros(*size, dtype=torch.float64) for size in ((neurons,), (hidden,), (hidden, hidden)))
        )

    def add(self, x_TH: Tensor, gate_FH: Tensor, up_FH: Tensor) -> None:
        inner_TF = F.silu(x_TH @ gate_FH.T) * (x_TH @ up_FH.T)
        self.activity_F += inner_TF.abs().sum(0).double().cpu()
        self.x_H += x_TH.sum(0).double().cpu()
        self.xx_HH += (x_TH.T @ x_TH).double().cpu()
        self.tokens += x_TH.shape[0]

    def importance_F(self, down_HF: Tensor) -> Tensor:
        """Mean length of what each neuron adds to the residual stream, float64."""
        return self.activity_F / self.tokens * down_HF.double().cpu().norm(dim=0)


def group_neurons(gate_FH: Tensor, importance_F: Tensor, always_on: int, routed: int, seed: int) -> Tensor:
    """Neurons of each expert, int64 [E, W], every neuron in exactly one.

    The S W most important form the always-on experts, in order; the rest are clustered by the direction of their gates.
    """
    width = gate_FH.shape[0] // (always_on + routed)
    order_F = importance_F.argsort(descending=True, stable=True)
    always_SW = order_F[: always_on * width].view(always_on, width)
    rest = order_F[always_on * width :].sort().values
    unit_NH = F.normalize(gate_FH[rest].double(), dim=1)
    return torch.cat([always_SW, rest[balanced_clusters(unit_NH, routed, seed)]])


def balanced_clusters(unit_NH: Tensor, clusters: int, seed: int) -> Tensor:
    """int64 [C, N / C]: unit vectors in clusters of equal size, by cosine (spherical k-means with a quota)."""
    size = unit_NH.shape[0] // clusters
    centres_CH, owner_N = first_centres(unit_NH, clusters, seed), None
    for _ in range(ROUNDS):
        found_N = assign(unit_NH @ centres_CH.T, size)
        if owner_N is not None and torch.equal(found_N, owner_N):
            break
        owner_N = found_N
        centres_CH = F.normalize(torch.stack([unit_NH[owner_N == c].mean(0) for c in range(clusters)]), dim=1)
    return torch.stack([(owner_N == c).nonzero().flatten() for c in range(clusters)])


def first_centres(unit_NH: Tensor, clusters: int, seed: int) -> Tensor:
    """k-means++: each further centre is a point drawn by its distance (1 - cosine) to the nearest centre so far."""
    generator = torch.Generator().manual_seed(seed)
    chosen = [int(torch.randint(unit_NH.shape[0], (1,), generator=generator))]
    near_N = unit_NH @ unit_NH[chosen[0]]
    while len(chosen) < clusters:
        weight_N = (1 - near_N).clamp_min(1e-9)  # points that coincide are still points
        weight_N[chosen] = 0
        chosen.append(int(torch.multinomial(weight_N, 1, generator=generator)))
        near_N = torch.maximum(near_N, unit_NH @ unit_NH[chosen[-1]])
    return unit_NH[chosen]


def assign(closeness_NC: Tensor, size: int) -> Tensor:
    """Cluster of each point, int64 [N], `size` points each; the closest free pair of point and cluster goes first.

    By deferred acceptance: every free point asks the closest cluster that has not refused it, and a cluster keeps the
    `size` closest of those that asked. Both sides rank pairs by the same number, so the result is the greedy one.
    """
    points, clusters = closeness_NC.shape
    open_NC, owner_N = closeness_NC.clone(), torch.full((points,), -1)
    while (free := (owner_N < 0).nonzero().flatten()).numel():
        owner_N[free] = open_NC[free].argmax(1)
        for cluster in range(clusters):
            asked = (owner_N == cluster).nonzero().flatten()
            refused = asked[closeness_NC[asked, cluster].argsort(descending=True, stable=True)[size:]]
            owner_N[refused] = -1
            open_NC[refused, cluster] = -torch.inf
    return owner_N


def router(gate_FH: Tensor, experts_EW: Tensor, always_on: int, stats: FFNStats, scale: float) -> tuple[Tensor, Tensor]:
    """(weight [E, H], correction bias [E]), float64.

    A routed expert's row is the mean of its unit gate rows, sized so that its logit has the standard deviation `scale`
    over the calibration tokens. Its bias takes the mean logit out of the choice (not out of the weight): an expert is
    chosen because its gates open more than they usually do.
    """
    experts = experts_EW.shape[0]
    weight_EH = torch.zeros(experts, gate_FH.shape[1], dtype=torch.float64)
    bias_E = torch.zeros(experts, dtype=torch.float64)
    bias_E[:always_on] = ALWAYS_BIAS
    mean_H = stats.x_H / stats.tokens
    covariance_HH = stats.xx_HH / stats.tokens - torch.outer(mean_H, mean_H)
    for expert in range(always_on, experts):
        direction_H = F.normalize(gate_FH[experts_EW[expert]].double(), dim=1).mean(0)
        spread = (direction_H @ covariance_HH @ direction_H).clamp_min(1e-24).sqrt()
        weight_EH[expert] = direction_H * (scale / spread)
        bias_E[expert] = 0.5 - torch.sigmoid(weight_EH[expert] @ mean_H)
    return weight_EH, bias_E
