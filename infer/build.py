"""From folders and options to an engine: weights, drafter, cache pools sized by what memory is left.

The cache's size is the same on every rank (the smallest that any of them can hold), since all run the same schedule.
"""

import gc
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedConfig

from core.errors import CheckpointError, ConfigError
from core.generate.rounds import Round as LoggedRound
from core.models.load import load_tokenizer
from infer.cache import KVCache, LayerShape, bytes_per_token
from infer.drafting import BlockDrafter, open_drafter, shapes_of, windows_of
from infer.engine import ModelEngine
from infer.geometry import Geometry
from infer.model import Model
from infer.ops import ops_of
from infer.options import DTYPES, EngineOptions
from infer.pages import PageBook, Pool, plan_pools
from infer.parallel import Ranks, device_of, start
from infer.round import Round
from infer.scheduler import Scheduler
from infer.shard import Shard
from infer.weights import Weights, load_weights

CPU_KV_BYTES = 2**30
STEP_TOKENS = {"cuda": 2048, "cpu": 512}


def build_engine(
    options: EngineOptions, ranks: Ranks | None = None, *, on_round: Callable[[LoggedRound], None] | None = None
) -> ModelEngine:
    """Load everything and return an engine of its own rank.

    Args:
        ranks: from `join`; None: this process alone.
    Raises:
        ConfigError, CheckpointError, UnsupportedError: one line each; nothing is left running.
    """
    ranks = ranks or Ranks(backend=options.backend)
    device, dtype = device_of(options.device), DTYPES[options.dtype]
    shard = ranks.shard
    loaded = load_weights(options.model, dtype=dtype, device=device, shard=shard)
    g = loaded.geometry
    drafter = None
    if options.drafter is not None:
        drafter = open_drafter(
            options.drafter, g, loaded.fingerprint, dtype=dtype, device=device, force=options.force_drafter
        )
    drafts = drafter.config.drafts if drafter else 0
    tokens = max(step_tokens(options, device), options.rows * (1 + drafts))
    ahead = 2 * drafts + 1 if drafts else 0
    groups = tuple(dict.fromkeys((*g.windows, *(windows_of(drafter.config) if drafter else ()))))
    layers = target_shapes(g, shard, groups)
    own = len(layers)
    layers += shapes_of(drafter.config, groups) if drafter else []
    most = min(g.max_length, options.max_length or g.max_length)
    plan = PoolPlan(groups, layers, dtype, options.page_size, options.rows, tokens, ahead)
    pools = plan.pools(ranks.least(options.kv_tokens or plan.fitting(kv_bytes(options, device), most)))
    book = PageBook(pools)
    length = longest_request(book, most, tokens, ahead)
    model = Model(g, loaded.weights, ops_of(options.backend), ranks, length=length + ahead + 1,
                  taps=drafter.config.taps if drafter else ())  # fmt: skip
    cache = KVCache(layers, pools, dtype, device)
    block = BlockDrafter(drafter, model, first=own, length=length + ahead + 1) if drafter else None
    scheduler = Scheduler(
        book, rows=options.rows, tokens=tokens, drafts=drafts, ahead=ahead, reuse=options.prefix_cache
    )
    graphs = options.graphs and recordable(options, device, ranks, loaded.weights)
    runner = Round(model, cache, block, log=on_round is not None, graphs=graphs)
    seed = ranks.agree(secrets.randbits(63) if options.seed is None else options.seed)
    return ModelEngine(
        scheduler, runner, max_length=length, vocabulary=g.vocab_size, ends=end_tokens(options.model, loaded.config),
        adaptive=options.adaptive, seed=seed, on_round=on_round,
    )  # fmt: skip


def recordable(options: EngineOptions, device: torch.device, ranks: Ranks, weights: Weights) -> bool:
    """Whether a step waits for nothing: the definitions and dense experts do (FP32 experts take the definition).
    Several ranks have not been recorded yet."""
    fast = device.type == "cuda" and options.backend != "reference" and options.dtype == "bfloat16"
    return fast and ranks.shard.world == 1 and not weights.has_dense_experts()


def join(options: EngineOptions) -> Ranks:
    """The ranks that the launcher started, or this process alone. Call once, before `build_engine`."""
    from core.models.build import read_config

    device = device_of(options.device)
    config = read_config(Path(options.model))
    # 1 + drafts tokens a row are at most 64 * rows; the buffers of the sums are sized by it
    tokens = max(step_tokens(options, device), options.rows * 64)
    return start(device, options.backend, tokens, config.hidden_size)


def step_tokens(options: EngineOptions, device: torch.device) -> int:
    return options.step_tokens or STEP_TOKENS[device.type]


def target_shapes(geometry: Geometry, shard: Shard, groups: Sequence[int | None]) -> list[LayerShape]:
    found = []
    for spec in geometry.layers:
        kv = shard.kv_heads(spec.kv_heads)
        found.append(LayerShape(kv.stop - kv.start, geometry.head_dim, geometry.value_dim, groups.index(spec.window)))
    return found


def kv_bytes(options: EngineOptions, device: torch.device) -> int:
    """What the cache may take, after the weights are there."""
    if device.type != "cuda":
        return CPU_KV_BYTES
    gc.collect()
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info(device)[0] * options.kv_share)


@dataclass(frozen=True)
class PoolPlan:
    """Pools of a model and its drafter as a function of the positions that layers without a window keep.

    groups: the distinct windows. step: tokens of a step. ahead: positions a round writes beyond a request's end.
    """

    groups: Sequence[int | None]
    layers: Sequence[LayerShape]
    dtype: torch.dtype
    page: int
    rows: int
    step: int
    ahead: int

    def pools(self, tokens: int) -> list[Pool]:
        return plan_pools(
            self.groups, size=self.page, tokens=tokens, rows=self.rows, step_tokens=self.step, ahead=self.ahead
        )

    def nbytes(self, tokens: int) -> int:
        each = [bytes_per_token(self.layers, group, self.dtype) for group in range(len(self.groups))]
        return sum((p.pages + 1) * p.size * size for p, size in zip(self.pools(tokens), each, strict=True))

    def fitting(self, budget: int, most: int) -> int:
        """Positions that fit into `budget` bytes, at most `rows` requests of `most` tokens.

        Raises:
            ConfigError: not even one page.
        """
        low, high = self.page, self.rows * (most + self.ahead + self.page)
        if self.nbytes(low) > budget:
            raise ConfigError(
                f"the KV cache does not fit: {self.rows} requests need more than the {budget / 2**30:.1f} GiB left; "
                "lower --rows, or spread the model over more GPUs"
            )
        return largest(lambda tokens: self.nbytes(tokens) <= budget, low, high)


def largest(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The largest number from low to high for which `holds`, given that it holds for all below and for `low`."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def longest_request(book: PageBook, most: int, tokens: int, ahead: int) -> int:
    """Most tokens of a request that can always run when it is alone.

    Raises:
        ConfigError: not even a short one.
    """
    found = largest(lambda length: book.fits(length, min(tokens, length), ahead), 1, most)
    if found < 2:
        raise ConfigError("the KV cache holds less than two tokens of one request; raise --kv-tokens")
    return found


def end_tokens(folder: Path, config: PreTrainedConfig) -> frozenset[int]:
    """EOS ids of the generation config, the model's config or the tokenizer, the first that says.

    Raises:
        CheckpointError: a file of them that is damaged.
    """
    try:
        generation = GenerationConfig.from_pretrained(folder) if (folder / "generation_config.json").is_file() else None
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / 'generation_config.json'} cannot be read: {error}") from error
    for source in (generation, config, load_tokenizer(folder)):
        found = getattr(source, "eos_token_id", None)
        if found is not None:
            return frozenset(found if isinstance(found, list | tuple) else (found,))
    return frozenset()
