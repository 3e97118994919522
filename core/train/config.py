"""Schemas of what every trainer shares; values live in configs/*.yaml, unknown keys are errors.

Plain (not frozen) dataclasses because OmegaConf composes into them; `core.config.load` validates once at the
door and nothing writes to them afterwards. Enum member names are what YAML and the command line say.
"""

from dataclasses import dataclass, field
from enum import Enum


class DataSource(Enum):
    embedded = "embedded"  # the Python standard library's sources, on every machine that runs this
    jsonl = "jsonl"
    hub = "hub"


@dataclass
class Source:
    """One ingredient of a mixture. `path`: file or glob relative to data.root (jsonl), or a hub repository."""

    path: str = "???"  # required
    weight: float = 1.0  # share of the tokens, normalised over the mixture
    domain: str | None = None  # name in reports; default: the file's stem
    split: str = "train"  # hub only
    subset: str | None = None  # hub only: the configuration's name
    text_field: str = "text"  # used when a record has no `messages`


@dataclass
class DataConfig:
    source: DataSource = DataSource.embedded
    root: str | None = None  # folder that relative paths start from; else the environment's FP4FLASH_DATA
    train: list[Source] = field(default_factory=list)
    val: list[Source] = field(default_factory=list)
    seq_len: int = 512  # tokens in a packed row
    eval_rows: int = 16  # packed rows kept of each validation domain
    max_bytes: int = 0  # embedded only: how much source text to use, 0 = all
    shuffle_buffer: int = 1000  # documents
    loss_on: str = "all"  # all | assistant: which tokens of a chat carry loss


class OptimName(Enum):
    adamw = "adamw"
    muon = "muon"  # matrices by Muon, the rest by AdamW


class Schedule(Enum):
    constant = "constant"
    cosine = "cosine"
    linear = "linear"


@dataclass
class OptimConfig:
    name: OptimName = OptimName.adamw
    lr: float = 1e-4
    min_lr_ratio: float = 0.1  # lr at the end over the peak
    schedule: Schedule = Schedule.cosine
    warmup: float = 0.05  # share of the steps
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_grad_norm: float = 1.0  # 0 = off
    muon_lr: float = 2e-3
    muon_momentum: float = 0.95
    ema: float = 0.0  # decay of an exponential moving average of the masters; 0 = off


class ParallelMode(Enum):
    none = "none"
    ddp = "ddp"
    zero2 = "zero2"
    zero3 = "zero3"
    fsdp2 = "fsdp2"  # refused by name
    ep = "ep"  # refused by name


class Offload(Enum):
    none = "none"
    cpu = "cpu"
    nvme = "nvme"


@dataclass
class ParallelConfig:
    mode: ParallelMode = ParallelMode.none
    offload_optimizer: Offload = Offload.none
    offload_params: Offload = Offload.none
    nvme_path: str | None = None


class TrackerName(Enum):
    none = "none"
    wandb = "wandb"
    tensorboard = "tensorboard"


@dataclass
class TrackerConfig:
    name: TrackerName = TrackerName.none
    project: str = "fp4flash"


@dataclass
class TrainConfig:
    steps: int = 100
    batch_size: int = 8  # packed rows in one optimiser step, over all ranks and micro-batches
    micro_batch_size: int = 0  # rows in one forward; 0 = batch_size / ranks
    seed: int = 0
    eval_every: int = 50  # steps; 0 = only at the end
    save_every: int = 50  # steps; 0 = only at the end
    keep_last: int = 1  # resumable checkpoints kept
    log_every: int = 1
    activation_checkpointing: bool = False
    compile: bool = False  # torch.compile of the decoder layers
    device: str = "auto"  # auto | cpu | cuda
    deterministic: bool = True  # fail rather than run a nondeterministic kernel


@dataclass
class RunConfig:
    root: str = "runs"
    name: str | None = None  # default: <command>-<model>-<time>
    resume: str | None = None  # a run folder, or `latest`
    cache: str = "runs/cache"  # trained nano bases and tokenizers
