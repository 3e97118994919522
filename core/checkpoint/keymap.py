"""Which checkpoint keys make which model tensor: total and strict, in both directions.

The model's own state dict is the list of what must be filled. For every name in it a `Recipe` is found among the
spellings its family allows; every checkpoint key is then either used by exactly one set of recipes, carried through
under an explicit pattern (MTP blocks, vision, audio), or named in an error. There is no "ignore the rest".

    model (transformers v5)                 checkpoint
    mlp.experts.gate_up_proj [E, 2I, H]     mlp.experts.<e>.{gate,up}_proj.weight [I, H]
    mlp.experts.down_proj [E, H, I]         mlp.experts.<e>.down_proj.weight [H, I]
    self_attn.sinks                         self_attn.attention_sink_bias             MiMo-V2
    self_attn.{q,k,v}_proj.weight           self_attn.qkv_proj.weight, chunked        MiMo-V2.5/2.6, see fp8.py
    mlp.experts.gate_up_proj [E, H, 2I]     the same name, or *_blocks and *_scales   GPT-OSS

Any `weight` may be stored as `weight_packed` with `weight_scale` (compressed-tensors): the plan speaks of `weight` and
`Plan.stored` says what the file calls it.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum

from torch import Tensor

from core.checkpoint.index import Checkpoint
from core.errors import CheckpointError


class Kind(Enum):
    copy = "copy"
    experts = "experts"  # keys of expert 0, expert 1, ...; with `width` keys each, concatenated along dim 1
    qkv = "qkv"  # keys: the fused tensor; `part` says which of Q, K, V
    gpt_oss = "gpt_oss"  # keys: blocks, scales


@dataclass(frozen=True)
class Recipe:
    kind: Kind
    keys: tuple[str, ...]
    width: int = 1
    part: int = 0


@dataclass(frozen=True)
class Family:
    """What a model type's checkpoints may look like. `rename`: model suffix -> checkpoint suffix."""

    per_expert: bool = False
    fused_qkv: bool = False
    blocks: bool = False
    rename: tuple[tuple[str, str], ...] = ()
    carried: tuple[str, ...] = ()
    extra_layers: bool = False  # layers from num_hidden_layers on are MTP blocks


MIMO = Family(
    per_expert=True,
    fused_qkv=True,
    rename=(("self_attn.sinks", "self_attn.attention_sink_bias"),),
    carried=(r"model\.mtp\..*", r"visual\..*", r"audio_encoder\..*", r"speech_embeddings\..*"),
)
FAMILIES = {
    "mimo_v2": MIMO,
    "mimo_v2_flash": MIMO,
    "qwen2_moe": Family(per_expert=True),
    "qwen3_moe": Family(per_expert=True),
    "glm4_moe": Family(per_expert=True, extra_layers=True),
    "deepseek_v2": Family(per_expert=True),
    "deepseek_v3": Family(per_expert=True, extra_layers=True),
    "gpt_oss": Family(blocks=True),
}
OLD_BUFFERS = re.compile(r".*\.rotary_emb\.inv_freq")  # written by transformers of 2023; recomputed, never read
SCALES = ("_scale_inv", "_scale")
PACKED = "_packed"
EXPERT_TENSOR = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)")
QKV = re.compile(r"(.*\.self_attn)\.([qkv])_proj\.(weight|bias)")


@dataclass(frozen=True)
class Plan:
    """How to fill every tensor of a model, and which keys are carried through."""

    recipes: dict[str, Recipe]
    carried: tuple[str, ...]
    scales: dict[str, str]  # quantised key -> key of its scales
    stored: dict[str, str] = field(default_factory=dict)  # key -> its name in the files, where that differs


def family_of(model_type: str) -> Family:
    return FAMILIES.get(model_type, Family())


def make_plan(
    checkpoint: Checkpoint, model_type: str, shapes: Mapping[str, tuple[int, ...]], tied: Iterable[str] = ()
) -> Plan:
    """Match a checkpoint to a model.

    Args:
        shapes: shape of every parameter and persistent buffer of the model.
        tied: names that may be absent because another tensor stands for them.
    Raises:
        CheckpointError: a tensor cannot be filled (named, with what was looked for), or a key is left over.
    """
    family = family_of(model_type)
    stored = {k.removesuffix(PACKED): k for k in checkpoint.entries if k.endswith(f".weight{PACKED}")}
    keys = (checkpoint.entries.keys() - stored.values()) | stored.keys()
    tied = set(tied)
    recipes: dict[str, Recipe] = {}
    for name, shape in shapes.items():
        tries = candidates(family, name, shape)
        found = next((r for r in tries if any(k in keys for k in r.keys)), None)
        if found is None and name in tied:
            continue
        if found is None:
            raise CheckpointError(
                f"{checkpoint.folder} lacks {name} (looked for {tries[-1].keys[0]}); "
                "wrong model class or incomplete download"
            )
        missing = next((k for k in found.keys if k not in keys), None)
        if missing:
            raise CheckpointError(
                f"{checkpoint.folder} lacks {missing}, a part of {name}; the download is incomplete, repeat it"
            )
        recipes[name] = found
    used = {key for recipe in recipes.values() for key in recipe.keys}
    scales = {key: key + end for key in used for end in SCALES if key + end in keys}
    left = [k for k in sorted(keys) if k not in used and k not in scales.values() and not OLD_BUFFERS.fullmatch(k)]
    layers = checkpoint.config.get("num_hidden_layers")
    carried = tuple(k for k in left if is_carried(family, k, layers))
    unknown = next((k for k in left if k not in carried and k not in tied), None)
    if unknown:
        raise CheckpointError(
            f"{checkpoint.folder} holds {unknown}, which a {model_type} model has no place for; "
            "it would be lost, so loading stops"
        )
    return Plan(recipes, carried, scales, stored)


def candidates(family: Family, name: str, shape: tuple[int, ...]) -> list[Recipe]:
    """Recipes by which `name` may be stored, most direct first."""
    key = to_checkpoint_name(family, name)
    tries = [Recipe(Kind.copy, (key,))]
    if key != name:
        tries.append(Recipe(Kind.copy, (name,)))
    expert = EXPERT_TENSOR.fullmatch(name)
    if family.per_expert and expert:
        tries.append(Recipe(Kind.experts, tuple(expert_keys(name, shape[0])), width=len(parts(name))))
    qkv = QKV.fullmatch(name)
    if family.fused_qkv and qkv:
        tries.append(Recipe(Kind.qkv, (f"{qkv[1]}.qkv_proj.{qkv[3]}",), part="qkv".index(qkv[2])))
    if family.blocks and expert:
        tries.append(Recipe(Kind.gpt_oss, (f"{name}_blocks", f"{name}_scales")))
    return tries


def to_checkpoint_name(family: Family, name: str) -> str:
    for ours, theirs in family.rename:
        if name.endswith(ours):
            return name.removesuffix(ours) + theirs
    return name


def parts(name: str) -> tuple[str, ...]:
    return ("gate_proj", "up_proj") if name.endswith("gate_up_proj") else ("down_proj",)


def expert_keys(name: str, experts: int) -> list[str]:
    """Checkpoint keys of a fused expert tensor, expert after expert; gate before up."""
    stem = name.rsplit(".", 1)[0]
    return [f"{stem}.{e}.{part}.weight" for e in range(experts) for part in parts(name)]


def is_carried(family: Family, key: str, layers: int | None) -> bool:
    if any(re.fullmatch(pattern, key) for pattern in family.carried):
        return True
    layer = re.match(r"model\.layers\.(\d+)\.", key)
    return bool(family.extra_layers and layers and layer and int(layer[1]) >= layers)


def to_checkpoint(family: Family, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(checkpoint key, view of `tensor`) pairs under which the hub stores a model tensor in BF16."""
    if family.per_expert and EXPERT_TENSOR.fullmatch(name):
        stem, names = name.rsplit(".", 1)[0], parts(name)
        for expert, weight in enumerate(tensor):
            for part, piece in zip(names, weight.chunk(len(names)), strict=True):
                yield f"{stem}.{expert}.{part}.weight", piece
        return
    yield to_checkpoint_name(family, name), tensor
