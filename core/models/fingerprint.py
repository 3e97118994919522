"""A short name for a model's values, the same in whatever format it is stored: which target a drafter belongs to.

SHA-256 over every parameter's name, shape and its first and last 2,048 values as BF16. It reads little, so it costs
nothing on a large model; it tells trainings and quantisations apart, not single flipped values (manifests do that).
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

EDGE = 2048


@dataclass(frozen=True)
class Ends:
    """Of one parameter: its shape, and its first and last values, BF16 on the CPU."""

    shape: tuple[int, ...]
    values: Tensor


def ends_of(shape: Iterable[int], first: Tensor, last: Tensor) -> Ends:
    """From a parameter's beginning and end, both at least `EDGE` values long where it has as many; any shape."""
    values = torch.cat((first.detach().reshape(-1)[:EDGE], last.detach().reshape(-1)[-EDGE:]))
    return Ends(tuple(shape), values.to("cpu", torch.bfloat16))


def digest(parameters: Iterable[tuple[str, Ends]]) -> str:
    """Hexadecimal digest of a model's parameters, tied ones once."""
    found = hashlib.sha256()
    for name, ends in sorted(parameters, key=lambda p: p[0]):
        found.update(f"{name}{ends.shape}".encode())
        found.update(ends.values.view(torch.int16).numpy().tobytes())
    return found.hexdigest()


def fingerprint(model: nn.Module) -> str:
    """Of the model as loaded, on any device."""
    return digest((name, ends_of(tensor.shape, tensor, tensor)) for name, tensor in model.named_parameters())
