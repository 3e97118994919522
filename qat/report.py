"""The numbers of a run: a table on the terminal, report.md, report.json and plots.

Headline: the share of PTQ's KL that QAT removes, 1 - KL(QAT) / KL(PTQ), where each KL is the mean over domains of the
mean over tokens. Its 95 % interval resamples the rows of every domain with replacement, the same rows for both arms.
Without quantisation the same table has other arms: a run with another model for a teacher shows `teacher`, `start` and
`trained`, and the share of the start's KL to the teacher that training removed.
Loss alone misleads: training on in-domain text lowers it below the BF16 model's while the model drifts away from it.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from core.run import Run, write_json
from qat.config import EvalConfig
from qat.evaluate import REFERENCES, STARTS, Arm
from qat.plots import plot_curves, plot_recovery
from qat.select import Selection

SCHEMA = 1


@dataclass(frozen=True)
class Share:
    """Share of PTQ's KL removed, with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}]"


def mean_kl(arm: Arm) -> float:
    """Mean over domains of KL per token."""
    return sum(float(rows.kl.sum() / rows.tokens.sum()) for rows in arm.values()) / len(arm)


def removed(ptq: Arm, arm: Arm, draws: int, seed: int = 0) -> Share:
    """1 - KL(arm) / KL(PTQ) with a paired bootstrap over rows within domains; NaN where PTQ costs nothing."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.zeros(2, max(draws, 0), dtype=torch.float64)
    for domain, rows in ptq.items():
        pick = torch.randint(len(rows.tokens), (max(draws, 0), len(rows.tokens)), generator=generator)
        tokens = rows.tokens[pick].sum(1)
        means += torch.stack([one[domain].kl[pick].sum(1) / tokens for one in (ptq, arm)])
    ratios = (1 - means[1] / means[0]).sort().values
    low, high = (float(ratios[int(q * (len(ratios) - 1))]) if len(ratios) else math.nan for q in (0.025, 0.975))
    base = mean_kl(ptq)
    return Share(1 - mean_kl(arm) / base if base > 0 else math.nan, low, high)


def removed_by_domain(ptq: Arm, arm: Arm, draws: int) -> dict[str, Share]:
    return {d: removed({d: ptq[d]}, {d: arm[d]}, draws) for d in ptq}


def summarise(arm: Arm) -> dict[str, dict[str, float]]:
    """Per domain: loss, perplexity, KL, argmax agreement, tokens."""
    found = {}
    for domain, r in arm.items():
        tokens = float(r.tokens.sum())
        loss = float(r.ce.sum()) / tokens
        found[domain] = {
            "loss": loss, "perplexity": math.exp(min(loss, 50)), "kl": float(r.kl.sum()) / tokens,
            "agreement": float(r.agree.sum()) / tokens, "tokens": tokens,
        }  # fmt: skip
    return found


def recovery_table(arms: dict[str, Arm], shares: dict[str, Share]) -> str:
    """Aligned text: loss and KL of every arm by domain, then the headline."""
    names = list(arms)
    others = [n for n in names if n not in REFERENCES]
    head = f"{'domain':14}" + "".join(f"{'loss ' + n:>13}" for n in names) + "".join(f"{'KL ' + n:>12}" for n in others)
    lines = [head]
    tables = {n: summarise(a) for n, a in arms.items()}
    domains = list(next(iter(tables.values())))
    for domain in domains:
        loss = "".join(f"{tables[n][domain]['loss']:>13.4f}" for n in names)
        lines.append(f"{domain:14}{loss}" + "".join(f"{tables[n][domain]['kl']:>12.5f}" for n in others))
    mean = {n: sum(t[d]["loss"] for d in domains) / len(domains) for n, t in tables.items()}
    kls = {n: mean_kl(arms[n]) for n in others}
    lines.append(
        f"{'mean':14}" + "".join(f"{mean[n]:>13.4f}" for n in names) + "".join(f"{kls[n]:>12.5f}" for n in others)
    )
    reference, start = (next((n for n in names if n in known), None) for known in (REFERENCES, STARTS))
    lines += [
        f"\n{name} removes {share} of {start}'s KL to the {reference} model (95 % bootstrap over rows)"
        for name, share in shares.items()
    ]
    return "\n".join(lines)


def write_report(
    run: Run, arms: dict[str, Arm], selection: Selection, config: EvalConfig, extra: dict[str, Any] | None = None
) -> str:
    """Write report.json, report.md and the plots; returns what to print."""
    extra = extra or {}
    start = next((a for n, a in arms.items() if n in STARTS), None)
    trained = {n: a for n, a in arms.items() if n not in REFERENCES + STARTS}
    shares = {n: removed(start, a, config.bootstrap) for n, a in trained.items()} if start else {}
    table = recovery_table(arms, shares)
    domains = {n: removed_by_domain(start, arms[n], config.bootstrap) for n in shares} if start else {}
    metrics = run.metrics()
    rates = {k: next((r[k] for r in reversed(metrics) if k in r), None) for k in ("flip_rate", "oscillation_rate")}
    value = {
        "schema": SCHEMA,
        "arms": {n: summarise(a) for n, a in arms.items()},
        "kl_removed": {n: asdict(s) for n, s in shares.items()},
        "kl_removed_by_domain": {n: {d: asdict(s) for d, s in found.items()} for n, found in domains.items()},
        "selection": selection.as_json()["coverage"],
        "last_step": rates,
        **extra,
    }
    write_json(run.folder / "report.json", value)
    notes = quant_notes(rates, extra)
    text = f"{table}\n\n{notes}" if notes else table
    (run.folder / "report.md").write_text(f"# {run.folder.name}\n\n```\n{text}\n\n{selection.table()}\n```\n")
    plot_curves(metrics, run.folder / "curves.png")
    if shares:
        plot_recovery(value["arms"], value["kl_removed_by_domain"], run.folder / "recovery.png")
    return f"\n{text}\n\nWritten: {run.folder} ({written(run.folder)})"


def quant_notes(rates: dict[str, Any], extra: dict[str, Any]) -> str:
    """Flip, oscillation and clip rates, and the starved experts by name."""
    lines = []
    quant = extra.get("quant", {})
    parts = [
        f"{k.replace('_', ' ')} {v:.3%}"
        for k, v in {**rates, "clip_rate": quant.get("clip_rate")}.items()
        if v is not None
    ]
    if parts:
        lines.append("Codes at the last step: " + ", ".join(parts))
    starved = quant.get("starved")
    if starved is not None:
        lines.append(
            f"Starved experts (under 1 % of uniform routing): {len(starved) or 'none'}"
            + "".join(f"\n  {s}" for s in starved[:8])
        )
    for task in extra.get("tasks", []):
        interval = f"[{task['low']:.1%}, {task['high']:.1%}]"
        lines.append(f"{task['arm']} {task['task']}: {task['accuracy']:.1%} {interval} of {task['count']}")
    return "\n".join(lines)


def written(folder: Path) -> str:
    """What a reader of the run folder would open, as it is there."""
    names = ("model", "model-ema", "report.md", "report.json", "curves.png", "recovery.png", "metrics.jsonl")
    return ", ".join(f"{n}/" if (folder / n).is_dir() else n for n in names if (folder / n).exists())
