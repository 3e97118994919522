"""From a checkpoint folder to the tensors that a step reads; experts stay packed in MXFP4.

The folder is read by the same strict plan as everywhere (core.checkpoint): every key is used, carried, or named in an
error. Experts that are stored as codes and scales are taken as they are. Experts stored in BF16 whose every value lies
on the MXFP4 grid (`export --to bf16` of a trained run) are packed without loss; others stay BF16 and run slower.

Legend: E experts, I inner size, G hidden size, N output rows, K reduction dim.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from core.checkpoint.index import open_checkpoint
from core.checkpoint.keymap import Kind, Recipe
from core.checkpoint.reader import Reader
from core.errors import UnsupportedError
from core.models.build import build_meta, read_config
from core.models.fingerprint import EDGE, Ends, digest, ends_of
from core.models.load import plan_reader
from core.mxfp4 import BLOCK, Packed
from infer.geometry import Geometry, LayerSpec, geometry_of
from infer.shard import Shard, columns_of, packed_columns, packed_rows, padded, rows_of
from infer.staging import Piece, Staging
from kernels.moe_mxfp4 import DenseWeights, ExpertWeights
from kernels.mxfp4_snap import decode, encode

BESIDE = 2  # threads that read a layer's other tensors while its experts are on their way


@dataclass(frozen=True)
class LayerWeights:
    """One layer of one rank. qkv rows: query heads, key heads, value heads."""

    input_norm: Tensor
    qkv: Tensor
    out: Tensor
    post_norm: Tensor
    qkv_bias: Tensor | None = None
    out_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    sinks: Tensor | None = None
    router: Tensor | None = None
    router_bias: Tensor | None = None  # of the linear map
    correction: Tensor | None = None  # added for choosing only
    experts: ExpertWeights | DenseWeights | None = None
    gate_up: Tensor | None = None  # of a dense layer
    down: Tensor | None = None


@dataclass(frozen=True)
class Weights:
    """embedding [V, G]; head [V / world, G] (the same tensor where they are tied and there is one rank)."""

    embedding: Tensor
    head: Tensor
    norm: Tensor
    layers: tuple[LayerWeights, ...]

    def has_dense_experts(self) -> bool:
        """Whether some experts are not in MXFP4."""
        return any(isinstance(layer.experts, DenseWeights) for layer in self.layers)

    def nbytes(self) -> int:
        """Bytes of everything, shared tensors once."""
        found: dict[int, int] = {}

        def add(value: object) -> None:
            if isinstance(value, Tensor):
                found[value.data_ptr()] = value.nbytes
            elif hasattr(value, "__dataclass_fields__"):
                for name in value.__dataclass_fields__:
                    add(getattr(value, name))

        for part in (self.embedding, self.head, self.norm, *self.layers):
            add(part)
        return sum(found.values())


@dataclass(frozen=True)
class Loader:
    """Reads tensors of the model by the model's own names; `ends` collects what its fingerprint is made of."""

    reader: Reader
    geometry: Geometry
    shard: Shard
    dtype: torch.dtype
    device: torch.device
    staging: Staging
    ends: dict[str, Ends] = field(default_factory=dict)

    def has(self, name: str) -> bool:
        return name in self.reader.plan.recipes

    def whole(self, name: str) -> Tensor:
        """A tensor on the CPU, in the runtime's dtype."""
        out = torch.empty(self.reader.shapes[name], dtype=self.dtype)
        self.reader.fill(name, out)
        self.ends[name] = ends_of(out.shape, out, out)
        return out

    def place(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device).contiguous()

    def optional(self, name: str, dtype: torch.dtype | None = None) -> Tensor | None:
        if not self.has(name):
            return None
        out = torch.empty(self.reader.shapes[name], dtype=dtype or self.dtype)
        self.reader.fill(name, out)
        self.ends[name] = ends_of(out.shape, out, out)
        return self.place(out)

    def layer(self, index: int, spec: LayerSpec) -> LayerWeights:
        """Without its experts."""
        stem = f"model.layers.{index}"
        given = self.attention(f"{stem}.self_attn", spec)
        given |= self.sparse(f"{stem}.mlp") if spec.sparse else self.dense(f"{stem}.mlp")
        return LayerWeights(
            input_norm=self.place(self.whole(f"{stem}.input_layernorm.weight")),
            post_norm=self.place(self.whole(f"{stem}.post_attention_layernorm.weight")),
            **given,
        )

    def attention(self, stem: str, spec: LayerSpec) -> dict[str, Tensor | None]:
        g, shard = self.geometry, self.shard
        heads, kv = shard.heads(g.heads), shard.kv_heads(spec.kv_heads)

        def cut(name: str, part: slice, dim: int) -> Tensor:
            return self.whole(name).unflatten(0, (-1, dim))[part].flatten(0, 1)

        def fused(kind: str) -> Tensor:
            parts = (("q", heads, g.head_dim), ("k", kv, g.head_dim), ("v", kv, g.value_dim))
            return self.place(torch.cat([cut(f"{stem}.{p}_proj.{kind}", where, dim) for p, where, dim in parts]))

        columns = slice(heads.start * g.value_dim, heads.stop * g.value_dim)
        sinks, out_bias = self.optional(f"{stem}.sinks", torch.float32), self.optional(f"{stem}.o_proj.bias")
        return {
            "qkv": fused("weight"),
            "qkv_bias": fused("bias") if self.has(f"{stem}.q_proj.bias") else None,
            "q_norm": self.optional(f"{stem}.q_norm.weight"),
            "k_norm": self.optional(f"{stem}.k_norm.weight"),
            "sinks": None if sinks is None else sinks[heads].contiguous(),
            "out": self.place(self.whole(f"{stem}.o_proj.weight")[:, columns]),
            "out_bias": None if shard.rank else out_bias,  # added once
        }

    def dense(self, stem: str) -> dict[str, Tensor]:
        gate_up = torch.cat([self.whole(f"{stem}.{p}_proj.weight") for p in ("gate", "up")])
        return {
            "gate_up": self.place(rows_of(gate_up, 0, self.shard)),
            "down": self.place(columns_of(self.whole(f"{stem}.down_proj.weight"), self.shard)),
        }

    def sparse(self, stem: str) -> dict[str, Tensor | None]:
        router = f"{stem}.{self.geometry.router}"
        return {
            "router": self.place(self.whole(f"{router}.weight")),
            "router_bias": self.optional(f"{router}.bias"),
            "correction": self.optional(f"{router}.e_score_correction_bias", torch.float32),
        }

    def experts(self, stem: str) -> ExpertWeights | DenseWeights:
        pieces: list[Piece] = []
        gate_up, down = (self.expert(f"{stem}.{part}_proj", pieces) for part in ("gate_up", "down"))
        self.staging.fill(pieces)
        if self.geometry.interleaved:
            gate_up = halves(gate_up)
        up_bias, down_bias = (self.optional(f"{stem}.{n}_proj_bias") for n in ("gate_up", "down"))
        if up_bias is not None:
            up_bias = rows_of(deinterleave(up_bias) if self.geometry.interleaved else up_bias, 1, self.shard)
        if self.shard.rank:
            down_bias = None  # added once, by rank 0
        biases = {"gate_up_bias": up_bias, "down_bias": down_bias}
        if isinstance(gate_up, Packed) and isinstance(down, Packed):
            return ExpertWeights(packed_rows(gate_up, self.shard), packed_columns(down, self.shard), **biases)
        if isinstance(gate_up, Tensor) and isinstance(down, Tensor):
            return DenseWeights(rows_of(gate_up, 1, self.shard), columns_of(down, self.shard), **biases)
        kinds = [("not " if isinstance(t, Tensor) else "") + "in MXFP4" for t in (gate_up, down)]
        raise UnsupportedError(
            f"{stem}: gate_up_proj is {kinds[0]} and down_proj is {kinds[1]}; the runtime runs both or neither"
        )

    def expert(self, name: str, pieces: list[Piece]) -> Packed | Tensor:
        """[E, N, K] as codes and scales, or dense where values are off the grid; on the device. What `pieces` gets is
        still to be read into it."""
        recipe = self.reader.plan.recipes[name]
        if self.is_packed(recipe):
            return self.packed(name, recipe, pieces)
        shape = self.reader.shapes[name]
        dense = torch.empty(shape, dtype=torch.bfloat16)
        self.reader.fill(name, dense)
        self.ends[name] = ends_of(shape, dense, dense)
        if self.geometry.interleaved:  # the family whose files hold [E, K, N]
            dense = dense.transpose(1, 2)
        return on_grid(self.place(dense), self.dtype)

    def is_packed(self, recipe: Recipe) -> bool:
        if recipe.kind is Kind.gpt_oss:
            return True
        return all(k in self.reader.plan.scales and self.reader.entry(k).dtype == torch.uint8 for k in recipe.keys)

    def packed(self, name: str, recipe: Recipe, pieces: list[Piece]) -> Packed:
        """Codes and scales of all experts, on the device, and what is to be read into them."""
        if recipe.kind is Kind.gpt_oss:
            return self.packed_gpt_oss(name, recipe, pieces)
        count = len(recipe.keys) // recipe.width
        _, n, k = self.reader.shapes[name]
        widths = (k // 2, k // BLOCK)
        whole = Packed(*(torch.empty(count, n, width, dtype=torch.uint8, device=self.device) for width in widths))
        edges = [Packed(*(torch.empty(1, n, width, dtype=torch.uint8) for width in widths)) for _ in range(2)]
        pieces += self.pieces(recipe, 0, whole)
        for expert, edge in zip((0, count - 1), edges, strict=True):
            for piece in self.pieces(recipe, expert, edge):
                self.reader.checkpoint.read_into(piece.entry.name, piece.out)
        self.ends[name] = self.packed_ends(name, *edges)
        return whole

    def packed_gpt_oss(self, name: str, recipe: Recipe, pieces: list[Piece]) -> Packed:
        """The same, of files that hold all experts in two tensors [E, N, blocks, 16] and [E, N, blocks]."""
        codes, scales = (self.reader.entry(key) for key in recipe.keys)
        made = {"dtype": torch.uint8, "device": self.device}
        whole = Packed(torch.empty(*scales.shape[:2], scales.shape[2] * BLOCK // 2, **made),
                       torch.empty(*scales.shape, **made))  # fmt: skip
        pieces += [Piece(codes, whole.codes), Piece(scales, whole.scales)]
        row, last = self.reader.checkpoint.read_row, scales.shape[0] - 1
        edges = [Packed(row(codes.name, e).flatten(-2)[None], row(scales.name, e)[None]) for e in (0, last)]
        self.ends[name] = self.packed_ends(name, *edges)
        return whole

    def pieces(self, recipe: Recipe, first: int, out: Packed) -> list[Piece]:
        """What goes into `out` [experts, N, ...], from expert `first` on; each is `recipe.width` pairs of tensors."""
        entries, scales, width = self.reader.checkpoint.entries, self.reader.plan.scales, recipe.width
        rows, found = out.codes.shape[1] // width, []
        for number in range(len(out.codes) * width):
            key = recipe.keys[first * width + number]
            expert, part = divmod(number, width)
            where = slice(part * rows, (part + 1) * rows)
            found.append(Piece(self.reader.entry(key), out.codes[expert, where]))
            found.append(Piece(entries[scales[key]], out.scales[expert, where]))
        return found

    def packed_ends(self, name: str, head: Packed, tail: Packed) -> Ends:
        """Of the expanded values, in the order in which the model holds them; `head` begins with the first expert,
        `tail` ends with the last."""
        n, k = head.codes.shape[1], head.codes.shape[2] * 2
        rows = n if self.geometry.interleaved else min(n, -(-EDGE // k))  # there, K comes before N: whole experts
        first = decode(Packed(head.codes[0, :rows], head.scales[0, :rows]), backend="reference")
        last = decode(Packed(tail.codes[-1, n - rows :], tail.scales[-1, n - rows :]), backend="reference")
        if self.geometry.interleaved:
            first, last = first.T, last.T
        return ends_of(self.reader.shapes[name], first, last)


def on_grid(dense: Tensor, dtype: torch.dtype) -> Packed | Tensor:
    """Codes and scales of BF16 [E, N, K] if they say exactly the same, else `dense` in `dtype`."""
    if dense.shape[-1] % BLOCK:
        return dense.to(dtype)
    codes = torch.empty(*dense.shape[:-1], dense.shape[-1] // 2, dtype=torch.uint8, device=dense.device)
    scales = torch.empty(*dense.shape[:-1], dense.shape[-1] // BLOCK, dtype=torch.uint8, device=dense.device)
    for expert, weight in enumerate(dense):
        packed = encode(weight, backend="reference" if not weight.is_cuda else "auto")
        if not torch.equal(decode(packed, backend="reference" if not weight.is_cuda else "auto"), weight):
            return dense.to(dtype)
        codes[expert], scales[expert] = packed.codes, packed.scales
    return Packed(codes, scales)


def deinterleave(tensor: Tensor) -> Tensor:
    """Rows gate, up, gate, up, ... of dim 1 -> all gate rows, then all up rows."""
    return torch.cat((tensor[:, ::2], tensor[:, 1::2]), dim=1).contiguous()


def halves(weight: Packed | Tensor) -> Packed | Tensor:
    if isinstance(weight, Packed):
        return Packed(deinterleave(weight.codes), deinterleave(weight.scales))
    return deinterleave(weight)


@dataclass(frozen=True)
class Loaded:
    """One rank's part of a model. fingerprint: of the whole model (core.models.fingerprint)."""

    weights: Weights
    geometry: Geometry
    config: PreTrainedConfig
    fingerprint: str


def load_weights(
    folder: Path | str, *, dtype: torch.dtype, device: torch.device, shard: Shard, staging: Staging | None = None
) -> Loaded:
    """What rank `shard.rank` holds of the model in `folder`; `staging` None: the usual one of the device.

    Raises:
        CheckpointError: missing, incomplete or damaged files. UnsupportedError: a family the runtime does not have.
    """
    folder = Path(folder)
    config = read_config(folder)
    geometry = geometry_of(config)
    shard.check(geometry)
    checkpoint = open_checkpoint(folder)
    meta = build_meta(config)
    reader = plan_reader(meta, checkpoint, checkpoint.config.get("model_type", config.model_type))
    return loaded(Loader(reader, geometry, shard, dtype, device, staging or Staging(device)), config, meta)


def loaded(loader: Loader, config: PreTrainedConfig, meta: nn.Module) -> Loaded:
    geometry, shard = loader.geometry, loader.shard
    embedding = loader.place(loader.whole("model.embed_tokens.weight"))
    first, last, width = shard.vocabulary(geometry.vocab_size)
    if loader.has("lm_head.weight"):
        head = loader.place(padded(loader.whole("lm_head.weight")[first:last], 0, width))
    else:
        head = embedding if shard.world == 1 else padded(embedding[first:last], 0, width)
    layers = layers_of(loader)
    norm = loader.place(loader.whole("model.norm.weight"))
    named = digest((name, loader.ends[name]) for name, _ in meta.named_parameters())
    return Loaded(Weights(embedding, head, norm, layers), geometry, config, named)


def layers_of(loader: Loader) -> tuple[LayerWeights, ...]:
    """Experts one layer after another, which is a matter of reading; the rest beside them."""
    specs = loader.geometry.layers
    beside = ThreadPoolExecutor(BESIDE)
    try:
        others = beside.map(loader.layer, range(len(specs)), specs)
        experts = [loader.experts(f"model.layers.{i}.mlp.experts") if s.sparse else None for i, s in enumerate(specs)]
        return tuple(replace(layer, experts=own) for layer, own in zip(others, experts, strict=True))
    finally:
        beside.shutdown(cancel_futures=True)
