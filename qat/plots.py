"""PNG plots of a run: training curves, and recovery by domain."""

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")  # Okabe-Ito, safe for colour blindness
CURVES = (("loss", "loss"), ("kl", "KL to BF16 (nats/token)"), ("grad_norm", "gradient norm"), ("lr", "learning rate"), ("flip_rate", "flips"))


def plot_curves(metrics: list[dict[str, Any]], path: Path) -> None:
    """One axes for each quantity that was logged, over optimiser steps."""
    wanted = [(k, label) for k, label in CURVES if any(k in row for row in metrics)]
    held_out = sorted({k for row in metrics for k in row if k.startswith("val_loss_")})
    count = len(wanted) + bool(held_out)
    if not count:
        return
    figure, axes = plt.subplots(count, 1, figsize=(7, 2.1 * count), sharex=True, squeeze=False)
    for axis, (key, label) in zip(axes[:, 0], wanted, strict=False):
        points = [(row["step"], row[key]) for row in metrics if key in row]
        axis.plot(*zip(*points, strict=True), color=COLOURS[0], linewidth=1.2)
        axis.set_ylabel(label)
        if key == "grad_norm":
            axis.set_yscale("log")
    for key, colour in zip(held_out, COLOURS * 3, strict=False):
        points = [(row["step"], row[key]) for row in metrics if key in row]
        axes[-1, 0].plot(*zip(*points, strict=True), marker="o", markersize=3, label=key.removeprefix("val_loss_"), color=colour)
    if held_out:
        axes[-1, 0].set_ylabel("held-out loss")
        axes[-1, 0].legend(fontsize=8, ncols=3)
    for axis in axes[:, 0]:
        axis.grid(alpha=0.3)
    axes[-1, 0].set_xlabel("optimiser step")
    finish(figure, path)


def plot_recovery(arms: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    """KL to the BF16 model by domain, a bar for each arm."""
    names = [n for n in arms if n != "BF16"]
    domains = list(next(iter(arms.values())))
    figure, axis = plt.subplots(figsize=(1.6 + 1.1 * len(domains), 3.4))
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        offsets = [i + (place - (len(names) - 1) / 2) * width for i in range(len(domains))]
        bars = axis.bar(offsets, [arms[name][d]["kl"] for d in domains], width, label=name, color=COLOURS[place])
        axis.bar_label(bars, fmt="%.3f", fontsize=7, padding=1)
    axis.set_xticks(range(len(domains)), domains)
    axis.set_ylabel("KL to the BF16 model (nats/token)")
    axis.set_title("What quantisation costs, and what training gives back", fontsize=10)
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    finish(figure, path)


def finish(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
