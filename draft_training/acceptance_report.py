"""The acceptance report: a table on the terminal, report.md, report.json, plots. All of it follows from round logs."""

from dataclasses import asdict, dataclass, field
from typing import Any

from core.run import Run, write_json
from draft_training.acceptance_plots import plot_all
from draft_training.acceptance_text import report_text
from draft_training.distribution import Distribution
from draft_training.estimators import Bootstrap, Difference, Figures, Rounds, difference, figures
from draft_training.latency import Latency
from draft_training.measure import Same

SCHEMA = 1
POOLED = "all"


@dataclass
class Arm:
    """A drafter on a target: logs served by temperature, the teacher-forced log on the target's greedy text (None: not
    replayable), and how much served greedy text equals plain greedy text."""

    drafter: str
    facts: dict[str, Any]
    made_for_this: bool | None
    served: dict[float, Rounds] = field(default_factory=dict)
    forced: Rounds | None = None
    same: Same | None = None


@dataclass
class Found:
    """Everything measured; `arms` begins with `drafter`."""

    boot: Bootstrap
    setup: dict[str, Any]
    arms: dict[str, Arm] = field(default_factory=dict)
    sweep: dict[int, Arm] = field(default_factory=dict)
    controls: dict[str, Rounds] = field(default_factory=dict)
    latency: dict[str, Latency | None] = field(default_factory=dict)
    distribution: Distribution | None = None
    first_text_on_other: Rounds | None = None


Table = dict[str, Figures]  # by domain, `all` last


@dataclass(frozen=True)
class Comparison:
    """By domain and for `all`: paired differences second - first."""

    title: str
    by_domain: dict[str, Difference]


@dataclass
class Summary:
    """Figures of every log. served and forced: by arm; gap: served - teacher-forced of each arm that has both."""

    setup: dict[str, Any]
    served: dict[str, dict[float, Table]] = field(default_factory=dict)
    forced: dict[str, Table] = field(default_factory=dict)
    same: dict[str, Same] = field(default_factory=dict)
    gap: dict[str, Comparison] = field(default_factory=dict)
    sweep: dict[int, dict[str, Table]] = field(default_factory=dict)
    sweep_change: dict[int, Comparison] = field(default_factory=dict)
    comparisons: list[Comparison] = field(default_factory=list)
    controls: dict[str, Figures] = field(default_factory=dict)
    latency: dict[str, Latency | None] = field(default_factory=dict)
    distribution: Distribution | None = None

    @property
    def conclusive(self) -> bool:
        tables = [*self.served["drafter"].values(), *([self.forced["drafter"]] if "drafter" in self.forced else [])]
        return any(t[POOLED].conclusive for t in tables)


def summarise(found: Found) -> Summary:
    boot = found.boot
    done = Summary(found.setup, latency=found.latency, distribution=found.distribution)
    for name, arm in found.arms.items():
        done.served[name] = {t: table(log, boot) for t, log in arm.served.items()}
        if arm.forced is not None:
            done.forced[name] = table(arm.forced, boot, ranks=True)
        if arm.same is not None:
            done.same[name] = arm.same
        if arm.forced is not None and 0.0 in arm.served:
            done.gap[name] = compare(f"{name}: served - teacher-forced", arm.served[0.0], arm.forced, boot)
    for window, arm in found.sweep.items():
        done.sweep[window] = {"served": table(arm.served[0.0], boot)} if 0.0 in arm.served else {}
        if arm.forced is not None:
            done.sweep[window]["teacher-forced"] = table(arm.forced, boot)
            own = found.arms["drafter"].forced
            assert own is not None, "the same kind of drafter"
            done.sweep_change[window] = compare(f"window {window} - the folder's", arm.forced, own, boot)
    done.comparisons = list(comparisons(found))
    for name, log in found.controls.items():
        some = Bootstrap(boot.domains[: len(log)], len(boot.weight))
        done.controls[name] = figures(log, some, None)
    return done


def table(log: Rounds, boot: Bootstrap, ranks: bool = False) -> Table:
    domains = list(dict.fromkeys(boot.domains))
    return {d: figures(log, boot, d, ranks) for d in domains} | {POOLED: figures(log, boot, None, ranks)}


def compare(title: str, second: Rounds, first: Rounds, boot: Bootstrap) -> Comparison:
    domains = list(dict.fromkeys(boot.domains))
    found = {d: difference(second, first, boot, d) for d in domains}
    return Comparison(title, found | {POOLED: difference(second, first, boot)})


def comparisons(found: Found) -> list[Comparison]:
    """The other drafter and the other target against the first, as far as both were measured."""
    first, boot, done = found.arms["drafter"], found.boot, []
    for name in ("other drafter", "other target"):
        other = found.arms.get(name)
        if other is None:
            continue
        where = "the same text" if name == "other drafter" else "each on its own text"
        if 0.0 in first.served and 0.0 in other.served:
            done.append(compare(f"{name} - first, served, {where}", other.served[0.0], first.served[0.0], boot))
        if first.forced is not None and other.forced is not None:
            done.append(compare(f"{name} - first, teacher-forced, {where}", other.forced, first.forced, boot))
    if found.first_text_on_other is not None and first.forced is not None:
        title = "other target - first, teacher-forced, both on the first one's text"
        done.append(compare(title, found.first_text_on_other, first.forced, boot))
    return done


def write_report(run: Run, found: Found) -> str:
    """Write report.json, report.md and the plots; returns what to print."""
    done = summarise(found)
    write_json(run.folder / "report.json", as_json(done))
    text = report_text(done)
    (run.folder / "report.md").write_text(f"# {run.folder.name}\n\n```\n{text}\n```\n")
    plot_all(done, run.folder)
    names = sorted(p.name for p in run.folder.iterdir() if p.suffix in {".md", ".json", ".png", ".jsonl"})
    return f"\n{text}\n\nWritten: {run.folder} ({', '.join(names)})"


def as_json(done: Summary) -> dict[str, Any]:
    """report.json: estimates are {value, low, high}, null where nothing was counted."""
    return {
        "schema": SCHEMA,
        "conclusive": done.conclusive,
        "bonus_token_included": True,
        "last_round": "cut to the tokens emitted",
        "prefill_token": "belongs to no round",
        "interval": "95 %, bootstrap over prompts within domains",
        "setup": done.setup,
        "served": {a: {f"{t:g}": tables(x) for t, x in found.items()} for a, found in done.served.items()},
        "teacher_forced": {a: tables(x) for a, x in done.forced.items()},
        "same_text": {a: asdict(s) for a, s in done.same.items()},
        "served_minus_teacher_forced": {a: comparison_json(c) for a, c in done.gap.items()},
        "window_sweep": {str(w): {k: tables(x) for k, x in found.items()} for w, found in done.sweep.items()},
        "window_sweep_change": {str(w): comparison_json(c) for w, c in done.sweep_change.items()},
        "comparisons": [comparison_json(c) for c in done.comparisons],
        "controls": {n: figures_json(f) for n, f in done.controls.items()},
        "latency": {
            n: asdict(x) | {"graphed_tokens_s": x.graphed_tokens_s} if x else None for n, x in done.latency.items()
        },
        "distribution": distribution_json(done.distribution),
    }


def tables(found: Table) -> dict[str, Any]:
    return {d: figures_json(f) for d, f in found.items()}


def figures_json(f: Figures) -> dict[str, Any]:
    return {
        "prompts": f.prompts, "rounds": f.rounds, "committed": f.committed, "cut_rounds": f.cut,
        "state": "measured" if f.conclusive else "inconclusive",
        "tau_pooled": f.tau_pooled.as_json(), "tau_request": f.tau_request.as_json(),
        "position_unconditional": [e.as_json() for e in f.position],
        "position_conditional": [e.as_json() for e in f.conditional],
        "context": [{"from": a, "below": b, "rounds": n, "tau": e.as_json()} for a, b, n, e in f.context],
        "recall": [[e.as_json() for e in slot] for slot in f.recall],
    }  # fmt: skip


def comparison_json(c: Comparison) -> dict[str, Any]:
    return {
        "title": c.title,
        "by_domain": {
            d: {
                "tau_pooled": x.tau_pooled.as_json(), "tau_request": x.tau_request.as_json(),
                "equal_requests": x.equal, "requests": x.requests,
            }
            for d, x in c.by_domain.items()
        },
    }  # fmt: skip


def distribution_json(found: Distribution | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return asdict(found) | {"p": found.p, "biased_p": found.biased_p, "verdict": found.verdict}
