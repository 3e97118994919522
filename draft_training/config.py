"""Schemas of `python -m draft_training.train` and `python -m draft_training.regenerate`; values live in configs/."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from core.errors import ConfigError
from core.generate.sampling import Sampling
from core.train.config import DataConfig, OptimConfig, ParallelConfig, RunConfig, TrackerConfig, TrainConfig


@dataclass
class TargetConfig:
    path: str | None = None  # checkpoint or run folder; default: the newest finished QAT run under run.root
    attention: str = "auto"
    experts: str = "auto"


class Kind(Enum):
    dflash = "dflash"  # drafts a block in one pass
    eagle = "eagle"  # one layer, chained: the autoregressive baseline


@dataclass
class DraftConfig:
    """The drafter; 0 or empty takes the target's value (see draft_training/build.py). Presets: configs/draft/."""

    kind: Kind = Kind.dflash
    num_hidden_layers: int = 5
    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    head_dim: int = 0
    intermediate_size: int = 0
    taps: list[int] = field(default_factory=list)  # target layers; empty: `tap_count` of them, spread
    tap_count: int = 5
    block_size: int = 8  # the anchor and K = block_size - 1 drafts
    window: int = 512
    full_layers: list[int] = field(default_factory=list)  # draft layers that see the whole context
    causal: bool = False
    sinks: bool = False
    value_scale: float = 1.0
    partial_rotary_factor: float = 1.0
    rope_theta: float = 10_000.0
    learned_mask: bool = True
    mask_token_id: int = -1  # -1: the tokenizer's mask, unknown or padding token, or the vocabulary's last
    selector_top_k: int = 0
    selector_rank: int = 0
    init: str | None = None  # a drafter folder to start from


class Labels(Enum):
    data = "data"  # the tokens of the text
    target = "target"  # what the target says after the text before each token


@dataclass
class LossConfig:
    ce: float = 1.0
    kl: float = 0.0
    gamma: float = 4.0  # decay of slot weights; 0 = all slots weigh the same
    dpace_alpha: float | None = None  # set: D-PACE weights in place of the decay
    labels: Labels = Labels.data
    selector: float = 1.0  # weight of the selector's loss, where there is one
    chunk_tokens: int = 8192  # slots whose logits exist at one time


@dataclass
class RepliesConfig:
    """Replies of the target: a folder written by draft_training.regenerate, or JSON lines of the same form (see
    draft_training/replies.py). Without a path, `data` is the text."""

    path: str | None = None
    force: bool = False  # train although another target said them, or some are missing
    auto: bool = False  # write them first, with the settings below, into run.cache
    count: int = 0  # prompts; 0 = all
    prompt_tokens: int = 1024  # longer prompts are left out; of plain text, the length of the prefix
    val_share: int = 50  # every n-th reply is held out
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 224
    rows: int = 256  # decoded together

    def sampling(self, seed: int) -> Sampling:
        return Sampling(self.temperature, self.top_p, self.top_k, self.max_new_tokens, seed)


@dataclass
class FeaturesConfig:
    """Features of the target in files, for small targets; without a path they are computed in every step."""

    path: str | None = None
    rows: int = 4096  # packed rows of data.seq_len tokens


@dataclass
class DraftTrainConfig:
    target: TargetConfig = field(default_factory=TargetConfig)
    draft: DraftConfig = field(default_factory=DraftConfig)
    data: DataConfig = field(default_factory=DataConfig)
    replies: RepliesConfig = field(default_factory=RepliesConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    run: RunConfig = field(default_factory=RunConfig)
    anchors: int = 512  # blocks of a packed row
    graph: bool = False  # on one GPU: a forward and backward as one CUDA graph; a target with eager experts has none
    eval_replies: int = 64  # held-out replies of each domain whose acceptance is measured
    dry_run: bool = False


@dataclass
class RegenerateConfig:
    target: TargetConfig = field(default_factory=TargetConfig)
    data: DataConfig = field(default_factory=DataConfig)
    replies: RepliesConfig = field(default_factory=RepliesConfig)
    train: TrainConfig = field(default_factory=TrainConfig)  # seed and device
    run: RunConfig = field(default_factory=RunConfig)
    out: str | None = None  # folder; default: <run.root>/replies-<target>
    dry_run: bool = False


def value(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part)
    return config


POSITIVE = ("train.steps", "train.batch_size", "train.log_every", "train.keep_last", "anchors", "loss.chunk_tokens",
            "draft.tap_count", "draft.num_hidden_layers", "data.seq_len", "optim.lr", "replies.val_share",
            "replies.prompt_tokens", "replies.rows", "eval_replies", "features.rows")  # fmt: skip
NOT_NEGATIVE = ("train.micro_batch_size", "train.eval_every", "train.save_every", "loss.ce", "loss.kl", "loss.gamma",
                "loss.selector", "replies.count", "optim.clip_grad_norm", "optim.weight_decay")  # fmt: skip


def check(config: DraftTrainConfig) -> None:
    """ConfigError for values out of range and combinations that leave nothing to train."""
    for key in POSITIVE:
        if value(config, key) <= 0:
            raise ConfigError(f"{key}={value(config, key)}: expected above 0")
    for key in NOT_NEGATIVE:
        if value(config, key) < 0:
            raise ConfigError(f"{key}={value(config, key)}: expected 0 or more")
    loss = config.loss
    if not loss.ce and not loss.kl:
        raise ConfigError("loss.ce=0 and loss.kl=0 leave nothing to train on; set one of them")
    if loss.dpace_alpha is not None and not 0 <= loss.dpace_alpha <= 1:
        raise ConfigError(f"loss.dpace_alpha={loss.dpace_alpha}: expected 0 to 1")
    check_kind(config.draft)
    config.replies.sampling(config.train.seed)


DFLASH_ONLY = ("causal", "sinks", "value_scale", "partial_rotary_factor", "learned_mask", "mask_token_id",
               "selector_top_k", "selector_rank")  # fmt: skip


def check_kind(draft: DraftConfig) -> None:
    """ConfigError for what the kind of drafter has not: a key that says nothing would be believed."""
    if draft.kind is Kind.dflash:
        return
    if draft.num_hidden_layers != 1:
        raise ConfigError(
            f"draft.num_hidden_layers={draft.num_hidden_layers}: a drafter of draft.kind=eagle has 1; take draft=eagle"
        )
    for key in DFLASH_ONLY:
        if getattr(draft, key) != getattr(DraftConfig, key):
            raise ConfigError(f"draft.{key}={getattr(draft, key)}: draft.kind=eagle has no such thing; leave it out")


def check_regenerate(config: RegenerateConfig) -> None:
    for key in ("replies.prompt_tokens", "replies.rows"):
        if value(config, key) <= 0:
            raise ConfigError(f"{key}={value(config, key)}: expected above 0")
    config.replies.sampling(config.train.seed)
