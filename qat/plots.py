"""PNG plots of a run: training curves, and recovery by domain."""

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

from qat.evaluate import REFERENCES, STARTS

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")  # Okabe-Ito, safe for colour blindness
CURVES = (
    (("loss",), "training loss\n(nats/token)"),
    (("kl",), "KL to teacher\n(nats/token)"),
    (("grad_norm",), "gradient norm"),
    (("lr",), "learning rate"),
    (("flip_rate", "oscillation_rate"), "codes changed\n(share per step)"),
)
LOGARITHMIC = {"grad_norm", "flip_rate", "oscillation_rate"}
HELD_OUT = "val_loss_"

Point = tuple[list[float], list[float]]


def points(metrics: list[dict[str, Any]], key: str) -> Point:
    rows = [row for row in metrics if key in row]
    return [row["step"] for row in rows], [row[key] for row in rows]


def plot_curves(metrics: list[dict[str, Any]], path: Path) -> None:
    """One axes for each quantity that was logged, over optimiser steps; nothing is written when nothing was."""
    logged = {key for row in metrics for key in row}
    held_out = tuple(sorted(k for k in logged if k.startswith(HELD_OUT)))
    wanted = [(tuple(k for k in keys if k in logged), label) for keys, label in CURVES]
    wanted = [(keys, label) for keys, label in [*wanted, (held_out, "held-out loss\n(nats/token)")] if keys]
    if not wanted:
        return
    figure, axes = plt.subplots(len(wanted), 1, figsize=(7, 1.9 * len(wanted)), sharex=True, squeeze=False)
    for axis, (keys, label) in zip(axes[:, 0], wanted, strict=True):
        for key, colour in zip(keys, COLOURS * len(keys), strict=False):
            name = key.removeprefix(HELD_OUT).replace("_", " ")
            marker = {"marker": "o", "markersize": 3} if key in held_out else {}
            axis.plot(*points(metrics, key), color=colour, linewidth=1.2, label=name, **marker)
        if LOGARITHMIC & set(keys) and any(v > 0 for key in keys for v in points(metrics, key)[1]):
            axis.set_yscale("log")
        if len(keys) > 1 or keys == held_out:
            axis.legend(fontsize=7, ncols=3, frameon=False)
        axis.set_ylabel(label, fontsize=8)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("optimiser step")
    figure.align_ylabels()
    finish(figure, path)


def plot_recovery(
    arms: dict[str, dict[str, dict[str, float]]], shares: dict[str, dict[str, dict[str, float]]], path: Path
) -> None:
    """Left: KL to the reference by domain and arm. Right: share of the start's KL removed, with 95 % intervals.

    Args:
        arms: report.json's `arms`: the reference (BF16, or the teacher), the start (PTQ, or the model as it was), and
            what was trained. shares: its `kl_removed_by_domain`.
    """
    reference, start = (next(n for n in arms if n in known) for known in (REFERENCES, STARTS))
    names = [n for n in arms if n != reference]
    domains = list(next(iter(arms.values())))
    figure, (left, right) = plt.subplots(1, 2, figsize=(3 + 1.9 * len(domains), 3.6), width_ratios=(3, 2))
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        offsets = [i + (place - (len(names) - 1) / 2) * width for i in range(len(domains))]
        bars = left.bar(offsets, [arms[name][d]["kl"] for d in domains], width, label=name, color=COLOURS[place])
        left.bar_label(bars, fmt="%.3g", fontsize=7, padding=1)
    left.set_ylabel(f"KL to the {reference} model (nats/token)")
    left.set_title("What was lost, and what training gives back", fontsize=10)
    left.legend(frameon=False)
    for place, (name, found) in enumerate(shares.items()):
        offsets = [i + (place - (len(shares) - 1) / 2) * 0.2 for i in range(len(domains))]
        values = [100 * found[d]["value"] for d in domains]
        below = [max(0.0, v - 100 * found[d]["low"]) for v, d in zip(values, domains, strict=True)]
        above = [max(0.0, 100 * found[d]["high"] - v) for v, d in zip(values, domains, strict=True)]
        colour = COLOURS[names.index(name)]
        right.errorbar(offsets, values, yerr=(below, above), fmt="o", capsize=3, color=colour, label=name)
    right.axhline(0, color="0.5", linewidth=0.8)
    right.set_ylim(top=105)
    right.set_xlim(-0.5, len(domains) - 0.5)
    right.set_ylabel(f"share of {start}'s KL removed (%)")
    right.set_title("95 % bootstrap over rows", fontsize=10)
    for axis in (left, right):
        axis.set_xticks(range(len(domains)), domains)
        axis.spines[["top", "right"]].set_visible(False)
    finish(figure, path)


def finish(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
