"""The report as text: aligned tables, what they mean, and faults with the checks to run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from draft_training.distribution import ALPHA, BIAS, Distribution
from draft_training.estimators import INCONCLUSIVE, RECALL, Figures
from draft_training.latency import Latency

if TYPE_CHECKING:
    from draft_training.acceptance_report import Comparison, Summary, Table

POOLED = "all"
DEFINITIONS = """A round is one draft and one verification; tokens a round (tau) = accepted drafts + 1, the bonus token
included. The last round is cut to the tokens emitted; the first token of a reply comes from reading the prompt and
belongs to no round. tau pooled = all tokens committed / all rounds; tau per request = mean over requests of the
request's own mean. Positions behind a cut count as not accepted among all rounds, and not at all where those before
them are asked for. Intervals: 95 %, bootstrap over prompts within domains."""
CONFORMANCE = (
    "1 context < anchor, 2 slot k is anchor + k, 3 taps, 5 anchor embedding at slot 0, 7 theta and rotary, "
    "9 window at W - 1, W, W + 1, 11 prefill features = incremental features"
)


def report_text(done: Summary) -> str:
    parts = [setup_text(done.setup), DEFINITIONS]
    if not done.conclusive:
        parts.append(f"{INCONCLUSIVE}: there is no round; raise sampling.max_new_tokens or choose other prompts")
    parts += [tau_text(name, done) for name in done.served]
    parts += [position_text(done), context_text(done), recall_text(done), sweep_text(done)]
    parts += [comparison_text(c) for c in done.comparisons]
    parts += [controls_text(done), latency_text(done.latency), distribution_text(done.distribution)]
    return "\n\n".join(p for p in parts if p)


def setup_text(setup: dict[str, Any]) -> str:
    target, drafter = setup["target"], setup["drafter"]
    known = {True: "this target's", False: "ANOTHER target's than this", None: "names no target"}
    facts = ", ".join(
        f"{k} {drafter[k]}" for k in ("kind", "K", "B", "window", "causal", "taps", "dtype") if k in drafter
    )
    template = setup["template_hash"][:12] if setup["template_hash"] else "none"
    temperatures = ", ".join(f"{t:g}" for t in setup["temperatures"])
    return (
        f"target   {target['folder']} ({target['model_type']}, {target['dtype']}, stored quantisation "
        f"{target['stored_quantisation']}, fingerprint {target['fingerprint'][:12]}, KV {setup['kv_dtype']}, "
        f"{setup['device']})\n"
        f"drafter  {drafter['folder']} ({facts}; {known[drafter['made_for_this_target']]})\n"
        f"decoding temperature {temperatures}; top_p {setup['top_p']:g}, top_k {setup['top_k']}, at most "
        f"{setup['max_new_tokens']} new tokens, seed {setup['seed']}\n"
        f"prompts  {setup['prompts']}, hash {setup['prompt_hash'][:12]}; chat template {template}; the target never "
        f"ended {setup['replies_cut']} of its replies: they are cut"
    )


def tau_text(name: str, done: Summary) -> str:
    """One arm: tau of every domain served and teacher-forced, and the gap between them."""
    rows = {f"served, temperature {t:g}": table for t, table in done.served[name].items()}
    if name in done.forced:
        rows["teacher-forced, greedy text"] = done.forced[name]
    lines = [
        f"{name + ':':30}{'domain':12}{'prompts':>8}{'rounds':>9}{'cut':>6}  {'tau pooled':24}{'tau per request':24}"
    ]
    for title, table in rows.items():
        for place, (domain, f) in enumerate(table.items()):
            lines.append(
                f"{title if place == 0 else '':30}{domain:12}{f.prompts:>8,}{f.rounds:>9,}{f.cut:>6,}  "
                f"{f.tau_pooled!s:24}{f.tau_request!s:24}"
            )
    if name not in done.forced:
        lines.append("teacher-forced: this kind of drafter cannot be replayed")
    return "\n".join([*lines, *gap_lines(name, done)])


def gap_lines(name: str, done: Summary) -> list[str]:
    lines = []
    if name in done.gap:
        whole = done.gap[name].by_domain[POOLED]
        lines.append(
            f"served - teacher-forced: {whole.tau_pooled}; {whole.equal} of {whole.requests} requests have the same "
            "rounds one by one"
        )
        faulty = [d for d, x in done.gap[name].by_domain.items() if x.fault]
        if faulty:
            lines.append(
                f"FAULT ({', '.join(faulty)}): the gap lies outside its interval, so engine and replay draft "
                f"differently; run the conformance checks {CONFORMANCE}"
            )
    same = done.same.get(name)
    if same:
        apart = "".join(f"; {i} parts at token {n}" for i, n in same.first[:3])
        lines.append(f"served greedy text = plain greedy text: {same.equal} of {same.total} replies{apart}")
    return lines


def position_text(done: Summary) -> str:
    """Acceptance by position, of the first served log and of the teacher-forced one, all domains."""
    tables = {f"served, temperature {t:g}": x for t, x in done.served["drafter"].items()}
    if "drafter" in done.forced:
        tables["teacher-forced"] = done.forced["drafter"]
    blocks = []
    for title, table in tables.items():
        f = table[POOLED]
        if not f.rounds:
            continue
        lines = [f"{'acceptance, ' + title:42}{'of all rounds':24}{'where those before it were':24}"]
        for k, (plain, given) in enumerate(zip(f.position, f.conditional, strict=True), 1):
            lines.append(f"{'position ' + str(k):42}{plain!s:24}{given if given.value == given.value else '-'}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def first_table(done: Summary) -> Table:
    return next(iter(done.served["drafter"].values()))


def context_text(done: Summary) -> str:
    f = first_table(done)[POOLED]
    lines = [f"{a:>7,} to {b:<8,}{n:>9,} rounds   tau {e}" for a, b, n, e in f.context]
    return "\n".join(["tokens before the anchor (served):", *lines]) if lines else ""


def recall_text(done: Summary) -> str:
    """Recall@k by slot: not among the candidates, or not chosen."""
    if "drafter" not in done.forced or not done.forced["drafter"][POOLED].recall:
        return ""
    head = f"{'text token among the k best (teacher-forced)':46}" + "".join(f"{'k=' + str(k):>9}" for k in RECALL)
    lines = [
        f"{'slot ' + str(slot):46}" + "".join(f"{e.value:>9.3f}" for e in found)
        for slot, found in enumerate(done.forced["drafter"][POOLED].recall, 1)
    ]
    return "\n".join([head, *lines])


def sweep_text(done: Summary) -> str:
    if not done.sweep:
        return ""
    lines = ["the same weights with another window:"]
    for window, tables in done.sweep.items():
        for kind, table in tables.items():
            cells = "  ".join(f"{d} {f.tau_pooled}" for d, f in table.items())
            lines.append(f"  W={window:<7}{kind:16}tau pooled: {cells}")
        change = done.sweep_change.get(window)
        if change:
            lines.append(
                f"  {'':9}less the folder's own window: {change.by_domain[POOLED].tau_pooled}, teacher-forced, paired"
            )
    return "\n".join(lines)


def comparison_text(c: Comparison) -> str:
    lines = [f"{c.title} (paired by prompt):"]
    for domain, x in c.by_domain.items():
        word = "" if not x.fault else "   differs"
        lines.append(f"  {domain:12}tau pooled {x.tau_pooled!s:26}mean of a prompt's difference {x.tau_request}{word}")
    return "\n".join(lines)


def controls_text(done: Summary) -> str:
    lines = [control_line(name, f) for name, f in done.controls.items()]
    return "\n".join(["controls, served greedily:", *lines]) if lines else ""


def control_line(name: str, f: Figures) -> str:
    return f"  {name:18}tau pooled {f.tau_pooled}, {f.rounds:,} rounds, {f.cut} cut"


def latency_text(found: dict[str, Latency | None]) -> str:
    if not found:
        return ""
    lines = ["a round at batch 1, plain torch:"]
    plain = found.get("plain")
    for name, x in found.items():
        if x is None:
            lines.append(f"  {name:16}{INCONCLUSIVE}: no round")
            continue
        ratio = f", {x.tokens_s / plain.tokens_s:.2f}x plain decoding" if plain and name != "plain" else ""
        lines.append(
            f"  {name:16}draft {x.draft_ms:.2f} ms, verify {x.verify_ms:.2f} ms, rest {x.rest_ms:.2f} ms; "
            f"{x.tokens_s:,.1f} tokens/s{ratio} ({x.rounds:,} rounds)"
        )
    return "\n".join(lines + graphed_lines(found))


def graphed_lines(found: dict[str, Latency | None]) -> list[str]:
    """The same rounds recorded; tokens/s is the served tokens a round over the two times."""
    timed = {name: x for name, x in found.items() if x is not None}
    if not any(x.graphed for x in timed.values()):
        reasons = sorted({x.not_graphed for x in timed.values()} - {"not asked for", ""})
        return [f"  as CUDA graphs: not measured ({'; '.join(reasons)})"] if reasons else []
    lines = ["a round at batch 1, drafting and verification as CUDA graphs:"]
    plain = timed["plain"].graphed_tokens_s if "plain" in timed else None
    for name, x in timed.items():
        if x.graphed is None:
            lines.append(f"  {name:16}not measured ({x.not_graphed})")
            continue
        rate = x.graphed.tokens_s(x.tokens_a_round)
        ratio = f", {rate / plain:.2f}x plain decoding" if plain and name != "plain" else ""
        lines.append(
            f"  {name:16}draft {x.graphed.draft_ms:.3f} ms, verify {x.graphed.verify_ms:.3f} ms after "
            f"{x.graphed.context} tokens; {rate:,.0f} tokens/s at {x.tokens_a_round:.2f} tokens a round{ratio}"
        )
    return lines


def distribution_text(found: Distribution | None) -> str:
    if found is None:
        return ""
    samples = sum(t.samples for t in found.tests if t.token == "first")
    power = "rejected, as it must be" if found.biased_p < ALPHA else "NOT found out: too few samples to say anything"
    return (
        f"distribution at temperature > 0: {found.verdict}. {len(found.tests)} G-tests, {samples:,} samples, smallest "
        f"Holm-corrected p {found.p:.3g} (limit {ALPHA:g});\n  a verifier accepting {BIAS:g} times too often: p "
        f"{found.biased_p:.3g}, {power};\n  verification's logits lie within {found.total_variation:.2g} (total "
        "variation) of a packed forward's"
    )
