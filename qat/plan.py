"""`dry_run=true`: what a run would quantise, hold in memory, write and take, from shapes alone (no weights are read).

Every figure follows from the parameter shapes of the model on the meta device and the formulas below; assumptions that
are not formulas (FLOP rate, disk rate) are printed beside the result. P all parameters, T trained ones, N GPUs.

    working weights   2 P                zero3: 2 P / N, and two decoder layers gathered
    FP32 masters      4 T                zero2, zero3: / N     (offload: host memory)
    Adam moments      8 T                zero2, zero3: / N     (offload: host memory)
    gradients         2 T                zero2, zero3: / N, and 1 GB of buckets
    teacher           2 T                it shares what is not trained; another checkpoint: 2 P; zero3: / N
    activations       2 bytes x tokens of a micro-batch x (inputs + outputs of every matrix a token meets), per layer;
                      with activation checkpointing: one such layer, and one hidden state for each
    logits            16 bytes x vocabulary x loss.chunk_tokens (student and teacher in FP32, one gradient, one spare)

    layerwise, one GPU: weights of one layer 2 L, its largest gradient, 12 bytes for each parameter in training
    (all of the layer's, or a slice of its experts: layerwise.slices), one layer's activations, the embeddings.

Time: 6 FLOPs a parameter that a token meets for forward and backward, 2 for the teacher, 2 for recomputation.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from core.errors import ConfigError
from core.mxfp4 import BITS_PER_WEIGHT
from core.train.config import Offload, OptimName, ParallelMode
from qat.config import NANO, Method, QATConfig, QuantFormat, Teacher
from qat.layer_io import find_decoder
from qat.layer_train import MASTER_BYTES, auto_slices
from qat.select import Selection, select

GB = 1e9
GPUS = (1, 8, 64)
GPU_SIZES = (80, 141, 192)  # GB: H100, H200, B200
MODES = (ParallelMode.none, ParallelMode.ddp, ParallelMode.zero2, ParallelMode.zero3)
BUCKETS = 1e9
MEMORY_RATE = 3e12  # bytes a second that the one-layer optimiser's passes reach
OPTIMISER_TRAFFIC = 60  # bytes read and written per parameter and update, chunked FP32 temporaries included


@dataclass(frozen=True)
class Assumptions:
    """What time estimates cannot derive. tflops: sustained BF16 rate of a GPU; read_gbs: checkpoint reading, GB/s."""

    tflops: float = 300.0
    read_gbs: float = 2.0


@dataclass(frozen=True)
class Facts:
    """Sizes of one model; `layer_*` are of the largest decoder layer. Parameters unless said otherwise."""

    total: int
    experts: int
    active: float  # a token meets these: routed experts count top-k / number
    embedding: int  # looked up, so no FLOPs
    trained: int
    quantised: int
    hidden: int
    vocab: int
    layers: int
    trained_layers: int
    layer: int
    layer_active: float
    layer_trained: int
    layer_gradient: int  # largest trained tensor of a layer
    layer_width: float  # inputs + outputs of every matrix that a token meets in a layer


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU by purpose, and on the host for it. `loading`: before the model is divided over GPUs."""

    parts: tuple[tuple[str, float], ...]
    host: float = 0.0
    loading: float = 0.0

    @property
    def total(self) -> float:
        return sum(size for _, size in self.parts)

    @property
    def peak(self) -> float:
        return max(self.total, self.loading)

    @property
    def gpu(self) -> int | None:
        """The smallest GPU size in GB that holds it with a tenth to spare."""
        return next((size for size in GPU_SIZES if self.peak <= 0.9 * size * GB), None)


@dataclass(frozen=True)
class Plan:
    name: str
    method: Method
    facts: Facts
    selection: Selection
    memory: dict[tuple[ParallelMode, int], Memory]  # whole-model training, by mode and number of GPUs
    layerwise: dict[int, tuple[int, Memory]]  # by GPU size in GB: (slices, memory); absent: does not fit
    columns: tuple[int, ...]
    disk: tuple[tuple[str, float], ...]
    days: tuple[tuple[str, float], ...]
    lines: tuple[str, ...]  # assumptions, formulas' inputs

    def render(self) -> str:
        """The plan as text."""
        from qat.plan_text import render

        return render(self)

    __str__ = render


def make_plan(
    config: QATConfig,
    model: nn.Module | None = None,
    assumptions: Assumptions | None = None,
    world: int | None = None,
) -> Plan:
    """Plan a run. Pure: reads no weights, writes nothing.

    Args:
        config: the run's configuration.
        model: the model on the meta device; default: built from `config.model`.
        assumptions: rates for the time estimate.
        world: a number of GPUs to plan for beside 1, 8 and 64.
    """
    model = model if model is not None else planned_model(config)
    assume = assumptions or Assumptions()
    selection = select(model, config.quant)
    facts = gather(model, selection, config)
    columns = tuple(sorted({*GPUS, *([world] if world else [])}))
    memory = {(mode, n): whole_model(facts, config, mode, n) for mode in MODES for n in columns if mode_fits(mode, n)}
    layerwise = {}
    for size in GPU_SIZES:
        try:
            layerwise[size] = one_layer(facts, config, size * GB)
        except ConfigError:
            continue
    days = tuple(time_days(facts, config, assume, layerwise, columns, memory))
    return Plan(
        config.model.name,
        config.qat,
        facts,
        selection,
        memory,
        layerwise,
        columns,
        tuple(disk(facts, config)),
        days,
        notes(config, assume),
    )


def planned_model(config: QATConfig) -> nn.Module:
    """`config.model` with its parameters on the meta device."""
    if config.model.name == NANO and config.model.path is None:
        from core.models.mimo_v2 import MiMoV2ForCausalLM
        from qat.base import nano_config

        with torch.device("meta"):
            return MiMoV2ForCausalLM(nano_config(config.model.nano, 0, 1))
    from core.models.load import meta_model

    return meta_model(config.model.path or config.model.name)[0]


def mode_fits(mode: ParallelMode, gpus: int) -> bool:
    return (mode is ParallelMode.none) == (gpus == 1)


def gather(model: nn.Module, selection: Selection, config: QATConfig) -> Facts:
    """Count parameters by role; see Facts."""
    from core.models.experts import find_experts
    from qat.select import layer_index, set_trainable

    trained = set(set_trainable(model, config.trainable.patterns, selection))
    experts = {e.name for e in find_experts(model)}
    parameters = dict(model.named_parameters())
    _, decoder = find_decoder(model)
    text = model.config.get_text_config()
    share = top_k(text) / expert_count(parameters, experts)
    met = {n: p.numel() * (share if n in experts else 1.0) for n, p in parameters.items()}
    embedding = model.get_input_embeddings().weight
    tied = model.get_output_embeddings() is not None and model.get_output_embeddings().weight is embedding
    by_layer: dict[int, list[str]] = {i: [] for i in range(len(decoder.layers))}
    for name in parameters:
        if layer_index(name) in by_layer:
            by_layer[layer_index(name)].append(name)
    largest = max(by_layer.values(), key=lambda names: sum(parameters[n].numel() for n in names))
    in_training = [n for n in largest if n in trained]

    def width(name: str) -> float:
        shape = parameters[name].shape
        if name in experts:
            return sum(shape[1:]) * share * shape[0] if len(shape) == 3 else 0.0
        return float(sum(shape)) if len(shape) == 2 else 2.0 * shape.numel()

    return Facts(
        total=sum(p.numel() for p in parameters.values()),
        experts=sum(parameters[n].numel() for n in experts),
        active=sum(met.values()),
        embedding=0 if tied else embedding.numel(),
        trained=sum(parameters[n].numel() for n in trained),
        quantised=sum(t.numel for t in selection.tensors),
        hidden=text.hidden_size,
        vocab=text.vocab_size,
        layers=len(decoder.layers),
        trained_layers=sum(any(n in trained for n in names) for names in by_layer.values()),
        layer=sum(parameters[n].numel() for n in largest),
        layer_active=sum(met[n] for n in largest),
        layer_trained=sum(parameters[n].numel() for n in in_training),
        layer_gradient=max((parameters[n].numel() for n in in_training), default=0),
        layer_width=sum(width(n) for n in largest),
    )


def top_k(text: object) -> int:
    for key in ("num_experts_per_tok", "top_k_experts", "moe_topk", "num_experts_per_token"):
        if getattr(text, key, None):
            return int(getattr(text, key))
    return 1


def expert_count(parameters: dict[str, nn.Parameter], experts: set[str]) -> int:
    return max((parameters[n].shape[0] for n in experts), default=1)


def tokens_in_step(config: QATConfig) -> int:
    return config.train.batch_size * config.data.seq_len


def whole_model(facts: Facts, config: QATConfig, mode: ParallelMode, gpus: int) -> Memory:
    """Memory of `qat=snap` or `fake_quant` on each of `gpus` GPUs."""
    optimiser_share = gpus if mode in (ParallelMode.zero2, ParallelMode.zero3) else 1
    weight_share = gpus if mode is ParallelMode.zero3 else 1
    gathered = 2 * 2 * facts.layer if mode is ParallelMode.zero3 else 0
    rows = config.train.micro_batch_size or max(1, math.ceil(config.train.batch_size / gpus))
    tokens = rows * config.data.seq_len
    per_layer = 2 * tokens * facts.layer_width
    hidden = 2 * tokens * facts.hidden * facts.layers
    activations = hidden + per_layer if config.train.activation_checkpointing else per_layer * facts.layers
    teacher = (
        {Teacher.base: facts.trained, Teacher.path: facts.total}.get(config.loss.teacher, 0) if config.loss.kl else 0
    )
    masters = 4 * facts.trained / optimiser_share
    moments = (4 if config.optim.name is OptimName.muon else 8) * facts.trained / optimiser_share
    off = config.parallel.offload_optimizer is not Offload.none
    return Memory(
        (
            ("working weights, BF16", 2 * facts.total / weight_share + gathered),
            ("FP32 masters", 0 if off else masters),
            ("optimiser moments", 0 if off else moments),
            ("gradients", 2 * facts.trained / optimiser_share + (BUCKETS if optimiser_share > 1 else 0)),
            ("teacher", 2 * teacher / weight_share),
            (f"activations, {rows} x {config.data.seq_len} tokens", activations),
            ("logits", 16 * facts.vocab * min(tokens, config.loss.chunk_tokens)),
        ),
        host=masters + moments if off else 0.0,
        loading=2 * (facts.total + teacher),
    )


def one_layer(facts: Facts, config: QATConfig, budget: float) -> tuple[int, Memory]:
    """(slices, memory) of `qat=layerwise` on one GPU of `budget` bytes.

    Raises:
        ConfigError: a layer does not fit however many slices it is cut into.
    """
    tokens = config.layerwise.batch_size * config.data.seq_len
    activations = 2 * tokens * facts.layer_width
    shell = 2 * facts.vocab * facts.hidden
    weights, gradient = 2 * facts.layer, 2 * facts.layer_gradient
    rest = budget - shell - activations
    slices = config.layerwise.slices or auto_slices(weights, facts.layer_trained, gradient, rest)
    memory = Memory(
        (
            ("weights of one layer, BF16", weights),
            ("its largest gradient", gradient),
            ("FP32 masters and moments", MASTER_BYTES * facts.layer_trained / slices),
            (f"activations, {config.layerwise.batch_size} x {config.data.seq_len} tokens", activations),
            ("embeddings", shell),
        )
    )
    if memory.total > budget:
        raise ConfigError(
            f"layerwise.slices={slices} needs {memory.total / GB:.0f} GB of {budget / GB:.0f}; set it to 0"
        )
    return slices, memory


def disk(facts: Facts, config: QATConfig) -> list[tuple[str, float]]:
    final = facts.total * 2
    packed = facts.quantised * BITS_PER_WEIGHT / 8 + (facts.total - facts.quantised) * 2
    sizes = [("trained model, BF16", final), ("the same exported in MXFP4", packed)]
    if config.qat is Method.layerwise:
        stream = 2 * config.layerwise.tokens * facts.hidden
        sizes += [("finished layers, BF16", 2 * facts.trained), ("hidden states, at most four streams", 4 * stream)]
    else:
        sizes += [
            (
                f"resumable checkpoints, {config.train.keep_last} kept and one in writing",
                (config.train.keep_last + 1) * MASTER_BYTES * facts.trained,
            )
        ]
    return sizes


def time_days(
    facts: Facts,
    config: QATConfig,
    assume: Assumptions,
    layerwise: dict[int, tuple[int, Memory]],
    columns: tuple[int, ...],
    memory: dict[tuple[ParallelMode, int], Memory],
) -> list[tuple[str, float]]:
    """(label, days) of the chosen method, for numbers of GPUs that some mode fits."""
    rate = assume.tflops * 1e12
    if config.qat is not Method.layerwise:
        met = facts.active - facts.embedding
        per_parameter = 6 + (2 if config.loss.kl else 0) + (2 if config.train.activation_checkpointing else 0)
        flops = per_parameter * met * tokens_in_step(config) * config.train.steps
        fitting = [n for n in columns if any(m.gpu for (_, gpus), m in memory.items() if gpus == n)]
        return [(f"{n} GPU{'s' * (n > 1)}, {config.train.steps} steps", flops / rate / n / 86400) for n in fitting]
    result = []
    for size, (slices, _) in layerwise.items():
        tokens = config.layerwise.steps * config.layerwise.batch_size * config.data.seq_len
        flops = facts.layer_active * (6 * tokens * slices + 3 * 2 * config.layerwise.tokens)
        optimiser = config.layerwise.steps * OPTIMISER_TRAFFIC * facts.layer_trained / MEMORY_RATE
        layer = flops / rate + optimiser + 2 * 2 * facts.layer / (assume.read_gbs * GB)
        label = f"one {size} GB GPU: {layer / 60:.1f} min a layer x {facts.trained_layers} layers, {slices} slices each"
        result.append((label, layer * facts.trained_layers / 86400))
    return result


def notes(config: QATConfig, assume: Assumptions) -> tuple[str, ...]:
    lines = [f"assumed: {assume.tflops:.0f} TFLOP/s sustained in BF16 on each GPU, no time lost in communication"]
    if config.qat is Method.layerwise:
        lines.append(f"assumed: checkpoint read at {assume.read_gbs:g} GB/s, each layer twice")
    if config.quant.format is QuantFormat.none:
        lines.append("quant=none: a plain BF16 run")
    return tuple(lines)
