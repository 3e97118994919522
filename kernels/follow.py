"""Programmatic dependent launch: a kernel's programs take their places while the kernel before still runs.

A decode step is some hundred kernels of a few microseconds, and between two of them a GPU idles for about one: the
first drains, the second is dispatched, its programs begin. With this, dispatch happens during the kernel before.

Programs that come early take what places are left, so they are spread less evenly over the multiprocessors. Short
kernels do not mind. One that streams weights or keys for tens of microseconds is as slow as its fullest multiprocessor:
with more programs than PLACES it is launched in the usual way (`followed`; on an H200 34 us became 45 for a product of
470 programs, and 28 us became 34 for attention in 128).

Every kernel of a step begins with `follow()`: it lets the kernel behind it be dispatched, then waits until the one
before has ended and its writes are visible. So nothing is read or written early, whatever lies between: the kernel
before has waited for the one before it. It must come first, also in programs that return at once, or a kernel could
end before its predecessor has. Kernels launched in the usual way, before or behind, wait for everything anyhow.

Hopper and later; elsewhere, and with FP4FLASH_PDL=0, kernels are launched in the usual way. No bits depend on it.
"""

import math
import os
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


def supported() -> bool:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return False
    asked = os.environ.get("FP4FLASH_PDL")
    if asked is not None:
        return asked == "1"
    return torch.cuda.is_available() and torch.version.hip is None and torch.cuda.get_device_capability() >= (9, 0)


FOLLOWS = tl.constexpr(supported())
FOLLOW: dict[str, Any] = {"launch_pdl": True} if FOLLOWS.value else {}  # options of a launch whose kernel follows
PLACES = 64  # programs: less than one a multiprocessor of an H100 or H200


def followed(grid: tuple[int, ...]) -> dict[str, Any]:
    """Options of a launch of a kernel that streams much memory."""
    return FOLLOW if math.prod(grid) <= PLACES else {}


@triton.jit
def follow():
    """First statement of a kernel."""
    if FOLLOWS:
        gdc_launch_dependents()
        gdc_wait()
