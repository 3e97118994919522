"""Which weights live in MXFP4: resolved once, printed, and refused where it is not what was meant.

Silent skips are the commonest fault of quantisation tools on fused experts (the 3-D parameters are no nn.Linear and
are passed over), so selection is total: every matrix of the model is quantised, kept (high precision by design) or
skipped (an expert the user left out by name), and an expert in none of these stops the run.
"""

from dataclasses import asdict, dataclass
from fnmatch import fnmatch

from torch import nn

from core.errors import ConfigError, UnsupportedError
from core.models.experts import find_experts
from core.mxfp4 import BITS_PER_WEIGHT, BLOCK, check_blocks
from qat.config import QuantConfig, QuantFormat

EXPERTS = "experts"


@dataclass(frozen=True)
class Selected:
    """One weight on the grid. `dim`: its reduction dimension, -1 or -2. `layer`: decoder layer, -1 if none."""

    name: str
    shape: tuple[int, ...]
    dim: int
    layer: int

    @property
    def numel(self) -> int:
        total = 1
        for size in self.shape:
            total *= size
        return total


@dataclass(frozen=True)
class CoverageRow:
    part: str
    tensors: int
    parameters: int
    bytes_before: int
    bytes_after: float


@dataclass(frozen=True)
class Selection:
    tensors: tuple[Selected, ...]
    coverage: tuple[CoverageRow, ...]

    @property
    def names(self) -> list[str]:
        return [t.name for t in self.tensors]

    def table(self) -> str:
        """The coverage table, as text."""
        lines = [f"{'':10}{'tensors':>9}{'parameters':>21}{'bytes in BF16':>21}{'bytes after':>21}"]
        lines += [
            f"{r.part:10}{r.tensors:>9,}{r.parameters:>21,}{r.bytes_before:>21,}{r.bytes_after:>21,.0f}"
            for r in self.coverage
        ]
        before, after = sum(r.bytes_before for r in self.coverage), sum(r.bytes_after for r in self.coverage)
        lines.append(
            f"{'model':10}{sum(r.tensors for r in self.coverage):>9,}{sum(r.parameters for r in self.coverage):>21,}"
            f"{before:>21,}{after:>21,.0f}   {after / before:.1%} of BF16"
        )
        return "\n".join(lines)

    def as_json(self) -> dict[str, object]:
        return {"tensors": [asdict(t) for t in self.tensors], "coverage": [asdict(r) for r in self.coverage]}


def select(model: nn.Module, config: QuantConfig) -> Selection:
    """Resolve `quant.select` and `quant.skip` on a model (weights are not read; a meta model will do).

    Raises:
        ConfigError: a pattern matches nothing, or an expert tensor is neither selected nor skipped.
        FormatError: a selected weight's reduction dimension does not divide into blocks of 32.
    """
    parameters = dict(model.named_parameters())
    experts = {e.name: e for e in find_experts(model)}
    if config.format is QuantFormat.none:
        return Selection((), coverage(parameters, set(), set()))
    chosen, skipped = (
        match(config.select, parameters, experts, "select"),
        match(config.skip, parameters, experts, "skip"),
    )
    forgotten = sorted(set(experts) - chosen - skipped)
    if forgotten:
        raise ConfigError(
            f"quant.select={config.select} leaves out {len(forgotten)} expert tensors, first {forgotten[0]}; "
            "select them (`experts` takes all) or name them in quant.skip"
        )
    tensors = []
    for name in sorted(chosen - skipped, key=list(parameters).index):
        dim = experts[name].reduction_dim if name in experts else -1
        check_matrix(name, parameters[name])
        check_blocks(parameters[name].shape[dim], f"the reduction dimension of {name}")
        tensors.append(Selected(name, tuple(parameters[name].shape), dim, layer_index(name)))
    if not tensors:
        raise ConfigError(
            "quant.select and quant.skip together leave nothing to quantise; use quant=none for a BF16 run"
        )
    return Selection(tuple(tensors), coverage(parameters, {t.name for t in tensors}, skipped))


def match(patterns: list[str], parameters: dict[str, nn.Parameter], experts: dict[str, object], key: str) -> set[str]:
    found: set[str] = set()
    for pattern in patterns:
        names = set(experts) if pattern == EXPERTS else {n for n in parameters if fnmatch(n, pattern)}
        if not names:
            what = "found no fused experts" if pattern == EXPERTS else "matched no parameter"
            example = next((n for n, p in parameters.items() if p.dim() >= 2 and "layers" in n), next(iter(parameters)))
            raise ConfigError(f"quant.{key}='{pattern}' {what}; names look like {example}")
        found |= names
    return found


def check_matrix(name: str, parameter: nn.Parameter) -> None:
    if parameter.dim() < 2:
        raise ConfigError(f"quant.select matches {name} of shape {tuple(parameter.shape)}, which is not a matrix")


def coverage(parameters: dict[str, nn.Parameter], quantised: set[str], skipped: set[str]) -> tuple[CoverageRow, ...]:
    def row(part: str, names: list[str], bits: float) -> CoverageRow:
        count = sum(parameters[n].numel() for n in names)
        return CoverageRow(part, len(names), count, 2 * count, count * bits / 8)

    rest = [n for n in parameters if n not in quantised and n not in skipped]
    return (
        row("quantised", sorted(quantised), BITS_PER_WEIGHT),
        row("kept", rest, 16),
        row("skipped", sorted(skipped), 16),
    )


def layer_index(name: str) -> int:
    """`model.layers.7.mlp...` -> 7; -1 outside the decoder layers."""
    parts = name.split(".")
    return int(parts[parts.index("layers") + 1]) if "layers" in parts else -1


def set_trainable(model: nn.Module, patterns: list[str], selection: Selection) -> list[str]:
    """Set requires_grad from `trainable.patterns`; `quantized` means the selected weights, `all` everything.

    Raises:
        ConfigError: a pattern matches nothing.
    """
    names = [n for n, _ in model.named_parameters()]
    chosen: set[str] = set()
    for pattern in patterns:
        found = (
            set(selection.names)
            if pattern == "quantized"
            else {n for n in names if pattern == "all" or fnmatch(n, pattern)}
        )
        if not found and not (pattern == "quantized" and not selection.tensors):
            raise ConfigError(
                f"trainable.patterns='{pattern}' matched no parameter; names look like {names[len(names) // 2]}"
            )
        chosen |= found
    if not chosen:
        raise ConfigError(
            "nothing is trained: trainable.patterns=[quantized] with quant=none; set trainable.patterns=[all]"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    return [n for n in names if n in chosen]


def refuse_transposed_shard(tensor: Selected) -> None:
    """Shards of a flattened parameter hold whole blocks only along its last dimension."""
    raise UnsupportedError(
        f"{tensor.name} {tensor.shape} is quantised along dimension {tensor.dim}, so a ZeRO-3 shard of it cuts "
        f"blocks of {BLOCK} apart; use qat=fake_quant, or parallel=zero2"
    )
