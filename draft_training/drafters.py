"""From a drafter folder to something that can be served and replayed: the one place that knows kinds of drafters.

`open_drafter` reads config.json's model_type; another kind of drafter is another entry of KINDS.
"""

import copy
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from core.errors import ConfigError, UnsupportedError
from core.generate.dflash import DFlashProposer
from core.generate.eagle import EagleProposer
from core.generate.interface import Prompt, Proposer, Reply
from core.generate.target import Target
from core.models.dflash import Drafter
from core.models.dflash_config import MODEL_TYPE as DFLASH
from core.models.dflash_io import PAIRING, load_drafter, read_pairing
from core.models.drafters import folder_of
from core.models.eagle import EagleDrafter
from core.models.eagle_config import MODEL_TYPE as EAGLE
from core.models.eagle_io import load_eagle
from core.models.fingerprint import fingerprint
from core.models.ops import EAGER
from draft_training.replay import Replayed, replay

Texts = list[tuple[Prompt, Reply]]
ANCHORS = {"cpu": 64, "cuda": 128}  # blocks of a row and pass


@dataclass(frozen=True)
class Opened:
    """A drafter bound to one target model.

    taps: target layers it reads. drafts: K. facts: what a report states of it. proposer: a fresh one for a Target with
    these taps; `candidates`: how many of a slot it reports, for the log. replayed: drafts along texts; None where this
    kind cannot. windowed: the same weights with another window; None where this kind has none. made_for_this: whether
    drafter.json names this target (None: it names none).
    """

    name: str
    taps: tuple[int, ...]
    drafts: int
    facts: dict[str, Any]
    proposer: Callable[..., Proposer]
    replayed: Callable[[Target, Texts], Iterator[Replayed]] | None = None
    windowed: Callable[[int], "Opened"] | None = None
    made_for_this: bool | None = field(default=None)


def drafter_folder(path: Path | str) -> Path:
    """The folder of the weights; a run folder stands for its model.

    Raises:
        ConfigError: no drafter there.
    """
    folder = folder_of(path)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"drafter.path={path} is not a drafter folder (no config.json); set it to one, or to its run")
    return folder


def open_drafter(path: Path | str, model: nn.Module, *, row_tokens: int = 4096, anchors: int = 0) -> Opened:
    """Load a drafter folder for `model`, in the target's dtype and on its device.

    Args:
        path: a drafter folder, or the run folder that holds one. row_tokens, anchors: of a replay pass (0: by device).
    Raises:
        ConfigError: no such folder, or made for a target of other sizes. UnsupportedError: an unknown kind.
        CheckpointError: damaged.
    """
    folder = drafter_folder(path)
    try:
        kind = json.loads((folder / "config.json").read_text()).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{folder}/config.json is no drafter's configuration ({error}); export it again") from error
    if kind not in KINDS:
        raise UnsupportedError(f"{folder}: model_type={kind!r} is no drafter known here; expected {', '.join(KINDS)}")
    opened = KINDS[kind](folder, model, row_tokens, anchors)
    named = trained_for(folder)
    return dataclasses.replace(opened, made_for_this=named == fingerprint(model) if named else None)


def trained_for(folder: Path) -> str | None:
    """The fingerprint of the target that drafter.json names; None where it names none."""
    return read_pairing(folder).get("target", {}).get("fingerprint") if (folder / PAIRING).is_file() else None


def open_dflash(folder: Path, model: nn.Module, row_tokens: int, anchors: int) -> Opened:
    weight = model.get_input_embeddings().weight
    drafter = load_drafter(folder, dtype=weight.dtype, device=weight.device)
    return dflash(str(folder), drafter, model, row_tokens, anchors)


def dflash(name: str, drafter: Drafter, model: nn.Module, row_tokens: int = 4096, anchors: int = 0) -> Opened:
    """A DFlash drafter that is already in memory."""
    config = drafter.config
    device = model.get_input_embeddings().weight.device
    DFlashProposer(drafter, Target(model, config.taps))  # refuses a target of another vocabulary, width or depth
    drafter.ops = EAGER  # flex_attention compiles for every shape, and here they all differ
    blocks = anchors or ANCHORS.get(device.type, 64)

    def replayed(target: Target, texts: Texts) -> Iterator[Replayed]:
        return replay(target, drafter, texts, row_tokens=row_tokens, anchors=blocks)

    def windowed(window: int) -> Opened:
        other = copy.copy(drafter)
        other.config = dataclasses.replace(config, window=window)
        return dflash(name, other, model, row_tokens, anchors)

    facts = {"kind": "dflash", "B": config.block_size, "K": config.drafts, "window": config.window,
             "layer_types": list(config.layer_types), "causal": config.causal, "taps": list(config.taps),
             "selector_top_k": config.selector_top_k, "dtype": dtype_name(drafter)}  # fmt: skip
    proposer = partial(DFlashProposer, drafter)
    return Opened(name, config.taps, config.drafts, facts, proposer, replayed, windowed)


def open_eagle(folder: Path, model: nn.Module, row_tokens: int, anchors: int) -> Opened:
    weight = model.get_input_embeddings().weight
    drafter = load_eagle(folder, dtype=weight.dtype, device=weight.device)
    return eagle(str(folder), drafter, model, row_tokens, anchors)


def eagle(name: str, drafter: EagleDrafter, model: nn.Module, row_tokens: int = 4096, anchors: int = 0) -> Opened:
    """An EAGLE drafter that is already in memory."""
    config = drafter.config
    device = model.get_input_embeddings().weight.device
    EagleProposer(drafter, Target(model, config.taps))  # refuses a target of another vocabulary, width or depth
    drafter.ops = EAGER
    chains = anchors or ANCHORS.get(device.type, 64)

    def replayed(target: Target, texts: Texts) -> Iterator[Replayed]:
        return replay(target, drafter, texts, row_tokens=row_tokens, anchors=chains)

    def windowed(window: int) -> Opened:
        other = copy.copy(drafter)
        other.config = dataclasses.replace(config, window=window)
        return eagle(name, other, model, row_tokens, anchors)

    facts = {"kind": "eagle", "K": config.drafts, "taps": list(config.taps), "dtype": dtype_name(drafter)}
    facts |= {"window": config.window} if config.window else {}
    proposer = partial(EagleProposer, drafter)
    return Opened(name, config.taps, config.drafts, facts, proposer, replayed, windowed)


KINDS: dict[str, Callable[[Path, nn.Module, int, int], Opened]] = {DFLASH: open_dflash, EAGLE: open_eagle}


def dtype_name(module: nn.Module) -> str:
    """The dtypes of the parameters, most values first."""
    sizes: dict[torch.dtype, int] = {}
    for p in module.parameters():
        sizes[p.dtype] = sizes.get(p.dtype, 0) + p.numel()
    return "+".join(str(d).removeprefix("torch.") for d in sorted(sizes, key=lambda d: -sizes[d]))


def pairs_of(prompts: Iterable[Prompt], replies: dict[str, Reply]) -> Texts:
    return [(p, replies[p.id]) for p in prompts]
