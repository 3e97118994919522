"""Schema of `python -m qat.train` and `python -m qat.evaluate`; values live in configs/."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from core.errors import ConfigError, UnsupportedError
from core.mxfp4 import ScaleRule
from core.train.config import DataConfig, OptimConfig, ParallelConfig, RunConfig, TrackerConfig, TrainConfig


@dataclass
class NanoConfig:
    """Geometry of the embedded model and how its BF16 base is trained when none is cached."""

    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 1
    head_dim: int = 48
    v_head_dim: int = 32
    intermediate_size: int = 384
    moe_intermediate_size: int = 96
    n_routed_experts: int = 16
    num_experts_per_tok: int = 4
    sliding_window: int = 64
    vocab_size: int = 2048
    steps: int = 300
    batch_size: int = 16
    lr: float = 3e-3


@dataclass
class ModelConfig:
    name: str = "???"
    nano: NanoConfig | None = None  # set: the embedded model; else `path` is a checkpoint folder
    path: str | None = None
    hub: str | None = None  # repository to download when `path` is not set; printed, never fetched silently
    attention: str = "auto"  # auto | eager | sdpa | flex_attention
    experts: str = "auto"  # auto | eager | grouped_mm | batched_mm


NANO = "nano_mimo_v2"  # the model name whose checkpoint is trained here when no path is given


class QuantFormat(Enum):
    none = "none"
    mxfp4 = "mxfp4"


class Method(Enum):
    snap = "snap"  # write snapped BF16 after each optimiser step
    fake_quant = "fake_quant"  # quantise in every forward: the general path
    layerwise = "layerwise"  # one decoder layer after another, memory of one layer


@dataclass
class QuantConfig:
    format: QuantFormat = QuantFormat.mxfp4
    rule: ScaleRule = ScaleRule.even
    select: list[str] = field(default_factory=lambda: ["experts"])  # `experts`, or fnmatch patterns on names
    skip: list[str] = field(default_factory=list)  # patterns of expert tensors left out on purpose
    start_step: int = 0
    # layer -> first quantised step, in place of start_step; on the command line: '+quant.layer_start_steps={3:100}'
    layer_start_steps: dict[int, int] = field(default_factory=dict)
    check_grid_every: int = 50  # forwards between checks that selected weights are on the grid; 0 = off


class Teacher(Enum):
    base = "base"  # the BF16 weights the run started from; shares every tensor that is not trained
    masters = "masters"  # the BF16 cast of the current masters
    path = "path"
    topk = "topk"  # precomputed top-k log-probabilities


@dataclass
class LossConfig:
    kl: float = 1.0  # weight of the forward KL(teacher || student), temperature 1
    ce: float = 0.0  # weight of the cross-entropy on data tokens
    teacher: Teacher = Teacher.base
    teacher_path: str | None = None
    topk_path: str | None = None  # folder written by python -m qat.topk
    topk: int = 64  # classes it keeps for each token
    chunk_tokens: int = 2048  # tokens whose logits exist at one time
    router_aux: bool = True  # add the auxiliary loss if the model defines one and its config turns it on


@dataclass
class TrainableConfig:
    """Which parameters are trained; a choice apart from which are quantised."""

    patterns: list[str] = field(default_factory=lambda: ["quantized"])  # `quantized`, `all`, or fnmatch patterns


@dataclass
class LayerwiseConfig:
    steps: int = 200  # optimiser steps a layer (and slice)
    batch_size: int = 16  # packed rows in one step
    tokens: int = 262144  # calibration tokens
    hidden: str = "disk"  # disk | recompute: hidden states in files, or in host memory and recomputed on resume
    inputs: str = "quantized"  # quantized | bf16: which stream a layer trains on; the target is always the BF16 stream
    slices: int = 0  # a layer's experts trained in this many turns; 0 = the fewest whose masters fit the device
    lr: float = 5e-3  # Adam's step as a share of each tensor's root mean square


@dataclass
class EvalConfig:
    compare: bool = True  # BF16 / PTQ / QAT at the end; holds two whole models, so turn it off where that does not fit
    tasks: list[str] = field(default_factory=list)  # gsm8k | code | tools
    task_limit: int = 50
    max_new_tokens: int = 256
    bootstrap: int = 1000


@dataclass
class QATConfig:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    trainable: TrainableConfig = field(default_factory=TrainableConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    layerwise: LayerwiseConfig = field(default_factory=LayerwiseConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)
    qat: Method = Method.snap
    dry_run: bool = False


POSITIVE = (
    "train.batch_size", "train.steps", "train.log_every", "train.keep_last", "loss.chunk_tokens", "loss.topk",
    "optim.lr", "data.seq_len", "data.eval_rows", "data.shuffle_buffer", "layerwise.steps", "layerwise.batch_size",
    "layerwise.tokens", "layerwise.lr", "eval.bootstrap", "eval.task_limit", "eval.max_new_tokens",
)  # fmt: skip
NOT_NEGATIVE = (
    "train.micro_batch_size", "train.eval_every", "train.save_every", "quant.start_step", "quant.check_grid_every",
    "optim.clip_grad_norm", "optim.weight_decay", "loss.kl", "loss.ce", "data.max_bytes", "layerwise.slices",
)  # fmt: skip
SHARES = ("optim.ema", "optim.warmup", "optim.min_lr_ratio")  # from 0 to 1
CHOICES = {
    "data.loss_on": ("all", "assistant"),
    "layerwise.hidden": ("disk", "recompute"),
    "layerwise.inputs": ("quantized", "bf16"),
}
TASKS = ("gsm8k", "code", "tools")


def check(config: QATConfig) -> None:
    """Ranges and combinations that the types cannot say, before anything is read or written.

    Raises:
        ConfigError: the first key whose value cannot be used. UnsupportedError: keys that one method does not honour.
    """

    def value(key: str) -> Any:
        section, name = key.split(".")
        return getattr(getattr(config, section), name)

    for key in POSITIVE:
        if not value(key) > 0:
            raise ConfigError(f"{key}={value(key)}: must be positive")
    for key in NOT_NEGATIVE:
        if value(key) < 0:
            raise ConfigError(f"{key}={value(key)}: must not be negative")
    for key in SHARES:
        if not 0 <= value(key) <= 1:
            raise ConfigError(f"{key}={value(key)}: expected a share between 0 and 1")
    for key, choices in CHOICES.items():
        if value(key) not in choices:
            raise ConfigError(f"{key}={value(key)!r}: expected {' or '.join(choices)}")
    wrong = next((t for t in config.eval.tasks if t not in TASKS), None)
    if wrong:
        raise ConfigError(f"eval.tasks has {wrong!r}; expected some of {', '.join(TASKS)}")
    check_losses(config)
    if config.qat is Method.layerwise:
        check_layerwise(config)


def check_losses(config: QATConfig) -> None:
    loss = config.loss
    if not loss.kl and not loss.ce:
        raise ConfigError("loss.kl=0 and loss.ce=0 leave nothing to train on; set one of them")
    if config.quant.format is QuantFormat.none and not loss.ce and loss.teacher in (Teacher.base, Teacher.masters):
        raise ConfigError(
            f"quant=none with loss.teacher={loss.teacher.value} alone is the KL of a model to itself, always 0; "
            "use loss=ce, or loss.teacher=path with loss.teacher_path"
        )


def check_layerwise(config: QATConfig) -> None:
    ignored = {
        "quant.start_step": config.quant.start_step,
        "quant.layer_start_steps": config.quant.layer_start_steps,
        "optim.ema": config.optim.ema,
        "train.compile": config.train.compile,
    }
    for key, value in ignored.items():
        if value:
            raise UnsupportedError(f"qat=layerwise does not honour {key}={value}; leave it out")
