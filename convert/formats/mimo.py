"""`mimo`: as Xiaomi releases its FP4 models: experts MXFP4, attention QKV and dense MLPs block FP8, the rest BF16.

    experts.E.X.weight [N, K]          ->  weight uint8 [N, K/2], weight_scale uint8 [N, K/32]
    self_attn.{q,k,v}_proj.weight      ->  qkv_proj.weight F8_E4M3, `num_key_value_heads` chunks, each [Q | K | V];
                                           qkv_proj.weight_scale_inv F32, 128x128 blocks that restart at every chunk
    mlp.{gate,up,down}_proj.weight     ->  weight F8_E4M3, weight_scale_inv F32 (dense layers)

FP8 is lossy. Bytes that the source already has in this layout go through untouched; everything else is encoded once and
listed under `reencoded` in the manifest. Layout: core/checkpoint/fp8.py; names: research on the published files.
"""

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from convert.formats.compressed_tensors import packed_job
from convert.formats.config import base_config
from convert.packer import Packer
from convert.plan import Format, Job, Output, copy_job
from convert.source import Item, Source
from core.checkpoint.fp8 import FP8_BLOCK, dequantise_fp8, grid_shape
from core.checkpoint.keymap import QKV, Kind
from core.errors import UnsupportedError
from core.models.mimo_v2_config import MiMoV2Config
from core.mxfp4 import BLOCK

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
DENSE_MLP = re.compile(r"model\.layers\.\d+\.mlp\.(gate|up|down)_proj\.weight")


def quantise_fp8(weight_RC: Tensor) -> tuple[Tensor, Tensor]:
    """(codes E4M3 [R, C], scales F32 [ceil(R/128), ceil(C/128)]): scale = amax / 448, codes to nearest."""
    rows, columns = weight_RC.shape
    tall, wide = grid_shape(rows, columns)
    padded = torch.zeros(tall * FP8_BLOCK, wide * FP8_BLOCK)
    padded[:rows, :columns] = weight_RC
    blocks = padded.unflatten(0, (tall, FP8_BLOCK)).unflatten(2, (wide, FP8_BLOCK))
    amax = blocks.abs().amax((1, 3))
    scale = torch.where(amax > 0, amax / FP8_MAX, torch.ones_like(amax))
    codes = (blocks / scale[:, None, :, None]).clamp(-FP8_MAX, FP8_MAX).to(FP8)
    return codes.flatten(2, 3).flatten(0, 1)[:rows, :columns].contiguous(), scale


class MiMo(Format):
    name = "mimo"

    def refuse(self, source: Source) -> None:
        if not isinstance(source.config, MiMoV2Config):
            raise UnsupportedError(
                f"--to mimo is MiMo-V2's own layout, this is model_type={source.config.model_type}; use --to hf"
            )
        if not source.quantised:
            raise UnsupportedError(f"{source.folder} has no quantised tensor to pack; use --to bf16")

    def jobs(self, source: Source) -> Iterator[Job]:
        done: set[str] = set()
        by_name = {item.name: item for item in source.items}
        for item in source.items:
            part = QKV.fullmatch(item.name)
            if item.name in done:
                continue
            if item.quantised:
                yield packed_job(item, "")
            elif part and part[3] == "weight":
                group = tuple(by_name[f"{part[1]}.{p}_proj.weight"] for p in "qkv")
                done |= {i.name for i in group}
                yield qkv_job(source, part[1], group)
            elif DENSE_MLP.fullmatch(item.name):
                yield fp8_job(source, item)
            else:
                yield copy_job(item)

    def config(self, source: Source) -> dict[str, Any]:
        config = source.config
        layers = range(config.num_hidden_layers)
        quantisation = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
            "store_dtype": "mxfp4",
            "mxfp4_block_size": BLOCK,
            "ignored_layers": [f"model.layers.{i}.self_attn.o_proj" for i in layers]
            + ["model.decoder.self_attn.o_proj"],
        }
        return base_config(source) | {
            "architectures": ["MiMoV2ForCausalLM"],
            "model_type": "mimo_v2",
            "attention_projection_layout": "fused_qkv",
            "sliding_window": config.sliding_window,
            "sliding_window_size": config.sliding_window,
            "attention_chunk_size": config.sliding_window,
            "quantization_config": quantisation,
        }

    def index_metadata(self, source: Source) -> dict[str, Any]:
        return {"save_format": "mxfp4", "tp_size": source.config.num_key_value_heads}


def fp8_outputs(name: str, rows: int, columns: int, tall: int) -> tuple[Output, Output]:
    return (
        Output(name, FP8, (rows, columns)),
        Output(f"{name}_scale_inv", torch.float32, (tall, grid_shape(rows, columns)[1])),
    )


def fp8_job(source: Source, item: Item) -> Job:
    """One matrix in block FP8; its own bytes where the source has them."""
    outputs = fp8_outputs(item.name, *item.shape, grid_shape(*item.shape)[0])
    raw = stored_fp8(source, item, Kind.copy)

    def make(packer: Packer) -> list[Tensor]:
        if raw:
            packer.value(item)
            return [source.checkpoint.read(key) for key in raw]
        value = packer.value(item)
        codes, scale = quantise_fp8(value)
        packer.replaced(item, dequantise_fp8(codes, scale, item.name))
        return [codes, scale]

    return Job((item,), outputs, "relay" if raw else "fp8", make)


def qkv_job(source: Source, stem: str, group: tuple[Item, ...]) -> Job:
    """Q, K and V of one layer as chunks [Q | K | V], each with a scale grid of its own."""
    chunks = source.config.num_key_value_heads
    rows, columns = [item.shape[0] for item in group], group[0].shape[1]
    height = sum(rows) // chunks
    outputs = fp8_outputs(f"{stem}.qkv_proj.weight", sum(rows), columns, chunks * grid_shape(height, columns)[0])
    raw = stored_fp8(source, group[0], Kind.qkv)

    def make(packer: Packer) -> list[Tensor]:
        values = [packer.value(item) for item in group]
        if raw:
            return [source.checkpoint.read(key) for key in raw]
        pieces = [value.chunk(chunks) for value in values]
        fused = [torch.cat([p[c] for p in pieces]) for c in range(chunks)]
        encoded = [quantise_fp8(chunk) for chunk in fused]
        back = [dequantise_fp8(*e, stem).split([r // chunks for r in rows]) for e in encoded]
        for number, item in enumerate(group):
            packer.replaced(item, torch.cat([b[number] for b in back]))
        return [torch.cat([e[0].view(torch.uint8) for e in encoded]).view(FP8), torch.cat([e[1] for e in encoded])]

    return Job(group, outputs, "relay" if raw else "fp8", make)


def stored_fp8(source: Source, item: Item, kind: Kind) -> tuple[str, str] | None:
    """(codes, scales) keys when the source stores the item in this very layout."""
    recipe = source.reader.plan.recipes[item.model_name]
    key = recipe.keys[0]
    scale = source.reader.plan.scales.get(key)
    if recipe.kind is not kind or scale is None or source.reader.entry(key).dtype != FP8:
        return None
    return (key, scale) if source.reader.entry(scale).dtype == torch.float32 else None
