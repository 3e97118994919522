"""Schema of `python -m draft_training.acceptance`; values live in configs/acceptance.yaml."""

from dataclasses import dataclass, field
from typing import Any

from core.errors import ConfigError
from core.generate.sampling import Sampling
from core.train.config import RunConfig
from draft_training.config import TargetConfig

EMBEDDED = "embedded"  # the domain that every machine has: held-out texts of the standard library


@dataclass
class TargetsConfig(TargetConfig):
    other: str | None = None  # a second target, compared with the first under the same drafter
    dtype: str = "bfloat16"  # bfloat16 | float32; the drafter computes in the same


@dataclass
class DraftersConfig:
    path: str | None = None  # drafter folder, or its run folder
    other: str | None = None  # a second drafter, compared on the same target text, prompt by prompt
    force: bool = False  # measure drafters that were trained for another target


@dataclass
class PromptsConfig:
    root: str | None = None  # folder of eval/<domain>.jsonl.gz; else the environment's FP4FLASH_DATA
    limit: int = 128  # of each domain; 0 = all. 128 give about 2 % half-width, 570 about 1 %
    max_tokens: int = 1024  # longer prompts are left out; of plain text, the length of the prefix
    max_bytes: int = 2_000_000  # embedded only: how much source text is read of each part


@dataclass
class SamplingConfig:
    temperatures: list[float] = field(default_factory=lambda: [0.0])  # each is served once
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 224

    def at(self, temperature: float, seed: int) -> Sampling:
        return Sampling(temperature, self.top_p, self.top_k, self.max_new_tokens, seed)


@dataclass
class ReplayConfig:
    row_tokens: int = 4096  # tokens of one teacher-forced forward, about
    anchors: int = 0  # blocks a row and pass; 0 = 64 on a CPU, 512 on a GPU


@dataclass
class SweepConfig:
    window: list[int] = field(default_factory=list)  # the same weights with each of these windows
    served: bool = False  # serve each too; else teacher-forced only


@dataclass
class LatencyConfig:
    prompts: int = 0  # decoded one by one, timed; 0 = off
    context: int = 256  # tokens before the round that is recorded as CUDA graphs, on a GPU; 0 = off


@dataclass
class DistributionConfig:
    prefixes: int = 0  # at which sampled decoding is tested against the target's probabilities; 0 = off
    samples: int = 50_000  # over all prefixes
    temperature: float = 1.0
    rows: int = 256


@dataclass
class AcceptanceConfig:
    target: TargetsConfig = field(default_factory=TargetsConfig)
    drafter: DraftersConfig = field(default_factory=DraftersConfig)
    eval: list[str] = field(default_factory=lambda: [EMBEDDED])  # domains: eval/<name>.jsonl.gz, or `embedded`
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    latency: LatencyConfig = field(default_factory=LatencyConfig)
    distribution: DistributionConfig = field(default_factory=DistributionConfig)
    run: RunConfig = field(default_factory=RunConfig)
    controls: int = 0  # prompts of which random drafts and the text itself are served; 0 = off
    rows: int = 32  # prompts decoded together
    bootstrap: int = 2000
    seed: int = 0
    device: str = "auto"  # auto | cpu | cuda


POSITIVE = ("prompts.max_tokens", "prompts.max_bytes", "sampling.max_new_tokens", "replay.row_tokens", "rows",
            "distribution.samples", "distribution.temperature", "distribution.rows", "bootstrap")  # fmt: skip
NOT_NEGATIVE = (
    "prompts.limit",
    "replay.anchors",
    "latency.prompts",
    "latency.context",
    "distribution.prefixes",
    "controls",
    "seed",
)
DTYPES = ("bfloat16", "float32")


def check(config: AcceptanceConfig) -> None:
    """ConfigError for values out of range and for what nothing can be measured without."""

    def value(key: str) -> Any:
        found: Any = config
        for part in key.split("."):
            found = getattr(found, part)
        return found

    for key in POSITIVE:
        if not value(key) > 0:
            raise ConfigError(f"{key}={value(key)}: expected above 0")
    for key in NOT_NEGATIVE:
        if value(key) < 0:
            raise ConfigError(f"{key}={value(key)}: expected 0 or more")
    if not config.drafter.path:
        raise ConfigError("drafter.path has no value; set it to a drafter folder or to the run that trained it")
    if not config.eval:
        raise ConfigError("eval=[] leaves no prompt; name domains such as code,math, or `embedded`")
    if len(set(config.eval)) != len(config.eval):
        raise ConfigError(f"eval={config.eval} names a domain twice; name each once")
    if not config.sampling.temperatures:
        raise ConfigError("sampling.temperatures=[] leaves nothing to serve; set [0.0] for greedy decoding")
    if config.target.dtype not in DTYPES:
        raise ConfigError(f"target.dtype={config.target.dtype!r}: expected {' or '.join(DTYPES)}")
    if config.run.resume:
        raise ConfigError(f"run.resume={config.run.resume}: acceptance is measured in one go; start a new run")
    if min(config.sweep.window, default=1) < 1:
        raise ConfigError(f"sweep.window={config.sweep.window}: expected windows above 0")
    for temperature in config.sampling.temperatures:
        config.sampling.at(temperature, config.seed)
