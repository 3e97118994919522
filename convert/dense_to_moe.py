"""A dense Llama-type model as a MiMo-V2 MoE model: configuration, weights, and the error that the split costs.

Attention, norms, embeddings and head are carried over as they are (full attention and full rotary in every layer, value
scale 1); every FFN becomes the experts of `convert/split_ffn.py`. All arithmetic is FP32 on the CPU.

Legend: B rows, T tokens, V vocabulary, E experts, W neurons of an expert.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedConfig

from convert.split_ffn import FFNStats, group_neurons, router
from core.errors import ConfigError, UnsupportedError
from core.models.build import build_meta
from core.models.mimo_v2 import MiMoV2ForCausalLM, Router
from core.models.mimo_v2_config import FULL, SPARSE, WINDOW, MiMoV2Config
from core.mxfp4 import BLOCK
from core.train.batch import IGNORE, Batch

SCORE_AT_ZERO = 0.5  # sigmoid(0); routed_scaling_factor is its inverse, so that an untrained router weighs by 1


@dataclass(frozen=True)
class Split:
    """S always-on and R routed experts, K of them a token; `router_scale`: standard deviation of a routed logit."""

    always_on: int
    routed: int
    top_k: int
    router_scale: float
    seed: int = 0

    @property
    def experts(self) -> int:
        return self.always_on + self.routed


def moe_config(dense: PreTrainedConfig, split: Split) -> MiMoV2Config:
    """The configuration of the split model.

    Raises:
        UnsupportedError: not a Llama-type SwiGLU model. ConfigError: the numbers do not fit; one line each.
    """
    rope = check_llama(dense)
    check_split(dense.intermediate_size, split)
    rotary = {"rope_type": "default", "rope_theta": float(rope["rope_theta"]), "partial_rotary_factor": 1.0}
    layers = dense.num_hidden_layers
    head_dim = getattr(dense, "head_dim", None) or dense.hidden_size // dense.num_attention_heads
    return MiMoV2Config(
        vocab_size=dense.vocab_size, hidden_size=dense.hidden_size, intermediate_size=dense.intermediate_size,
        num_hidden_layers=layers, num_attention_heads=dense.num_attention_heads,
        num_key_value_heads=dense.num_key_value_heads, head_dim=head_dim, v_head_dim=head_dim,
        max_position_embeddings=dense.max_position_embeddings, initializer_range=dense.initializer_range,
        rms_norm_eps=dense.rms_norm_eps, tie_word_embeddings=dense.tie_word_embeddings,
        rope_parameters={FULL: rotary, WINDOW: rotary}, attention_value_scale=1.0,
        layer_types=[FULL] * layers, mlp_layer_types=[SPARSE] * layers,
        n_routed_experts=split.experts, num_experts_per_tok=split.always_on + split.top_k,
        moe_intermediate_size=dense.intermediate_size // split.experts,
        norm_topk_prob=False, routed_scaling_factor=1 / SCORE_AT_ZERO,
        bos_token_id=dense.bos_token_id, eos_token_id=dense.eos_token_id, pad_token_id=dense.pad_token_id,
    )  # fmt: skip


def check_llama(dense: PreTrainedConfig) -> dict[str, Any]:
    """The rotary parameters of a model that MiMo-V2's layers compute exactly."""
    if dense.model_type != "llama":
        raise UnsupportedError(
            f"config.json: model_type={dense.model_type}; upcycling splits Llama-type models, choose one of type llama"
        )
    rope = {"rope_type": "default"} | (dense.rope_parameters or {})
    given = {"hidden_act": dense.hidden_act, "attention_bias": dense.attention_bias, "mlp_bias": dense.mlp_bias}
    wanted = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "rope_type": "default"}
    for key, value in (given | {"rope_type": rope["rope_type"]}).items():
        if value != wanted[key]:
            raise UnsupportedError(f"config.json: {key}={value}; the MoE model computes {key}={wanted[key]} only")
    return rope


def check_split(neurons: int, split: Split) -> None:
    if split.always_on < 0 or split.routed < 1 or split.router_scale < 0:
        raise ConfigError(
            f"--always-on {split.always_on} --routed {split.routed} --router-scale {split.router_scale}: expected at "
            "least 0, 1 and 0"
        )
    if not 1 <= split.top_k <= split.routed:
        raise ConfigError(
            f"--top-k {split.top_k}: expected 1 to --routed {split.routed}; it counts the routed experts of a token"
        )
    if neurons % split.experts:
        raise ConfigError(
            f"intermediate_size={neurons} does not divide by --always-on {split.always_on} + --routed {split.routed} = "
            f"{split.experts} experts of one width; choose S + R among its divisors"
        )
    width = neurons // split.experts
    if width % BLOCK:
        raise ConfigError(
            f"--always-on {split.always_on} --routed {split.routed} make experts of width {width} of "
            f"intermediate_size={neurons}; MXFP4 blocks need a multiple of {BLOCK}, choose a smaller S + R"
        )


def geometry(config: MiMoV2Config, split: Split) -> str:
    """Layers, experts, width, and parameters total and active a token; shapes only, no weights."""
    total = sum(p.numel() for p in build_meta(config).parameters())
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    idle = config.num_hidden_layers * (split.routed - split.top_k) * expert
    return (
        f"{config.num_hidden_layers} layers of {split.experts} experts of width {config.moe_intermediate_size}: "
        f"{split.always_on} always on, {split.top_k} of {split.routed} routed ({config.num_experts_per_tok} a token)\n"
        f"{total / 1e6:,.1f}M parameters, {(total - idle) / 1e6:,.1f}M active a token"
    )


@torch.no_grad()
def calibrate(dense: nn.Module, batches: list[Batch]) -> list[FFNStats]:
    """FFNStats of every layer over the batches."""
    found = []
    handles = []
    for layer in dense.model.layers:
        stats = FFNStats.empty(*layer.mlp.gate_proj.weight.shape)

        def see(mlp: nn.Module, inputs: tuple[Tensor, ...], stats: FFNStats = stats) -> None:
            stats.add(inputs[0].flatten(0, -2), mlp.gate_proj.weight, mlp.up_proj.weight)

        found.append(stats)
        handles.append(layer.mlp.register_forward_pre_hook(see))
    with tqdm(total=sum(b.input_ids_BT.numel() for b in batches), desc="calibrating", unit="token", leave=False) as bar:
        for batch in batches:
            dense.model(input_ids=batch.input_ids_BT, position_ids=batch.position_ids_BT, use_cache=False)
            bar.update(batch.input_ids_BT.numel())
    for handle in handles:
        handle.remove()
    return found


def upcycled(dense: nn.Module, config: MiMoV2Config, split: Split, stats: list[FFNStats]) -> MiMoV2ForCausalLM:
    """The split model. What is no FFN shares its storage with the dense one; router weights hold BF16 values."""
    kept = {n: t for n, t in dense.state_dict().items() if ".mlp." not in n}
    model = build_meta(config, next(dense.parameters()).dtype)
    model.load_state_dict(kept | dict(ffn_tensors(dense, split, stats)), assign=True)
    model.set_experts_implementation("fp4flash")
    return model.eval()


def ffn_tensors(dense: nn.Module, split: Split, stats: list[FFNStats]) -> Iterator[tuple[str, Tensor]]:
    """(name in the split model, tensor) of every layer's experts and router."""
    for number, layer in enumerate(tqdm(dense.model.layers, desc="splitting", unit="layer", leave=False)):
        gate_FH, up_FH, down_HF = (
            getattr(layer.mlp, f"{part}_proj").weight.detach() for part in ("gate", "up", "down")
        )
        importance_F = stats[number].importance_F(down_HF)
        experts_EW = group_neurons(gate_FH, importance_F, split.always_on, split.routed, split.seed + number)
        weight_EH, bias_E = router(gate_FH, experts_EW, split.always_on, stats[number], split.router_scale)
        stem = f"model.layers.{number}.mlp"
        yield f"{stem}.gate.weight", weight_EH.to(torch.bfloat16).to(gate_FH.dtype)
        yield f"{stem}.gate.e_score_correction_bias", bias_E.float()
        yield f"{stem}.experts.gate_up_proj", torch.cat([gate_FH[experts_EW], up_FH[experts_EW]], dim=1)
        yield f"{stem}.experts.down_proj", down_HF.T[experts_EW].transpose(1, 2).contiguous()


def every_expert_on(model: MiMoV2ForCausalLM) -> MiMoV2ForCausalLM:
    """The same weights with router scale 0 and every expert chosen: what the dense model computes."""
    result = build_meta(model.config, next(model.parameters()).dtype)
    result.load_state_dict(model.state_dict(), assign=True)
    result.set_experts_implementation("fp4flash")
    for module in result.modules():
        if isinstance(module, Router):
            module.top_k = module.weight.shape[0]
            module.weight = nn.Parameter(torch.zeros_like(module.weight))
    return result.eval()


@torch.no_grad()
def held_out(models: dict[str, nn.Module], reference: nn.Module, batches: list[Batch]) -> dict[str, dict[str, float]]:
    """Mean loss and mean KL(reference || model) by model, nats a labelled token."""
    sums = {name: [0.0, 0.0] for name in models}
    for batch in tqdm(batches, desc="held-out text", unit="batch", leave=False):
        labels_N = batch.labels_BT.flatten()
        carries_N = labels_N != IGNORE
        log_p_NV = log_probabilities(reference, batch)[carries_N]
        for name, model in models.items():
            log_q_NV = log_p_NV if model is reference else log_probabilities(model, batch)[carries_N]
            sums[name][0] += float(F.nll_loss(log_q_NV, labels_N[carries_N], reduction="sum"))
            sums[name][1] += float(F.kl_div(log_q_NV, log_p_NV, log_target=True, reduction="sum"))
    tokens = sum(b.num_targets for b in batches)
    return {name: {"loss": loss / tokens, "kl": kl / tokens} for name, (loss, kl) in sums.items()}


def log_probabilities(model: nn.Module, batch: Batch) -> Tensor:
    """[B T, V], FP32."""
    out = model(input_ids=batch.input_ids_BT, position_ids=batch.position_ids_BT, use_cache=False)
    return out.logits.float().log_softmax(-1).flatten(0, 1)
