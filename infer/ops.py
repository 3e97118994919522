"""The operations a step is made of, as one frozen table: plain torch or Triton, chosen once by name.

Every entry is a function of a package in kernels/, whose reference.py defines it. `auto` takes Triton on CUDA tensors
and under TRITON_INTERPRET=1, and the references elsewhere, so the same engine runs without a GPU.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from core.errors import ConfigError
from kernels.accept import accept
from kernels.linear import linear
from kernels.moe_mxfp4 import experts, experts_dense
from kernels.paged_attention import paged_attention
from kernels.qkv_rope import qkv_rope, write_kv
from kernels.rms_norm import rms_norm
from kernels.router import route

BACKENDS = ("auto", "triton", "reference")


@dataclass(frozen=True)
class Ops:
    rms_norm: Callable[..., Any]
    linear: Callable[..., Tensor]
    qkv_rope: Callable[..., Tensor]
    write_kv: Callable[..., None]
    attention: Callable[..., Tensor]
    route: Callable[..., tuple[Tensor, Tensor]]
    experts: Callable[..., Tensor]
    experts_dense: Callable[..., Tensor]
    accept: Callable[..., tuple[Tensor, Tensor]]


def ops_of(backend: str) -> Ops:
    """Raises ConfigError for another name than those in BACKENDS."""
    if backend not in BACKENDS:
        raise ConfigError(f"backend={backend!r}: expected one of {', '.join(BACKENDS)}")
    chosen = {
        "rms_norm": rms_norm,
        "linear": linear,
        "qkv_rope": qkv_rope,
        "write_kv": write_kv,
        "attention": paged_attention,
        "route": route,
        "experts": experts,
        "accept": accept,
    }
    bound = {name: partial(function, backend=backend) for name, function in chosen.items()}
    return Ops(**bound, experts_dense=experts_dense)
