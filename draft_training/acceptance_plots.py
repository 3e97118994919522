"""PNG plots of an acceptance report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

from draft_training.estimators import RECALL, Estimate

if TYPE_CHECKING:
    from draft_training.acceptance_report import Summary, Table

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")  # Okabe-Ito, safe for colour blindness
POOLED = "all"


def plot_all(done: Summary, folder: Path) -> None:
    """tau.png, position.png, context.png, recall.png, window.png; each only where it has something to show."""
    rows = {f"{a}, served, T={t:g}": x for a, found in done.served.items() for t, x in found.items()}
    rows |= {f"{a}, teacher-forced": x for a, x in done.forced.items()}
    rows = {name: table for name, table in rows.items() if table[POOLED].rounds}
    if not rows:
        return
    plot_tau(rows, folder / "tau.png")
    plot_position(rows, folder / "position.png")
    plot_context(next(iter(rows.values())), folder / "context.png")
    forced = done.forced.get("drafter")
    if forced and forced[POOLED].recall:
        plot_recall(forced, folder / "recall.png")
    if done.sweep:
        plot_sweep(done, folder / "window.png")


def bars(axis: Any, x: list[float], found: list[Estimate], **style: Any) -> None:
    """Values with their intervals; what was not counted is left out."""
    chosen = [(a, e) for a, e in zip(x, found, strict=True) if e.value == e.value]
    below = [max(0.0, e.value - e.low) if e.low == e.low else 0.0 for _, e in chosen]
    above = [max(0.0, e.high - e.value) if e.high == e.high else 0.0 for _, e in chosen]
    axis.errorbar([a for a, _ in chosen], [e.value for _, e in chosen], yerr=(below, above), capsize=3, **style)


def doubling(axis: Any, values: list[int]) -> None:
    """A logarithmic axis with the values themselves written at it."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(values, [f"{v:,}" for v in values])


def plot_tau(rows: dict[str, Table], path: Path) -> None:
    domains = list(next(iter(rows.values())))
    figure, axis = plt.subplots(figsize=(3 + 1.3 * len(domains), 3.6))
    for place, (name, table) in enumerate(rows.items()):
        x = [i + (place - (len(rows) - 1) / 2) * 0.7 / len(rows) for i in range(len(domains))]
        bars(axis, x, [table[d].tau_pooled for d in domains], fmt="o", color=COLOURS[place % 6], label=name)
    axis.set_xticks(range(len(domains)), domains)
    axis.axhline(1, color="0.5", linewidth=0.8)
    axis.set_ylabel("tokens a round (pooled, bonus included)")
    axis.legend(fontsize=7, frameon=False)
    finish(figure, path)


def plot_position(rows: dict[str, Table], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    titles = ("of all rounds", "where those before it were accepted")
    for place, (name, table) in enumerate(rows.items()):
        f = table[POOLED]
        for axis, found, title in zip(axes, (f.position, f.conditional), titles, strict=True):
            x = [k + 0.06 * place for k in range(1, len(found) + 1)]  # beside each other where they are equal
            axis.set_xticks(range(1, len(found) + 1))
            axis.set_xlim(0.7, len(found) + 0.5)
            bars(axis, x, list(found), fmt="o-", color=COLOURS[place % 6], markersize=3, linewidth=1.2, label=name)
            axis.set_title(title, fontsize=10)
            axis.set_xlabel("position in the block")
    axes[0].set_ylabel("share accepted")
    axes[0].set_ylim(0, 1.02)
    axes[1].legend(fontsize=7, frameon=False)
    finish(figure, path)


def plot_context(table: Table, path: Path) -> None:
    figure, axis = plt.subplots(figsize=(6, 3.4))
    for place, (domain, f) in enumerate(table.items()):
        x = [float(b) for _, b, _, _ in f.context]
        bars(axis, x, [e for *_, e in f.context], fmt="o-", color=COLOURS[place % 6], markersize=3, label=domain)
    doubling(axis, [b for _, b, _, _ in table[POOLED].context])
    axis.set_xlabel("tokens before the anchor, below")
    axis.set_ylabel("tokens a round")
    axis.legend(fontsize=7, frameon=False)
    finish(figure, path)


def plot_recall(table: Table, path: Path) -> None:
    figure, axis = plt.subplots(figsize=(6, 3.4))
    slots = table[POOLED].recall
    for place, k in enumerate(RECALL):
        x = [float(slot) for slot in range(1, len(slots) + 1)]
        found = [slot[place] for slot in slots]
        bars(axis, x, found, fmt="o-", color=COLOURS[place % 6], markersize=3, label=f"k = {k}")
    axis.set_ylim(0, 1.02)
    axis.set_xlabel("slot")
    axis.set_ylabel("text token among the k best")
    axis.legend(fontsize=7, frameon=False)
    finish(figure, path)


def plot_sweep(done: Summary, path: Path) -> None:
    figure, axis = plt.subplots(figsize=(6, 3.4))
    windows = sorted(done.sweep)
    kinds = list(dict.fromkeys(k for tables in done.sweep.values() for k in tables))
    for place, kind in enumerate(kinds):
        chosen = [w for w in windows if kind in done.sweep[w]]
        found = [done.sweep[w][kind][POOLED].tau_pooled for w in chosen]
        bars(axis, [float(w) for w in chosen], found, fmt="o-", color=COLOURS[place % 6], markersize=3, label=kind)
    trained = done.setup["drafter"].get("window")
    if trained:
        axis.axvline(trained, color="0.5", linewidth=0.8, linestyle="--", label=f"the folder's, {trained}")
    doubling(axis, windows)
    axis.set_xlabel("window W of the drafter (keys, itself included)")
    axis.set_ylabel("tokens a round")
    axis.legend(fontsize=7, frameon=False)
    finish(figure, path)


def finish(figure: Any, path: Path) -> None:
    for axis in figure.axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
