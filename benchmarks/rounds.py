"""Tokens/s at batch 1 that two drafters of one target give, verification by the runtime.

    python -m benchmarks.rounds --target DIR --drafter A --other B --report ACCEPTANCE/report.json [--context 512]

A round is drafting and verification; tokens/s = tokens a round over the sum of their times. Tokens a round are the
served ones of an acceptance report that measured both (`draft_training.acceptance ... drafter.other=B`). Times are
medians of replayed CUDA graphs with `--context` tokens of real text before the block:

draft    the drafter's pass or passes, and what it keeps of the block: plain torch, the same for both kinds
verify   the block of K + 1 tokens: by the runtime's kernels, experts packed; and, for comparison, by plain torch

Both drafters are given the same verification, so a cheaper one makes drafting weigh more. Beside that: the first wholly
by the runtime, which has no kernels for the other.
"""

import argparse
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import publish, require_gpu
from benchmarks.engine import files_of, read_prompts
from core.errors import Fp4FlashError
from core.generate.interface import Prompt
from core.models.load import load_model, load_tokenizer
from draft_training.drafters import open_drafter
from draft_training.round_graph import fixed_round, record, replay_ms
from infer.build import build_engine
from infer.cache import Step, group_step
from infer.drafting import Tables
from infer.options import EngineOptions

NAME, DEVICE = "benchmarks.rounds", "cuda"
ARMS = ("drafter", "other drafter")


def tokens_a_round(report: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Served at temperature 0, by arm and domain; `all` is pooled."""
    served = {arm: report["served"][arm]["0"] for arm in ARMS}
    return {arm: {domain: t["tau_pooled"]["value"] for domain, t in table.items()} for arm, table in served.items()}


@torch.no_grad()
def runtime_ms(folder: Path, drafter: Path, ids: list[int], context: int) -> dict[str, float]:
    """Milliseconds of the runtime behind ids[:context]: its forward over the others with the choice of tokens
    ("verify"), and the drafter by its kernels ("draft")."""
    engine = build_engine(
        EngineOptions(folder, drafter, device=DEVICE, rows=1, kv_tokens=2 * len(ids) + 512, prefix_cache=False)
    )
    book, model, cache, block = engine.scheduler.book, engine.runner.model, engine.runner.cache, engine.runner.drafter
    assert block is not None
    table, _ = book.open(ids, reuse=False)
    book.reserve(table, len(ids))

    def step_of(first: int, stop: int) -> Step:
        groups = tuple(group_step([pages], [first], [stop - first], cache.size, model.device) for pages in table.pages)
        piece, place = torch.tensor(ids[first:stop]), torch.arange(first, stop)
        return Step(piece.to(model.device), place.to(model.device), groups, place.to(model.device) - first)

    before, step = step_of(0, context), step_of(context, len(ids))
    block.extend(model.forward(before, cache).features, before.position, before.groups, cache)
    features = model.forward(step, cache).features
    tables = Tables(tuple(g.batch.page_table for g in step.groups), len(ids) + block.block)

    def verify() -> Tensor:
        return model.forward(step, cache).logits.argmax(-1)

    def draft() -> Tensor:
        block.extend(features, step.position, step.groups, cache)
        return block.propose(step.ids[:1], step.position[:1], tables, cache).tokens

    return {"verify": replay_ms(record(verify)[0]), "draft": replay_ms(record(draft)[0])}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    report = json.loads(Path(options.report).read_text())
    tau, folders = tokens_a_round(report), dict(zip(ARMS, (options.drafter, options.other), strict=True))
    tokenizer = load_tokenizer(Path(options.target))
    prompts = [Prompt(str(n), ids) for n, ids in enumerate(read_prompts(files_of(options.prompts), tokenizer, 64, 512))]
    model = load_model(Path(options.target), device=DEVICE).model
    found: dict[str, Any] = {"context": options.context, "draft_ms": {}}
    width = 0
    for arm in ARMS:
        opened = open_drafter(folders[arm], model)
        width = max(width, opened.drafts + 1)
        fixed = fixed_round(model, opened, prompts, options.context)
        assert fixed.draft is not None
        found["draft_ms"][arm] = replay_ms(record(fixed.draft)[0])
        found["verify_ms"] = {"torch": replay_ms(record(fixed.verify)[0])}
        del opened, fixed
    del model
    gc.collect()
    torch.cuda.empty_cache()
    text = [i for p in prompts for i in p.ids][: options.context + width]
    own = runtime_ms(Path(options.target), Path(options.drafter), text, options.context)
    found["verify_ms"]["runtime"], found["runtime_draft_ms"] = own["verify"], own["draft"]
    found["runtime_tokens_s"] = {domain: 1000 * t / sum(own.values()) for domain, t in tau[ARMS[0]].items()}
    found["rows"] = [
        {"verification": how, "domain": domain, "tokens_s": speeds, "ratio": speeds[ARMS[0]] / speeds[ARMS[1]]}
        for how, verify in found["verify_ms"].items()
        for domain in tau[ARMS[0]]
        for speeds in [{arm: 1000 * tau[arm][domain] / (found["draft_ms"][arm] + verify) for arm in ARMS}]
    ]
    return found | {"tau": tau, "drafters": folders}


def show(found: dict[str, Any]) -> None:
    print(f"{found['context']} tokens of context; verification: runtime {found['verify_ms']['runtime']:.3f} ms, "
          f"plain torch {found['verify_ms']['torch']:.3f} ms")  # fmt: skip
    for arm, folder in found["drafters"].items():
        print(f"{arm:14} drafts in plain torch in {found['draft_ms'][arm]:.3f} ms  ({folder})")
    alone = found["runtime_tokens_s"]["all"]
    print(f"wholly by the runtime it drafts in {found['runtime_draft_ms']:.3f} ms: {alone:,.0f} tokens/s")
    print(f"{'verified by':12} {'domain':8} {ARMS[0]:>14} {ARMS[1]:>14}   ratio")
    for row in found["rows"]:
        speeds = " ".join(f"{row['tokens_s'][arm]:14,.0f}" for arm in ARMS)
        print(f"{row['verification']:12} {row['domain']:8} {speeds}   {row['ratio']:.2f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, metavar="DIR", help="the target's folder")
    parser.add_argument("--drafter", required=True, metavar="DIR", help="the report's drafter")
    parser.add_argument("--other", required=True, metavar="DIR", help="the report's other drafter")
    parser.add_argument("--report", required=True, metavar="FILE", help="report.json of draft_training.acceptance")
    parser.add_argument("--context", type=int, default=512, help="tokens before the block")
    parser.add_argument("--prompts", metavar="FILE", help="JSON lines with `messages` or `text`, plain or .gz")
    parser.add_argument("--json", help="also write the result to this file")
    options = parser.parse_args()
    require_gpu(NAME)
    try:
        found = measure(options)
    except (Fp4FlashError, OSError, KeyError) as error:
        print(f"{NAME}: {error}", file=sys.stderr)
        return 2
    show(found)
    publish("rounds", found, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
