"""A short name for a model's values, the same in whatever format it is stored: which target a drafter belongs to.

SHA-256 over every parameter's name, shape and its first and last 2,048 values as BF16. It reads little, so it costs
nothing on a large model; it tells trainings and quantisations apart, not single flipped values (manifests do that).
"""

import hashlib

import torch
from torch import nn

EDGE = 2048


def fingerprint(model: nn.Module) -> str:
    """Hexadecimal digest of the model as loaded, on any device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters()):
        flat = tensor.detach().reshape(-1)
        ends = torch.cat((flat[:EDGE], flat[-EDGE:])).to("cpu", torch.bfloat16)
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(ends.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
