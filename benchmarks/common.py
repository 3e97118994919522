"""What every benchmark prints with its figures: hardware, versions, commit; and how it times."""

import json
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from core.run import git_state, versions


def environment() -> dict[str, Any]:
    """Hardware, versions and commit of this run."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"device": device, "versions": versions(), "git": git_state(Path(__file__).parent)}


def require_gpu(command: str) -> None:
    """End with one line and status 2 where there is no GPU."""
    if not torch.cuda.is_available():
        print(f"{command}: needs a CUDA GPU and torch sees none", file=sys.stderr)
        raise SystemExit(2)


def gpu_seconds(work: Callable[[], object], repeats: int, warmup: int = 3) -> list[float]:
    """Seconds of each of `repeats` runs of `work`, by CUDA events, after `warmup` runs."""
    for _ in range(warmup):
        work()
    torch.cuda.synchronize()
    taken = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        stop.record()
        stop.synchronize()
        taken.append(start.elapsed_time(stop) / 1e3)
    return taken


def spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def publish(name: str, result: dict[str, Any], path: str | None) -> None:
    """Print the result as JSON and write it to `path` if given."""
    text = json.dumps({"benchmark": name, **result, **environment()}, indent=2)
    print(text)
    if path:
        Path(path).write_text(text + "\n")
