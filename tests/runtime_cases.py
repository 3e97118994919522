"""What tests of the runtime share: tiny models of every family with drafters that know some of their text."""

from pathlib import Path
from typing import Any

import torch

from core.generate.decode import PlainGenerator
from core.generate.dflash import DFlashProposer
from core.generate.interface import Prompt, Reply
from core.generate.sampling import Sampling
from core.generate.target import Target
from core.models.dflash import Drafter, init_drafter
from core.models.dflash_config import FULL, SLIDING, DFlashConfig
from core.models.load import load_model
from infer.build import build_engine
from infer.engine import ModelEngine
from infer.options import EngineOptions
from infer.request import Engine, Output, Request, SamplingParams
from tests.convert_cases import checkpoint
from tests.drafter_cases import saved, teach

FAMILIES = ("mimo", "mimo pro", "qwen3_moe", "gpt_oss")
DRAFTER: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 64, "taps": (0, 1), "mask_token_id": 7, "block_size": 5,
    "window": 9, "sinks": True, "value_scale": 0.612, "partial_rotary_factor": 0.5,
    "layer_types": (FULL, SLIDING),
}  # fmt: skip


def prompts(count: int = 6, seed: int = 0) -> list[Prompt]:
    """Of odd lengths."""
    made = torch.Generator().manual_seed(seed)
    sizes = (1, 5, 9, 13, 31, 33)
    return [
        Prompt(str(i), torch.randint(0, 64, (sizes[i % len(sizes)],), generator=made).tolist()) for i in range(count)
    ]


def plain(model: Any, given: list[Prompt], sampling: Sampling, proposer: Any = None, eos: tuple[int, ...] = ()) -> Any:
    """Replies of core's own loop by id: the reference that shares no code with the engine."""
    target = Target(model, proposer.drafter.config.taps if proposer else ())
    found: list[Reply] = list(PlainGenerator(target, proposer, eos=eos).generate(given, sampling))
    return {r.id: r for r in found}


def greedy(model: Any, given: list[Prompt], tokens: int) -> dict[str, list[int]]:
    return {i: r.ids for i, r in plain(model, given, Sampling(max_new_tokens=tokens)).items()}


def taught(model: Any, given: list[Prompt], **changes: Any) -> Drafter:
    """A drafter that knows some of the model's greedy text, so that drafts are accepted and rejected."""
    torch.manual_seed(3)
    config = DFlashConfig(**DRAFTER | {"num_target_layers": model.config.num_hidden_layers} | changes)
    drafter = Drafter(config)
    init_drafter(drafter, model.get_input_embeddings().weight[config.mask_token_id].detach(), std=0.1)
    drafter.requires_grad_(True)
    texts = [p.ids[:1] + r for p, r in zip(given, greedy(model, given, 40).values(), strict=True)]
    teach(drafter.train(), model, [t[:40] for t in texts], 25)
    return drafter.eval().requires_grad_(False)


def both_folders(place: Path, family: str, **changes: Any) -> tuple[Path, Path, Any, Drafter]:
    """(model folder, drafter folder, the model and drafter in FP32 as core loads them)."""
    folder = checkpoint(place / "model", family)
    model = load_model(folder, dtype=torch.float32, attention="eager").model
    drafter = taught(model, prompts(), **changes)
    return folder, saved(drafter, model, place / "drafter"), model, drafter


def with_drafter(model: Any, drafter: Drafter, given: list[Prompt], tokens: int) -> dict[str, Reply]:
    target = Target(model, drafter.config.taps)
    return plain(model, given, Sampling(max_new_tokens=tokens), DFlashProposer(drafter, target))


def engine(model: Path, drafter: Path | None = None, **options: Any) -> ModelEngine:
    on_round = options.pop("on_round", None)
    return build_engine(EngineOptions(model, drafter, **{"dtype": "float32"} | options), on_round=on_round)


def drained(running: Engine) -> tuple[dict[str, list[int]], dict[str, Output]]:
    """Step until nothing is left: (tokens, last output) by request."""
    tokens: dict[str, list[int]] = {}
    last: dict[str, Output] = {}
    while running.busy:
        for output in running.step():
            tokens.setdefault(output.id, []).extend(output.ids)
            last[output.id] = output
    return tokens, last


def generated(running: Engine, given: list[Prompt], **params: Any) -> dict[str, list[int]]:
    for prompt in given:
        running.add(Request(prompt.id, prompt.ids, SamplingParams(**{"ignore_eos": True} | params)))
    return drained(running)[0]
