"""GGUF's tensor names and MXFP4 blocks: both directions, one table per architecture of llama.cpp.

    canonical                                        GGUF
    model.layers.L.self_attn.q_proj.weight           blk.L.attn_q.weight
    model.layers.L.mlp.experts.E.up_proj.weight      blk.L.ffn_up_exps.weight  [E, N, K]: all experts of a layer
    model.layers.L.mlp.experts.gate_up_proj          blk.L.ffn_gate_exps.weight and ffn_up_exps.weight (GPT-OSS:
                                                     rows alternate gate and up; GGUF keeps them apart)

A GGUF block of 32 MXFP4 weights is 17 bytes: the scale byte, then 16 bytes whose LOW nibbles are elements 0-15 and
whose HIGH nibbles are elements 16-31 (`split halves`; everywhere else two neighbours share a byte). Going from one to
the other moves nibbles and changes no code. (Code 8, -0, counts as +0 in llama.cpp, whose table is of integers.)

Names: the tables of llama.cpp's loader for each architecture; tests hold them against the gguf package's.
"""

import re
from dataclasses import dataclass, field

import torch
from torch import Tensor

from core.mxfp4 import BLOCK, Packed

BLOCK_BYTES = 1 + BLOCK // 2
HALF = BLOCK // 4  # bytes of low-first codes that hold one half of a block
ATTENTION = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
}  # fmt: skip
DENSE = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


@dataclass(frozen=True)
class Arch:
    """`name`: what the file says. `modules`: in a layer, weight and bias alike. `leaves`: tensors named otherwise."""

    name: str
    model_types: tuple[str, ...]
    modules: dict[str, str]
    leaves: dict[str, str] = field(default_factory=dict)
    needs_head: bool = True  # llama.cpp's loader wants output.weight; else the embedding stands in


ARCHES = (
    Arch(
        "mimo2",
        ("mimo_v2", "mimo_v2_flash"),
        ATTENTION | DENSE | {"post_attention_layernorm": "ffn_norm", "mlp.gate": "ffn_gate_inp"},
        {
            "self_attn.attention_sink_bias": "attn_sinks.weight",
            "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
        },
    ),
    Arch(
        "qwen3moe",
        ("qwen3_moe",),
        ATTENTION
        | {
            "post_attention_layernorm": "ffn_norm",
            "mlp.gate": "ffn_gate_inp",
            "self_attn.q_norm": "attn_q_norm",
            "self_attn.k_norm": "attn_k_norm",
        },
        needs_head=False,
    ),
    Arch(
        "gpt-oss",
        ("gpt_oss",),
        ATTENTION | {"post_attention_layernorm": "post_attention_norm", "mlp.router": "ffn_gate_inp"},
        {"self_attn.sinks": "attn_sinks.weight"},
    ),
    Arch("llama", ("llama",), ATTENTION | DENSE | {"post_attention_layernorm": "ffn_norm"}, needs_head=False),
)
WRITTEN = tuple(a for a in ARCHES if a.name != "llama")
EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(?:\d+\.)?(gate|up|down|gate_up)_proj(?:\.weight|(_bias)?)")
STACKED = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)_exps\.(weight|bias)")


def to_gguf(arch: Arch, name: str) -> str | None:
    """GGUF's name of a canonical tensor that is no expert's; None: the architecture has none."""
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name)
    if layer and layer[2] in arch.leaves:
        return f"blk.{layer[1]}.{arch.leaves[layer[2]]}"
    module, _, leaf = (layer[2] if layer else name).rpartition(".")
    found = (arch.modules if layer else TOP).get(module)
    if found is None or leaf not in ("weight", "bias"):
        return None
    return f"blk.{layer[1]}.{found}.{leaf}" if layer else f"{found}.{leaf}"


def from_gguf(arch: Arch, name: str) -> str | None:
    """The canonical name of a GGUF tensor that is no expert's; None: unknown."""
    layer = re.fullmatch(r"blk\.(\d+)\.(.*)", name)
    back = {ours: theirs for theirs, ours in arch.leaves.items()}
    if layer and layer[2] in back:
        return f"model.layers.{layer[1]}.{back[layer[2]]}"
    table = {ours: theirs for theirs, ours in (arch.modules if layer else TOP).items()}
    module, _, leaf = (layer[2] if layer else name).rpartition(".")
    if module not in table or leaf not in ("weight", "bias"):
        return None
    return f"model.layers.{layer[1]}.{table[module]}.{leaf}" if layer else f"{table[module]}.{leaf}"


def must_be_f32(name: str, dims: int) -> bool:
    """What llama.cpp's converter keeps in F32: vectors, biases, routers."""
    return dims <= 1 or not name.endswith(".weight") or name.endswith(("_norm.weight", "ffn_gate_inp.weight"))


def to_blocks(packed: Packed) -> Tensor:
    """uint8 [..., K/32 * 17] of codes [..., K/2] (low nibble first) and scales [..., K/32]."""
    bytes_QP = packed.codes.unflatten(-1, (-1, BLOCK // 2))
    first, second = bytes_QP[..., :HALF], bytes_QP[..., HALF:]
    out = torch.empty(*packed.scales.shape, BLOCK_BYTES, dtype=torch.uint8)
    out[..., 0] = packed.scales
    out[..., 1::2] = (first & 0x0F) | (second << 4)  # elements 0, 2, .. 14 and 16, 18, .. 30
    out[..., 2::2] = (first >> 4) | (second & 0xF0)  # elements 1, 3, .. 15 and 17, 19, .. 31
    return out.flatten(-2)


def from_blocks(blocks: Tensor) -> Packed:
    """The inverse of `to_blocks`."""
    bytes_QP = blocks.unflatten(-1, (-1, BLOCK_BYTES))
    even, odd = bytes_QP[..., 1::2], bytes_QP[..., 2::2]
    codes = torch.cat(((even & 0x0F) | (odd << 4), (even >> 4) | (odd & 0xF0)), dim=-1)
    return Packed(codes.flatten(-2), bytes_QP[..., 0].contiguous())
