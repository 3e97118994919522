"""Filling model tensors from a checkpoint, one at a time.

A fused tensor is assembled in place from its pieces, so besides the tensor being filled no more than one piece of
the checkpoint is in memory. Every piece is checked for shape, and for NaN and Inf.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from core.checkpoint.fp8 import dequantise_fp8, dequantise_gpt_oss, dequantise_mxfp4, split_fused_qkv
from core.checkpoint.index import Checkpoint, Entry
from core.checkpoint.keymap import Kind, Plan, Recipe
from core.errors import CheckpointError


@dataclass(frozen=True)
class Reader:
    """checkpoint + plan; `config` fields of the model that fused layouts depend on."""

    checkpoint: Checkpoint
    plan: Plan
    shapes: dict[str, tuple[int, ...]]
    qkv_chunks: int = 1

    def stream(
        self, wanted: Collection[str] | None = None, dtype: torch.dtype | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """(name, CPU tensor) in the order of the checkpoint's files; None: FP32 and FP16 stay, else BF16."""
        for name in self.order(wanted):
            out = torch.empty(self.shapes[name], dtype=dtype or self.dtype(self.plan.recipes[name].keys[0]))
            self.fill(name, out)
            yield name, out

    def entry(self, key: str) -> Entry:
        """Where `key` lies, under whatever name the file has for it."""
        return self.checkpoint.entries[self.plan.stored.get(key, key)]

    def dtype(self, key: str) -> torch.dtype:
        """What a key decodes to: FP32 and FP16 stay, all else is BF16."""
        found = self.entry(key).dtype
        return found if found in (torch.float32, torch.float16) else torch.bfloat16

    def check_stored(self) -> None:
        """Shapes of the files against the model's, before anything of the model's size is allocated.

        Raises:
            CheckpointError: they are of different models.
        """
        for name, recipe in self.plan.recipes.items():
            shape = self.shapes[name]
            if recipe.kind is Kind.experts:
                shape = (shape[1] // recipe.width, shape[2])
            elif recipe.kind is Kind.qkv:
                stem = name.rsplit(".", 2)[0]
                shape = (sum(self.shapes[f"{stem}.{p}_proj.weight"][0] for p in "qkv"), *shape[1:])
            elif recipe.kind is Kind.gpt_oss:
                shape = (shape[0], shape[2], shape[1] // 32, 16)
            for key in recipe.keys[: 1 if recipe.kind is Kind.gpt_oss else None]:
                stored = self.entry(key)
                if key not in self.plan.scales and stored.dtype == torch.uint8 and recipe.kind is not Kind.gpt_oss:
                    raise without_scales(key, stored.dtype)
                coded = recipe.kind is not Kind.gpt_oss and key in self.plan.scales and stored.dtype == torch.uint8
                wanted = (*shape[:-1], shape[-1] // 2) if coded else shape
                if stored.shape != wanted:
                    raise wrong_shape(key, stored.shape, wanted)

    def order(self, wanted: Collection[str] | None = None) -> list[str]:
        """Names to read, sorted by where they lie, so that disks are read forwards."""
        names = [n for n in self.plan.recipes if wanted is None or n in wanted]
        first = {n: self.entry(self.plan.recipes[n].keys[0]) for n in names}
        return sorted(names, key=lambda n: (str(first[n].file), first[n].start))

    def fill(self, name: str, out: Tensor) -> None:
        """Write the tensor `name` into `out` (its whole shape, any device, cast to its dtype)."""
        recipe = self.plan.recipes[name]
        if recipe.kind is Kind.experts:
            self.fill_experts(recipe, out)
        else:
            piece = self.assemble(name, recipe, out)
            self.check(recipe.keys[0], piece, tuple(out.shape))
            out.copy_(piece)

    def fill_experts(self, recipe: Recipe, out: Tensor) -> None:
        rows = out.shape[1] // recipe.width
        for number, key in enumerate(recipe.keys):
            expert, part = divmod(number, recipe.width)
            piece = self.fetch(key)
            self.check(key, piece, (rows, out.shape[2]))
            out[expert, part * rows : (part + 1) * rows].copy_(piece)

    def assemble(self, name: str, recipe: Recipe, out: Tensor) -> Tensor:
        if recipe.kind is Kind.qkv:
            return self.split_qkv(name, recipe)[recipe.part]
        if recipe.kind is Kind.gpt_oss:
            blocks, scales = (self.checkpoint.read(key) for key in recipe.keys)
            if (
                blocks.dtype != torch.uint8
                or blocks.dim() != 4
                or tuple(blocks.shape[:3]) != tuple(scales.shape)
                or blocks.shape[3] != 16
            ):
                raise CheckpointError(
                    f"{recipe.keys[0]}: {tuple(blocks.shape)} with scales {tuple(scales.shape)} is not MXFP4"
                )
            return dequantise_gpt_oss(blocks, scales)
        return self.fetch(recipe.keys[0], tuple(out.shape))

    def fetch(self, key: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """One checkpoint tensor, dequantised if it is stored quantised."""
        stored = self.entry(key)
        if shape is not None and key not in self.plan.scales and stored.shape != shape:
            raise wrong_shape(key, stored.shape, shape)
        tensor = self.checkpoint.read(stored.name)
        if key not in self.plan.scales:
            if not tensor.is_floating_point() or tensor.dtype.itemsize == 1:
                raise without_scales(key, tensor.dtype)
            return tensor
        scale = self.checkpoint.read(self.plan.scales[key])
        if tensor.dtype == torch.uint8:
            return dequantise_mxfp4(tensor, scale.view(torch.uint8))
        if tensor.dtype != torch.float8_e4m3fn or tensor.dim() != 2:
            raise CheckpointError(
                f"{key} is {tensor.dtype} with scales, a layout fp4flash does not read; convert it to BF16 first"
            )
        return dequantise_fp8(tensor, scale, key)

    def split_qkv(self, name: str, recipe: Recipe) -> tuple[Tensor, ...]:
        """(Q, K, V) of the fused tensor that `name` (any of the three) is a part of."""
        key = recipe.keys[0]
        stem = name.rsplit(".", 2)[0]
        q, k, v = (self.shapes[f"{stem}.{p}_proj.weight"][0] for p in "qkv")
        scale = self.checkpoint.read(self.plan.scales[key]) if key in self.plan.scales else None
        fused = self.checkpoint.read(key)
        return split_fused_qkv(fused, scale, self.qkv_chunks, (q, k, v), key)

    def check(self, key: str, piece: Tensor, shape: tuple[int, ...]) -> None:
        if tuple(piece.shape) != shape:
            raise wrong_shape(key, tuple(piece.shape), shape)
        if piece.numel():
            low, high = piece.aminmax()
            if not (torch.isfinite(low) and torch.isfinite(high)):
                raise CheckpointError(
                    f"{key} in {self.entry(key).file} has a NaN or Inf; the checkpoint is damaged, download it again"
                )


def without_scales(key: str, dtype: torch.dtype) -> CheckpointError:
    return CheckpointError(f"{key} is stored as {dtype} without scales; convert the checkpoint to BF16 first")


def wrong_shape(key: str, found: tuple[int, ...], expected: tuple[int, ...]) -> CheckpointError:
    return CheckpointError(
        f"{key} has shape {found}, the model needs {expected}; config.json and weights are of different models"
    )
