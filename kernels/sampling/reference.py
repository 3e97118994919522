"""THE definition of sampling, in plain torch: after one polynomial everything is integers.

A token's weight is exp((logit - largest) / temperature) as a whole number of 2^-40. FP32 multiplications and additions
that are rounded one by one give it, so every device and the Triton kernel find the same number; sums of whole numbers
have the same bits in any order. Hence a row's token cannot depend on the rows beside it, on tiles, or on the machine.

    cuts    an order-preserving integer of each logit; top-k keeps every token whose logit is at least the k-th largest,
            then top-p keeps those from the smallest logit up whose weight reaches the share top_p. Tokens with the
            edge's very logit are all kept: the answer never depends on how a sort breaks ties.
    draw    32 random bits times the weights' sum, shifted right by 32, is a place below the sum; the token is the first
            whose running sum, in vocabulary order, exceeds it.
    noise   Philox4x32-10 (Salmon et al., SC 2011): key = seed, counter = (position, stream). Nothing is carried from
            draw to draw, so a request repeats its tokens whatever shares the batch.

Greedy is temperature 0: all the weight is on the largest logit, at the lowest id where several have it. What is below
2^-40 of the largest weighs nothing and is never drawn.

Legend: R rows, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

WEIGHT_BITS = 40  # 2^18 tokens of weight 2^40 have a sum below 2^58
LOG2E = 1 / math.log(2)
MOST_RATE = 2.0**100  # keeps 0 * rate a number for the smallest temperatures
MOST_HALVINGS = 60.0  # 2^(40 - 60) is already no weight
# 2^-f = 1 + f (C1 + f (C2 + ...)) on [0, 1], relative error 1.9e-7 in FP32; fitted so that 2^0 is 1 exactly.
HALVING = (-0.69314706, 0.24022436, -0.05549076, 0.00957918, -0.0012747482, 0.00010902322)

MASK = 0xFFFFFFFF
ROUND_A, ROUND_B = 0xD2511F53, 0xCD9E8D57
KEY_A, KEY_B = 0x9E3779B9, 0xBB67AE85

# Streams of noise of one request: one position draws from each independently.
SAMPLE, ACCEPT, RESIDUAL, DRAFT = range(4)


@dataclass(frozen=True)
class Params:
    """One entry a row, on the logits' device.

    temperature: FP32 [R]; 0 is greedy. top_p: FP32 [R]; 1 is off. top_k: int32 [R]; 0 is off. seed: int64 [R].
    cut: False promises that no row uses top_p or top_k; they are then not read, and the kernels of the cuts (about
        twenty short ones) not launched.
    """

    temperature: Tensor
    top_p: Tensor
    top_k: Tensor
    seed: Tensor
    cut: bool = True


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four words of Philox4x32-10; words are int64 tensors of 0 .. 2^32 - 1."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        # A product of two words may wrap int64; its 64 bits are right, and the shift's copies of the sign are masked.
        a, b = c0 * ROUND_A, c2 * ROUND_B
        c0, c2 = (b >> 32 & MASK) ^ c1 ^ k0, (a >> 32 & MASK) ^ c3 ^ k1
        c1, c3 = b & MASK, a & MASK
        k0, k1 = (k0 + KEY_A) & MASK, (k1 + KEY_B) & MASK
    return c0, c1, c2, c3


def noise(seed: Tensor, position: Tensor, stream: int) -> Tensor:
    """One word, int64 in [0, 2^32), for each seed and position (int64, any shape)."""
    counter = (position & MASK, position >> 32 & MASK, torch.full_like(position, stream), torch.zeros_like(position))
    return philox(counter, (seed & MASK, seed >> 32 & MASK))[0]


def uniform(seed: Tensor, position: Tensor, stream: int) -> Tensor:
    """The upper 24 bits of the word as FP32 in [0, 1)."""
    return (noise(seed, position, stream) >> 8).to(torch.float32) * 2.0**-24


def share(word: Tensor, total: Tensor) -> Tensor:
    """floor(word * total / 2^32) for word in [0, 2^32] and total in [0, 2^58], in int64 without overflow."""
    high, low = total >> 31, total & 0x7FFFFFFF
    return (word * high + (word * low >> 31)) >> 1


def order(logits: Tensor) -> Tensor:
    """int64 that orders FP32 values as they order; both zeros alike, NaN above everything."""
    bits = logits.view(torch.int32).to(torch.int64)
    magnitude = bits & 0x7FFFFFFF
    key = torch.where(bits < 0, -magnitude, magnitude)
    return torch.where(magnitude > 0x7F800000, 0x7FFFFFFF, key)


def exponential(logits: Tensor, temperature: Tensor) -> Tensor:
    """int64 [R, V]: exp((logit - largest) / temperature) in units of 2^-40, rounded down; nothing is cut."""
    # A tensor over a tensor is rounded once; torch computes a number over a tensor by way of the reciprocal.
    rate = (torch.full_like(temperature, LOG2E) / temperature).clamp(max=MOST_RATE)[:, None]
    halvings = ((logits.amax(-1, keepdim=True) - logits) * rate).clamp(max=MOST_HALVINGS)
    whole = halvings.floor()
    rest = halvings - whole
    value = torch.full_like(rest, HALVING[-1])
    for coefficient in (*HALVING[-2::-1], 1.0):
        value = value * rest + coefficient
    power = ((127 + WEIGHT_BITS - whole.to(torch.int32)) << 23).view(torch.float32)
    return (value * power).to(torch.int64)


def at_least(key: Tensor, measure: Tensor, need: Tensor) -> Tensor:
    """[R, V]: whether a key belongs to the smallest set of largest keys (equal keys together) that measures `need`."""
    ranked, order_RV = key.sort(dim=-1, descending=True)
    reached = measure.gather(-1, order_RV).cumsum(-1) >= need[:, None]
    edge = ranked.gather(-1, reached.to(torch.int64).argmax(-1, keepdim=True))
    return key >= edge


def weights(logits: Tensor, params: Params) -> Tensor:
    """int64 [R, V] after temperature, top-k and top-p. A row with a NaN, a +Inf or only -Inf weighs nothing."""
    logits = logits.to(torch.float32)
    key = order(logits)
    top = key.amax(-1, keepdim=True)
    good = (top > -0x7F800000) & (top < 0x7F800000)
    greedy = (params.temperature <= 0)[:, None]
    weight = exponential(torch.where(good, logits, 0.0), torch.where(greedy[:, 0], 1.0, params.temperature))
    if params.cut:
        size = logits.shape[-1]
        k = torch.where(params.top_k > 0, params.top_k, size).clamp(max=size).to(torch.int64)
        weight = torch.where(at_least(key, torch.ones_like(key), k), weight, 0)
        total = weight.sum(-1)
        dropped = (2**32 - (params.top_p.clamp(0, 1) * 2.0**32).to(torch.int64)).clamp(min=0)
        weight = torch.where(at_least(key, weight, (total - share(dropped, total)).clamp(min=1)), weight, 0)
    best = (key == top).to(torch.int64).argmax(-1, keepdim=True)
    one_hot = torch.zeros_like(weight).scatter(-1, best, 1 << WEIGHT_BITS)
    return torch.where(good, torch.where(greedy, one_hot, weight), 0)


def pick(weight: Tensor, word: Tensor) -> Tensor:
    """int64 [R]: the first token whose running sum exceeds the word's share of all; -1 where nothing weighs."""
    running = weight.cumsum(-1)
    total = running[:, -1]
    token = (running <= share(word, total)[:, None]).sum(-1)
    return torch.where(total > 0, token, -1)


def probabilities(logits: Tensor, params: Params) -> Tensor:
    weight = weights(logits, params)
    return (weight.to(torch.float64) / weight.sum(-1, keepdim=True).to(torch.float64)).to(torch.float32)


def sample(logits: Tensor, params: Params, position: Tensor, stream: int) -> Tensor:
    return pick(weights(logits, params), noise(params.seed, position, stream))
