"""Options of the engine, the same for every command of infer and for the Python API."""

import argparse
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from core.errors import ConfigError
from infer.ops import BACKENDS

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class EngineOptions:
    """How a model is run.

    dtype: of activations, and of weights that are not MXFP4 codes. backend: auto | triton | reference (infer.ops).
    rows: requests at once. step_tokens: tokens computed in a step, prompts are read in pieces of at most this;
        None: 2,048 on a GPU, 512 on a CPU, and more where `rows` full drafts need it.
    page_size: positions of a page. kv_tokens: positions that layers without a window keep in all; None: what fits into
        `kv_share` of the GPU's free memory, or into 1 GiB on a CPU.
    max_length: most tokens of a request; None: the model's.
    adaptive: draft fewer tokens for requests whose drafts are rejected. force_drafter: take another target's drafter.
    graphs: replay steps in which every request generates as CUDA graphs (one GPU).
    """

    model: Path
    drafter: Path | None = None
    device: str = "auto"
    dtype: str = "bfloat16"
    backend: str = "auto"
    rows: int = 32
    step_tokens: int | None = None
    page_size: int = 16
    kv_tokens: int | None = None
    kv_share: float = 0.9
    max_length: int | None = None
    prefix_cache: bool = True
    adaptive: bool = True
    force_drafter: bool = False
    graphs: bool = True
    seed: int | None = None

    def __post_init__(self) -> None:
        rules = {
            "dtype": (self.dtype in DTYPES, f"one of {', '.join(DTYPES)}"),
            "backend": (self.backend in BACKENDS, f"one of {', '.join(BACKENDS)}"),
            "rows": (1 <= self.rows <= 1024, "1 to 1024"),
            "step_tokens": (self.step_tokens is None or self.step_tokens >= 1, "at least 1"),
            "page_size": (self.page_size in (8, 16, 32, 64, 128), "a power of 2 from 8 to 128"),
            "kv_tokens": (self.kv_tokens is None or self.kv_tokens >= self.page_size, "at least one page"),
            "kv_share": (0 < self.kv_share <= 0.98, "above 0, at most 0.98"),
            "max_length": (self.max_length is None or self.max_length >= 2, "at least 2: a prompt and a reply token"),
            "seed": (self.seed is None or 0 <= self.seed < 2**63, "0 to 2^63 - 1"),
        }
        for key, (holds, rule) in rules.items():
            if not holds:
                raise ConfigError(f"--{key.replace('_', '-')} {getattr(self, key)}: expected {rule}")
        for key, folder in (("model", self.model), ("drafter", self.drafter)):
            if folder is not None and not Path(folder).is_dir():
                raise ConfigError(f"--{key} {folder}: no such folder")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The engine's options but --model and --drafter, which commands describe themselves."""
    group = parser.add_argument_group("engine")
    group.add_argument("--device", default="auto", help="auto | cuda | cpu (default: %(default)s)")
    group.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="of activations (default: %(default)s)")
    group.add_argument("--backend", default="auto", choices=BACKENDS, help="kernels (default: %(default)s)")
    group.add_argument("--rows", type=int, default=32, help="requests at once (default: %(default)s)")
    group.add_argument("--step-tokens", type=int, metavar="N", help="tokens of a step; longer prompts go in pieces")
    group.add_argument("--page-size", type=int, default=16, help="positions of a KV page (default: %(default)s)")
    group.add_argument("--kv-tokens", type=int, metavar="N", help="positions the KV cache holds (default: what fits)")
    group.add_argument(
        "--kv-share", type=float, default=0.9, help="of a GPU's free memory, for the KV cache (default: %(default)s)"
    )
    group.add_argument("--max-length", type=int, metavar="N", help="most tokens of a request (default: the model's)")
    group.add_argument("--no-prefix-cache", dest="prefix_cache", action="store_false", help="read every prompt anew")
    group.add_argument("--no-adaptive", dest="adaptive", action="store_false", help="always verify full drafts")
    group.add_argument("--no-graphs", dest="graphs", action="store_false", help="no CUDA graphs")
    group.add_argument("--force-drafter", action="store_true", help="take a drafter of another target")
    group.add_argument("--dry-run", action="store_true", help="print what it would take on a GPU, and load nothing")


def options_of(found: argparse.Namespace) -> EngineOptions:
    """Raises ConfigError for a value out of range or a folder that is not there."""
    known = {f.name for f in fields(EngineOptions)}
    given = {k: v for k, v in vars(found).items() if k in known}
    given["model"] = Path(given["model"])
    given["drafter"] = Path(given["drafter"]) if given.get("drafter") else None
    return EngineOptions(**given)
