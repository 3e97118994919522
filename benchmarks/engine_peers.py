"""transformers on the loads of benchmarks.engine: batched `generate` and continuous batching.

What it cannot run is named with the reason and ends nothing.
"""

import argparse
import gc
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, CompressedTensorsConfig, GenerationConfig, Mxfp4Config
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.utils import WorkloadHints

from infer.options import DTYPES
from infer.parallel import device_of

GENERATE, CONTINUOUS = "transformers generate", "transformers continuous"
CPU_CACHE_SHARE = 0.05  # of the memory, for continuous batching on a CPU
# what a program we did not write may end with; reported as "not measured"
TROUBLE = (RuntimeError, ValueError, TypeError, AttributeError, ImportError, LookupError, OSError, AssertionError)
Ids = list[int]


@dataclass(frozen=True)
class Load:
    """prompts: of one measurement. Every one is continued by `tokens` tokens, `rows` at a time."""

    prompts: list[Ids]
    rows: int
    tokens: int

    @property
    def longest(self) -> int:
        return max(map(len, self.prompts)) + self.tokens


@dataclass(frozen=True)
class Figure:
    """seconds: of one pass. step_ms, tau: of the engine only."""

    what: str
    load: Load
    replies: list[Ids]
    seconds: float
    step_ms: float | None = None
    tau: float | None = None

    @property
    def speed(self) -> float:
        return len(self.replies) * self.load.tokens / self.seconds


def timed(work: Callable[[], list[Ids]], load: Load) -> tuple[list[Ids], float]:
    """One pass to warm up, one by the clock.

    Raises:
        RuntimeError: a reply has not as many tokens as were asked for.
    """
    work()
    began = time.perf_counter()
    replies = work()
    seconds = time.perf_counter() - began
    short = next((len(ids) for ids in replies if len(ids) != load.tokens), None)
    if short is not None:
        raise RuntimeError(f"a reply has {short} tokens instead of {load.tokens}")
    return replies, seconds


def free() -> None:
    """Give the memory of what was deleted back to the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def load_peer(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """transformers' model with its own attention and experts, packed weights as `dtype`."""
    kind = (getattr(AutoConfig.from_pretrained(folder), "quantization_config", None) or {}).get("quant_method")
    readers = {"compressed-tensors": CompressedTensorsConfig, "mxfp4": Mxfp4Config}
    more = {"quantization_config": readers[kind](dequantize=True)} if kind in readers else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, **more)
    model.generation_config = GenerationConfig(pad_token_id=0)  # none of the folder's end tokens and temperatures
    return model.to(device).eval()


def generate(model: Any, load: Load) -> list[Ids]:
    replies = []
    for at in range(0, len(load.prompts), load.rows):
        batch = load.prompts[at : at + load.rows]
        width = max(map(len, batch))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in batch], device=model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch], device=model.device)
        made = model.generate(ids, attention_mask=mask, max_new_tokens=load.tokens, do_sample=False)
        replies += made[:, width:].tolist()
    return replies


def continuous(manager: ContinuousBatchingManager, load: Load) -> list[Ids]:
    names = manager.add_requests(load.prompts, max_new_tokens=load.tokens)
    replies: dict[str, Ids] = {}
    while len(replies) < len(names):
        result = manager.get_result(timeout=1)
        if result is None:
            if not manager.is_running():
                raise RuntimeError(f"its thread ended: {manager.background_thread_status.fatal_error}")
        elif result.error is not None:
            raise RuntimeError(result.error)
        elif result.is_finished():
            replies[result.request_id] = result.generated_tokens
    return [replies[name] for name in names]


def measure_generate(model: Any, load: Load) -> Figure:
    return Figure(GENERATE, load, *timed(lambda: generate(model, load), load))


def measure_continuous(model: Any, load: Load) -> Figure:
    """transformers chooses the attention (flash where it has it, else SDPA or paged eager), graphs and cache size."""
    share = None if model.device.type == "cuda" else CPU_CACHE_SHARE
    chosen = ContinuousBatchingConfig(
        max_requests_per_batch=load.rows, allow_block_sharing=False, max_memory_percent=share
    )
    greedy = GenerationConfig(max_new_tokens=load.tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    hints = WorkloadHints(load.longest - load.tokens, load.tokens, len(load.prompts))
    with model.continuous_batching_context_manager(
        greedy, continuous_batching_config=chosen, timeout=5, workload_hints=hints
    ) as manager:
        return Figure(CONTINUOUS, load, *timed(lambda: continuous(manager, load), load))


def measure_peers(options: argparse.Namespace, loads: list[Load]) -> tuple[list[Figure], dict[str, str]]:
    """Figures, and why others are missing. Continuous batching comes last: it may leave a GPU that is of no use."""
    found: list[Figure] = []
    missing: dict[str, str] = {}
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)  # what it would report is in `missing`
    try:
        model = load_peer(Path(options.model), DTYPES[options.dtype], device_of(options.device))
    except TROUBLE as error:
        return [], dict.fromkeys((GENERATE, CONTINUOUS), f"transformers does not load the folder: {reason(error)}")
    for what, measure in ((GENERATE, measure_generate), (CONTINUOUS, measure_continuous)):
        for load in loads:
            try:
                found.append(progress(measure(model, load)))
            except TROUBLE as error:
                missing[what] = f"{load.rows} at once: {reason(error)}"
                break
    return found, missing


def reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def progress(figure: Figure) -> Figure:
    print(f"measured: {figure.what}, {figure.load.rows} at once", file=sys.stderr, flush=True)
    free()
    return figure
