"""Tiny checkpoints of every family that convert reads, with experts on the grid, and how tests look at folders."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DeepseekV3Config, GptOssConfig, PreTrainedConfig, Qwen3MoeConfig

from convert import export
from core.checkpoint.index import INDEX
from core.models.build import build_meta
from core.models.experts import find_experts
from core.models.load import save_model
from core.models.mimo_v2_config import MiMoV2Config
from core.mxfp4 import ScaleRule, snap

SIZE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip
MIMO = SIZE | {
    "moe_intermediate_size": 32, "head_dim": 32, "v_head_dim": 32, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"], "max_position_embeddings": 256,
}  # fmt: skip
ROUTED: dict[str, Any] = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}


def gpt_oss(hidden: int, width: int) -> GptOssConfig:
    return GptOssConfig(
        **SIZE | {"hidden_size": hidden, "intermediate_size": width}, num_local_experts=3, num_experts_per_tok=2,
        head_dim=16,
    )  # fmt: skip


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "mimo": lambda: MiMoV2Config(**MIMO),
    # three layers: the full-attention layer after the window; two KV heads, so that QKV has two chunks
    "mimo pro": lambda: MiMoV2Config(
        **MIMO | {"num_key_value_heads": 2, "num_attention_heads": 4, "num_hidden_layers": 3}
        | {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, swa_num_key_value_heads=2,
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(**SIZE, **ROUTED, num_experts=4, head_dim=32),
    "deepseek_v3": lambda: DeepseekV3Config(
        **SIZE | {"num_key_value_heads": 2}, **ROUTED, n_routed_experts=4, n_group=2, topk_group=1,
        first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
        v_head_dim=16,
    ),
    "gpt_oss": lambda: gpt_oss(64, 96),
    "gpt_oss wide": lambda: gpt_oss(96, 160),
}  # fmt: skip
PER_EXPERT = ("mimo", "mimo pro", "qwen3_moe", "deepseek_v3")
CARRIED: dict[str, Tensor] = {
    "model.mtp.layers.0.eh_proj.weight": torch.linspace(-3, 3, 2048).reshape(32, 64).to(torch.float8_e4m3fn),
    "model.mtp.layers.0.eh_proj.weight_scale_inv": torch.tensor([[0.25]]),
    "model.mtp.layers.0.enorm.weight": torch.ones(64, dtype=torch.bfloat16),
    "visual.patch.weight": torch.linspace(-1, 1, 105).reshape(3, 5, 7).to(torch.bfloat16),
}


def values_of(config: PreTrainedConfig, rule: ScaleRule | None, seed: int = 0) -> dict[str, Tensor]:
    """Random BF16 tensors of the model; experts snapped by `rule` along their reduction dimension (None: left as is).

    Columns differ by powers of two, so that blocks have many scales, and one block is all zeros, one has -0.
    """
    generator = torch.Generator().manual_seed(seed)
    model = build_meta(config)
    experts = {e.name: e.reduction_dim for e in find_experts(model)}
    values = {}
    for name, tensor in model.state_dict().items():
        value = torch.randn(tensor.shape, generator=generator) * 0.2
        if "norm" in name:
            value = 1 + value
        if name in experts:
            value = value * 2.0 ** torch.randint(-6, 3, (*tensor.shape[:-1], 1), generator=generator)
            value.transpose(experts[name], -1)[0, 0, :32] = 0
            value.transpose(experts[name], -1)[0, 1, :32] *= -0.0
        wide = torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
        value = value.to(wide)
        values[name] = snap(value, rule, experts[name]) if rule and name in experts else value
    return values


def checkpoint(
    folder: Path, family: str, rule: ScaleRule | None = ScaleRule.even, carried: bool = False, seed: int = 0
) -> Path:
    """Write a tiny model as the hub would have it in BF16; returns `folder`."""
    config = CONFIGS[family]()
    save_model(values_of(config, rule, seed).items(), config, folder)
    if carried:
        file = folder / "model.safetensors"
        save_file(load_file(file) | CARRIED, file, metadata={"format": "pt"})
    return folder


def exported(source: Path, to: str, out: Path, *more: str) -> Path:
    """Run the command; fails the test unless it succeeds."""
    assert export.main(["--to", to, "--from", str(source), "--out", str(out), *more]) == 0
    return out


def small_shards(source: Path, to: str, out: Path, size: int = 40_000, *more: str) -> Path:
    return exported(source, to, out, "--shard-gb", str(size / 2**30), *more)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder through the safetensors library."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
    return found


def raw_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def bytes_of(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {n: (str(t.dtype), tuple(t.shape), raw_bytes(t)) for n, t in tensors_of(folder).items()}


def is_packed(name: str) -> bool:
    """Codes or MXFP4 scales, in any of the layouts."""
    return ".experts." in name and not name.endswith("bias")


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def digest(folder: Path) -> dict[str, str]:
    """Every file under `folder`: its hash."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def edit_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    parsed = json.loads(data[8 : 8 + size])
    change(parsed)
    text = json.dumps(parsed).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    parsed = json.loads(path.read_text())
    change(parsed)
    path.write_text(json.dumps(parsed))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def weight_map(folder: Path) -> dict[str, str]:
    return json.loads((folder / INDEX).read_text())["weight_map"]
