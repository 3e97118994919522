"""The printed form of `qat.plan.Plan`."""

from core.train.config import ParallelMode
from qat.config import Method
from qat.plan import GB, GPU_SIZES, MODES, Memory, Plan

NO = "does not fit"


def render(plan: Plan) -> str:
    """Model, coverage, memory per GPU, disk, time, assumptions."""
    parts = [model_lines(plan), ["", "Coverage", *plan.selection.table().splitlines()]]
    if plan.method is Method.layerwise:
        parts.append(layerwise_lines(plan))
    parts += [whole_lines(plan), disk_lines(plan), time_lines(plan)]
    return "\n".join(line for part in parts for line in part)


def model_lines(plan: Plan) -> list[str]:
    f = plan.facts
    return [
        f"Plan for model={plan.name} qat={plan.method.value} (dry run: no weights read, nothing written)",
        "",
        f"parameters {f.total / GB:,.2f}B, active per token {f.active / GB:,.2f}B, experts {f.experts / f.total:.1%}, "
        f"{f.layers} decoder layers (the largest: {f.layer / GB:,.2f}B)",
        f"quantised {f.quantised / GB:,.2f}B, trained {f.trained / GB:,.2f}B in {f.trained_layers} layers",
    ]


def fits(memory: Memory) -> str:
    return f"fits {memory.gpu} GB" if memory.gpu else NO


def breakdown(memory: Memory) -> list[str]:
    lines = [f"  {name:<44}{size / GB:>12,.2f} GB" for name, size in memory.parts]
    if memory.loading > memory.total:
        lines.append(f"  {'in training':<44}{memory.total / GB:>12,.2f} GB")
        lines.append(f"  {'while loading: every process reads all of it':<44}{memory.loading / GB:>12,.2f} GB")
    lines.append(f"  {'memory per GPU':<44}{memory.peak / GB:>12,.2f} GB   {fits(memory)}")
    if memory.host:
        lines.append(f"  {'host memory for each GPU (offload)':<44}{memory.host / GB:>12,.2f} GB")
    return lines


def layerwise_lines(plan: Plan) -> list[str]:
    lines = ["", "Memory, qat=layerwise: one GPU trains one decoder layer after another"]
    for size in GPU_SIZES:
        if size not in plan.layerwise:
            lines.append(f"on {size} GB: does not fit, one layer with its gradient is larger")
            continue
        slices, memory = plan.layerwise[size]
        turns = "whole layer at once" if slices == 1 else f"its experts in {slices} turns"
        lines += [f"on {size} GB: fits, {turns}", *breakdown(memory)]
    if plan.layerwise:
        f = plan.facts
        lines.append(
            f"Layers are read from the checkpoint one at a time ({2 * f.layer / GB:,.1f} GB); the model is never whole."
        )
    return lines


def whole_lines(plan: Plan) -> list[str]:
    title = "for comparison, the whole model trained at once" if plan.method is Method.layerwise else "whole model"
    lines = ["", f"Memory per GPU in GB, {title} (10 % of a GPU kept free)"]
    lines.append(f"  {'parallel':<10}" + "".join(f"{f'{n} GPU' + 's' * (n > 1):>28}" for n in plan.columns))
    for mode in MODES:
        cells = []
        for n in plan.columns:
            memory = plan.memory.get((mode, n))
            cells.append("-" if memory is None else cell(plan, mode, memory))
        lines.append(f"  {mode.value:<10}" + "".join(f"{cell:>28}" for cell in cells))
    if plan.method is not Method.layerwise:
        if not any(fits(memory) != NO for memory in plan.memory.values()):
            lines.append(
                "Nothing above fits. One decoder layer at a time does: set qat=layerwise; dry_run=true plans it."
            )
        for n in plan.columns:
            mode = ParallelMode.none if n == 1 else ParallelMode.zero3
            lines += [f"{mode.value} on {n} GPU{'s' * (n > 1)}, each holds", *breakdown(plan.memory[mode, n])]
    return lines


def cell(plan: Plan, mode: ParallelMode, memory: Memory) -> str:
    """One entry of the table; a combination that the trainer refuses is not said to fit."""
    if mode is ParallelMode.zero3 and plan.method is Method.snap and any(t.dim != -1 for t in plan.selection.tensors):
        return "refused: [in, out] experts"
    return f"{memory.peak / GB:,.1f} ({fits(memory)})"


def disk_lines(plan: Plan) -> list[str]:
    return ["", "Disk", *(f"  {name:<54}{size / GB:>12,.2f} GB" for name, size in plan.disk)]


def duration(days: float) -> str:
    if days >= 2:
        return f"{days:,.1f} days"
    if days * 24 >= 2:
        return f"{days * 24:.1f} hours"
    return f"{days * 1440:.1f} minutes"


def time_lines(plan: Plan) -> list[str]:
    return [
        "",
        "Time",
        *(f"  {label}: {duration(days)}" for label, days in plan.days),
        *(f"  {line}" for line in plan.lines),
    ]
